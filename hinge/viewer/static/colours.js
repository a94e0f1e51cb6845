// Colour maps, all of even lightness and readable for colour-blind eyes; 25 stops between which is interpolated.

const STOPS = {
  // yellow to green stands out against haematoxylin and eosin, and its light end is not taken for a nucleus
  ylgn: "ffffe5f7fcb9d9f0a3addd8e78c67941ab5d238443006837004529",
  ylorbr: "ffffe5fff7bcfee391fec44ffe9929ec7014cc4c02993404662506",
  viridis: "440154471063481f70472d7b4439834046883b528b365d8d31688e2c728e287c8e24868e21918c1f9a8a20a48628ae8035b77948c16e5ec96275d05490d743addc30c8e020e5e419fde725",
  cividis: "00224e002a5f0031701a386f2a3f6d38476c434e6c4d556c575d6d61656f6a6c717374757d7c78868379918b789b9476a59c74b0a571bcae6cc6b667d2c060dec958e9d34ef6dd3ffee838",
  magma: "000004050416100b2d1d11472c115f3f0f7251127c601880721f81832681932b80a5317eb73779c73d73d8456ce75263f1605df8745cfc8961fd9b6bfeb078fec488fed799fdebacfcfdbf",
  inferno: "000004050417110a30210c4a320a5e450a6957106e67166e781c6d8a226a9a2865ab2f5ebc3754ca404ad84c3ee45a31ed6925f57b17f98e09fca108fbb61af9cb35f4df53f2f27dfcffa4",
  diverging: "0530612166ac4393c392c5ded1e5f0f7f7f7fddbc7f4a582d6604db2182b67001f",
};

export const MAPS = ["ylgn", "viridis", "cividis", "magma", "inferno"];

/** 256 colours as [r, g, b]. */
export const TABLES = Object.fromEntries(
  Object.entries(STOPS).map(([name, text]) => {
    const stops = text.match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    const table = Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1);
      const left = Math.min(Math.floor(at), stops.length - 2);
      return stops[left].map((value, c) => Math.round(value + (stops[left + 1][c] - value) * (at - left)));
    });
    return [name, table];
  }),
);

// the palette of Okabe and Ito, suitable for colour-blind readers, and lighter colours after the first eight
export const CATEGORIES = "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 505050 ffcd78 aad7f5 78cdb4 96aadc f0aa82 b8a9c9 8c6d31 a6761d".split(" ").map((hex) => `#${hex}`);

/** Red, green and blue of the genes in channels. */
export const CHANNELS = ["#e5383b", "#2fb344", "#4c7dff"];

export const step = (value, low, high) => Math.max(0, Math.min(255, Math.round(((value - low) / (high - low)) * 255)));

export function paintLegend(canvas, table) {
  canvas.width = 256;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(256, 1);
  table.forEach((rgb, x) => pixels.data.set([...rgb, 255], 4 * x));
  context.putImageData(pixels, 0, 0);
}

/** A grid of values as a canvas of one pixel a cell; what `shows` refuses is transparent. */
export function paintGrid(values, rows, columns, table, low, high, shows) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const shades = Uint32Array.from(table, ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r);
  const packed = new Uint32Array(pixels.data.buffer);
  values.forEach((value, cell) => (packed[cell] = shows(value) ? shades[step(value, low, high)] : 0));
  context.putImageData(pixels, 0, 0);
  return canvas;
}

const BINS = 38;

/** The legend of a pane: colours, and above them a histogram of the values that they stand for. */
export function paintHistogram(canvas, table, values, low, high, ink) {
  [canvas.width, canvas.height] = [2 * BINS, 18];
  const context = canvas.getContext("2d");
  const counts = new Array(BINS).fill(0);
  for (const value of values) if (!Number.isNaN(value)) counts[Math.max(0, Math.min(BINS - 1, Math.floor(((value - low) / (high - low)) * BINS)))]++;
  const most = Math.max(...counts, 1);
  context.fillStyle = ink;
  counts.forEach((count, i) => count && context.fillRect(2 * i, 10 - Math.max(1, (9 * count) / most), 2, Math.max(1, (9 * count) / most)));
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${table[Math.round((255 * x) / (canvas.width - 1))]})`;
    context.fillRect(x, 11, 1, 7);
  }
}
