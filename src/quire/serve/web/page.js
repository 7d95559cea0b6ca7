// Small things that every part of the page uses: elements, and what the browser remembers.

const PREFIX = "quire.";

/** The element with this id. */
export function element(id) {
  return document.getElementById(id);
}

/** A new element with a class and a text. */
export function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** A new element of a drawing. */
export function draw(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  if (text) made.textContent = text;
  return made;
}

/** What was saved under a name, or undefined. Storage that is switched off or damaged counts as empty. */
export function load(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? undefined;
  } catch {
    return undefined;
  }
}

/** Remember a value for the next visit. */
export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Full, or switched off: the page works without.
  }
}

/** A number for people: three digits, and k or M. */
export function short(value) {
  if (value >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (value >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  if (value >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return value.toPrecision(2);
}
