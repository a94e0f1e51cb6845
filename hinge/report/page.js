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

const STOPS = {
  viridis: "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
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

// ---------------------------------------------------------------- header and scores

function fillSettings() {
  const entries = Object.entries(report.settings);
  const list = (pairs) => pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  byId("settings").append(...list(entries.slice(0, 12)));
  if (entries.length <= 12) return;
  byId("more-settings").hidden = false;
  byId("more-settings").querySelector("dl").append(...list(entries.slice(12)));
}

const MODEL = "hinge";
const CEILINGS = new Set(["noise-ceiling", "oracle"]);
const ALL = "\u0000all";

const betterMark = (better) => {
  if (better === "higher") return "↑ higher";
  if (better === "lower") return "↓ lower";
  return better ? String(better).replace("nearest", "→") : "";
};

// How far a printed score is from the ideal; the smallest is the best. Ties at the printed digits stay ties.
function distanceFromIdeal(value, better) {
  const printed = Number(value.toFixed(3));
  if (better === "higher") return -printed;
  if (better === "lower") return printed;
  const target = parseFloat(String(better).replace("nearest", ""));
  return Number.isFinite(target) ? Number(Math.abs(printed - target).toFixed(3)) : NaN;
}

function setUpScores() {
  const { rows, definitions, methods } = report.scores;
  if (!rows.length) {
    byId("scores-bar").hidden = byId("definitions").hidden = true;
    byId("scores-note").textContent = "This report was written without scores.";
    return;
  }
  const metrics = Object.keys(definitions).filter((metric) => rows.some((row) => isNumber(row[metric])));
  const unique = (name) => [...new Set(rows.map((row) => row[name]).filter((value) => value !== undefined && value !== null))];
  const slides = unique("slide");
  const transforms = unique("transform");
  const methodOrder = unique("method").sort((a, b) => (b === MODEL) - (a === MODEL) || CEILINGS.has(a) - CEILINGS.has(b));

  for (const transform of transforms) byId("scores-transform").append(new Option(transform, transform));
  byId("scores-transform-label").hidden = transforms.length < 2;
  if (slides.length > 1) byId("scores-slide").append(new Option(`mean over ${slides.length} slides`, ALL));
  for (const slide of slides) byId("scores-slide").append(new Option(slide, slide));

  const describe = (node, head, lines) => {
    node.tabIndex = 0;
    const show = () => {
      const box = node.getBoundingClientRect();
      showTip(box.left, box.bottom - 8, head, lines);
    };
    for (const name of ["pointerenter", "focus"]) node.addEventListener(name, show);
    for (const name of ["pointerleave", "blur"]) node.addEventListener(name, hideTip);
    return node;
  };

  function draw() {
    const transform = transforms.length ? byId("scores-transform").value : undefined;
    const chosen = byId("scores-slide").value;
    const mean = chosen === ALL;
    byId("scores-each-label").hidden = !mean;
    const here = rows.filter((row) => transform === undefined || row.transform === transform);
    const scoreOf = (row, metric) => (row && isNumber(row[metric]) ? row[metric] : null);
    const lines = methodOrder
      .map((method) => {
        const own = here.filter((row) => row.method === method && (mean || row.slide === chosen));
        const values = {};
        for (const metric of metrics) {
          const known = own.map((row) => scoreOf(row, metric)).filter(isNumber);
          values[metric] = known.length ? { value: known.reduce((a, b) => a + b, 0) / known.length, slides: known.length } : null;
        }
        return { method, own, values };
      })
      .filter((line) => line.own.length);
    const shown = metrics.filter((metric) => lines.some((line) => line.values[metric]));
    const most = Math.max(...lines.flatMap((line) => shown.map((metric) => line.values[metric]?.slides ?? 0)));
    const best = {};
    for (const metric of shown) {
      const rivals = lines.filter((line) => !CEILINGS.has(line.method) && line.values[metric]?.slides === most);
      const distances = rivals.map((line) => distanceFromIdeal(line.values[metric].value, definitions[metric].better));
      best[metric] = rivals.length > 1 ? Math.min(...distances) : NaN;
    }

    const header = make("tr", {}, make("th", { scope: "col" }, "Method"));
    for (const metric of shown) {
      const meaning = definitions[metric];
      const label = (meaning.label || metric).replaceAll("-", "\u2011"); // a hyphen that does not break
      const cell = make("th", { scope: "col" }, label, make("span", { class: "better" }, betterMark(meaning.better)));
      const unit = meaning.unit ? [["unit", meaning.unit]] : [];
      header.append(describe(cell, meaning.label || metric, [[meaning.definition || ""], ...unit, ["better", meaning.better || "–"]]));
    }
    const bodies = [make("tbody"), make("tbody", { class: "ceiling" })];
    let partial = false;
    for (const line of lines) {
      const name = make("th", { scope: "row" }, line.method);
      if (methods[line.method]) describe(name, line.method, [[methods[line.method]]]);
      const row = make("tr", { class: line.method === MODEL ? "model" : "" }, name);
      for (const metric of shown) {
        const entry = line.values[metric];
        const cell = make("td", { class: entry ? "" : "none" }, make("span", {}, entry ? fixed(entry.value, 3) : "–"));
        if (entry && entry.slides < most) {
          partial = true;
          cell.append("*");
        } else if (entry && !CEILINGS.has(line.method) && distanceFromIdeal(entry.value, definitions[metric].better) === best[metric]) {
          cell.className = "best";
        }
        row.append(cell);
      }
      const body = bodies[CEILINGS.has(line.method) ? 1 : 0];
      body.append(row);
      if (!mean || !byId("scores-each").checked) continue;
      for (const slide of slides) {
        const one = line.own.find((item) => item.slide === slide);
        if (!one) continue;
        body.append(
          make("tr", { class: "one" }, make("th", { scope: "row" }, slide), ...shown.map((metric) => make("td", {}, fixed(scoreOf(one, metric), 3)))),
        );
      }
    }
    byId("scores-table").replaceChildren(make("thead", {}, header), ...bodies.filter((body) => body.children.length));
    byId("scores-note").textContent = [
      "The best method of each column is marked, ties at the printed digits included.",
      lines.some((line) => CEILINGS.has(line.method)) ? "The noise ceiling is what a perfect prediction could reach on counts this noisy; it does not compete." : "",
      partial ? "* known on fewer slides than the others, so not compared." : "",
    ].join(" ");
  }
  for (const id of ["scores-transform", "scores-slide", "scores-each"]) byId(id).addEventListener("change", draw);
  draw();
  const list = byId("definitions").querySelector("dl");
  for (const metric of metrics) {
    const { label, definition, unit, better } = definitions[metric];
    const notes = [unit ? `Unit: ${unit}.` : "", better ? `Better: ${better}.` : ""].join(" ");
    list.append(make("dt", {}, label || metric), make("dd", {}, `${definition || ""} ${notes}`));
  }
  for (const method of methodOrder) {
    if (methods[method]) list.append(make("dt", {}, method), make("dd", {}, methods[method]));
  }
}

// ---------------------------------------------------------------- state shared by the figures

const state = { slide: null, gene: 0, draw: 0, opacity: 0.85, view: { zoom: 1, x: 0, y: 0 }, panels: [], matrices: [] };
const spotValues = (values) => {
  const n = state.slide.x.length;
  return values ? values.subarray(state.gene * n, (state.gene + 1) * n) : null;
};

// ---------------------------------------------------------------- gene list

const SORTS = {
  pcc: ["PCC", (slide) => (a, b) => (slide.genewise.pcc?.[b] ?? -9) - (slide.genewise.pcc?.[a] ?? -9)],
  variance: ["measured variance", (slide) => (a, b) => slide.genewise.variance[b] - slide.genewise.variance[a]],
  name: ["name", (slide) => (a, b) => slide.genes[a].localeCompare(slide.genes[b])],
};

function visibleGenes() {
  const { slide } = state;
  const wanted = byId("gene-search").value.trim().toLowerCase();
  return slide.genes
    .map((_, gene) => gene)
    .filter((gene) => slide.genes[gene].toLowerCase().includes(wanted))
    .sort(SORTS[byId("gene-sort").value][1](slide));
}

function listGenes() {
  const { slide } = state;
  const items = visibleGenes().map((gene) => {
    const pcc = slide.genewise.pcc?.[gene];
    const fill = make("i");
    fill.style.width = `${100 * Math.max(0, pcc ?? 0)}%`;
    const item = make(
      "li",
      { role: "option", id: `gene-${gene}`, "aria-selected": gene === state.gene },
      make("span", { class: "name" }, slide.genes[gene]),
      make("span", { class: "meter" }, fill),
      make("span", { class: "number" }, fixed(pcc)),
    );
    item.addEventListener("click", () => chooseGene(gene));
    return item;
  });
  byId("gene-list").replaceChildren(...(items.length ? items : [make("li", { class: "empty" }, "No gene of the panel has this in its name.")]));
}

function chooseGene(gene, scroll = false) {
  state.gene = gene;
  for (const item of byId("gene-list").children) item.setAttribute("aria-selected", item.id === `gene-${gene}`);
  byId("gene-search").setAttribute("aria-activedescendant", `gene-${gene}`);
  const item = byId(`gene-${gene}`);
  const list = byId("gene-list");
  if (item && scroll) list.scrollTop = item.offsetTop - list.offsetTop - list.clientHeight / 2;
  drawGene();
}

function setUpGenes() {
  for (const [name, [label]] of Object.entries(SORTS)) byId("gene-sort").append(new Option(label, name));
  byId("gene-sort").addEventListener("change", listGenes);
  byId("gene-search").addEventListener("input", listGenes);
  for (const id of ["gene-search", "gene-list"]) {
    byId(id).addEventListener("keydown", (event) => {
      const genes = visibleGenes();
      const at = genes.indexOf(state.gene);
      const next = { ArrowDown: at + 1, ArrowUp: at < 0 ? 0 : at - 1, Enter: Math.max(at, 0) }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      if (next >= 0 && next < genes.length) chooseGene(genes[next], true);
    });
  }
}

// ---------------------------------------------------------------- the slide

const PANELS = [
  { key: "measured", title: "Measured", table: tables.viridis },
  { key: "mean", title: "Predicted mean", table: tables.viridis },
  { key: "draw", title: "Draw", table: tables.viridis },
  { key: "std", title: "Uncertainty (std)", table: tables.spread },
];

function panelValues(key) {
  const { slide } = state;
  return spotValues(key === "draw" ? slide.draws[state.draw] : slide[key]);
}

function buildPanels() {
  const { slide } = state;
  state.panels = PANELS.filter(({ key }) => (key === "draw" ? slide.draws.length : slide[key])).map((kind) => {
    const what = make("span", { class: "what" }, kind.title);
    const low = make("span");
    const high = make("span");
    const bar = make("canvas");
    paintBar(bar, kind.table);
    const canvas = make("canvas");
    const ring = make("div", { class: "ring" });
    const view = make("div", { class: "view" }, canvas, ring);
    const node = make("div", { class: "panel" }, make("div", { class: "top" }, what, make("span", { class: "legend" }, low, bar, high)), view);
    const panel = { ...kind, what, low, high, canvas, ring, view, node };
    listen(panel);
    return panel;
  });
  byId("panels").classList.toggle("single", state.panels.length === 1);
  byId("panels").style.setProperty("--aspect", slide.width / slide.height);
  byId("panels").replaceChildren(...state.panels.map((panel) => panel.node));
}

// Scale from pixels of the cropped image to CSS pixels of a panel at zoom 1.
const baseScale = (panel) => panel.canvas.clientWidth / state.slide.width;

function drawPanels() {
  const { slide, view } = state;
  if (!slide) return;
  const ratio = devicePixelRatio || 1;
  for (const panel of state.panels) {
    const { canvas, key, table } = panel;
    canvas.style.aspectRatio = `${slide.width} / ${slide.height}`;
    const scale = baseScale(panel) * view.zoom;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(((canvas.clientWidth * slide.height) / slide.width) * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio * scale, 0, 0, ratio * scale, -view.x * ratio * scale, -view.y * ratio * scale);
    context.imageSmoothingQuality = "high";
    context.drawImage(slide.image, 0, 0, slide.width, slide.height);
    const [low, high] = key === "std" ? [0, slide.spread_scale[state.gene]] : slide.scale[state.gene];
    panel.low.textContent = fixed(low, 1);
    panel.high.textContent = fixed(high, high < 1 ? 2 : 1);
    if (key === "draw") panel.what.textContent = `Draw ${state.draw + 1}`;
    const values = panelValues(key);
    const radius = Math.max(slide.radius, 1.3 / scale);
    context.globalAlpha = state.opacity;
    for (let i = 0; i < values.length; i++) {
      if (!isNumber(values[i])) continue;
      context.fillStyle = `rgb(${colourAt(table, values[i], low, high)})`;
      context.beginPath();
      context.arc(slide.x[i], slide.y[i], radius, 0, 2 * Math.PI);
      context.fill();
    }
    panel.view.classList.toggle("grab", view.zoom > 1);
  }
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawPanels();
  });
}

