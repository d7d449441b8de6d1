// The page: what happens when something is asked for.

import { ask, models, setup } from "./api.js";
import { Comparison, inTurn } from "./compare.js";
import { find, number, say } from "./dom.js";
import { Form } from "./form.js";
import { imageOf, scopeOf, showResult } from "./result.js";
import { Stage } from "./stage.js";

const stage = new Stage();
const comparison = new Comparison(open);
const form = new Form({ changed: takePicture, asked, cancelled: cancel });
let running = null; // the AbortController of what is under way
let showing = null; // the run that the page shows alone; null for a picture or a comparison
let last = null; // the unpruned answer, and what it was asked with
let counting = 0; // the timer that says when to come back

function takePicture(picture) {
  cancel();
  showPicture(picture);
}

function showPicture(picture) {
  showing = null;
  find("compare").hidden = true;
  stage.show(picture, null, "Ask, and see which tokens of the picture stay.");
  showResult(null, null);
}

async function asked() {
  running?.abort();
  clearInterval(counting);
  find("form-wait").hidden = true;
  form.clear();
  const controller = new AbortController();
  running = controller;
  busy(true);
  try {
    if (!find("model").value) await start(); // what is served was not there when the page came
    await (form.comparing ? compare(controller.signal) : one(controller.signal));
  } catch (error) {
    if (error.name !== "AbortError" && !controller.signal.aborted) form.refuse(error);
  } finally {
    if (running === controller) {
      running = null;
      busy(false);
    }
  }
}

function busy(yes) {
  find("ask").setAttribute("aria-busy", String(yes));
  if (!yes && document.activeElement === find("cancel")) find("submit").focus();
  find("cancel").disabled = !yes;
  if (!yes) find("progress").hidden = true;
}

function cancel() {
  if (!running) return;
  running.abort();
  say("Cancelled.");
}

/** One answer, and then the unpruned one, so that neither takes the other's time. */
async function one(signal) {
  const { picture } = form;
  const run = { method: form.method, keep: form.keep };
  const body = form.body(run.method, run.keep);
  const plain = form.body("none");
  const [, question] = plain.messages[0].content;
  const asking = JSON.stringify({ ...plain, messages: question.text, key: form.key });
  const known = last?.picture === picture && last.asking === asking && !plain.temperature;
  let unpruned = null;
  if (form.wantsUnpruned && run.method !== "none") unpruned = known ? last.run : { method: "none", state: "waiting" };
  find("compare").hidden = true;
  showing = run;
  reveal();
  say("Asking.");
  const show = frames(() => {
    if (showing !== run) return; // of an aborted answer the last is heard when something else stands there
    if (imageOf(run) && stage.pruned !== imageOf(run)) stage.show(picture, imageOf(run), scopeOf(run));
    showResult(run, unpruned);
  });
  await ask(body, form.key, signal, run, show);
  if (run.error) {
    unpruned = null;
    show.now();
    if (!imageOf(run)) showPicture(picture); // what stood there was another answer's
    return wrong(run.error);
  }
  show.now();
  say(`Answer: ${run.text.trim()}. ${scopeOf(run)}.`);
  if (unpruned?.state === "waiting") {
    await ask(plain, form.key, signal, unpruned, show);
    show.now();
    if (unpruned.error) return wrong(unpruned.error);
    last = { picture, asking, run: unpruned };
    say(`Unpruned: ${unpruned.text.trim()}.`);
  }
  return null;
}

async function compare(signal) {
  const { methods, keeps } = form.cells;
  form.body("none"); // says what is missing before a grid is made for it
  showing = null;
  const runs = comparison.begin(methods, keeps, form.picture);
  const bodies = new Map(runs.map((run) => [run, form.body(run.method, run.keep)]));
  const progress = find("progress");
  Object.assign(progress, { hidden: false, max: runs.length, value: 0 });
  say(`Comparing ${runs.length} answers.`);
  note();
  reveal();
  const [unpruned, ...others] = runs;
  const each = async (run) => {
    await ask(bodies.get(run), form.key, signal, run, () => comparison.update(run));
    progress.value = comparison.done;
    note();
    if (!comparison.open && run !== unpruned && !run.error) comparison.choose(run);
    else if (comparison.open === run || run === unpruned) refresh();
    if (!run.error) return true;
    const { status, param } = run.error;
    wrong(run.error, status === 400 && param === "pruning.keep" ? `${run.keep}: ` : "");
    return status === 400 && param.startsWith("pruning"); // that alone may not be wrong with the next
  };
  try {
    if (await each(unpruned)) await inTurn(others, each);
  } finally {
    for (const run of runs) {
      if (run.state !== "waiting") continue;
      run.state = "cancelled";
      comparison.update(run);
    }
    note();
  }
  say(`${comparison.done} of ${runs.length} answers are there.`);
}

function note() {
  find("compare-note").textContent = `${comparison.done} of ${comparison.all.length} answers. Open one to see its tokens.`;
}

function open(run) {
  refresh(run);
  if (document.activeElement?.closest("#grid")) find("kept").scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
}

function refresh(run = comparison.open) {
  if (!run) return;
  stage.show(comparison.picture, imageOf(run), scopeOf(run));
  showResult(run, run === comparison.unpruned ? null : comparison.unpruned);
}

/** Says what went wrong, and counts down to when it is worth another try. */
function wrong(error, before = "") {
  error.message = before + error.message;
  form.refuse(error);
  if (!error.retryAfterS) return;
  const until = performance.now() + 1000 * error.retryAfterS;
  const place = find("form-wait"); // hidden from who listens: said at its ends, not every second
  place.hidden = false;
  clearInterval(counting);
  const count = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    place.textContent = left > 0 ? `Again in ${left} s.` : "You may try again now.";
    if (left > 0) return;
    clearInterval(counting);
    say(place.textContent);
  };
  count();
  say(place.textContent);
  counting = setInterval(count, 500);
}

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Where the answer is below the form, brings it into sight. */
function reveal() {
  const results = find("results");
  if (results.getBoundingClientRect().top > innerHeight * 0.6) results.scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
}

/** Something to do at most once a frame; `now` does it at once. */
function frames(doing) {
  let due = 0;
  const later = () => {
    due ||= requestAnimationFrame(later.now);
  };
  later.now = () => {
    cancelAnimationFrame(due);
    due = 0;
    doing();
  };
  return later;
}

async function start() {
  const served = find("served");
  try {
    const found = await models(form.key);
    form.offer(found);
    served.textContent = found.length ? [...new Set([found[0].id, found[0].family].filter(Boolean)), `${number(found[0].context_length)} tokens of context`].join(" · ") : "no model is served";
    served.dataset.state = "ready";
  } catch (error) {
    served.dataset.state = "failed";
    served.textContent = error.status === 401 ? "a key is wanted here" : error.message;
    if (error.status === 401) {
      find("more").open = true;
      form.refuse(form.key ? error : Object.assign(error, { message: "This service wants a key." }));
    }
  }
}

find("key").addEventListener("change", start);
start();
setup().then((found) => form.offerSamples(found), () => {});
