// Methods by retentions: each answer in a cell of a grid, a few asked for at a time.

import { el, find, number } from "./dom.js";
import { draw } from "./overlay.js";
import { kindsOf } from "./kinds.js";
import { imageOf, milliseconds } from "./result.js";

const AT_ONCE = 2;
const SIDE = 136; // of a cell's picture, in CSS pixels

/** Calls `each` with every item, at most AT_ONCE at a time, until it rejects or says `false`. */
export async function inTurn(items, each) {
  const rest = [...items];
  let goes = true;
  const work = async () => {
    while (goes && rest.length) if ((await each(rest.shift())) === false) goes = false;
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}

export class Comparison {
  /** `opened` is called with a run that is to be shown whole. */
  constructor(opened) {
    this.opened = opened;
    this.runs = [];
    this.unpruned = null;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.runs.forEach((run) => this.update(run)));
  }

  /** Begins anew: a grid of waiting cells. Returns the runs, the unpruned first. */
  begin(methods, keeps, picture) {
    this.picture = picture;
    this.cells = new Map();
    this.open = null;
    this.unpruned = { method: "none", keep: "", state: "waiting" };
    this.runs = methods.flatMap((method) => keeps.map((keep) => ({ method, keep, state: "waiting" })));
    const cell = (run) => {
      const canvas = el("canvas", { "aria-hidden": "true" });
      const words = el("span", { class: "words" });
      const button = el("button", { type: "button", "aria-pressed": "false", on: { click: () => this.choose(run) } }, canvas, words);
      this.cells.set(run, { canvas, words, button });
      return button;
    };
    const head = el("tr", {}, el("td"), ...keeps.map((keep) => el("th", { scope: "col" }, `keep ${keep}`)));
    const body = methods.map((method) => el("tr", {}, el("th", { scope: "row" }, method), ...this.runs.filter((run) => run.method === method).map((run) => el("td", {}, cell(run)))));
    const reference = el("tr", { class: "reference" }, el("th", { scope: "row" }, "unpruned"), el("td", { colspan: keeps.length }, cell(this.unpruned)));
    find("grid").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, reference, ...body)));
    find("compare").hidden = false;
    for (const run of this.all) this.update(run);
    return this.all;
  }

  get all() {
    return this.unpruned ? [this.unpruned, ...this.runs] : [];
  }

  get done() {
    return this.all.filter((run) => run.state === "done").length;
  }

  /** Opens a cell in the main view. */
  choose(run) {
    if (!imageOf(run)) return;
    this.open = run;
    for (const [other, { button }] of this.cells) button.setAttribute("aria-pressed", String(other === run));
    this.opened(run);
  }

  /** Shows what has become of a run; the others too, where they are held against it. */
  update(run) {
    this.#show(run);
    if (run === this.unpruned && run.state === "done") this.runs.forEach((each) => this.#show(each));
  }

  #show(run) {
    const { canvas, words, button } = this.cells.get(run);
    const image = imageOf(run);
    button.disabled = !image;
    button.dataset.state = run.state;
    draw(canvas, { picture: this.picture, pruned: image, number: 0, layer: image ? "kept" : "image", kinds: new Set(kindsOf(image?.views[0])), cursor: null, width: SIDE, height: SIDE });
    const lines = [el("b", {}, run.error ? run.error.message : run.text || { waiting: "waits", asking: "…", cancelled: "cancelled" }[run.state] || "(no words)")];
    if (image) lines.push(el("small", {}, `${number(image.tokens_kept)} tokens${run.totalMs ? `, ${milliseconds(run.totalMs)} ms` : ""}`));
    if (run !== this.unpruned && run.state === "done" && this.unpruned.state === "done") {
      const same = run.text.trim() === this.unpruned.text.trim();
      lines.push(el("small", { class: same ? "same" : "differs" }, same ? "= as unpruned" : "≠ unpruned"));
    }
    words.replaceChildren(...lines);
  }
}
