// Elements and figures. Texts from files become text nodes and nothing else.

export function element(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function drawn(tag, properties = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// Gives a place other children, unless they are what stands there: a selected text, the focus and an open menu stay.
export function show(place, ...children) {
  const next = place.cloneNode(false);
  next.append(...children.flat());
  if (!place.isEqualNode(next)) place.replaceChildren(...next.childNodes);
}

export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

export function byId(id) {
  return document.getElementById(id);
}

export function figure(value, digits = 4) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 100000) return amount(value);
  if (Number.isInteger(value)) return String(value);
  return size !== 0 && size < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(digits + (size >= 1))));
}

export function loss(value) {
  return value === null || value === undefined ? "" : value.toFixed(4);
}

export function amount(value, unit = "") {
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size / 2) return Number((value / size).toPrecision(3)) + letter + unit;
  return Number(value.toPrecision(3)) + unit;
}

export function moment(seconds) {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? "" : date.toISOString().slice(0, 16).replace("T", " ") + " UTC";
}

export function table(caption, head, rows) {
  return element("table", {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, head.map((cell) => element("th", { scope: "col" }, cell)))),
    element("tbody", {}, rows));
}

// A table that is wider than the page scrolls, by the keyboard too.
export function scrolled(name, child) {
  return element("div", { class: "scrolled", tabindex: 0, role: "region", "aria-label": name }, child);
}
