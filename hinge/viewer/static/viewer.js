// Puts the page together: what is shown is in `state`, and in the address, so that a view can be kept.

import { drawStrip, interval, intervalName, showGene, showSpot } from "./charts.js";
import { showCohort } from "./cohort.js";
import { CoExpression } from "./coexpression.js";
import { MAPS, TABLES, paintLegend } from "./colours.js";
import { Slide, readJson } from "./data.js";
import { DisplayPanel } from "./displaypanel.js";
import { Drawing } from "./drawing.js";
import { GeneList } from "./genes.js";
import { byId, fixed, make } from "./page.js";
import { LAYERS, layersOf } from "./layers.js";
import { OutsideGenes } from "./outside.js";
import { Panes } from "./panes.js";
import { RegionPanel } from "./regionpanel.js";
import { countOf, encodeSpots, spotsIn } from "./regions.js";
import { saveCsv, savePng, saveSvg } from "./snapshot.js";

// OpenSeadragon would put a style into the page, which the page's policy forbids, unless it finds it there already
document.head.append(document.createElementNS("urn:none", "style"));
document.head.lastChild.setAttribute("data-openseadragon-mobile-css", "");

const KEYS = [
  ["/", "find a gene"],
  ["J  K", "next, previous gene of the list"],
  ["1 – 4", "number of panes"],
  ["L", "next layer of the pane last used"],
  ["[  ]", "previous, next draw"],
  ["+  −  0", "zoom in, out, all spots"],
  ["arrows", "pan"],
  ["shift + arrows", "from spot to spot"],
  ["H", "hide or show the spots"],
  ["T", "light or dark"],
  ["R", "draw a region with the lasso"],
  ["enter", "close a polygon"],
  ["esc", "let go of the spot or the drawing"],
];
const TABS = ["gene", "spot", "pairs", "regions", "display"];
const DEFAULTS = ["measured", "mean", "std", "draw"];

const state = { run: null, number: 0, slide: null, gene: null, wanted: 0, spot: -1, settings: [], tab: "gene", hidden: false };

const panes = new Panes(byId("panes"), { layer: () => (panes.paint(), remember()), hover, choose: chooseSpot, draw: (...event) => drawing.event(...event), close: () => drawing.finish(), moved: () => remember(), say: (text) => say(text) });
const outside = new OutsideGenes();
const genes = new GeneList((gene) => chooseGene(gene), (name) => outside.offer(name, state.run.title, state.slide.facts.name));
const pairs = new CoExpression((gene) => chooseGene(gene));

const display = new DisplayPanel(panes.display, {
  changed: () => {
    display.show(state.gene);
    panes.paint();
    remember();
  },
  layer: (name) => {
    // in the pane used last, unless another one shows it already
    if (!state.settings.some((setting) => setting.layer === name)) panes.leader.setting.layer = name;
  },
  gene: (gene) => showGeneOrSet(gene),
  say: (text) => say(text, true),
});

const REGION_COLOURS = { a: "#1d4ed8", b: "#c2410c" };
const drawing = new Drawing({
  changed: (corners) => {
    panes.drawing = corners;
    panes.mark(panes.hover, state.spot);
  },
  done: (corners) => {
    const polygons = [[corners]];
    const spots = spotsIn(state.slide, polygons);
    regions.setTool(null);
    if (countOf(spots)) regions.add([{ spots, polygons }]);
    else byId("spoken").textContent = "The region holds no spot.";
  },
});
const regions = new RegionPanel({
  say: (text) => say(text, true),
  chooseGene: (gene) => chooseGene(gene),
  tool: (tool) => {
    drawing.setTool(tool);
    panes.setTool(tool);
  },
  changed: () => {
    remember();
    panes.outlined = regions.regions.map((region) => [region, REGION_COLOURS[["a", "b"].find((role) => regions.chosen[role] === region)] ?? "#4b5563"]);
    panes.mark(panes.hover, state.spot);
  },
});

function say(text, note = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("note", note);
}

// ---------------------------------------------------------------- what is shown

async function chooseSlide(number, gene) {
  state.number = number;
  byId("slide").value = number;
  say("Reading the slide …");
  hover(-1);
  try {
    const slide = await Slide.open(number);
    if (state.number !== number) return;
    Object.assign(state, { slide, gene: null, spot: -1 });
    const names = slide.facts.genes;
    const wanted = names.indexOf(gene ?? state.name);
    for (const setting of state.settings) {
      if (!layersOf(slide.facts).includes(setting.layer)) setting.layer = "mean";
      setting.draw = Math.min(setting.draw, slide.facts.draws - 1);
    }
    panes.showSlide(slide);
    display.open(slide);
    genes.open(slide.facts);
    state.first = wanted >= 0 ? -1 : slide.facts.first_gene;
    say(slide.facts.note ?? "", true);
    await chooseGene(wanted >= 0 ? wanted : slide.facts.first_gene);
    await regions.open(slide);
    if (state.slide !== slide) return;
    display.setColumns(regions.columns);
    await recallShared();
    panes.paint();
    state.recalled = true;
    remember();
  } catch (error) {
    say(error.message);
  }
}

