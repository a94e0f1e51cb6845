// Small multiples: one gene on all slides of the run, in one range.

import { TABLES, paintLegend, step } from "./colours.js";
import { Slide, quantile } from "./data.js";
import { byId, fixed, make } from "./page.js";

const SIDE_PX = 190;

function paint(canvas, slide, gene, table, [low, high]) {
  const ratio = devicePixelRatio || 1;
  canvas.width = canvas.height = SIDE_PX * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const { left, top, width, height } = slide.box;
  const factor = (SIDE_PX - 16) / Math.max(width + slide.pitch, height + slide.pitch, 1);
  const radius = Math.max(0.8, Math.max(slide.radius, 0.4 * slide.pitch) * factor);
  const [x0, y0] = [(SIDE_PX - factor * width) / 2 - factor * left, (SIDE_PX - factor * height) / 2 - factor * top];
  context.strokeStyle = "rgb(20 22 24 / .25)";
  context.lineWidth = 0.6;
  for (let spot = 0; spot < slide.barcodes.length; spot++) {
    context.fillStyle = `rgb(${table[step(gene.mean[spot], low, high)]})`;
    context.beginPath();
    context.arc(x0 + factor * slide.places[2 * spot], y0 + factor * slide.places[2 * spot + 1], radius, 0, 2 * Math.PI);
    context.fill();
    // light spots on a white card
    if (radius > 2) context.stroke();
  }
}

/** Show the predicted mean of a gene on all slides; `choose` gets the number of the slide that is clicked. */
export async function showCohort(slides, name, map, choose) {
  const dialog = byId("cohort-dialog");
  byId("cohort-title").textContent = `${name}, predicted mean on the slides of the run`;
  const grid = byId("cohort");
  grid.replaceChildren();
  byId("cohort-text").textContent = "Reading the slides …";
  dialog.showModal();
  const shown = [];
  const missing = [];
  for (const [number, label] of slides.entries()) {
    if (!dialog.open) return;
    const slide = await Slide.open(number);
    const index = slide.facts.genes.indexOf(name);
    if (index < 0) {
      missing.push(label);
      continue;
    }
    const gene = await slide.gene(index);
    const canvas = make("canvas", { role: "img", "aria-label": `${name} on ${label}` });
    const pcc = slide.facts.pcc?.[index];
    const button = make("button", { type: "button" }, canvas, make("span", {}, label), make("span", { class: "soft" }, pcc === undefined || pcc === null ? "" : `PCC ${fixed(pcc)}`));
    button.addEventListener("click", () => {
      dialog.close();
      choose(number);
    });
    grid.append(button);
    shown.push({ canvas, slide, gene });
    const all = shown.flatMap((each) => [...each.gene.mean]);
    const range = [quantile(all, 0.01), Math.max(quantile(all, 0.99), quantile(all, 0.01) + 1e-6)];
    for (const each of shown) paint(each.canvas, each.slide, each.gene, TABLES[map], range);
    [byId("cohort-low").textContent, byId("cohort-high").textContent] = [fixed(range[0]), `${fixed(range[1])} ${gene.unit}`];
    paintLegend(byId("cohort-legend"), TABLES[map]);
  }
  byId("cohort-text").textContent = `One range for all slides, 1st to 99th percentile. ${missing.length ? `Without ${name}: ${missing.join(", ")}.` : ""}`;
}
