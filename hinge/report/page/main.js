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
  buildGeneTable();
  buildRegions();
  writeCaptions();
  chooseGene(state.gene, true);
  byId("slide-verdict").textContent = report.slides.length > 1 && slide.verdict.length ? `${slide.name}: ${slide.verdict.join(" ")}` : "";
  document.body.dataset.slide = slide.name;
}

function setUp() {
  fillSettings();
  setUpScores();
  if (!report.slides.length) {
    for (const id of ["slide", "coexpression", "calibration", "genes", "regions", "nav"]) byId(id).hidden = true;
    return;
  }
  report.slides.forEach((slide, i) => byId("slide-select").append(new Option(slide.name, i)));
  byId("slide-select").addEventListener("change", (event) => chooseSlide(Number(event.target.value)));
  setUpGenes();
  setUpSlideControls();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintMatrices);
  chooseSlide(0);
}

// A printed page shows what is folded on the screen, in dark letters.
const opened = [];
addEventListener("beforeprint", () => {
  for (const node of document.querySelectorAll("details:not([open])")) {
    node.open = true;
    opened.push(node);
  }
  drawPanels();
});
addEventListener("afterprint", () => {
  for (const node of opened.splice(0)) node.open = false;
  redraw();
});

setUp();