function zoomAt(factor, x, y) {
  const { view, slide } = state;
  const zoom = Math.max(1, Math.min(12, view.zoom * factor));
  view.x = x - ((x - view.x) * view.zoom) / zoom;
  view.y = y - ((y - view.y) * view.zoom) / zoom;
  view.zoom = zoom;
  moveView(0, 0);
  byId("zoom-out").disabled = byId("zoom-reset").disabled = zoom === 1;
  byId("zoom-in").disabled = zoom === 12;
  pointAt(null);
  if (slide) redraw();
}

function moveView(dx, dy) {
  const { view, slide } = state;
  view.x = Math.max(0, Math.min(slide.width * (1 - 1 / view.zoom), view.x + dx));
  view.y = Math.max(0, Math.min(slide.height * (1 - 1 / view.zoom), view.y + dy));
}

function pointAt(spot) {
  const { slide, view } = state;
  for (const panel of state.panels) {
    panel.ring.style.display = spot === null ? "none" : "block";
    if (spot === null) continue;
    const scale = baseScale(panel) * view.zoom;
    const size = Math.max(9, 2 * slide.radius * scale + 4);
    panel.ring.style.width = panel.ring.style.height = `${size}px`;
    panel.ring.style.left = `${(slide.x[spot] - view.x) * scale}px`;
    panel.ring.style.top = `${(slide.y[spot] - view.y) * scale}px`;
  }
  if (spot === null) hideTip();
}

