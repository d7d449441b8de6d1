// The picture with its tokens: what is shown of it, and the token that a pointer or the arrow keys are on.

import { drawing, el, find, number } from "./dom.js";
import { SCORES, kindOf, kindsOf } from "./kinds.js";
import { draw, isValid } from "./overlay.js";

/** In CSS pixels, at most: so that the picture and the answer above it fit a window together. */
const height = () => Math.max(300, Math.min(620, innerHeight - 300));

export class Stage {
  constructor() {
    this.picture = null;
    this.pruned = null;
    this.layer = "kept";
    this.number = 0;
    this.hidden = new Set();
    this.cursor = null;
    this.frame = find("canvas");
    this.canvas = find("overlay");
    this.view = find("view");
    this.view.addEventListener("change", () => this.#turnTo(Number(this.view.value)));
    this.frame.addEventListener("pointermove", (event) => this.#point(event));
    this.frame.addEventListener("pointerdown", (event) => this.#point(event));
    this.frame.addEventListener("pointerleave", () => document.activeElement === this.frame || this.#move(null));
    this.frame.addEventListener("keydown", (event) => this.#press(event));
    this.frame.addEventListener("blur", () => this.#move(null));
    new ResizeObserver(() => this.draw()).observe(this.frame.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Shows a picture, and what was pruned of it: the image's report, or null. */
  show(picture, pruned, note) {
    const same = this.pruned && pruned && this.pruned.views.length === pruned.views.length && this.picture === picture;
    Object.assign(this, { picture, pruned, cursor: null });
    if (!same) this.number = 0;
    find("kept-note").textContent = note;
    const views = pruned?.views ?? [];
    find("view-field").hidden = views.length < 2;
    this.view.replaceChildren(...views.map((_, place) => el("option", { value: place }, viewName(pruned, place))));
    this.view.value = String(this.number);
    this.#layers();
    this.#refresh();
  }

  get #view() {
    return this.pruned?.views?.[this.number];
  }

  #turnTo(place) {
    this.number = place;
    this.cursor = null;
    this.#refresh();
  }

  #refresh() {
    this.#legend();
    this.#scale();
    this.#lists();
    this.#tell();
    find("canvas-keys").hidden = !this.#view;
    this.frame.setAttribute("aria-label", this.#summary());
    this.draw();
  }

  #summary() {
    const view = this.#view;
    if (!view) return this.picture ? `The picture ${this.picture.name}` : "No picture";
    return `${view.grid_height} rows and ${view.grid_width} columns of tokens, ${view.kept_indices.length} kept`;
  }

  #layers() {
    const place = find("layers");
    const view = this.#view;
    const names = view ? ["kept", "image", ...Object.keys(SCORES).filter((name) => view.scores?.[name])] : [];
    if (!names.includes(this.layer)) this.layer = "kept";
    place.hidden = !view;
    const policy = this.pruned?.policy ?? {};
    const titles = { kept: "Kept tokens", image: "Picture alone", object: `Object layer ${policy.object_layer ?? ""}`, deep: `Deep layer ${policy.deep_layer ?? ""}`, cls: SCORES.cls.title, similarity: SCORES.similarity.title };
    this.thumbs = new Map();
    const choices = names.map((name) => {
      const thumb = el("canvas", { "aria-hidden": "true" });
      this.thumbs.set(name, thumb);
      const radio = el("input", { type: "radio", name: "layer", value: name, on: { change: () => this.#choose(name) } });
      radio.checked = name === this.layer;
      return el("label", { title: SCORES[name]?.says }, radio, el("span", { class: "thumb" }, thumb), el("span", { class: "title" }, titles[name]));
    });
    place.replaceChildren(place.firstElementChild, ...choices);
    if (view && !view.scores) {
      const why = view.scores_left_out ? `The scores are left out: ${view.scores_left_out}.` : "This method looks at no scores.";
      place.append(el("p", { class: "hint" }, why));
    }
  }

  #choose(name) {
    this.layer = name;
    this.#legend();
    this.#scale();
    this.draw();
  }

  #legend() {
    const view = this.#view;
    const counts = new Map();
    for (const kind of view?.kinds ?? []) counts.set(kind, (counts.get(kind) ?? 0) + 1);
    const entries = kindsOf(view).filter((kind) => counts.has(kind)).map((kind) => {
      const { colour, mark, says } = kindOf(kind);
      const box = el("input", { type: "checkbox", value: kind });
      box.checked = !this.hidden.has(kind);
      box.addEventListener("change", () => {
        this.hidden[box.checked ? "delete" : "add"](kind);
        this.draw();
      });
      return el("label", {}, box, drawing(mark, { fill: colour, "fill-rule": "evenodd" }), el("span", { class: "kind" }, kind), el("b", {}, number(counts.get(kind))), el("small", {}, says));
    });
    const legend = find("legend");
    const { height = view?.grid_height, width = view?.grid_width } = view?.valid ?? {};
    const all = view ? height * width : 0; // padding is neither kept nor dropped
    const dropped = view && el("p", { class: "dropped" }, el("span", { class: "swatch" }), "dropped", el("b", {}, number(all - view.kept_indices.length)), el("small", {}, "dimmed"));
    legend.replaceChildren(...entries, ...(dropped ? [dropped] : []));
    legend.hidden = !view || this.layer !== "kept";
  }

  #scale() {
    const scores = this.#view?.scores?.[this.layer];
    find("scale").hidden = !scores;
    if (!scores) return;
    find("scale-low").textContent = number(scores.reduce((a, b) => Math.min(a, b)));
    find("scale-high").textContent = number(scores.reduce((a, b) => Math.max(a, b)));
  }

  #lists() {
    const place = find("lists");
    const view = this.#view;
    place.hidden = !view;
    const rows = [];
    for (const kind of kindsOf(view)) {
      const found = view?.kept_indices.filter((_, at) => view.kinds[at] === kind) ?? [];
      if (found.length) rows.push(el("dt", {}, kind), el("dd", { "data-kind": kind }, found.join(" ")));
    }
    place.querySelector("dl").replaceChildren(...rows);
  }

  #point(event) {
    const view = this.#view;
    if (!view) return;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * view.grid_width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * view.grid_height);
    const inside = column >= 0 && column < view.grid_width && row >= 0 && row < view.grid_height;
    this.#move(inside ? row * view.grid_width + column : null);
  }

  #press(event) {
    const view = this.#view;
    if (!view || event.ctrlKey || event.metaKey || event.altKey) return;
    const { grid_width: columns, grid_height: rows, kept_indices: kept } = view;
    const from = this.cursor ?? kept[0] ?? 0;
    const row = Math.floor(from / columns);
    const column = from % columns;
    const to = {
      ArrowRight: () => row * columns + Math.min(column + 1, columns - 1),
      ArrowLeft: () => row * columns + Math.max(column - 1, 0),
      ArrowDown: () => Math.min(row + 1, rows - 1) * columns + column,
      ArrowUp: () => Math.max(row - 1, 0) * columns + column,
      Home: () => row * columns,
      End: () => row * columns + columns - 1,
      n: () => kept.find((index) => index > from) ?? kept[0] ?? from,
      p: () => kept.findLast((index) => index < from) ?? kept.at(-1) ?? from,
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.#move(this.cursor === null ? from : to());
    find("token-said").textContent = this.#words().map(([name, value]) => `${name} ${value}`).join(", ");
  }

  #move(index) {
    if (index === this.cursor) return;
    this.cursor = index;
    this.#tell();
    this.draw();
  }

