// ---------------------------------------------------------------- the slide
const PANELS = [
  { key: "measured", title: "Measured", table: tables.expression },
  { key: "mean", title: "Predicted mean", table: tables.expression },
  { key: "draw", title: "Draw", table: tables.expression },
  { key: "std", title: "Uncertainty (std)", table: tables.spread },
];

function panelValues(key) {
  const { slide } = state;
  return spotValues(key === "draw" ? slide.draws[state.draw] : slide[key]);
}

function buildPanels() {
  const { slide } = state;
  state.panels = PANELS.filter(({ key }) => (key === "draw" ? slide.draws.length : slide[key])).map((kind) => {
    const what = make("span", { class: "what" }, kind.title);
    const low = make("span");
    const high = make("span");
    const bar = make("canvas");
    paintBar(bar, kind.table);
    const canvas = make("canvas");
    const ring = make("div", { class: "ring" });
    const view = make("div", { class: "view" }, canvas, ring);
    const node = make("div", { class: "panel" }, make("div", { class: "top" }, what, make("span", { class: "legend" }, low, bar, high)), view);
    const panel = { ...kind, what, low, high, canvas, ring, view, node };
    listen(panel);
    return panel;
  });
  byId("panels").classList.toggle("single", state.panels.length === 1);
  byId("panels").style.setProperty("--aspect", slide.width / slide.height);
  byId("panels").replaceChildren(...state.panels.map((panel) => panel.node));
}

// Scale from pixels of the cropped image to CSS pixels of a panel at zoom 1.
const baseScale = (panel) => panel.canvas.clientWidth / state.slide.width;

function drawPanels() {
  const { slide, view } = state;
  if (!slide) return;
  const ratio = devicePixelRatio || 1;
  for (const panel of state.panels) {
    const { canvas, key, table } = panel;
    canvas.style.aspectRatio = `${slide.width} / ${slide.height}`;
    const scale = baseScale(panel) * view.zoom;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(((canvas.clientWidth * slide.height) / slide.width) * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio * scale, 0, 0, ratio * scale, -view.x * ratio * scale, -view.y * ratio * scale);
    context.imageSmoothingQuality = "high";
    context.drawImage(slide.image, 0, 0, slide.width, slide.height);
    const [low, high] = key === "std" ? [0, slide.spread_scale[state.gene]] : slide.scale[state.gene];
    panel.low.textContent = fixed(low, 1);
    panel.high.textContent = fixed(high, high < 1 ? 2 : 1);
    if (key === "draw") panel.what.textContent = `Draw ${state.draw + 1}`;
    const values = panelValues(key);
    const radius = Math.max(slide.radius, 1.3 / scale);
    context.globalAlpha = state.opacity;
    // a thin rim separates light spots from light tissue; it would hide spots of few pixels
    const outlined = radius * scale > 3;
    context.lineWidth = 0.8 / scale;
    context.strokeStyle = "rgb(20 22 24 / .6)";
    canvas.setAttribute("aria-label", `${panel.title} of ${slide.genes[state.gene]} on slide ${slide.name}, colours from ${fixed(low, 1)} to ${fixed(high, 1)}. The arrow keys go from spot to spot.`);
    for (let i = 0; i < values.length; i++) {
      if (!isNumber(values[i])) continue;
      context.fillStyle = `rgb(${colourAt(table, values[i], low, high)})`;
      context.beginPath();
      context.arc(slide.x[i], slide.y[i], radius, 0, 2 * Math.PI);
      context.fill();
      if (outlined) context.stroke();
    }
    panel.view.classList.toggle("grab", view.zoom > 1);
  }
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawPanels();
  });
}

function zoomAt(factor, x, y) {
  const { view, slide } = state;
  const zoom = Math.max(1, Math.min(12, view.zoom * factor));
  view.x = x - ((x - view.x) * view.zoom) / zoom;
  view.y = y - ((y - view.y) * view.zoom) / zoom;
  view.zoom = zoom;
  moveView(0, 0);
  byId("zoom-out").disabled = byId("zoom-reset").disabled = zoom === 1;
  byId("zoom-in").disabled = zoom === 12;
  pointAt(null);
  if (slide) redraw();
}

function moveView(dx, dy) {
  const { view, slide } = state;
  view.x = Math.max(0, Math.min(slide.width * (1 - 1 / view.zoom), view.x + dx));
  view.y = Math.max(0, Math.min(slide.height * (1 - 1 / view.zoom), view.y + dy));
}

function pointAt(spot) {
  state.spot = spot;
  const { slide, view } = state;
  for (const panel of state.panels) {
    panel.ring.style.display = spot === null ? "none" : "block";
    if (spot === null) continue;
    const scale = baseScale(panel) * view.zoom;
    const size = Math.max(9, 2 * slide.radius * scale + 4);
    panel.ring.style.width = panel.ring.style.height = `${size}px`;
    panel.ring.style.left = `${(slide.x[spot] - view.x) * scale}px`;
    panel.ring.style.top = `${(slide.y[spot] - view.y) * scale}px`;
  }
  if (spot === null) hideTip();
}