function spotRows(spot) {
  const { slide } = state;
  const at = (values, digits = 2) => fixed(spotValues(values)[spot], digits);
  const rows = [["measured", at(slide.measured)]];
  if (slide.mean) rows.push(["predicted mean", at(slide.mean)]);
  if (slide.low) rows.push([slide.interval, `${at(slide.low)} to ${at(slide.high)}`]);
  if (slide.std) rows.push(["std of draws", at(slide.std)]);
  if (slide.draws.length) rows.push([`draw ${state.draw + 1}`, at(slide.draws[state.draw])]);
  return rows;
}

function listen(panel) {
  const { canvas } = panel;
  let drag = null;
  const position = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = baseScale(panel) * state.view.zoom;
    return [(event.clientX - box.left) / scale + state.view.x, (event.clientY - box.top) / scale + state.view.y];
  };
  const hover = (event) => {
    const { slide } = state;
    const [x, y] = position(event);
    const reach = Math.max(1.6 * slide.radius, 8 / (baseScale(panel) * state.view.zoom));
    let nearest = null;
    let least = reach * reach;
    for (let i = 0; i < slide.x.length; i++) {
      const distance = (slide.x[i] - x) ** 2 + (slide.y[i] - y) ** 2;
      if (distance < least) [nearest, least] = [i, distance];
    }
    pointAt(nearest);
    if (nearest !== null) showTip(event.clientX, event.clientY, `${slide.genes[state.gene]} · ${slide.barcodes[nearest]}`, spotRows(nearest));
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (state.view.zoom > 1) {
      drag = [event.clientX, event.clientY];
      canvas.setPointerCapture(event.pointerId);
    }
    hover(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return hover(event);
    const scale = baseScale(panel) * state.view.zoom;
    moveView((drag[0] - event.clientX) / scale, (drag[1] - event.clientY) / scale);
    drag = [event.clientX, event.clientY];
    pointAt(null);
    redraw();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (drag = null));
  onLeave(canvas, () => pointAt(null));
  canvas.addEventListener("dblclick", (event) => zoomAt(2, ...position(event)));
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoomAt(Math.exp(-event.deltaY / 200), ...position(event));
    },
    { passive: false },
  );
}

