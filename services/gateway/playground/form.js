// What is asked: the form's fields, what they come to, and what is wrong with them, said beside them.

import { el, find } from "./dom.js";
import { METHODS } from "./kinds.js";
import { read } from "./picture.js";

const OPTIONS = ["alpha", "beta", "object_layer", "buffer", "text_budget"]; // of `pruning`, where they are set
const NUMBERS = new Set(["alpha", "beta", "object_layer", "max_completion_tokens", "temperature"]);
const MOST_CELLS = 30;
const FIELDS = { file: "picture", compared: "compared-methods" }; // of inputs that are not named as their field

/** What is wrong with one field. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

export class Form {
  /** `changed` is called with a new picture; `asked` when an answer is wanted. */
  constructor({ changed, asked, cancelled }) {
    this.changed = changed;
    this.picture = null;
    this.chosen = 0; // how many pictures were: what comes of an earlier one comes too late
    this.samples = [];
    this.maxBytes = Infinity;
    this.form = find("ask");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      asked();
    });
    find("cancel").addEventListener("click", cancelled);
    addEventListener("keydown", (event) => event.key === "Escape" && cancelled());
    this.#methods();
    this.#keep();
    this.#picture();
    find("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    for (const radio of this.form.elements.mode) radio.addEventListener("change", () => this.#mode());
    this.form.addEventListener("input", (event) => this.#clear(event.target.id === "keep-slider" ? "keep" : event.target.name || event.target.id));
    this.#mode();
  }

  get comparing() {
    return this.form.elements.mode.value === "compare";
  }

  get method() {
    return this.form.elements.method.value;
  }

  get key() {
    return find("key").value.trim();
  }

  get wantsUnpruned() {
    return find("unpruned").checked;
  }

  /** Methods by retentions, to compare. Throws FieldError. */
  get cells() {
    const methods = [...this.form.querySelectorAll("[name=compared]:checked")].map((box) => box.value);
    const keeps = [...new Set(find("keeps").value.split(",").map((each) => each.trim()).filter(Boolean))];
    if (!methods.length) throw new FieldError("compared-methods", "Choose one at least.");
    if (!keeps.length) throw new FieldError("keeps", "Say how much to keep: a share such as 1/3, or a count.");
    if (methods.length * keeps.length > MOST_CELLS) throw new FieldError("keeps", `These are ${methods.length * keeps.length} answers, at most ${MOST_CELLS} at a time.`);
    return { methods, keeps };
  }

  /** The request's body for a method and a retention. Throws FieldError. */
  body(method, keep) {
    if (!this.picture) throw new FieldError("picture", "Choose a picture.");
    const question = find("question").value.trim();
    if (!question) throw new FieldError("question", "Write a question.");
    if (!find("model").value) throw new FieldError("model", "No model is known to be served.");
    const pruning = { method, report: true, scores: true };
    if (method !== "none") {
      if (!keep) throw new FieldError("keep", "Say how much to keep: a share such as 1/3, or a count.");
      pruning.keep = keep;
      for (const name of OPTIONS) this.#put(pruning, name);
    }
    const parts = [{ type: "image_url", image_url: { url: this.picture.url } }, { type: "text", text: question }];
    const body = { model: find("model").value, messages: [{ role: "user", content: parts }], pruning };
    for (const name of ["max_completion_tokens", "temperature"]) this.#put(body, name);
    return body;
  }

  get keep() {
    return find("keep").value.trim();
  }

  #put(target, name) {
    const field = find(name);
    if (field.validity.badInput) throw new FieldError(name, "Is no number.");
    if (field.value !== "") target[name] = NUMBERS.has(name) ? Number(field.value) : field.value;
  }

  /** What may be chosen. */
  offer(models) {
    const chosen = find("model").value;
    find("model").replaceChildren(...models.map((model) => el("option", { value: model.id }, model.id)));
    if (models.some((model) => model.id === chosen)) find("model").value = chosen;
  }

  /** Offers sample pictures, and takes the first if none is chosen. */
  async offerSamples({ samples, max_image_bytes: maxBytes }) {
    this.maxBytes = maxBytes;
    const strip = find("samples");
    strip.hidden = !samples.length;
    strip.replaceChildren(...samples.map((sample) => {
      const button = el("button", { type: "button", "aria-pressed": "false", "aria-label": sample.name, on: { click: () => this.#sample(sample) } }, el("img", { src: sample.url, alt: "", width: 48, height: 48 }));
      sample.button = button;
      return button;
    }));
    this.samples = samples;
    if (samples.length && !this.chosen) await this.#sample(samples[0]);
  }

  async #sample(sample) {
    const chosen = (this.chosen += 1);
    try {
      const answer = await fetch(sample.url);
      if (!answer.ok) throw new Error("This sample is not there any more.");
      const blob = await answer.blob();
      if (chosen === this.chosen) await this.#take(blob, sample.name, sample);
    } catch (error) {
      if (chosen === this.chosen) this.refuse(new FieldError("picture", error.message));
    }
  }

  async #take(blob, name, sample = null) {
    const chosen = (this.chosen += 1);
    let picture;
    try {
      picture = await read(blob, name, this.maxBytes);
    } catch (error) {
      return chosen === this.chosen && this.refuse(new FieldError("picture", error.message));
    }
    if (chosen !== this.chosen) return null;
    this.picture = picture;
    this.#clear("picture");
    const preview = find("preview");
    preview.src = this.picture.url;
    preview.hidden = false;
    find("picture-name").textContent = `${name}, ${this.picture.width} × ${this.picture.height}`;
    for (const each of this.samples) each.button.setAttribute("aria-pressed", String(each === sample));
    const questions = sample?.questions ?? [];
    find("suggestions").hidden = !questions.length;
    find("suggestions").replaceChildren(...questions.slice(0, 6).map((words) => el("button", { type: "button", on: { click: () => this.#question(words) } }, words)));
    const field = find("question");
    if (questions.length && (!field.value || field.value === this.suggested)) this.#question(questions[0]);
    return this.changed(this.picture);
  }

  #question(words) {
    this.suggested = words;
    find("question").value = words;
    this.#clear("question");
  }

  #picture() {
    const drop = find("drop");
    const file = find("file");
    file.addEventListener("change", () => file.files[0] && this.#take(file.files[0], file.files[0].name));
    addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    for (const end of ["dragleave", "drop"]) addEventListener(end, () => drop.classList.remove("over"));
    const take = (data) => {
      const found = [...(data?.files ?? [])][0];
      if (found) this.#take(found, found.name || "picture");
      return Boolean(found);
    };
    addEventListener("drop", (event) => {
      event.preventDefault();
      if (!take(event.dataTransfer)) this.refuse(new FieldError("picture", "That was no file."));
    });
    addEventListener("paste", (event) => take(event.clipboardData) && event.preventDefault());
  }

  #methods() {
    const hint = find("method-hint");
    const pill = (name, type, method, checked) => {
      const input = el("input", { type, name, value: method, "aria-describedby": `${FIELDS[name] ?? name}-error` });
      input.checked = checked;
      return el("label", {}, input, el("span", {}, method));
    };
    find("methods").replaceChildren(...Object.keys(METHODS).map((method) => pill("method", "radio", method, method === "hiprune++")));
    const tell = () => {
      hint.textContent = METHODS[this.method];
      for (const field of [find("keep"), find("keep-slider")]) field.disabled = this.method === "none";
    };
    find("methods").addEventListener("change", tell);
    tell();
    const compared = Object.keys(METHODS).filter((method) => method !== "none");
    find("compared-methods").replaceChildren(...compared.map((method) => pill("compared", "checkbox", method, !["strided", "visionzip", "divprune"].includes(method))));
  }

  #keep() {
    const slider = find("keep-slider");
    const field = find("keep");
    slider.addEventListener("input", () => {
      field.value = `${slider.value}%`;
    });
    field.addEventListener("input", () => {
      const [, above, below, sign] = /^\s*([\d.]+)(?:\s*\/\s*([\d.]+)|\s*(%))?\s*$/.exec(field.value) ?? [];
      const share = below ? above / below : sign ? above / 100 : above <= 1 ? Number(above) : NaN;
      if (share > 0 && share <= 1) slider.value = Math.round(share * 100);
    });
  }

  #mode() {
    find("one").hidden = this.comparing;
    find("many").hidden = !this.comparing;
    find("submit").textContent = this.comparing ? "Compare" : "Ask";
  }

  /** Says what is wrong: beside its field, where it has one, which gets the focus; else above the buttons. */
  refuse(error) {
    const field = error.field ?? this.#fieldOf(error);
    const place = find(`${field}-error`);
    place.hidden = false;
    place.textContent = error.message;
    if (field === "form") return;
    if (!place.hasAttribute("role")) place.setAttribute("role", "alert");
    const input = { picture: "file", method: "methods", "compared-methods": "compared-methods" }[field] ?? field;
    const target = find(input).matches("div") ? find(input).querySelector("input") : find(input);
    if (find("more").contains(target)) find("more").open = true;
    target.setAttribute("aria-invalid", "true");
    target.focus();
  }

  #fieldOf({ status, param = "", code }) {
    if (status === 401 || code === "invalid_api_key") return "key";
    if (param.endsWith("image_url.url")) return "picture";
    if (param.startsWith("messages[")) return "question";
    const name = param.replace("pruning.", "").replace(/^max_tokens$/, "max_completion_tokens");
    const field = name === "keep" && this.comparing ? "keeps" : name;
    return find(`${field}-error`) ? field : "form";
  }

  #clear(field) {
    const place = find(`${FIELDS[field] ?? field}-error`);
    find("form-error").hidden = true;
    find("form-wait").hidden = true;
    if (!place) return;
    place.hidden = true;
    for (const input of this.form.querySelectorAll("[aria-invalid]")) if (input.getAttribute("aria-describedby")?.includes(place.id)) input.removeAttribute("aria-invalid");
  }

  /** Takes back all that was said to be wrong. */
  clear() {
    for (const place of this.form.querySelectorAll(".error")) place.hidden = true;
    for (const input of this.form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }
}
