// An answer and the unpruned one beside it: the words, and what each took.

import { el, find, number, scaled } from "./dom.js";

// the services' stages in their order; deeper ones are parts of the one above
const STAGES = [
  ["queue", 0], ["prune", 0], ["cache_get", 1], ["encode", 1], ["preprocess", 2], ["vision", 2],
  ["text", 1], ["select", 1], ["cache_put", 1], ["project", 0], ["prefill", 0], ["decode", 0],
];

/** A run's image in its report; null before it is there. */
export const imageOf = (run) => run?.pruning?.images?.[0] ?? null;

/** The scope of an answer in a line: "hiprune++, 65 of 196 tokens". */
export function scopeOf(run) {
  const image = imageOf(run);
  if (!image) return run.method === "none" ? "unpruned" : `${run.method}, ${run.keep}`;
  const { tokens_kept: kept, tokens_before: before } = image;
  if (kept === before) return `${image.method === "none" ? "" : `${image.method}, `}all ${number(before)} tokens`;
  return `${image.method}, ${number(kept)} of ${number(before)} tokens (${Math.round((100 * kept) / before)} %)`;
}

/** Shows a run and its unpruned one, which may be null. */
export function showResult(run, unpruned) {
  find("answers").hidden = !run;
  showAnswer(find("answer-pruned"), run, run?.method === "none" ? "Unpruned" : `Pruned: ${run?.method}`);
  showAnswer(find("answer-unpruned"), unpruned, "Unpruned");
  find("answer-unpruned").hidden = !unpruned;
  showFigures(run, unpruned);
}

function showAnswer(place, run, title) {
  const [heading, answer, foot] = place.children;
  heading.textContent = title;
  place.dataset.state = run?.state ?? "none";
  answer.classList.toggle("error", Boolean(run?.error));
  answer.textContent = run?.error ? [run.text, run.error.message].filter(Boolean).join(" — ") : run?.text || (run?.state === "done" ? "(no words)" : "");
  foot.textContent = run ? footOf(run).filter(Boolean).join(" · ") : "";
}

/** What an answer took, in short. */
function footOf(run) {
  const image = imageOf(run);
  if (!image) return [scopeOf(run), stateOf(run)];
  const { prefill_flops_before: before, prefill_flops_after: after } = run.usage?.prompt_tokens_details ?? {};
  return [
    `${number(image.tokens_kept)} of ${number(image.tokens_before)} tokens`,
    before && after < before ? `FLOPs × ${(after / before).toFixed(2)}` : "",
    run.firstMs === null ? "" : `first word in ${milliseconds(run.firstMs)} ms`,
    stateOf(run),
    image.text_note,
  ];
}

function stateOf(run) {
  if (run.state === "done" && run.finish === "length") return "cut at its longest";
  return { waiting: "waits for the other", asking: "answering …", cancelled: "cancelled", failed: "" }[run.state] ?? "";
}

function showFigures(run, unpruned) {
  find("took").hidden = !run?.pruning;
  if (!run?.pruning) return;
  const both = [run, unpruned];
  const of = (seen) => both.map((each) => each && seen(each));
  const work = [
    row("visual tokens", of((each) => imageOf(each)?.tokens_kept), { ratio: true }),
    row("prompt tokens", of((each) => each.usage?.prompt_tokens), { ratio: true }),
    row("prefill, in FLOPs", of((each) => each.usage?.prompt_tokens_details?.prefill_flops_after), { shown: scaled, ratio: true }),
    words("cache", of((each) => imageOf(each)?.cache)),
  ];
  const times = both.map((each) => ({ ...imageOf(each)?.timings_ms, ...each?.timings }));
  const longest = Math.max(...times.flatMap((each) => Object.values(each)), ...both.map((each) => each?.totalMs ?? 0));
  const time = (title, values, more) => row(title, values, { shown: milliseconds, most: longest, ...more });
  const known = STAGES.filter(([name]) => times.some((each) => name in each));
  const others = Object.keys({ ...times[0], ...times[1] }).filter((name) => !STAGES.some(([stage]) => stage === name));
  const stages = [...known, ...others.map((name) => [name, 0])].map(([name, depth]) =>
    time(name.replace("_", " "), times.map((each) => each[name]), { depth, ratio: name === "prefill" }));
  const seen = [
    time("first word", of((each) => each.firstMs), { ratio: true }),
    time("all of it", of((each) => each.totalMs), { ratio: true }),
  ];
  const [head] = find("figures").tHead.rows;
  head.cells[1].textContent = run.method === "none" ? "Unpruned" : "Pruned";
  find("figures").replaceChildren(find("figures").tHead, group("Work", work), group("Stages, as the services tell, in ms", stages), group("Seen from this page, in ms", seen));
  const cold = imageOf(run).cache === "miss" && unpruned && imageOf(unpruned)?.cache !== "miss";
  find("took-note").textContent = `FLOPs are estimates.${cold ? " The first answer encoded the picture, the second found it in the cache: of their times, only prefill and decode compare." : ""}`;
}

function group(title, rows) {
  return el("tbody", {}, el("tr", { class: "group" }, el("th", { scope: "rowgroup", colspan: 4 }, title)), ...rows);
}

export const milliseconds = (value) => (value >= 10 ? number(Math.round(value)) : number(Number(value.toPrecision(2))));

function row(title, values, { shown = number, most = Math.max(...values.map((value) => value ?? 0)), depth = 0, ratio = false }) {
  const cells = values.map((value) => {
    if (value == null) return el("td", {}, el("span", { class: "nothing" }, "–"));
    const bar = el("span", { class: "bar-of", "aria-hidden": "true" });
    bar.style.setProperty("--share", String(most ? value / most : 0));
    return el("td", {}, bar, el("span", {}, shown(value)));
  });
  const [one, other] = values;
  const told = ratio && one != null && other ? `× ${(one / other).toFixed(2)}` : "";
  return el("tr", { "data-depth": depth }, el("th", { scope: "row" }, title), ...cells, el("td", {}, told));
}

function words(title, values) {
  return el("tr", {}, el("th", { scope: "row" }, title), ...values.map((value) => el("td", {}, value ?? "–")), el("td"));
}
