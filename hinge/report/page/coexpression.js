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
    const figure = `${title} correlations between ${size} genes${scores ? `, r ${fixed(scores.r)} against measured` : ""}`;
    const canvas = make("canvas", { width: size, height: size, role: "img", "aria-label": figure });
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
