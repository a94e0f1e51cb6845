// Reads the viewer's files. Arrays (.bin) are little-endian and deflated; a gene is fetched when it is looked at.

const GENES_KEPT = 60;

async function get(path) {
  const response = await fetch(path);
  if (response.ok) return response;
  let message = `${path} cannot be read (${response.status})`;
  try {
    message = (await response.json()).error ?? message;
  } catch {
    // no sentence came with it
  }
  throw new Error(message);
}

export const readJson = async (path) => (await get(path)).json();

async function readBytes(path) {
  const deflated = await (await get(path)).blob();
  return new Response(deflated.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

// Value of each of the 65,536 half-precision numbers.
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

/** Value below which a share of some values lies; NaN is left out. */
export function quantile(values, share) {
  const known = Float32Array.from(values).filter((value) => !Number.isNaN(value)).sort();
  if (!known.length) return NaN;
  const at = share * (known.length - 1);
  const left = Math.floor(at);
  return known[left] + (known[Math.min(left + 1, known.length - 1)] - known[left]) * (at - left);
}

const MOST_FOR_SCALE = 60000;
export const thinned = (values) => {
  const stride = Math.ceil(values.length / MOST_FOR_SCALE);
  return stride === 1 ? values : values.filter((_, i) => i % stride === 0);
};

class Gene {
  constructor(slide, index, buffer) {
    const { spots: n, draws: count, measured } = slide.facts;
    this.index = index;
    this.name = slide.facts.genes[index];
    this.unit = slide.facts.transform;
    this.ranges = new Map();
    if (!buffer) return; // a gene set, which fills itself
    const view = new DataView(buffer);
    this.low = view.getFloat32(0, true);
    this.high = view.getFloat32(4, true);
    let at = 8;
    const halves = () => {
      const values = Float32Array.from({ length: n }, (_, i) => HALVES[view.getUint16(at + 2 * i, true)]);
      at += 2 * n;
      return values;
    };
    this.measured = measured ? halves() : null;
    this.mean = halves();
    this.std = halves();
    this.steps = new Uint8Array(buffer, at, n * count);
    this.count = count;
    this.n = n;
    this.scale = this.range(1);
  }

  /** Range of measured values, mean and draws together, without some percentiles at either end. */
  range(clip) {
    if (!this.ranges.has(clip)) {
      const shared = [this.measured, this.mean].filter(Boolean).flatMap((values) => [...thinned(values)]);
      for (const value of thinned(this.steps)) shared.push(this.value(value));
      const [low, high] = [quantile(shared, clip / 100), quantile(shared, 1 - clip / 100)];
      this.ranges.set(clip, [low, high > low ? high : low + 1]);
    }
    return this.ranges.get(clip);
  }

  value(step) {
    return this.low + (step / 255) * (this.high - this.low);
  }

  /** One draw, a value for each spot. */
  draw(number) {
    return Float32Array.from({ length: this.n }, (_, spot) => this.value(this.steps[number * this.n + spot]));
  }

  /** All draws of one spot. */
  drawsAt(spot) {
    return Float32Array.from({ length: this.count }, (_, number) => this.value(this.steps[number * this.n + spot]));
  }
}

/**
 * A gene set as a gene: the mean of its genes, each scaled to mean 0 and standard deviation 1 of its predicted mean over
 * the spots. Measured values and draws are scaled by the same numbers.
 */
export class GeneSet extends Gene {
  constructor(slide, name, genes) {
    const { spots: n, draws: count } = slide.facts;
    const scaled = genes
      .map((gene) => {
        const centre = gene.mean.reduce((sum, value) => sum + value, 0) / n;
        const spread = Math.sqrt(gene.mean.reduce((sum, value) => sum + (value - centre) ** 2, 0) / n);
        return { gene, centre, spread };
      })
      .filter(({ spread }) => spread > 1e-9);
    const average = (values) => Float32Array.from({ length: n }, (_, spot) => scaled.reduce((sum, { gene, centre, spread }) => sum + (values(gene, spot) - centre) / spread, 0) / scaled.length);
    const draws = Array.from({ length: count }, (_, number) => average((gene, spot) => gene.value(gene.steps[number * n + spot])));
    super(slide, -1, null);
    this.name = name;
    this.unit = "scaled";
    this.n = n;
    this.count = count;
    this.size = scaled.length;
    this.measured = genes[0]?.measured ? average((gene, spot) => gene.measured[spot]) : null;
    this.mean = average((gene, spot) => gene.mean[spot]);
    this.std = Float32Array.from({ length: n }, (_, spot) => {
      const centre = draws.reduce((sum, draw) => sum + draw[spot], 0) / count;
      return Math.sqrt(draws.reduce((sum, draw) => sum + (draw[spot] - centre) ** 2, 0) / count);
    });
    const ends = draws.map((draw) => draw.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]));
    [this.low, this.high] = [Math.min(...ends.map(([low]) => low)), Math.max(...ends.map(([, high]) => high))];
    this.steps = new Uint8Array(n * count);
    draws.forEach((draw, number) => draw.forEach((value, spot) => (this.steps[number * n + spot] = Math.round((255 * (value - this.low)) / (this.high - this.low || 1)))));
    this.scale = this.range(1);
  }
}

