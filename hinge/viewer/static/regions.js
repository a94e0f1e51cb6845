// Regions: named sets of spots, from drawn polygons, labels and files; the encodings in which they travel.

/** Whether a place lies in a polygon, whose rings after the first are holes. */
export function inPolygon(x, y, rings) {
  let inside = false;
  for (const ring of rings) {
    for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
      const [[ax, ay], [bx, by]] = [ring[i], ring[j]];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
    }
  }
  return inside;
}

/** Spots (0 or 1 each) whose centre lies in one of some polygons, in pixels of the shown image. */
export function spotsIn(slide, polygons) {
  const spots = new Uint8Array(slide.barcodes.length);
  for (const rings of polygons) {
    const [xs, ys] = [0, 1].map((axis) => rings[0].map((corner) => corner[axis]));
    const box = [xs, ys].map((values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]));
    for (let i = 0; i < spots.length; i++) {
      const [x, y] = [slide.places[2 * i], slide.places[2 * i + 1]];
      if (x < box[0][0] || x > box[0][1] || y < box[1][0] || y > box[1][1]) continue;
      if (inPolygon(x, y, rings)) spots[i] = 1;
    }
  }
  return spots;
}

const SQUARE = 1.5; // distances between spots

/** Outline of a set of spots as a path in image pixels: the sides of squares that hold them, next to squares that do not. */
export function outlineOf(slide, spots) {
  const { box, places } = slide;
  const side = SQUARE * slide.pitch;
  const columns = Math.floor(box.width / side) + 3; // with an empty rim
  const inside = new Uint8Array(columns * (Math.floor(box.height / side) + 3));
  spots.forEach((one, spot) => {
    const [column, row] = [(places[2 * spot] - box.left) / side, (places[2 * spot + 1] - box.top) / side].map((at) => Math.floor(at) + 1);
    if (one) inside[row * columns + column] = 1;
  });
  const path = new Path2D();
  for (let cell = columns; cell < inside.length; cell++) {
    const [left, top] = [box.left + ((cell % columns) - 1) * side, box.top + (Math.floor(cell / columns) - 1) * side];
    // the side to the left and the one above, where this square or the neighbour is inside, and not both
    if (inside[cell] !== inside[cell - 1]) (path.moveTo(left, top), path.lineTo(left, top + side));
    if (inside[cell] !== inside[cell - columns]) (path.moveTo(left, top), path.lineTo(left + side, top));
  }
  return path;
}

export const countOf = (spots) => spots.reduce((sum, one) => sum + one, 0);

async function through(bytes, stream) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());
}

/** A set of spots as text for a request: a bit a spot, deflated, URL-safe base64. */
export async function encodeSpots(spots) {
  const bits = new Uint8Array(Math.ceil(spots.length / 8));
  spots.forEach((one, i) => (bits[i >> 3] |= one << (i & 7)));
  const packed = await through(bits, new CompressionStream("deflate"));
  let text = "";
  for (const byte of packed) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export async function decodeSpots(text, count) {
  const packed = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (character) => character.charCodeAt(0));
  const bits = await through(packed, new DecompressionStream("deflate"));
  if (bits.length !== Math.ceil(count / 8)) throw new Error("the link holds a region of another slide");
  return Uint8Array.from({ length: count }, (_, i) => (bits[i >> 3] >> (i & 7)) & 1);
}

// ---------------------------------------------------------------- files

const polygonsOf = (geometry) => {
  if (geometry?.type === "Polygon") return [geometry.coordinates];
  if (geometry?.type === "MultiPolygon") return geometry.coordinates;
  if (geometry?.type === "GeometryCollection") return geometry.geometries.flatMap(polygonsOf);
  return [];
};

/** Regions of a GeoJSON file as QuPath writes it: {name, polygons}; annotations of one class are one region. */
function readGeoJson(text, scale) {
  const content = JSON.parse(text);
  const features = Array.isArray(content) ? content : (content.features ?? [content]);
  const found = new Map();
  features.forEach((feature, i) => {
    const kind = feature.properties?.classification;
    const name = String(kind?.name ?? kind?.names?.join(": ") ?? feature.properties?.name ?? `region ${i + 1}`);
    const polygons = polygonsOf(feature.geometry).map((rings) =>
      rings.map((ring) => {
        const corners = ring.map(([x, y]) => [Number(x) * scale, Number(y) * scale]);
        if (corners.length < 3 || !corners.flat().every(Number.isFinite)) throw new Error(`feature ${i + 1} is not a polygon`);
        return corners;
      }),
    );
    if (polygons.length) found.set(name, [...(found.get(name) ?? []), ...polygons]);
  });
  return [...found].map(([name, polygons]) => ({ name, polygons }));
}

