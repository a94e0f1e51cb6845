// Charts beside the slide: a gene's measured and predicted values, a spot's draws.

import { quantile } from "./data.js";
import { colour, ends, facts, fixed, make } from "./page.js";

const FONT = "11px system-ui, sans-serif";

function axes(x, y) {
  const shared = () => ({ stroke: colour("soft"), font: FONT, labelFont: FONT, grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, labelGap: 0 });
  return [
    { ...shared(), label: x, size: 24, labelSize: 18, gap: 4, grid: { show: false } },
    { ...shared(), label: y, size: 34, labelSize: 18, gap: 4 },
  ];
}

const plain = { legend: { show: false }, cursor: { show: false }, padding: [8, 8, 0, 0] };
let charts = [];

/** Draw a chart into an element that is on the page; the one that was there is given up. */
function chart(parent, options, data) {
  charts = charts.filter((each) => each.root.isConnected || (each.destroy(), false));
  const { clientWidth: width, clientHeight: height } = parent;
  if (width) charts.push(new uPlot({ ...plain, ...options, width, height }, data, parent));
}

function pearson(a, b) {
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    ab += (a[i] - ma) * (b[i] - mb);
    aa += (a[i] - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  }
  return aa && bb ? ab / Math.sqrt(aa * bb) : NaN;
}

// Where 90 % of further draws would fall; fewer than 19 draws do not reach so far out, and give their range.
export const interval = (draws) => {
  const outer = draws.length >= 19 ? 0.05 : 0;
  return [quantile(draws, outer), quantile(draws, 1 - outer)];
};
export const intervalName = (count) => (count >= 19 ? "90 % of draws" : "Range of draws");

export function showGene(parent, gene, transform, note = "") {
  const known = gene.measured ? [...gene.measured.keys()].filter((i) => !Number.isNaN(gene.measured[i])) : [];
  const heading = make("div", { class: "heading" }, gene.name);
  const figure = make("div", { class: "chart", role: "img" });
  const average = (values) => [...values].reduce((sum, value) => sum + value, 0) / values.length;
  if (!known.length) {
    const numbers = [["Mean", fixed(average(gene.mean))], ["Mean SD", fixed(average(gene.std))]];
    const bins = 24;
    const [low, high] = ends(gene.scale);
    parent.replaceChildren(heading, facts(numbers), figure, make("p", { class: "caption" }, `Predicted mean over the spots; no measured values. ${note}`));
    return histogram(figure, gene.mean, low, high, bins, `${transform}`, null);
  }
  const [x, y] = [gene.measured, gene.mean].map((values) => known.map((i) => values[i]));
  let [inside, squares] = [0, 0];
  known.forEach((spot, i) => {
    const [low, high] = interval(gene.drawsAt(spot));
    inside += x[i] >= low && x[i] <= high;
    squares += (x[i] - y[i]) ** 2;
  });
  const numbers = [
    ["PCC", fixed(pearson(x, y))],
    ["RMSE", fixed(Math.sqrt(squares / known.length))],
    [gene.count >= 19 ? "In 90 %" : "In range", `${Math.round((100 * inside) / known.length)} %`],
    ["Mean SD", fixed(average(gene.std))],
  ];
  figure.setAttribute("aria-label", `${gene.name}: measured and predicted values of ${known.length} spots, correlation ${fixed(pearson(x, y))}`);
  parent.replaceChildren(heading, facts(numbers), figure, make("p", { class: "caption" }, `One dot a spot, ${transform}. On the line, both are equal. ${note}`));
  const order = known.map((_, i) => i).sort((a, b) => x[a] - x[b]);
  const [low, high] = ends(x, y);
  const rim = 0.04 * (high - low || 1);
  const range = [low - rim, high + rim];
  const shades = { show: true, size: known.length > 2000 ? 2 : 4, width: 0, fill: `${colour("accent")}${known.length > 2000 ? "66" : "99"}` };
  chart(
    figure,
    {
      scales: { x: { time: false, range: () => range }, y: { range: () => range } },
      axes: axes("measured", "predicted mean"),
      series: [
        {},
        { stroke: colour("strong"), width: 1, points: { show: false } },
        { stroke: "transparent", paths: () => null, points: shades },
      ],
    },
    [order.map((i) => x[i]), order.map((i) => x[i]), order.map((i) => y[i])],
  );
}