function drawGene() {
  const { slide, gene } = state;
  const scores = slide.genewise;
  const facts = [
    ["PCC", scores.pcc?.[gene]],
    ["RMSE", scores.rmse?.[gene]],
    ["90 % interval covers", scores.coverage_90?.[gene]],
    ["measured variance", scores.variance[gene]],
  ].filter(([, value]) => isNumber(value));
  const line = facts.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, fixed(value))));
  if (slide.mean && !isNumber(scores.pcc?.[gene])) line.unshift(make("span", {}, "PCC undefined: the measured gene is constant"));
  byId("gene-line").replaceChildren(make("strong", {}, slide.genes[gene]), ...line);
  hideTip();
  redraw();
}

function setUpSlideControls() {
  byId("opacity").addEventListener("input", (event) => {
    state.opacity = Number(event.target.value) / 100;
    redraw();
  });
  const step = (by) => {
    state.draw = (state.draw + by + state.slide.draws.length) % state.slide.draws.length;
    byId("draw-select").value = state.draw;
    redraw();
  };
  byId("draw-back").addEventListener("click", () => step(-1));
  byId("draw-next").addEventListener("click", () => step(1));
  byId("draw-select").addEventListener("change", (event) => {
    state.draw = Number(event.target.value);
    redraw();
  });
  const centre = () => [state.view.x + state.slide.width / state.view.zoom / 2, state.view.y + state.slide.height / state.view.zoom / 2];
  byId("zoom-in").addEventListener("click", () => zoomAt(1.6, ...centre()));
  byId("zoom-out").addEventListener("click", () => zoomAt(1 / 1.6, ...centre()));
  byId("zoom-reset").addEventListener("click", () => zoomAt(0, 0, 0));
  new ResizeObserver(redraw).observe(byId("panels"));
}