async function chooseGene(index) {
  const { slide } = state;
  state.wanted = index;
  genes.mark(index);
  try {
    const gene = await slide.gene(index);
    if (state.slide !== slide || state.wanted !== index) return; // another was chosen meanwhile
    showGeneOrSet(gene);
  } catch (error) {
    say(error.message);
  }
}

function showGeneOrSet(gene) {
  const { slide } = state;
  Object.assign(state, { gene, name: gene.name });
  panes.gene = gene;
  panes.paint();
  display.show(gene);
  showTab();
  remember();
  document.title = `${gene.name} · ${slide.facts.name} · hinge`;
  Object.assign(document.body.dataset, { gene: gene.name, slide: state.run.slides[state.number] });
  byId("spoken").textContent = `${gene.name} on ${slide.facts.name}`;
}

function showPanes(count, layers = []) {
  const first = state.slide && !state.slide.facts.measured ? DEFAULTS.slice(1) : DEFAULTS;
  while (state.settings.length < count) {
    const used = state.settings.map((setting) => setting.layer);
    const next = layers[state.settings.length] ?? first.find((layer) => !used.includes(layer)) ?? "draw";
    const same = state.settings.filter((setting) => setting.layer === "draw").length;
    state.settings.push({ layer: next, draw: next === "draw" && state.slide ? same % state.slide.facts.draws : 0 });
  }
  state.settings.length = count;
  [...byId("count").children].forEach((button, i) => button.setAttribute("aria-pressed", i + 1 === count));
  panes.arrange(state.settings);
  remember();
}

function chooseSpot(spot) {
  state.spot = spot;
  panes.mark(panes.hover, spot);
  if (spot >= 0) state.tab = "spot";
  showTab();
}

function showTab() {
  for (const name of TABS) {
    const chosen = name === state.tab;
    byId(`tab-${name}`).setAttribute("aria-selected", chosen);
    byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    byId(`panel-${name}`).hidden = !chosen;
  }
  const { slide, gene, tab } = state;
  if (!gene) return;
  if (tab === "gene") showGene(byId("panel-gene"), gene, gene.unit, noteOf(gene, slide.facts));
  else if (tab === "spot") showSpot(byId("panel-spot"), slide, gene, state.spot);
  else if (tab === "pairs" && gene.index < 0) slide.coexpression().then((found) => pairs.show(found, slide.facts.genes, found.genes[0]));
  else if (tab === "pairs") slide.coexpression().then((found) => state.slide === slide && pairs.show(found, slide.facts.genes, gene.index), (error) => say(error.message));
}

// ---------------------------------------------------------------- the spot under the pointer

const strip = make("canvas", { "aria-hidden": "true" });

function hover(spot, event) {
  if (panes.hover !== spot) panes.mark(spot, state.spot);
  const tip = byId("tip");
  tip.hidden = spot < 0 || !state.gene;
  if (tip.hidden) return;
  const { gene, slide } = state;
  const [low, high] = interval(gene.drawsAt(spot));
  const rows = [
    ["Measured", gene.measured ? fixed(gene.measured[spot]) : "–"],
    ["Predicted", `${fixed(gene.mean[spot])} ± ${fixed(gene.std[spot])}`],
    [intervalName(gene.count), `${fixed(low)} – ${fixed(high)}`],
    ...(slide.novelty ? [["Novelty", fixed(slide.novelty[spot])]] : []),
  ];
  tip.replaceChildren(
    make("div", { class: "head" }, make("span", {}, gene.name), make("span", {}, slide.barcodes[spot])),
    strip,
    make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
  );
  drawStrip(strip, gene, spot);
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 18 + box.width > innerWidth ? event.clientX - 18 - box.width : event.clientX + 18;
  const top = event.clientY + 18 + box.height > innerHeight ? event.clientY - 18 - box.height : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
}