function histogram(parent, values, low, high, bins, label, measured) {
  const width = (high - low || 1) / bins;
  const counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.max(0, Math.min(bins - 1, Math.floor((value - low) / width)))]++;
  const line = (plot) => {
    if (measured === null || Number.isNaN(measured)) return;
    const x = plot.valToPos(measured, "x", true);
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour("mark");
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
  };
  const rim = 0.03 * (high - low || 1);
  chart(
    parent,
    {
      scales: { x: { time: false, range: () => [low - rim, high + rim] }, y: { range: (_, least, most) => [0, Math.max(1, most) * 1.08] } },
      axes: axes(label, measured === null ? "spots" : "draws"),
      series: [{}, { stroke: "transparent", fill: `${colour("accent")}bb`, width: 0, points: { show: false }, paths: uPlot.paths.bars({ size: [0.9, 40] }) }],
      hooks: { draw: [line] },
    },
    [counts.map((_, i) => low + (i + 0.5) * width), counts],
  );
}

export function showSpot(parent, slide, gene, spot) {
  if (spot < 0 || !gene) {
    parent.replaceChildren(make("p", { class: "empty" }, "Click a spot, or go from spot to spot with shift and the arrow keys."));
    return;
  }
  const draws = gene.drawsAt(spot);
  const [low, high] = interval(draws);
  const measured = gene.measured ? gene.measured[spot] : NaN;
  const figure = make("div", { class: "chart", role: "img", "aria-label": `Draws of ${gene.name} in this spot` });
  const numbers = [
    ["Measured", fixed(measured)],
    ["Predicted", fixed(gene.mean[spot])],
    ["SD", fixed(gene.std[spot])],
    [gene.count >= 19 ? "90 %" : "Range", `${fixed(low)} – ${fixed(high)}`],
    ...(slide.novelty ? [["Novelty", fixed(slide.novelty[spot])]] : []),
  ];
  const novel = slide.novelty?.[spot] > 1 ? " The image of this spot is unlike the training slides (novelty above 1)." : "";
  const caption = `${gene.name}, ${gene.count} draws${Number.isNaN(measured) ? "" : "; the line is the measured value"}.${novel}`;
  parent.replaceChildren(make("div", { class: "heading" }, slide.barcodes[spot]), facts(numbers), figure, make("p", { class: "caption" }, caption));
  histogram(figure, draws, ...ends(draws, gene.scale, [measured]), 20, gene.unit, measured);
}

/** The draws of a spot as dots on a line, small enough for a tooltip. */
export function drawStrip(canvas, gene, spot) {
  const ratio = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const draws = gene.drawsAt(spot);
  const measured = gene.measured ? gene.measured[spot] : NaN;
  const [low, high] = ends(draws, gene.scale, [gene.mean[spot], measured]);
  const place = (value) => 5 + ((value - low) / (high - low || 1)) * (width - 10);
  const floor = height - 13;
  const size = draws.length > 40 ? 1.6 : 2.4;
  const piles = new Map();
  context.fillStyle = colour("accent");
  for (const value of draws) {
    const pile = Math.round(place(value) / (2 * size));
    const up = piles.get(pile) ?? 0;
    piles.set(pile, up + 1);
    context.beginPath();
    context.arc(pile * 2 * size, Math.max(size, floor - size - 1 - up * 2 * size), size, 0, 2 * Math.PI);
    context.fill();
  }
  context.fillStyle = colour("strong");
  context.fillRect(0, floor, width, 1);
  if (!Number.isNaN(measured)) {
    context.fillStyle = colour("mark");
    context.fillRect(place(measured) - 1, 0, 2, floor + 4);
  }
  context.font = "10px system-ui, sans-serif";
  context.fillStyle = colour("soft");
  context.textBaseline = "bottom";
  context.fillText(fixed(low, 1), 0, height);
  context.textAlign = "right";
  context.fillText(fixed(high, 1), width, height);
}