// ---------------------------------------------------------------- co-expression

const MATRICES = [
  { key: "measured", title: "Measured" },
  { key: "draws", title: "Draws" },
  { key: "mean", title: "Predicted mean" },
];

function buildMatrices() {
  const { slide } = state;
  const { coexpression: matrices, order } = slide;
  byId("coexpression").hidden = !matrices;
  state.matrices = [];
  if (!matrices) return;
  const size = order.length;
  state.matrices = MATRICES.filter(({ key }) => matrices[key]).map(({ key, title }) => {
    const scores = slide.coexpression_scores[key];
    const canvas = make("canvas", { width: size, height: size });
    const crosses = [make("div", { class: "cross" }), make("div", { class: "cross" })];
    const line = scores ? `r ${fixed(scores.r)} · RMSE ${fixed(scores.rmse, 3)} against measured` : `${size} genes, ${slide.x.length} spots`;
    const node = make("div", { class: "matrix" }, make("h3", {}, title), make("p", { class: "scores" }, line), make("div", { class: "view" }, canvas, ...crosses));
    const cell = (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor((offset / length) * size)));
      return [at(event.clientX - box.left, box.width), at(event.clientY - box.top, box.height)];
    };
    const hover = (event) => {
      const [column, row] = cell(event);
      for (const matrix of state.matrices) placeCross(matrix.crosses, column, row, size);
      const value = (values) => fixed(values[row * size + column]);
      const rows = MATRICES.filter((kind) => matrices[kind.key]).map((kind) => [kind.title.toLowerCase(), value(matrices[kind.key])]);
      showTip(event.clientX, event.clientY, `${slide.genes[order[row]]} × ${slide.genes[order[column]]}`, rows);
    };
    for (const name of ["pointermove", "pointerdown"]) canvas.addEventListener(name, hover);
    onLeave(canvas, () => {
      hideTip();
      hideCrosses();
    });
    canvas.addEventListener("click", (event) => chooseGene(order[cell(event)[1]], true));
    return { key, canvas, crosses, node };
  });
  byId("matrices").replaceChildren(...state.matrices.map((matrix) => matrix.node));
  paintMatrices();
}

function placeCross([horizontal, vertical], column, row, size) {
  const percent = (at) => `${(100 * (at + 0.5)) / size}%`;
  Object.assign(horizontal.style, { display: "block", left: "0", width: "100%", height: "1px", top: percent(row) });
  Object.assign(vertical.style, { display: "block", top: "0", height: "100%", width: "1px", left: percent(column) });
}

