// What is shown, as PNG, SVG and CSV: the panes with titles, legends and scale bars.

import { download, fixed } from "./page.js";
import { LAYERS } from "./layers.js";

const HEAD_PX = 44;
const FONT = "system-ui, sans-serif";

const titleOf = (pane, gene) => {
  const { layer, draw } = pane.setting;
  const name = layer === "draw" ? `Draw ${draw + 1}` : LAYERS[layer];
  return ["image", "label", "channels", "novelty"].includes(layer) ? name : `${name} of ${gene?.name ?? ""}`;
};

const KEYS_SHOWN = 8; // labels in a legend; their names are cut to KEY_LENGTH
const KEY_LENGTH = 16;
const keysOf = ({ legend } = {}) =>
  (legend?.keys ?? []).slice(0, KEYS_SHOWN).map(([name, shade]) => [name.length > KEY_LENGTH ? `${name.slice(0, KEY_LENGTH - 1)}…` : name, shade]);

const legendText = ({ legend }) => (legend?.table ? `${fixed(legend.low)} to ${fixed(legend.high)} ${legend.unit}` : (legend?.text ?? ""));

/** Place of each pane on the sheet. */
function sheetOf(panes) {
  const outer = panes.parent.getBoundingClientRect();
  const boxes = panes.panes.map((pane) => {
    const box = pane.view.getBoundingClientRect();
    return { pane, left: box.left - outer.left, top: box.top - outer.top - 40 + HEAD_PX - 4, width: box.width, height: box.height };
  });
  return { boxes, width: outer.width, height: outer.height + 40 };
}

export async function savePng(panes, slide, gene) {
  const { boxes, width, height } = sheetOf(panes);
  const ratio = Math.max(2, devicePixelRatio || 1);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  for (const { pane, ...box } of boxes) {
    context.save();
    context.beginPath();
    context.rect(box.left, box.top, box.width, box.height);
    context.clip();
    context.drawImage(pane.viewer.drawer.canvas, box.left, box.top, box.width, box.height);
    context.globalAlpha = panes.opacity;
    context.drawImage(pane.spotCanvas(), box.left, box.top, box.width, box.height);
    context.globalAlpha = 1;
    context.drawImage(pane.marks, box.left, box.top, box.width, box.height);
    context.restore();
    const scale = pane.scaleBar();
    if (scale) {
      context.fillStyle = "rgb(255 255 255 / .85)";
      context.fillRect(box.left + 6, box.top + box.height - 32, scale.px + 14, 26);
      context.fillStyle = "#111";
      context.fillRect(box.left + 12, box.top + box.height - 12, scale.px, 2.5);
      context.font = `11px ${FONT}`;
      context.fillText(scale.text, box.left + 12, box.top + box.height - 17);
    }
    context.fillStyle = "#111";
    context.font = `600 13px ${FONT}`;
    context.fillText(titleOf(pane, gene), box.left, box.top - 22);
    context.font = `11px ${FONT}`;
    const { legend } = pane.colours ?? {};
    if (legend?.table) legend.table.forEach((rgb, i) => ((context.fillStyle = `rgb(${rgb})`), context.fillRect(box.left + (i * 90) / 256, box.top - 14, 1, 8)));
    context.fillStyle = "#333";
    const keys = keysOf(pane.colours);
    if (!keys.length) context.fillText(legendText(pane.colours ?? {}), box.left + (legend?.table ? 98 : 0), box.top - 6);
    let left = box.left;
    for (const [name, shade] of keys) {
      context.fillStyle = shade;
      context.fillRect(left, box.top - 14, 8, 8);
      context.fillStyle = "#333";
      context.fillText(name, left + 12, box.top - 6);
      left += 24 + context.measureText(name).width;
    }
  }
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  download(`${slide.facts.name} ${gene?.name ?? ""}.png`, blob);
}

/** Outlines of the regions as SVG, of those without polygons rings around the spots. */
function outlinesOf(panes, slide, place, factor) {
  const radius = Math.max(slide.radius * factor, 2) + 1.5;
  return panes.outlined.map(([{ polygons, spots }, colour]) => {
    const rings = polygons.flat().map((ring) => `M${ring.map((corner) => place(...corner)).join("L")}Z`);
    const circles = polygons.length ? [] : [...spots.keys()].filter((spot) => spots[spot]).map((spot) => {
      const [x, y] = place(slide.places[2 * spot], slide.places[2 * spot + 1]);
      return `M${x - radius} ${y}a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 ${-2 * radius} 0`;
    });
    return `<path d="${[...rings, ...circles].join("")}" fill="none" stroke="${colour}" stroke-width="2"/>`;
  });
}

