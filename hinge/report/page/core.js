"use strict";
// Draws the report from the JSON in #report-data. Names that came from files enter the page as text nodes only.

const report = JSON.parse(document.getElementById("report-data").textContent);
const byId = (id) => document.getElementById(id);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function fixed(value, digits = 2) {
  if (!isNumber(value)) return "–";
  const shown = Math.abs(value) >= 1000 ? value.toPrecision(5) : value.toFixed(digits);
  return (Number(shown) === 0 ? shown.replace("-", "") : shown).replace("-", "−");
}

// ---------------------------------------------------------------- arrays
// An array is int16 steps of a quantum, low bytes first, then high bytes, deflated, in base64; -32768 stands for NaN.
async function unpack(packed) {
  const squeezed = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  const stream = new Blob([squeezed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = bytes.length / 2;
  const values = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    const step = ((bytes[i] | (bytes[size + i] << 8)) << 16) >> 16;
    values[i] = step === -32768 ? NaN : step * packed.quantum;
  }
  return values;
}

async function unpackTree(item) {
  if (Array.isArray(item)) return Promise.all(item.map(unpackTree));
  if (item === null || typeof item !== "object") return item;
  if ("quantum" in item) return unpack(item);
  const entries = await Promise.all(Object.entries(item).map(async ([name, value]) => [name, await unpackTree(value)]));
  return Object.fromEntries(entries);
}

async function loadImage(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

const loaded = new Map();
function loadSlide(index) {
  if (!loaded.has(index)) {
    const raw = report.slides[index];
    loaded.set(index, Promise.all([unpackTree(raw), loadImage(raw.image)]).then(([slide, image]) => ({ ...slide, image })));
  }
  return loaded.get(index);
}

// ---------------------------------------------------------------- colours
// yellow to green stands out against haematoxylin and eosin, and its light end is not taken for a nucleus
const STOPS = {
  expression: "ffffe5 f7fcb9 d9f0a3 addd8e 78c679 41ab5d 238443 006837 004529",
  spread: "ffffe5 fff7bc fee391 fec44f fe9929 ec7014 cc4c02 993404 662506",
  diverging: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
};
const tables = Object.fromEntries(
  Object.entries(STOPS).map(([name, text]) => {
    const stops = text.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    const table = Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1);
      const left = Math.min(Math.floor(at), stops.length - 2);
      return stops[left].map((value, c) => Math.round(value + (stops[left + 1][c] - value) * (at - left)));
    });
    return [name, table];
  }),
);

function colourAt(table, value, low, high) {
  const at = Math.round(((value - low) / (high - low)) * 255);
  return table[Math.max(0, Math.min(255, at))];
}

function paintBar(canvas, table) {
  canvas.width = 256;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  table.forEach((rgb, x) => {
    context.fillStyle = `rgb(${rgb})`;
    context.fillRect(x, 0, 1, 1);
  });
}

// ---------------------------------------------------------------- tooltip
const tip = byId("tip");
function showTip(x, y, head, rows) {
  tip.replaceChildren(
    make("div", { class: "head" }, head),
    ...rows.map(([name, value]) =>
      value === undefined ? make("div", {}, name) : make("div", { class: "row" }, make("span", {}, name), make("span", {}, value)),
    ),
  );
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
  const top = y + 16 + box.height > innerHeight ? y - 12 - box.height : y + 16;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - box.width - 4))}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
const hideTip = () => (tip.style.display = "none");
addEventListener("scroll", hideTip, { passive: true });
addEventListener("pointerdown", hideTip, { capture: true });
// A finger that lifts leaves too; what it pointed at stays until the next touch.
const onLeave = (node, act) => node.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && act());

// ---------------------------------------------------------------- tables that are sorted and searched

const ROWS_SHOWN = 300; // of a long table; the search finds the others

/** Fill a table. A column is {label, title, text(row), value(row)}; the first one names the row. `choose` gets a row. Without `sortBy`, rows keep their order. */
function fillTable(table, { caption, columns, rows, search, sortBy, choose }) {
  const sort = { column: columns[sortBy], descending: sortBy !== undefined };
  const body = make("tbody");
  const buttons = columns.map((column) => make("button", { type: "button", class: "sort" }, column.label));
  const cells = columns.map((column, i) => make("th", { scope: "col", title: column.title ?? column.label }, buttons[i]));
  const draw = () => {
    const wanted = search.value.trim().toLowerCase();
    const key = (row) => sort.column.value(row);
    const order = (a, b) => {
      const [one, other] = [key(a), key(b)];
      if (typeof one === "string") return one.localeCompare(other);
      return (isNumber(one) ? one : -Infinity) - (isNumber(other) ? other : -Infinity);
    };
    const found = rows.filter((row) => columns[0].value(row).toLowerCase().includes(wanted));
    if (sort.column) found.sort(order);
    if (sort.descending) found.reverse();
    const lines = found.slice(0, ROWS_SHOWN).map((row) => {
      const name = choose ? make("button", { type: "button", class: "link" }, columns[0].text(row)) : columns[0].text(row);
      if (choose) name.addEventListener("click", () => choose(row));
      return make("tr", {}, make("th", { scope: "row" }, name), ...columns.slice(1).map((column) => make("td", {}, column.text(row))));
    });
    const rest = found.length - lines.length;
    const note = rest > 0 ? `and ${rest} more: type to find them` : found.length ? "" : "No gene has this in its name.";
    if (note) lines.push(make("tr", {}, make("td", { colspan: columns.length, class: "soft" }, note)));
    body.replaceChildren(...lines);
    cells.forEach((cell, i) => {
      if (columns[i] === sort.column) cell.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
  };
  columns.forEach((column, i) =>
    buttons[i].addEventListener("click", () => {
      sort.descending = sort.column === column ? !sort.descending : i > 0;
      sort.column = column;
      draw();
    }),
  );
  search.oninput = draw;
  table.replaceChildren(make("caption", { class: "unseen" }, caption), make("thead", {}, make("tr", {}, ...cells)), body);
  draw();
}

/** Offer rows of text as a CSV file. */
function downloadCsv(name, header, rows) {
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [header, ...rows].map((row) => row.map((cell) => quoted(String(cell ?? ""))).join(","));
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