function hideCrosses() {
  for (const cross of state.matrices.flatMap((matrix) => matrix.crosses)) cross.style.display = "none";
}

function paintMatrices() {
  const table = tables.diverging;
  paintBar(byId("matrix-legend"), table);
  const blank = getComputedStyle(document.documentElement).getPropertyValue("--undefined").trim();
  const undefinedColour = [1, 3, 5].map((at) => parseInt(blank.slice(at, at + 2), 16));
  for (const { key, canvas } of state.matrices) {
    const values = state.slide.coexpression[key];
    const context = canvas.getContext("2d");
    const picture = context.createImageData(canvas.width, canvas.height);
    for (let i = 0; i < values.length; i++) {
      const rgb = isNumber(values[i]) ? colourAt(table, values[i], -1, 1) : undefinedColour;
      picture.data.set([...rgb, 255], 4 * i);
    }
    context.putImageData(picture, 0, 0);
  }
}

// ---------------------------------------------------------------- calibration

const FRAME = { width: 420, height: 330, left: 60, right: 12, top: 12, bottom: 42 };
const scaleX = (value) => FRAME.left + value * (FRAME.width - FRAME.left - FRAME.right);
const scaleY = (value) => FRAME.height - FRAME.bottom - value * (FRAME.height - FRAME.top - FRAME.bottom);
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${scaleX(x).toFixed(1)} ${scaleY(y).toFixed(1)}`).join("");

function chart(title, xLabel, yLabel, yTop, marks) {
  const svg = make("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", "aria-label": title });
  for (let i = 0; i <= 4; i++) {
    const at = i / 4;
    const x = scaleX(at);
    const y = scaleY(at);
    svg.append(
      make("line", { class: "axis", x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y, y2: y }),
      make("text", { x, y: FRAME.height - FRAME.bottom + 16, "text-anchor": "middle" }, fixed(at)),
      make("text", { x: FRAME.left - 7, y: y + 4, "text-anchor": "end" }, fixed(at * yTop, yTop < 0.5 ? 3 : 2)),
    );
  }
  svg.append(
    make("text", { x: scaleX(0.5), y: FRAME.height - 6, "text-anchor": "middle" }, xLabel),
    make("text", { transform: `translate(11 ${scaleY(0.5)}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
    ...marks,
  );
  return make("div", { class: "chart" }, make("h3", {}, title), svg);
}

// The next larger number that looks well beside a tick.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((factor) => factor * power >= value * (1 - 1e-9)) * power;
}

function hoverable(node, head, rows) {
  for (const name of ["pointermove", "pointerdown"]) {
    node.addEventListener(name, (event) => showTip(event.clientX, event.clientY, head, rows));
  }
  onLeave(node, hideTip);
  return node;
}

function drawCalibration() {
  const { calibration } = state.slide;
  byId("calibration").hidden = !calibration;
  if (!calibration) return;
  const points = (item) => item.nominal.map((nominal, i) => [nominal, item.empirical[i]]);
  const others = report.slides.map((slide) => slide.calibration).filter((item, i) => item && i !== state.index);
  const coverage = [
    make("path", { class: "guide", d: path([[0, 0], [1, 1]]) }),
    ...others.map((item) => make("path", { class: "others", d: path(points(item)) })),
    make("path", { class: "curve", d: path(points(calibration)) }),
    ...points(calibration).flatMap(([x, y]) => {
      const at = { cx: scaleX(x), cy: scaleY(y) };
      const target = make("circle", { class: "target", r: 11, ...at });
      return [make("circle", { class: "dot", r: 3, ...at }), hoverable(target, `${Math.round(100 * x)} % interval`, [["covers", `${fixed(100 * y, 1)} %`]])];
    }),
  ];
  const { ranks } = calibration;
  const even = 1 / ranks.length;
  const top = roundUp(Math.max(2 * even, 1.05 * Math.max(...ranks)) / 4) * 4;
  const columns = ranks.map((share, i) => {
    const x = scaleX(i / ranks.length);
    const box = { x: x + 0.75, width: scaleX((i + 1) / ranks.length) - x - 1.5 };
    const y = scaleY(share / top);
    const column = make("rect", { class: "column", ...box, y, height: scaleY(0) - y });
    const head = `Rank ${fixed(i / ranks.length)} to ${fixed((i + 1) / ranks.length)}`;
    return hoverable(column, head, [["share of values", fixed(share, 3)], ["if calibrated", fixed(even, 3)]]);
  });
  columns.push(make("path", { class: "guide", d: path([[0, even / top], [1, even / top]]) }));
  byId("charts").replaceChildren(
    chart("Coverage of central intervals", "nominal coverage", "share of measured values inside", 1, coverage),
    chart("Rank of the measured value among the draws", "0 = below every draw, 1 = above", "share of measured values", top, columns),
  );
}

