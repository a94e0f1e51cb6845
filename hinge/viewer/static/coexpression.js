// Heat maps of gene-gene correlations. In one square: measured above the diagonal, predicted below.

import { TABLES } from "./colours.js";
import { byId, colour, fixed } from "./page.js";

const MISSING = -128;
const CHOOSE = "A click on a row chooses its gene.";

export class HeatMap {
  /** `shows(row, column)` names the matrix of a cell; `on` has functions point(cell), choose(gene). */
  constructor(canvas, shows, on) {
    this.canvas = canvas;
    this.shows = shows;
    this.on = on;
    this.cell = null;
    canvas.addEventListener("pointermove", (event) => this.pairs && this.point(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("click", (event) => this.pairs && on.choose(this.pairs.genes[this.cellAt(event).row]));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  show(pairs, chosen) {
    this.pairs = pairs;
    this.chosen = pairs.genes.indexOf(chosen);
    this.cell = null;
    this.draw();
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = (place, length) => Math.max(0, Math.min(this.pairs.size - 1, Math.floor((place / length) * this.pairs.size)));
    return { row: at(event.clientY - box.top, box.height), column: at(event.clientX - box.left, box.width) };
  }

  key(event) {
    if (!this.pairs) return; // still on their way
    const [right, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] ?? [];
    const cell = this.cell ?? { row: Math.max(0, this.chosen), column: 0 };
    if (event.key === "Enter") this.on.choose(this.pairs.genes[cell.row]);
    else if (right === undefined) return;
    else {
      const within = (place) => Math.max(0, Math.min(this.pairs.size - 1, place));
      this.point({ row: within(cell.row + down), column: within(cell.column + right) });
    }
    event.preventDefault();
    event.stopPropagation();
  }

  point(cell) {
    this.cell = cell;
    this.on.point(cell);
    this.draw();
  }

  draw() {
    const { size } = this.pairs;
    const small = new OffscreenCanvas(size, size);
    const pixels = new ImageData(size, size);
    const missing = parseInt(colour("line").slice(1), 16);
    for (let row = 0; row < size; row++) {
      for (let column = 0; column < size; column++) {
        const matrix = this.pairs[this.shows(row, column)];
        const value = matrix ? matrix[row * size + column] : MISSING;
        const rgb = value === MISSING ? [missing >> 16, (missing >> 8) & 255, missing & 255] : TABLES.diverging[value + 128];
        pixels.data.set([...rgb, 255], 4 * (row * size + column));
      }
    }
    small.getContext("2d").putImageData(pixels, 0, 0);
    const ratio = devicePixelRatio || 1;
    const side = this.canvas.clientWidth;
    this.canvas.width = this.canvas.height = Math.max(1, Math.round(side * ratio));
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, side, side);
    const unit = side / size;
    context.strokeStyle = "#111";
    context.lineWidth = 1;
    if (this.chosen >= 0) {
      context.strokeRect(-1, this.chosen * unit, side + 2, unit);
      context.strokeRect(this.chosen * unit, -1, unit, side + 2);
    }
    if (this.cell) {
      context.lineWidth = 2;
      context.strokeRect(this.cell.column * unit - 1, this.cell.row * unit - 1, unit + 2, unit + 2);
    }
  }
}

/** The sentence on a cell. */
export function describe(pairs, names, cell) {
  if (!cell) return "";
  const value = (name) => {
    const found = pairs[name]?.[cell.row * pairs.size + cell.column] ?? MISSING;
    return found === MISSING ? "–" : fixed(found / 127);
  };
  const head = `${names[pairs.genes[cell.row]]} and ${names[pairs.genes[cell.column]]}`;
  return pairs.measured ? `${head}: measured ${value("measured")}, predicted ${value("predicted")}` : `${head}: predicted ${value("predicted")}`;
}

/** The square beside the slide and the two of the dialog. */
export class CoExpression {
  constructor(choose) {
    const triangle = (row, column) => (row === column ? "predicted" : row < column && this.pairs.measured ? "measured" : "predicted");
    const on = (text, others) => ({
      choose,
      point: (cell) => {
        byId(text).textContent = describe(this.pairs, this.names, cell) || (text === "pairs-text" ? this.hint : CHOOSE);
        for (const other of others()) {
          other.cell = cell;
          other.draw();
        }
      },
    });
    this.small = new HeatMap(byId("pairs"), triangle, on("pairs-text", () => []));
    this.large = [
      new HeatMap(byId("pairs-measured"), () => "measured", on("pairs-large-text", () => [this.large[1]])),
      new HeatMap(byId("pairs-predicted"), () => "predicted", on("pairs-large-text", () => [this.large[0]])),
    ];
    byId("pairs-enlarge").addEventListener("click", () => {
      byId("pairs-dialog").showModal();
      byId("pairs-large-text").textContent = CHOOSE;
      this.refresh();
    });
  }

  show(pairs, names, gene) {
    [this.pairs, this.names, this.gene] = [pairs, names, gene];
    this.hint = pairs.measured ? "Above the diagonal measured, below it predicted." : "Mean over the draws; nothing was measured.";
    byId("pairs-text").textContent = this.hint;
    byId("pairs-enlarge").hidden = !pairs.measured;
    const { r, rmse } = pairs.scores;
    const few = pairs.size < names.length ? `, the ${pairs.size} most varying` : "";
    byId("pairs-scores").textContent = r === undefined ? `${pairs.size} genes${few}` : `${pairs.size} genes${few} · r ${fixed(r)} · RMSE ${fixed(rmse)}`;
    for (const [id, what] of [["pairs", "measured and predicted"], ["pairs-measured", "measured"], ["pairs-predicted", "predicted"]]) {
      byId(id).setAttribute("aria-label", `Correlations of ${pairs.size} genes, ${what}; arrow keys move, enter chooses a gene`);
      byId(id).setAttribute("role", "application");
    }
    this.refresh();
  }

  refresh() {
    if (!this.pairs) return;
    if (byId("pairs").clientWidth) this.small.show(this.pairs, this.gene);
    if (byId("pairs-dialog").open) for (const map of this.large) map.show(this.pairs, this.gene);
  }
}
