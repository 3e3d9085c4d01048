// Elements and numbers. Text of a bundle only ever becomes a text node.

export const byId = (id) => document.getElementById(id);

// An element: properties by name, `onclick` and its like as listeners, `data` as data attributes.
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || (value === false && !name.startsWith("aria-"))) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true && !name.startsWith("aria-") ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
}

export const link = (text, onclick, title) => h("button", { class: "link", type: "button", onclick, title }, text);

export const count = (number) => number.toLocaleString("en-US");

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let size = Math.abs(number);
  while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return `${number < 0 ? "−" : ""}${unit && size < 100 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function micros(number) {
  const size = Math.abs(number);
  const sign = number < 0 ? "−" : "";
  return size >= 1e4 ? `${sign}${(size / 1e3).toFixed(1)} ms` : `${sign}${size.toFixed(size < 100 ? 1 : 0)} µs`;
}

export const signed = (text, number) => (number > 0 ? `+${text}` : text);

export const emptyNote = (title, text) => h("div", { class: "empty" }, h("b", {}, title), h("p", {}, text));

const tip = byId("tip");

export function showTip(event, ...children) {
  fill(tip, ...children);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - box.height - 8))}px`;
}

export const hideTip = () => { tip.hidden = true; };