const escaped = (text) => String(text).replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

export function saveSvg(panes, slide, gene) {
  const { boxes, width, height } = sheetOf(panes);
  const parts = boxes.map(({ pane, left, top, width: w, height: h }, number) => {
    const image = pane.viewer.drawer.canvas.toDataURL("image/jpeg", 0.9);
    const { factor, left: x0, top: y0 } = pane.placing();
    const radius = Math.max(slide.radius * factor, 0.7);
    const { codes, css, order, legend, grid } = pane.colours ?? { order: [] };
    const { map } = slide.facts;
    const smooth = grid
      ? `<image href="${grid.toDataURL()}" x="${x0 + factor * map.left}" y="${y0 + factor * map.top}" width="${factor * map.cell_px * map.columns}" height="${factor * map.cell_px * map.rows}" preserveAspectRatio="none"/>`
      : "";
    const circles = [...order].flatMap((spot) => {
      const [x, y] = [x0 + factor * slide.places[2 * spot], y0 + factor * slide.places[2 * spot + 1]];
      if (x < -radius || y < -radius || x > w + radius || y > h + radius) return [];
      const look = css[codes[spot]] ? `fill="${css[codes[spot]]}"` : 'fill="none" stroke="#8a8d92"';
      return `<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${radius.toFixed(1)}" ${look}/>`;
    });
    const bar = legend?.table
      ? `<defs><linearGradient id="legend${number}">${[0, 64, 128, 191, 255].map((i) => `<stop offset="${i / 255}" stop-color="rgb(${legend.table[i]})"/>`).join("")}</linearGradient></defs><rect x="0" y="-14" width="90" height="8" fill="url(#legend${number})"/>`
      : "";
    const outlines = outlinesOf(panes, slide, (x, y) => [x0 + factor * x, y0 + factor * y].map((at) => Math.round(10 * at) / 10), factor);
    const keys = keysOf(pane.colours).map(([name, shade]) => `<tspan fill="${shade}" dx="6">■ </tspan><tspan>${escaped(name)}</tspan>`);
    const scale = pane.scaleBar();
    const length = scale
      ? `<rect x="6" y="${h - 32}" width="${scale.px + 14}" height="26" fill="#fff" opacity=".85"/><rect x="12" y="${h - 12}" width="${scale.px}" height="2.5" fill="#111"/><text x="12" y="${h - 17}" font-size="11">${escaped(scale.text)}</text>`
      : "";
    return `<g transform="translate(${left} ${top})"><text y="-22" font-size="13" font-weight="600">${escaped(titleOf(pane, gene))}</text>${bar}<text x="${bar ? 98 : 0}" y="-6" font-size="11">${keys.join("") || escaped(legendText(pane.colours ?? {}))}</text><svg width="${w}" height="${h}"><image href="${image}" width="${w}" height="${h}"/><g opacity="${panes.opacity}">${smooth}${circles.join("")}</g>${outlines.join("")}${length}</svg></g>`;
  });
  const sheet = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="${FONT}" fill="#111"><rect width="${width}" height="${height}" fill="#fff"/>${parts.join("")}</svg>`;
  download(`${slide.facts.name} ${gene?.name ?? ""}.svg`, sheet, "image/svg+xml");
}

/** Spots with their positions, and the values of each pane but those of maps; hidden spots are left out. */
export function saveCsv(panes, slide, gene) {
  const shown = panes.panes.filter((pane) => pane.colours?.legend.values && !pane.colours.grid);
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const spots = shown.length ? [...shown[0].colours.order].sort((a, b) => a - b) : slide.barcodes.map((_, i) => i);
  const lines = [["barcode", "x", "y", ...shown.map((pane) => `${titleOf(pane, gene)} (${pane.colours.legend.unit})`)].map(quoted).join(",")];
  for (const spot of spots) {
    const place = [0, 1].map((axis) => slide.places[2 * spot + axis] / slide.facts.scale);
    const values = shown.map((pane) => pane.colours.legend.values[spot]).map((value) => (Number.isNaN(value) ? "" : String(value)));
    lines.push([quoted(slide.barcodes[spot]), ...place, ...values].join(","));
  }
  download(`${slide.facts.name} ${gene?.name ?? ""}.csv`, lines.join("\n") + "\n", "text/csv");
}