export class Slide {
  static async open(number) {
    const slide = new Slide();
    slide.path = `slides/${number}/`;
    const [facts, barcodes, places] = await Promise.all([
      readJson(`${slide.path}slide.json`),
      readJson(`${slide.path}barcodes.json`),
      readBytes(`${slide.path}spots.bin`),
    ]);
    slide.facts = facts;
    slide.barcodes = barcodes;
    slide.places = new Float32Array(places); // x, y, x, y …
    slide.novelty = facts.novel === null ? null : new Float32Array(await readBytes(`${slide.path}novelty.bin`));
    slide.genes = new Map();
    slide.#arrange();
    return slide;
  }

  /** A gene's values; the last few asked for are kept. */
  gene(index) {
    let gene = this.genes.get(index);
    this.genes.delete(index);
    gene ??= readBytes(`${this.path}genes/${index}.bin`).then((buffer) => new Gene(this, index, buffer));
    gene.catch(() => this.genes.delete(index));
    this.genes.set(index, gene);
    if (this.genes.size > GENES_KEPT) this.genes.delete(this.genes.keys().next().value);
    return gene;
  }

  /** Read the smooth map of a gene into `gene.map`; undefined where it is there already, or there is none. */
  readMap(gene) {
    if (gene.map || !this.facts.map?.genes.includes(gene.index)) return undefined;
    gene.reading ??= readBytes(`${this.path}map/${gene.index}.bin`).then((buffer) => {
      gene.map = Float32Array.from(new Uint16Array(buffer), (bits) => HALVES[bits]);
    });
    gene.reading.catch(() => (gene.reading = undefined));
    return gene.reading;
  }

  coexpression() {
    this.pairs ??= readBytes(`${this.path}coexpression.bin`).then((buffer) => {
      const { genes, matrices, scores } = this.facts.coexpression;
      const size = genes.length ** 2;
      const found = { genes, scores, size: genes.length };
      matrices.forEach((name, i) => (found[name] = new Int8Array(buffer, i * size, size)));
      return found;
    });
    return this.pairs;
  }

  // Spots by squares of about their distance, so that the one under the pointer is found among a million.
  #arrange() {
    const n = this.barcodes.length;
    const [xs, ys] = [0, 1].map((axis) => Float32Array.from({ length: n }, (_, i) => this.places[2 * i + axis]));
    const range = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    const [[left, right], [top, bottom]] = [range(xs), range(ys)];
    this.box = { left, top, width: right - left, height: bottom - top };
    this.pitch = Math.sqrt((Math.max(this.box.width, 1) * Math.max(this.box.height, 1)) / n) || 1;
    this.radius = (this.facts.spot_diameter_px ?? this.pitch * 0.55) / 2;
    this.squares = new Map();
    for (let i = 0; i < n; i++) {
      const key = this.#square(xs[i], ys[i]);
      if (!this.squares.has(key)) this.squares.set(key, []);
      this.squares.get(key).push(i);
    }
  }

  #square(x, y, right = 0, down = 0) {
    const column = Math.floor((x - this.box.left) / this.pitch) + right;
    const row = Math.floor((y - this.box.top) / this.pitch) + down;
    return row * 2 ** 20 + column;
  }

  /** Nearest spot to a place in image pixels, at most `reach` away; -1 for none. */
  spotAt(x, y, reach) {
    const squares = Math.min(3, Math.ceil(reach / this.pitch));
    let [best, nearest] = [-1, reach ** 2];
    for (let down = -squares; down <= squares; down++) {
      for (let right = -squares; right <= squares; right++) {
        for (const i of this.squares.get(this.#square(x, y, right, down)) ?? []) {
          const distance = (this.places[2 * i] - x) ** 2 + (this.places[2 * i + 1] - y) ** 2;
          if (distance <= nearest) [best, nearest] = [i, distance];
        }
      }
    }
    return best;
  }

  /** The next spot from one in a direction (right, down as -1, 0, 1); itself where there is none. */
  neighbour(spot, right, down) {
    const [x, y] = [this.places[2 * spot], this.places[2 * spot + 1]];
    let [best, nearest] = [spot, Infinity];
    for (let i = 0; i < this.barcodes.length; i++) {
      const [dx, dy] = [this.places[2 * i] - x, this.places[2 * i + 1] - y];
      const along = dx * right + dy * down;
      const aside = Math.abs(dx * down) + Math.abs(dy * right);
      if (along <= 0 || aside > along) continue;
      if (along + 2 * aside < nearest) [best, nearest] = [i, along + 2 * aside];
    }
    return best;
  }
}