function goToSpot(right, down) {
  const { slide, gene } = state;
  if (!gene) return;
  const middle = () => slide.spotAt(slide.box.left + slide.box.width / 2, slide.box.top + slide.box.height / 2, 3 * slide.pitch);
  const spot = state.spot >= 0 ? slide.neighbour(state.spot, right, down) : Math.max(0, middle());
  chooseSpot(spot);
  panes.reveal(spot);
  const pane = panes.leader;
  const [x, y] = pane.onScreen(spot);
  const box = pane.view.getBoundingClientRect();
  hover(spot, { clientX: box.left + x, clientY: box.top + y });
  const measured = gene.measured ? `measured ${fixed(gene.measured[spot])}, ` : "";
  byId("spoken").textContent = `Spot ${slide.barcodes[spot]}: ${measured}predicted ${fixed(gene.mean[spot])}, standard deviation ${fixed(gene.std[spot])}`;
}

// ---------------------------------------------------------------- settings

function setTheme(theme, keep = true) {
  document.documentElement.dataset.theme = theme;
  if (keep) {
    try {
      localStorage.setItem("hinge-theme", theme);
    } catch {
      // storage may be forbidden
    }
  }
  showTab();
  panes.paint();
  pairs.refresh();
}

const otherTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

function setHidden(hidden) {
  state.hidden = hidden;
  panes.setOpacity(hidden ? 0 : byId("opacity").value / 100);
}

const MOST_IN_ADDRESS = 3000; // characters of a region

async function remember() {
  const { gene, slide } = state;
  if (!gene || !state.recalled) return;
  const layers = state.settings.map(({ layer, draw }) => (layer === "draw" ? `draw${draw + 1}` : layer)).join(",");
  const { map, clip, own, threshold, channels, label, low, high, brightness } = panes.display;
  const name = gene.index < 0 ? slide.facts.genes[Math.max(0, state.wanted)] : gene.name;
  const found = new URLSearchParams({ slide: state.run.slides[state.number], gene: name, panes: layers, colours: map });
  if (panes.view) found.set("view", panes.view.join(","));
  if (clip !== 1 || own) found.set("range", `${clip}${own ? "own" : ""}`);
  if (threshold !== null) found.set("threshold", threshold);
  if (low !== null || high !== null) found.set("filter", `${low ?? ""},${high ?? ""}`);
  if (channels.some(Boolean)) found.set("channels", channels.map((one) => one?.name ?? "").join(" "));
  if (label) found.set("category", label.name);
  if (brightness !== 100) found.set("brightness", brightness);
  for (const role of ["a", "b"]) {
    const region = regions.chosen[role];
    const spots = region && (await encodeSpots(region.spots));
    if (region && spots.length < MOST_IN_ADDRESS) found.set(role, `${region.name} ${spots}`);
  }
  if (state.gene === gene && state.slide === slide) history.replaceState(null, "", `#${found}`);
}

const numberOr = (text, other) => (text !== null && text !== undefined && text !== "" && Number.isFinite(Number(text)) ? Number(text) : other);

function recall() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const text of (asked.get("panes") ?? "").split(",").slice(0, 4)) {
    const [, layer, draw] = /^([a-z]+)(\d{0,4})$/.exec(text) ?? [];
    if (layer in LAYERS) state.settings.push({ layer, draw: Math.max(0, Number(draw || 1) - 1) });
  }
  const shared = panes.display;
  if (MAPS.includes(asked.get("colours"))) shared.map = asked.get("colours");
  const view = (asked.get("view") ?? "").split(",").map(Number);
  if (view.length === 3 && view.every(Number.isFinite) && view[2] > 0) panes.wantedView = view;
  const range = asked.get("range") ?? "1";
  shared.own = range.endsWith("own");
  shared.clip = [0, 1, 2, 5].includes(parseFloat(range)) ? parseFloat(range) : 1;
  shared.threshold = numberOr(asked.get("threshold"), null);
  [shared.low, shared.high] = [0, 1].map((end) => numberOr((asked.get("filter") ?? "").split(",")[end], null));
  shared.brightness = Math.min(160, Math.max(40, numberOr(asked.get("brightness"), 100)));
  state.asked = asked;
  return { slide: Math.max(0, state.run.slides.indexOf(asked.get("slide"))), gene: asked.get("gene") };
}

/** What the address asks for on the first slide: category, channels, regions. */
async function recallShared() {
  const { asked } = state;
  if (!asked) return;
  state.asked = null;
  if (asked.get("category")) display.setCategory(asked.get("category"));
  const names = (asked.get("channels") ?? "").split(" ");
  for (const [i, name] of names.slice(0, 3).entries()) if (name) await display.setChannel(i, name, false);
  for (const role of ["a", "b"]) {
    const [, name, spots] = /^(.*) ([\w-]+)$/s.exec(asked.get(role) ?? "") ?? [];
    if (spots) await regions.recall(role, name, spots).catch((error) => say(error.message, true));
  }
  display.show(state.gene);
}