function spotRows(spot) {
  const { slide } = state;
  const at = (values, digits = 2) => fixed(spotValues(values)[spot], digits);
  const rows = [["measured", at(slide.measured)]];
  if (slide.mean) rows.push(["predicted mean", at(slide.mean)]);
  if (slide.low) rows.push([slide.interval, `${at(slide.low)} to ${at(slide.high)}`]);
  if (slide.std) rows.push(["std of draws", at(slide.std)]);
  if (slide.draws.length) rows.push([`draw ${state.draw + 1}`, at(slide.draws[state.draw])]);
  return rows;
}

/** The next spot from one in a direction; the one nearest to the middle where none is marked. */
function neighbour(spot, right, down) {
  const { x, y, width, height } = state.slide;
  const from = spot === null ? [width / 2, height / 2] : [x[spot], y[spot]];
  let [best, least] = [spot ?? 0, Infinity];
  for (let i = 0; i < x.length; i++) {
    const [dx, dy] = [x[i] - from[0], y[i] - from[1]];
    const along = dx * right + dy * down;
    const aside = Math.abs(dx * down) + Math.abs(dy * right);
    if (spot !== null && (along <= 0 || aside > along)) continue;
    const distance = spot === null ? Math.hypot(dx, dy) : along + 2 * aside;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

function listen(panel) {
  const { canvas } = panel;
  let drag = null;
  const position = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = baseScale(panel) * state.view.zoom;
    return [(event.clientX - box.left) / scale + state.view.x, (event.clientY - box.top) / scale + state.view.y];
  };
  const hover = (event) => {
    const { slide } = state;
    const [x, y] = position(event);
    const reach = Math.max(1.6 * slide.radius, 8 / (baseScale(panel) * state.view.zoom));
    let nearest = null;
    let least = reach * reach;
    for (let i = 0; i < slide.x.length; i++) {
      const distance = (slide.x[i] - x) ** 2 + (slide.y[i] - y) ** 2;
      if (distance < least) [nearest, least] = [i, distance];
    }
    pointAt(nearest);
    if (nearest !== null) showTip(event.clientX, event.clientY, `${slide.genes[state.gene]} · ${slide.barcodes[nearest]}`, spotRows(nearest));
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (state.view.zoom > 1) {
      drag = [event.clientX, event.clientY];
      canvas.setPointerCapture(event.pointerId);
    }
    hover(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return hover(event);
    const scale = baseScale(panel) * state.view.zoom;
    moveView((drag[0] - event.clientX) / scale, (drag[1] - event.clientY) / scale);
    drag = [event.clientX, event.clientY];
    pointAt(null);
    redraw();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (drag = null));
  onLeave(canvas, () => pointAt(null));
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.addEventListener("blur", () => pointAt(null));
  canvas.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    const spot = neighbour(state.spot, ...direction);
    pointAt(spot);
    const box = canvas.getBoundingClientRect();
    const scale = baseScale(panel) * state.view.zoom;
    const head = `${state.slide.genes[state.gene]} · ${state.slide.barcodes[spot]}`;
    showTip(box.left + (state.slide.x[spot] - state.view.x) * scale, box.top + (state.slide.y[spot] - state.view.y) * scale, head, spotRows(spot));
    byId("spoken").textContent = `${head}: ${spotRows(spot).map((row) => row.join(" ")).join(", ")}`;
  });
  canvas.addEventListener("dblclick", (event) => zoomAt(2, ...position(event)));
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoomAt(Math.exp(-event.deltaY / 200), ...position(event));
    },
    { passive: false },
  );
}

function drawGene() {
  const { slide, gene } = state;
  const scores = slide.genewise;
  const facts = [
    ["PCC", scores.pcc?.[gene]],
    ["RMSE", scores.rmse?.[gene]],
    ["90 % interval covers", scores.coverage_90?.[gene]],
    ["measured variance", scores.variance[gene]],
  ].filter(([, value]) => isNumber(value));
  const line = facts.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, fixed(value))));
  if (slide.mean && !isNumber(scores.pcc?.[gene])) line.unshift(make("span", {}, "PCC undefined: the measured gene is constant"));
  byId("gene-line").replaceChildren(make("strong", {}, slide.genes[gene]), ...line);
  hideTip();
  redraw();
}

function setUpSlideControls() {
  byId("opacity").addEventListener("input", (event) => {
    state.opacity = Number(event.target.value) / 100;
    redraw();
  });
  const step = (by) => {
    state.draw = (state.draw + by + state.slide.draws.length) % state.slide.draws.length;
    byId("draw-select").value = state.draw;
    redraw();
  };
  byId("draw-back").addEventListener("click", () => step(-1));
  byId("draw-next").addEventListener("click", () => step(1));
  byId("draw-select").addEventListener("change", (event) => {
    state.draw = Number(event.target.value);
    redraw();
  });
  const centre = () => [state.view.x + state.slide.width / state.view.zoom / 2, state.view.y + state.slide.height / state.view.zoom / 2];
  byId("zoom-in").addEventListener("click", () => zoomAt(1.6, ...centre()));
  byId("zoom-out").addEventListener("click", () => zoomAt(1 / 1.6, ...centre()));
  byId("zoom-reset").addEventListener("click", () => zoomAt(0, 0, 0));
  new ResizeObserver(redraw).observe(byId("panels"));
}