/** Rows of a CSV or TSV file as lists of cells. */
export function readTable(text) {
  const tab = text.split("\n", 1)[0].includes("\t") ? "\t" : ",";
  const rows = [];
  let [row, cell, quoted] = [[], "", false];
  for (let i = 0; i < text.length; i++) {
    const character = text[i];
    if (quoted) {
      if (character !== '"') cell += character;
      else if (text[i + 1] === '"') cell += text[++i];
      else quoted = false;
    } else if (character === '"') quoted = true;
    else if (character === tab || character === "\n") {
      row.push(cell.replace(/\r$/, ""));
      cell = "";
      if (character === "\n") {
        rows.push(row);
        row = [];
      }
    } else cell += character;
  }
  if (cell || row.length) rows.push([...row, cell.replace(/\r$/, "")]);
  return rows.filter((cells) => cells.some(Boolean));
}

function readLabels(text, slide) {
  const [head, ...rows] = readTable(text.replace(/^\uFEFF/, ""));
  const lower = head.map((name) => name.trim().toLowerCase());
  const find = (names) => lower.findIndex((name) => names.includes(name));
  const first = Math.max(0, find(["barcode", "spot", "index", ""]));
  const named = find(["label", "region", "annotation", "class", "cluster"]);
  const ofSlides = head.length > 2 ? find(["slide", "sample", "section", "library_id"]) : -1;
  const others = head.map((_, i) => i).filter((i) => i !== first && i !== ofSlides);
  const second = others.length === 1 ? others[0] : named;
  if (second < 0 || second === first) throw new Error("name the columns of the table 'barcode' and 'label'");
  const at = new Map(slide.barcodes.map((barcode, i) => [barcode, i]));
  const found = new Map();
  const labels = new Map();
  const { name } = slide.facts;
  const own = ofSlides >= 0 && rows.some((cells) => cells[ofSlides] === name);
  for (const cells of rows) {
    const spot = at.get(cells[first]);
    const label = cells[second];
    if (spot === undefined || !label || (own && cells[ofSlides] !== name)) continue;
    // such as barcodes of several slides
    if ((labels.get(spot) ?? label) !== label) throw new Error(`it has several labels for spot ${cells[first]}; give one row a spot, or a column 'slide' with the value '${name}'`);
    labels.set(spot, label);
    if (!found.has(label)) found.set(label, new Uint8Array(slide.barcodes.length));
    found.get(label)[spot] = 1;
  }
  return [...found].map(([name, spots]) => ({ name, spots, polygons: [] }));
}

/** Regions of a file of annotations or labels; an error that says what is wrong with the file. */
export function readRegions(name, text, slide) {
  const table = /\.(csv|tsv|txt)$/i.test(name);
  let regions;
  try {
    regions = table ? readLabels(text, slide) : readGeoJson(text, slide.facts.scale);
  } catch (error) {
    throw new Error(`${name} cannot be read: ${error.message}`);
  }
  regions = regions.map((region) => ({ ...region, spots: region.spots ?? spotsIn(slide, region.polygons) })).filter((region) => countOf(region.spots));
  if (!regions.length) throw new Error(`${name} holds no region with a spot of ${slide.facts.name}; it needs ${table ? "its barcodes" : "its full-resolution pixels"}`);
  return regions;
}

const CORNERS = 24; // of the outline of a spot

/** Regions as GeoJSON annotations in full-resolution pixels; one without polygons becomes the outlines of its spots. */
export function toGeoJson(regions, slide) {
  const { scale } = slide.facts;
  const place = ([x, y]) => [x / scale, y / scale].map((value) => Math.round(value * 100) / 100);
  const outline = (spot) =>
    Array.from({ length: CORNERS + 1 }, (_, i) => {
      const angle = ((i % CORNERS) / CORNERS) * 2 * Math.PI;
      return [slide.places[2 * spot] + slide.radius * Math.cos(angle), slide.places[2 * spot + 1] + slide.radius * Math.sin(angle)];
    });
  const features = regions.map(({ name, spots, polygons }) => {
    const shapes = polygons.length ? polygons : [...spots.keys()].filter((spot) => spots[spot]).map((spot) => [outline(spot)]);
    const closed = (ring) => (String(ring[0]) === String(ring.at(-1)) ? ring : [...ring, ring[0]]);
    const coordinates = shapes.map((rings) => rings.map((ring) => closed(ring).map(place)));
    return { type: "Feature", geometry: { type: "MultiPolygon", coordinates }, properties: { objectType: "annotation", name, classification: { name } } };
  });
  return JSON.stringify({ type: "FeatureCollection", features });
}