function noteOf(gene, facts) {
  if (facts.outside.includes(gene.index)) return "This gene is outside the panel: the backbone predicts it from the drawn panel, and no training slide measured it.";
  return gene.index === state.first ? firstGeneText(facts) : "";
}

const firstGeneText = (facts) => (facts.pcc?.some((pcc) => pcc !== null) ? "Opened first: its PCC is at the upper quartile of the genes." : "Opened first: it varies most.");

const nextLayer = () => {
  const setting = panes.leader.setting;
  const names = [...panes.leader.layer.options].map((option) => option.value);
  setting.layer = names[(names.indexOf(setting.layer) + 1) % names.length];
  panes.on.layer();
  byId("spoken").textContent = LAYERS[setting.layer];
};

function stepDraw(by) {
  for (const pane of panes.panes) if (pane.setting.layer === "draw") pane.stepDraw(by);
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  const typing = event.target.closest("input:not([type=range]), select, textarea, dialog[open]");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || !state.slide) return;
  const { key } = event;
  if (key in ARROWS) {
    if (event.target.closest("input, .pairs") || (event.target.closest("[role=tablist]") && !event.shiftKey)) return;
    if (event.shiftKey) goToSpot(...ARROWS[key]);
    else panes.pan(...ARROWS[key]);
  } else if (key === "/") byId("gene-search").select();
  else if (key === "j" || key === "k") chooseGene(genes.beside(key === "j" ? 1 : -1));
  else if ("1234".includes(key)) showPanes(Number(key));
  else if (key === "l") nextLayer();
  else if (key === "[" || key === "]") stepDraw(key === "]" ? 1 : -1);
  else if (key === "+" || key === "=") panes.zoom(1.5);
  else if (key === "-") panes.zoom(1 / 1.5);
  else if (key === "0") panes.fit();
  else if (key === "r") {
    state.tab = "regions";
    showTab();
    regions.setTool("lasso");
  } else if (key === "Enter" && drawing.tool) drawing.finish();
  else if (key === "h") setHidden(!state.hidden);
  else if (key === "t") otherTheme();
  else if (key === "?") byId("help-dialog").showModal();
  else if (key === "Escape") {
    hover(-1);
    if (drawing.tool) regions.setTool(null);
    else chooseSpot(-1);
  } else return;
  event.preventDefault();
}

async function setUp() {
  paintLegend(byId("pairs-legend"), TABLES.diverging);
  byId("keys").append(...KEYS.flatMap(([key, does]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, does)]));
  [...byId("count").children].forEach((button, i) => button.addEventListener("click", () => showPanes(i + 1)));
  for (const name of MAPS) byId("colours").append(new Option(name, name));
  byId("colours").addEventListener("change", (event) => {
    panes.display.map = event.target.value;
    panes.paint();
    remember();
  });
  byId("opacity").addEventListener("input", () => setHidden(false));
  byId("zoom-in").addEventListener("click", () => panes.zoom(1.5));
  byId("zoom-out").addEventListener("click", () => panes.zoom(1 / 1.5));
  byId("zoom-fit").addEventListener("click", () => panes.fit());
  byId("save-png").addEventListener("click", () => savePng(panes, state.slide, state.gene));
  byId("save-svg").addEventListener("click", () => saveSvg(panes, state.slide, state.gene));
  byId("save-csv").addEventListener("click", () => saveCsv(panes, state.slide, state.gene));
  byId("all-slides").addEventListener("click", () => state.gene?.index >= 0 && showCohort(state.run.slides, state.name, panes.display.map, chooseSlide));
  byId("theme").addEventListener("click", otherTheme);
  byId("help").addEventListener("click", () => byId("help-dialog").showModal());
  for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
  for (const name of TABS) {
    byId(`tab-${name}`).addEventListener("click", () => {
      state.tab = name;
      showTab();
    });
  }
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || event.shiftKey) return;
    state.tab = TABS[(TABS.indexOf(state.tab) + by + TABS.length) % TABS.length];
    showTab();
    byId(`tab-${state.tab}`).focus();
  });
  addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light", false));
  byId("slide").addEventListener("change", (event) => chooseSlide(Number(event.target.value)));
  try {
    state.run = await readJson("run.json");
  } catch (error) {
    return say(error.message);
  }
  byId("title").textContent = state.run.title;
  byId("all-slides").hidden = state.run.slides.length < 2;
  state.run.slides.forEach((name, i) => byId("slide").append(new Option(name, i)));
  const { slide, gene } = recall();
  byId("colours").value = panes.display.map;
  showPanes(state.settings.length || 2);
  await chooseSlide(slide, gene);
}

setUp();
