// Small helpers. Text always goes in as text: documents may hold HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const count = (number) => number.toLocaleString("en");
export const chunks = (number) => `${count(number)} chunk${number === 1 ? "" : "s"}`;

export function bytes(number) {
  const [size, unit] = number >= 1e9 ? [number / 1e9, "GB"] : [number / 1e6, "MB"];
  return `${size < 10 ? Math.round(size * 10) / 10 : Math.round(size)} ${unit}`;
}

export const seconds = (number) => (number >= 1 ? `${number.toFixed(2)} s` : `${Math.round(number * 1000)} ms`);

export function announce(text) {
  byId("announcer").textContent = text;
}

export function show(id, text) {
  const place = byId(id);
  place.textContent = text;
  place.hidden = !text;
}
