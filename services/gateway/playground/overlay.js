// Draws a view's tokens over its picture. Knows a canvas, a report's view and colours; knows no event.

import { heat, kindOf, markOf } from "./kinds.js";
import { sourceOf } from "./picture.js";

/**
 * Draws. `shown` has:
 *   picture, pruned (the image's report, or null), number (the view's), layer ("kept", "image", or a score's name),
 *   kinds (a Set of those to show), cursor (an index or null), width (in CSS pixels), height (at most, likewise).
 * Returns the size of the drawing in CSS pixels.
 */
export function draw(canvas, shown) {
  const { picture, pruned, number } = shown;
  const source = sourceOf(picture, pruned, number);
  const aspect = source.width / source.height;
  const width = Math.max(1, Math.round(Math.min(shown.width, shown.height * aspect)));
  const height = Math.max(1, Math.round(width / aspect));
  const density = Math.min(window.devicePixelRatio || 1, 3);
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.setProperty("width", `${width}px`);
  canvas.style.setProperty("height", `${height}px`);
  const pen = canvas.getContext("2d");
  pen.scale(canvas.width / width, canvas.height / height);
  pen.fillStyle = "#fff"; // transparency, as the encoder has it
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture.image, source.x, source.y, source.width, source.height, 0, 0, width, height);
  const view = pruned?.views?.[number];
  if (view && shown.layer !== "image") {
    const at = grid(view, width, height);
    const kept = new Map(view.kept_indices.map((index, place) => [index, view.kinds[place]]));
    if (shown.layer === "kept") drawKept(pen, at, kept, shown.kinds, wash(canvas));
    else drawHeat(pen, at, view.scores?.[shown.layer], kept);
  }
  if (view && shown.cursor !== null) drawCursor(pen, grid(view, width, height), shown.cursor);
  return { width, height };
}

const wash = (canvas) => getComputedStyle(canvas).getPropertyValue("--wash").trim();

function grid(view, width, height) {
  const { grid_height: rows, grid_width: columns } = view;
  const w = width / columns;
  const h = height / rows;
  const box = (index) => [(index % columns) * w, Math.floor(index / columns) * h, w, h];
  return { rows, columns, w, h, box, width, height, valid: view.valid };
}

function drawKept(pen, at, kept, kinds, faded) {
  const isShown = (index) => kinds.has(kept.get(index));
  pen.beginPath();
  pen.rect(0, 0, at.width, at.height);
  for (const index of kept.keys()) if (isShown(index)) pen.rect(...at.box(index));
  pen.fillStyle = faded;
  pen.fill("evenodd");
  const cell = Math.min(at.w, at.h);
  const thick = Math.max(1.25, Math.min(3, cell / 11));
  // neighbours of one kind are one area: a strong line around it, faint ones within
  for (const [index, kind] of kept) {
    if (!isShown(index)) continue;
    const [x, y, w, h] = at.box(index);
    const inset = thick / 2;
    const column = index % at.columns;
    const sides = [
      [index - at.columns, x, y + inset, x + w, y + inset],
      [index + at.columns, x, y + h - inset, x + w, y + h - inset],
      [column > 0 ? index - 1 : -1, x + inset, y, x + inset, y + h],
      [column < at.columns - 1 ? index + 1 : -1, x + w - inset, y, x + w - inset, y + h],
    ];
    pen.strokeStyle = kindOf(kind).colour;
    for (const [beside, fromX, fromY, toX, toY] of sides) {
      const within = kept.get(beside) === kind;
      pen.globalAlpha = within ? 0.5 : 1;
      pen.lineWidth = within ? 0.75 : thick;
      pen.beginPath();
      pen.moveTo(fromX, fromY);
      pen.lineTo(toX, toY);
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }
  if (cell < 9) return;
  for (const index of firsts(kept, at.columns)) {
    if (!isShown(index)) continue;
    const [x, y] = at.box(index);
    drawMark(pen, kept.get(index), x + thick + 1.5, y + thick + 1.5, Math.max(6, Math.min(14, cell * 0.34)));
  }
}

/** The first token of each area of neighbours of one kind: one mark says what all of the area is. */
function firsts(kept, columns) {
  const seen = new Set();
  const found = [];
  for (const [index, kind] of kept) {
    if (seen.has(index)) continue;
    found.push(index);
    const todo = [index];
    while (todo.length) {
      const here = todo.pop();
      if (seen.has(here) || kept.get(here) !== kind) continue;
      seen.add(here);
      const column = here % columns;
      todo.push(here - columns, here + columns);
      if (column > 0) todo.push(here - 1);
      if (column < columns - 1) todo.push(here + 1);
    }
  }
  return found;
}

function drawMark(pen, kind, x, y, size) {
  pen.save();
  pen.translate(x, y);
  pen.scale(size / 16, size / 16);
  pen.lineJoin = "round";
  pen.lineWidth = 4;
  pen.strokeStyle = "rgb(255 255 255 / .9)";
  pen.stroke(markOf(kind));
  pen.fillStyle = kindOf(kind).colour;
  pen.fill(markOf(kind), "evenodd");
  pen.restore();
}

function drawHeat(pen, at, scores, kept) {
  if (!scores) return;
  const shares = sharesOf(scores);
  pen.globalCompositeOperation = "saturation";
  pen.fillStyle = "#808080";
  pen.fillRect(0, 0, at.width, at.height);
  pen.globalCompositeOperation = "source-over";
  pen.globalAlpha = 0.78;
  for (let index = 0; index < scores.length; index += 1) {
    if (!isValid(at.valid, at.columns, index)) continue;
    const [x, y] = at.box(index).map(Math.round);
    const [right, below] = [Math.round((index % at.columns + 1) * at.w), Math.round((Math.floor(index / at.columns) + 1) * at.h)];
    pen.fillStyle = heat(shares[index]);
    pen.fillRect(x, y, right - x, below - y);
  }
  pen.globalAlpha = 1;
  for (const index of kept.keys()) {
    const [x, y, w, h] = at.box(index);
    const size = Math.max(1.5, Math.min(w, h) * 0.1);
    pen.beginPath();
    pen.arc(x + w / 2, y + h / 2, size, 0, 2 * Math.PI);
    pen.fillStyle = "#fff";
    pen.strokeStyle = "rgb(0 0 0 / .65)";
    pen.lineWidth = 1;
    pen.fill();
    pen.stroke();
  }
}

/** Whether a token is no padding, in a grid of so many columns of which a part is valid, or all. */
export function isValid(valid, columns, index) {
  if (!valid) return true;
  const row = Math.floor(index / columns) - valid.top;
  const column = (index % columns) - valid.left;
  return row >= 0 && row < valid.height && column >= 0 && column < valid.width;
}

/** Each score's place in [0, 1] between the least and the largest, by logarithm where none is below 0. */
export function sharesOf(scores) {
  const sorted = [...scores].sort((a, b) => a - b);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const floor = Math.max(at(0.5) / 100, 1e-9);
  const told = sorted[0] < 0 ? (value) => value : (value) => Math.log(Math.max(value, floor));
  const low = told(at(0.02));
  const high = told(sorted.at(-1));
  return scores.map((value) => (high > low ? (told(value) - low) / (high - low) : 0));
}

function drawCursor(pen, at, index) {
  const [x, y, w, h] = at.box(index);
  for (const [colour, width] of [["#000", 5], ["#fff", 2.5]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.strokeRect(x, y, w, h);
  }
}
