// What the colours of a pane stand for: values of a gene, its map, a probability, novelty, genes in channels, a category.

import { CATEGORIES, CHANNELS, TABLES, paintGrid, step } from "./colours.js";
import { quantile, thinned } from "./data.js";

export const LAYERS = {
  measured: "Measured",
  mean: "Predicted mean",
  std: "Uncertainty (SD)",
  draw: "One draw",
  above: "P(above threshold)",
  map: "Smooth map",
  novelty: "Novelty",
  channels: "Genes in channels",
  label: "Category",
  image: "H&E alone",
};

/** Names of the layers that a slide has. */
export function layersOf({ measured, map, novel }) {
  const missing = { measured: !measured, map: !map, novelty: novel === null };
  return Object.keys(LAYERS).filter((name) => !missing[name]);
}

const LEVELS = 16; // of a channel's colour

/** Settings that all panes share. */
export class Display {
  map = "ylgn";
  clip = 1; // percentiles at either end that the colours leave out
  own = false; // each pane has its own range
  threshold = null; // of "above"; null for the middle of the gene's range
  channels = [null, null, null];
  label = null; // {name, labels, codes}
  low = null; // spots whose predicted mean is below are hidden
  high = null;
  brightness = 100;
}

export const thresholdOf = (gene, display) => display.threshold ?? Math.round(10 * (gene.scale[0] + gene.scale[1]) / 2) / 10;

function valuesOf(slide, gene, setting, display) {
  if (setting.layer === "draw") return gene.draw(setting.draw);
  if (setting.layer === "novelty") return slide.novelty;
  if (setting.layer !== "above") return gene[setting.layer];
  const threshold = thresholdOf(gene, display);
  const share = new Float32Array(gene.n);
  for (let number = 0; number < gene.count; number++) {
    for (let spot = 0; spot < gene.n; spot++) share[spot] += gene.value(gene.steps[number * gene.n + spot]) > threshold ? 1 : 0;
  }
  return share.map((sum) => sum / gene.count);
}

function rangeOf(gene, values, setting, display) {
  if (setting.layer === "above") return [0, 1];
  const ends = [display.clip / 100, 1 - display.clip / 100];
  if (setting.layer === "std") return [0, quantile(thinned(values), ends[1]) || 1];
  if (setting.layer === "novelty") return [0, Math.max(1, quantile(thinned(values), ends[1]))];
  const [low, high] = display.own ? ends.map((end) => quantile(thinned(values), end)) : gene.range(display.clip);
  return [low, high > low ? high : low + 1];
}

/** The smooth map of a gene, drawn as an image under no spots. */
function mapColours(slide, gene, display) {
  const none = { codes: new Uint16Array(slide.barcodes.length), css: [null], order: [] };
  const { map } = slide.facts;
  if (!gene.map) {
    const known = map.genes.includes(gene.index);
    return { ...none, legend: { text: known ? "reading the map …" : gene.index < 0 ? "the map holds single genes" : "the map lacks this gene" } };
  }
  const [low, high] = rangeOf(gene, gene.map, { layer: "map" }, display);
  const table = TABLES[display.map];
  const shows = (value) => value >= (display.low ?? -Infinity) && value <= (display.high ?? Infinity); // never NaN
  const grid = paintGrid(gene.map, map.rows, map.columns, table, low, high, shows);
  return { ...none, grid, legend: { low, high, table, values: gene.map, unit: `${gene.unit}, ${map.pitch_um} µm, ${map.method}` } };
}

/** Spots that the filter lets through. */
function kept(gene, display, n) {
  const spots = Uint32Array.from({ length: n }, (_, i) => i);
  if (!gene || (display.low === null && display.high === null)) return spots;
  return spots.filter((spot) => gene.mean[spot] >= (display.low ?? -Infinity) && gene.mean[spot] <= (display.high ?? Infinity));
}

/**
 * Colours of the spots: `codes` (n) into `css`, null for a ring, in the `order` in which they are drawn; the `legend` is
 * {low, high, table, values, unit} or {text, keys} with keys [name, colour]; a `grid` is an image that is drawn instead
 * of spots. Null where a pane shows neither.
 */
export function coloursOf(slide, gene, setting, display) {
  const n = slide.barcodes.length;
  const { layer } = setting;
  const codes = new Uint16Array(n);
  let [css, legend] = [[], {}];
  if (layer === "image") return null;
  if (layer === "label") {
    if (!display.label) return { codes, css: [null], order: [], legend: { text: "choose it in the tab Display" } };
    const { name, labels } = display.label;
    css = [...labels.map((_, i) => CATEGORIES[i % CATEGORIES.length]), null];
    display.label.codes.forEach((code, spot) => (codes[spot] = code < 0 ? labels.length : code));
    legend = { text: `${name}, ${labels.length} labels`, keys: labels.map((label, i) => [label, css[i]]) };
  } else if (layer === "channels") {
    const genes = display.channels.filter(Boolean);
    if (!genes.length) return { codes, css: [null], order: [], legend: { text: "choose genes in the tab Display" } };
    css = new Array(LEVELS ** 3);
    const levels = display.channels.map((one) => {
      if (!one) return new Uint8Array(n);
      const [low, high] = one.range(display.clip);
      return Uint8Array.from(one.mean, (value) => Math.round((step(value, low, high) / 255) * (LEVELS - 1)));
    });
    for (let spot = 0; spot < n; spot++) {
      const [r, g, b] = levels.map((level) => level[spot]);
      codes[spot] = (r * LEVELS + g) * LEVELS + b;
      css[codes[spot]] ??= `rgb(${mixed(r, g, b)})`;
    }
    const keys = display.channels.map((one, i) => one && [one.name, CHANNELS[i]]).filter(Boolean);
    legend = { text: display.channels.map((one, i) => one && `${["red", "green", "blue"][i]} ${one.name}`).filter(Boolean).join(" · "), keys };
  } else if (layer === "map") {
    return gene && mapColours(slide, gene, display);
  } else {
    if (!gene) return null;
    const values = valuesOf(slide, gene, setting, display);
    const [low, high] = rangeOf(gene, values, setting, display);
    // another map than the values', so that spread and probability are not taken for expression
    const others = { ylgn: "ylorbr", magma: "viridis", inferno: "viridis" };
    const table = TABLES[["std", "above", "novelty"].includes(layer) ? (others[display.map] ?? "magma") : display.map];
    css = [...table.map((rgb) => `rgb(${rgb})`), null];
    for (let spot = 0; spot < n; spot++) codes[spot] = Number.isNaN(values[spot]) ? 256 : step(values[spot], low, high);
    const unit = { above: `> ${thresholdOf(gene, display)} ${gene.unit}`, novelty: "above 1: unlike training" }[layer] ?? gene.unit;
    legend = { low, high, table, values, unit };
  }
  const order = kept(gene, display, n).sort((a, b) => codes[a] - codes[b]);
  return { codes, css, order, legend };
}

/** Colour of three channels from 0 to 15: their colours add up, from dark grey. */
function mixed(r, g, b) {
  const parts = [[229, 56, 59], [47, 179, 68], [76, 125, 255]];
  const levels = [r, g, b].map((level) => level / (LEVELS - 1));
  return [0, 1, 2].map((c) => Math.min(255, Math.round(24 + levels.reduce((sum, level, i) => sum + level * parts[i][c], 0))));
}
