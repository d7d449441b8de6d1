// Elements, made and found. Text is only ever set as text.

export const find = (id) => document.getElementById(id);

/** An element: `el("p", {class: "note"}, "words", child)`. `on` adds listeners; other names are attributes. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, heard] of Object.entries(value)) made.addEventListener(event, heard);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** An SVG drawing with one path. */
export function drawing(path, attributes) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 16 16", "aria-hidden": "true" })) svg.setAttribute(name, value);
  const made = document.createElementNS(space, "path");
  for (const [name, value] of Object.entries({ d: path, ...attributes })) made.setAttribute(name, value);
  svg.append(made);
  return svg;
}

/** Says something to who listens to the page. Said twice, it is heard twice. */
export function say(words) {
  const place = find("said");
  place.textContent = place.textContent === words ? `${words}\u00a0` : words;
}

const whole = new Intl.NumberFormat("en");

/** 1,234; or to three digits. */
export function number(value) {
  if (Number.isInteger(value)) return whole.format(value);
  return Math.abs(value) >= 1000 ? whole.format(Math.round(value)) : String(Number(value.toPrecision(3))).replace("-", "−");
}

/** 1.23 G of a large number. */
export function scaled(value) {
  for (const [unit, size] of [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6]]) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return number(value);
}