  /** What there is to say of the token under the cursor, as pairs. */
  #words() {
    const view = this.#view;
    if (!view || this.cursor === null) return [];
    const place = view.kept_indices.indexOf(this.cursor);
    const dropped = isValid(view.valid, view.grid_width, this.cursor) ? "dropped" : "padding";
    const words = [
      ["token", number(this.cursor)],
      ["row, column", `${Math.floor(this.cursor / view.grid_width) + 1}, ${(this.cursor % view.grid_width) + 1}`],
      ["kind", place < 0 ? dropped : view.kinds[place]],
    ];
    for (const [name, { title }] of Object.entries(SCORES)) {
      const scores = view.scores?.[name];
      if (!scores) continue;
      const score = scores[this.cursor];
      const rank = 1 + scores.reduce((above, each) => above + (each > score), 0);
      words.push([title.toLowerCase(), `${number(score)}, rank ${number(rank)}`]);
    }
    return words;
  }

  #tell() {
    const words = this.#words();
    if (!words.length) {
      find("token").replaceChildren(...(this.#view ? [el("div", { class: "hint" }, el("dt", { class: "unseen" }, "token"), el("dd", {}, "No token is pointed at."))] : []));
      return;
    }
    find("token").replaceChildren(...words.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  /** Draws what is shown, in the room there is. */
  draw() {
    this.frame.classList.toggle("empty", !this.picture);
    this.canvas.hidden = !this.picture;
    if (!this.picture) return;
    const kinds = new Set(kindsOf(this.#view).filter((kind) => !this.hidden.has(kind)));
    const { picture, pruned, layer, cursor } = this;
    const width = this.frame.parentElement.clientWidth;
    draw(this.canvas, { picture, pruned, number: this.number, layer, kinds, cursor, width, height: height() });
    if (cursor !== null) return; // the small ones have none
    for (const [name, thumb] of this.thumbs ?? []) {
      draw(thumb, { picture, pruned, number: this.number, layer: name, kinds, cursor: null, width: 72, height: 72 });
    }
  }
}

function viewName(pruned, place) {
  if (!pruned.layout) return `View ${place + 1}`;
  if (place === 0) return "Base view";
  const across = pruned.layout.tile_columns;
  return `Tile ${place}: row ${Math.floor((place - 1) / across) + 1}, column ${((place - 1) % across) + 1}`;
}