// ---------------------------------------------------------------- choosing a slide

function writeCaptions() {
  const { slide } = state;
  const parts = [`${slide.name}: ${slide.x.length} spots, ${slide.genes.length} genes, values as ${slide.transform}.`];
  if (slide.n_draws) {
    const shown = slide.draws.length;
    parts.push(
      `${slide.n_draws} draw${slide.n_draws === 1 ? "" : "s"} a spot${shown < slide.n_draws ? `, the first ${shown} kept in this file; mean, spread and intervals use all` : ""}.`,
    );
  }
  if (slide.std) parts.push("Uncertainty is the standard deviation of the draws, on its own scale.");
  parts.push(
    slide.n_draws
      ? "Measured, mean and draw share one colour scale, from the 1st to the 99th percentile of the gene's measured and drawn values on this slide."
      : "The colours go from the 1st to the 99th percentile of the gene's measured values on this slide.",
  );
  if (slide.mean) parts.push("The page opens on the gene with the median PCC.");
  parts.push("Double-click or Ctrl + wheel zooms, dragging moves, the arrow keys in the gene list go through the genes.");
  byId("slide-caption").textContent = parts.join(" ");
  byId("coexpression-caption").textContent = [
    "Genes in the order of a hierarchical clustering of the measured matrix; grey: undefined, the gene is constant.",
    slide.n_draws ? "Draws: the average of every draw's own matrix; its r and RMSE are those of each single draw, averaged." : "",
    slide.mean ? "A mean prediction has less spread than the tissue, which inflates its correlations." : "",
    "Click a cell to see the gene of its row on the slide.",
  ].join(" ");
  byId("calibration-caption").textContent = [
    "Over all spots and genes of the slide, dotted: perfectly calibrated.",
    report.slides.length > 1 ? "Grey: the other slides." : "",
    "A curve under the diagonal or a U-shaped histogram means draws with too little spread; a slope in the histogram means bias.",
  ].join(" ");
}

async function chooseSlide(index) {
  const before = state.slide && state.slide.genes[state.gene];
  const slide = await loadSlide(index);
  if (Number(byId("slide-select").value) !== index) return; // another slide was chosen while this one was unpacked
  Object.assign(state, { slide, index, view: { zoom: 1, x: 0, y: 0 } });
  state.gene = Math.max(0, slide.genes.indexOf(before) >= 0 ? slide.genes.indexOf(before) : slide.first_gene);
  state.draw = Math.min(state.draw, Math.max(0, slide.draws.length - 1));
  byId("draw-select").replaceChildren(...slide.draws.map((_, i) => new Option(`${i + 1} of ${slide.draws.length}`, i)));
  byId("draw-select").value = state.draw;
  byId("draw-group").hidden = slide.draws.length < 2;
  buildPanels();
  zoomAt(1, 0, 0);
  listGenes();
  buildMatrices();
  drawCalibration();
  writeCaptions();
  chooseGene(state.gene, true);
  document.body.dataset.slide = slide.name;
}

function setUp() {
  fillSettings();
  setUpScores();
  if (!report.slides.length) {
    for (const id of ["slide", "coexpression", "calibration", "nav"]) byId(id).hidden = true;
    return;
  }
  report.slides.forEach((slide, i) => byId("slide-select").append(new Option(slide.name, i)));
  byId("slide-select").addEventListener("change", (event) => chooseSlide(Number(event.target.value)));
  setUpGenes();
  setUpSlideControls();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintMatrices);
  chooseSlide(0);
}

setUp();
