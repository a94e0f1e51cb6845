// A pane: an OpenSeadragon viewer with the spots on a canvas over it, legend, scale bar and overview.

import { paintHistogram } from "./colours.js";
import { LAYERS, coloursOf, layersOf } from "./layers.js";
import { colour, fixed, make } from "./page.js";
import { MANY_SPOTS, Points } from "./points.js";
import { outlineOf } from "./regions.js";

const KEYS_SHOWN = 4; // colours of labels in the head of a pane; the tab Display has all
const SMALLEST_CIRCLE_PX = 1.3;
const SCALE_BAR_PX = 110; // at most
const LENGTHS_UM = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000];

export class Pane {
  constructor(panes, number) {
    this.panes = panes;
    this.ready = false;
    this.setting = { layer: "mean", draw: 0 };
    this.layer = make("select", { "aria-label": `Layer of pane ${number + 1}` });
    this.back = make("button", { type: "button", "aria-label": "Previous draw" }, "‹");
    this.next = make("button", { type: "button", "aria-label": "Next draw" }, "›");
    this.number = make("span");
    this.stepper = make("span", { class: "stepper" }, this.back, this.number, this.next);
    this.bar = make("canvas", { "aria-hidden": "true" });
    [this.low, this.high] = [make("span"), make("span")];
    this.unit = make("span", { class: "unit" });
    this.legend = make("span", { class: "legend" }, this.low, this.bar, this.high, this.unit);
    this.mount = make("div", { class: "osd" });
    this.spots = make("canvas", { "aria-hidden": "true" });
    this.marks = make("canvas", { "aria-hidden": "true" });
    [this.length, this.magnification, this.line] = [make("span"), make("span", { class: "magnification" }), make("i")];
    this.scale = make("div", { class: "scale", hidden: "" }, this.length, this.magnification, this.line);
    this.where = make("div", { class: "where", hidden: "", "aria-hidden": "true" });
    this.points = null; // WebGL, for many spots
    this.overview = number === 0;
    this.view = make("div", { class: "view" }, this.mount, this.spots, this.marks, this.scale, this.where);
    this.root = make("section", { class: "pane", role: "group" }, make("header", {}, this.layer, this.stepper, this.legend), this.view);
    this.spots.style.opacity = panes.opacity;
    this.layer.addEventListener("change", () => this.change({ layer: this.layer.value }));
    this.back.addEventListener("click", () => this.stepDraw(-1));
    this.next.addEventListener("click", () => this.stepDraw(1));
    for (const name of ["pointerdown", "wheel", "focusin"]) {
      this.view.addEventListener(name, () => panes.lead(this), { capture: true, passive: true });
    }
    this.view.addEventListener("pointermove", (event) => this.point(event));
    for (const [name, kind] of [["pointerdown", "down"], ["pointermove", "move"], ["pointerup", "up"]]) {
      this.view.addEventListener(name, (event) => panes.tool && this.drawAt(kind, event), { capture: true });
    }
    this.view.addEventListener("dblclick", () => panes.tool && panes.on.close());
    this.view.addEventListener("pointerleave", (event) => {
      this.where.hidden = true;
      if (event.pointerType !== "touch") panes.on.hover(-1);
    });
    this.view.addEventListener("pointerdown", () => {
      this.view.classList.add("drags");
      addEventListener("pointerup", () => this.view.classList.remove("drags"), { once: true });
    });
  }

  setTool(tool) {
    this.view.classList.toggle("selects", Boolean(tool));
    this.viewer?.setMouseNavEnabled(!tool);
  }

  drawAt(kind, event) {
    if (!this.ready || event.button > 0) return;
    if (kind === "down") this.view.setPointerCapture(event.pointerId);
    const box = this.view.getBoundingClientRect();
    const { factor, left, top } = this.placing();
    this.panes.on.draw(kind, [(event.clientX - box.left - left) / factor, (event.clientY - box.top - top) / factor], factor);
    event.preventDefault();
  }

  change(setting) {
    Object.assign(this.setting, setting);
    this.panes.on.layer();
  }

  stepDraw(by) {
    const count = this.panes.slide.facts.draws;
    this.change({ draw: (this.setting.draw + by + count) % count });
  }

  open() {
    this.viewer?.destroy();
    this.ready = false;
    const { slide } = this.panes;
    const { width, height, tile, overlap } = slide.facts.image;
    this.usePoints(slide);
    this.layer.replaceChildren(...layersOf(slide.facts).map((name) => new Option(LAYERS[name], name)));
    this.viewer = OpenSeadragon({
      element: this.mount,
      tileSources: {
        Image: {
          xmlns: "http://schemas.microsoft.com/deepzoom/2008",
          Url: `${slide.path}image_files/`,
          Format: "jpeg",
          TileSize: tile,
          Overlap: overlap,
          Size: { Width: width, Height: height },
        },
      },
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: this.overview,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.17,
      navigatorAutoFade: false,
      keyboardNavEnabled: false,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      visibilityRatio: 0.3,
      minZoomImageRatio: 0.6,
      maxZoomPixelRatio: 8,
      zoomPerScroll: 1.25,
      animationTime: 0.4,
      springStiffness: 9,
      placeholderFillStyle: "#fff",
    });
    this.viewer.canvas.setAttribute("aria-label", "Slide: arrows pan, plus and minus zoom, shift and arrows go from spot to spot");
    this.viewer.canvas.setAttribute("role", "application");
    this.viewer.addHandler("open", () => {
      this.ready = true;
      this.setTool(this.panes.tool);
      const leader = this.panes.leader;
      if (leader === this || !leader.ready) this.fit(true, this.panes.wantedView);
      else this.panes.follow(this);
      this.resize();
    });
    this.viewer.addHandler("animation-finish", () => this.panes.on.moved());
    this.viewer.addHandler("viewport-change", () => this.panes.follow(this));
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("after-resize", () => this.resize());
    this.viewer.addHandler("canvas-click", (event) => {
      if (!event.quick || this.panes.tool) return;
      const spot = this.spotAt(event.position.x, event.position.y);
      this.panes.on.choose(spot);
    });
  }

  /** Draw the spots of a slide with many of them by WebGL, where the browser has it. */
  usePoints(slide) {
    this.points?.close();
    this.points = slide.barcodes.length >= MANY_SPOTS ? Points.of(slide) : null;
    this.spots.hidden = Boolean(this.points);
    if (!this.points) return;
    const { canvas } = this.points;
    canvas.style.opacity = this.panes.opacity;
    this.spots.after(canvas);
    canvas.addEventListener("webglcontextlost", () => {
      if (this.points?.canvas !== canvas) return;
      canvas.remove();
      this.points = null;
      this.spots.hidden = false;
      this.draw();
    });
  }

  close() {
    this.points?.close();
    this.viewer?.destroy();
    this.root.remove();
  }

  fit(immediately, view = null) {
    this.panes.wantedView = null;
    if (view) {
      this.viewer.viewport.zoomTo(view[2], null, true);
      this.viewer.viewport.panTo(new OpenSeadragon.Point(view[0], view[1]), true);
      return;
    }
    const { box, pitch, facts } = this.panes.slide;
    const rim = 0.75 * pitch + 0.02 * Math.max(box.width, box.height);
    const unit = facts.image.width;
    const bounds = [box.left - rim, box.top - rim, box.width + 2 * rim, box.height + 2 * rim].map((length) => length / unit);
    this.viewer.viewport.fitBounds(new OpenSeadragon.Rect(...bounds), immediately);
  }

  resize() {
    if (!this.ready) return;
    const ratio = devicePixelRatio || 1;
    for (const canvas of [this.spots, this.marks]) {
      canvas.width = Math.round(this.view.clientWidth * ratio);
      canvas.height = Math.round(this.view.clientHeight * ratio);
    }
    this.draw();
  }

  // Screen pixels of this pane for image pixels: factor, and where the image's corner lies.
  placing() {
    const { viewport } = this.viewer;
    const corner = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const right = viewport.pixelFromPoint(new OpenSeadragon.Point(1, 0), true);
    return { factor: (right.x - corner.x) / this.panes.slide.facts.image.width, left: corner.x, top: corner.y };
  }

  onScreen(spot) {
    const { factor, left, top } = this.placing();
    const { places } = this.panes.slide;
    return [left + factor * places[2 * spot], top + factor * places[2 * spot + 1]];
  }

  spotAt(x, y) {
    if (!this.ready) return -1;
    const { factor, left, top } = this.placing();
    const { slide } = this.panes;
    return slide.spotAt((x - left) / factor, (y - top) / factor, Math.max(slide.radius * 1.15, Math.min(4 / factor, slide.pitch)));
  }

  point(event) {
    if (this.ready) this.showPlace(event);
    if (event.buttons || !this.ready) return this.panes.on.hover(-1);
    const box = this.view.getBoundingClientRect();
    this.panes.on.hover(this.spotAt(event.clientX - box.left, event.clientY - box.top), event);
  }

  /** Where the pointer is, in full-resolution pixels and mm. */
  showPlace(event) {
    const box = this.view.getBoundingClientRect();
    const { factor, left, top } = this.placing();
    const { scale, um_per_px: unit } = this.panes.slide.facts;
    const place = [(event.clientX - box.left - left) / factor, (event.clientY - box.top - top) / factor];
    const [x, y] = place.map((value) => Math.round(value / scale).toLocaleString("en"));
    const mm = unit ? ` · ${place.map((value) => fixed((value * unit) / 1000, 3)).join(", ")} mm` : "";
    this.where.textContent = `${x}, ${y} px${mm}`;
    this.where.hidden = false;
  }

  /** Work out each spot's colour; then draw. */
  paint() {
    const { gene, slide, display } = this.panes;
    if (!slide) return;
    const { setting } = this;
    this.layer.value = setting.layer;
    this.stepper.hidden = setting.layer !== "draw";
    this.number.textContent = `${setting.draw + 1} / ${slide.facts.draws}`;
    this.root.setAttribute("aria-label", `${LAYERS[setting.layer]}${gene ? ` of ${gene.name}` : ""}`);
    this.mount.style.filter = display.brightness === 100 ? "" : `brightness(${display.brightness / 100})`;
    if (setting.layer === "map" && gene) {
      slide.readMap(gene)?.then(() => this.panes.gene === gene && this.paint(), (error) => this.panes.on.say(error.message));
    }
    this.colours = coloursOf(slide, gene, setting, display);
    this.points?.setColours(this.colours);
    this.legend.hidden = !this.colours;
    if (this.colours) this.paintLegend(this.colours.legend);
    this.draw();
  }

  paintLegend({ low, high, table, values, unit, text, keys }) {
    this.bar.hidden = !table;
    this.low.textContent = table ? fixed(low) : "";
    this.high.textContent = table ? fixed(high) : "";
    this.unit.textContent = table ? unit : text;
    if (keys && keys.length <= KEYS_SHOWN) {
      const chips = keys.flatMap(([name, shade]) => {
        const chip = make("i", { "aria-hidden": "true" });
        chip.style.background = shade;
        return [chip, name];
      });
      this.unit.replaceChildren(...chips);
    }
    const { clip, own } = this.panes.display;
    this.legend.title = table ? `${fixed(low)} to ${fixed(high)} ${unit}; colours end at percentiles ${clip} and ${100 - clip}${own ? " of this pane" : ", shared by measured values, mean and draws"}` : text;
    if (table) paintHistogram(this.bar, table, values, low, high, colour("strong"));
  }

  /** Draw the spots where the slide is now. */
  draw() {
    if (!this.ready || !this.viewer.world.getItemCount()) return;
    const { slide } = this.panes;
    const ratio = devicePixelRatio || 1;
    const context = this.spots.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.view.clientWidth, this.view.clientHeight);
    const { factor, left, top } = this.placing();
    const grid = this.colours?.grid;
    if (this.points) [this.spots.hidden, this.points.canvas.hidden] = [!grid, Boolean(grid)];
    if (grid) {
      const { map } = slide.facts;
      context.imageSmoothingQuality = "high";
      context.drawImage(grid, left + factor * map.left, top + factor * map.top, factor * map.cell_px * map.columns, factor * map.cell_px * map.rows);
    } else if (this.points) this.points.draw(this.view.clientWidth, this.view.clientHeight, factor, left, top, Math.max(slide.radius * factor, 0.7));
    else if (this.colours) {
      const radius = Math.max(slide.radius * factor, 0.7);
      const [right, bottom] = [this.view.clientWidth + radius, this.view.clientHeight + radius];
      const { codes, order, css } = this.colours;
      let code = -1;
      context.lineWidth = 0.8;
      const finish = () => {
        if (code < 0) return;
        if (css[code]) {
          context.fillStyle = css[code];
          context.fill();
          // a thin rim separates light spots from light tissue; it would hide spots of few pixels
          context.strokeStyle = "rgb(20 22 24 / .55)";
          if (radius > 3) context.stroke();
        } else {
          context.strokeStyle = "#8a8d92"; // not measured
          context.stroke();
        }
      };
      for (const spot of order) {
        const x = left + factor * slide.places[2 * spot];
        const y = top + factor * slide.places[2 * spot + 1];
        if (x < -radius || y < -radius || x > right || y > bottom) continue;
        if (codes[spot] !== code) {
          finish();
          code = codes[spot];
          context.beginPath();
        }
        if (radius < SMALLEST_CIRCLE_PX) {
          context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
        } else {
          context.moveTo(x + radius, y);
          context.arc(x, y, radius, 0, 2 * Math.PI);
        }
      }
      finish();
    }
    this.drawMarks();
    this.drawScale(factor);
    this.showOverview();
  }

  /** The overview lies over the slide, and is of no use while all spots are in sight. */
  showOverview() {
    const { navigator, viewport } = this.viewer;
    if (!navigator) return;
    const { x, y, width, height } = viewport.getBounds(true);
    const { box, facts } = this.panes.slide;
    const [left, top, wide, high] = [box.left, box.top, box.width, box.height].map((length) => length / facts.image.width);
    navigator.element.classList.toggle("idle", x <= left && y <= top && x + width >= left + wide && y + height >= top + high);
  }

  drawMarks() {
    if (!this.ready) return;
    const ratio = devicePixelRatio || 1;
    const context = this.marks.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.view.clientWidth, this.view.clientHeight);
    const { slide, hover, chosen } = this.panes;
    this.drawRegions(context);
    const radius = Math.max(slide.radius * this.placing().factor, 3) + 1;
    for (const [spot, width] of [[chosen, 3], [hover, 1.5]]) {
      if (spot < 0) continue;
      const [x, y] = this.onScreen(spot);
      for (const [colour, line] of [["#fff", width + 2.5], ["#111", width]]) {
        context.beginPath();
        context.arc(x, y, radius, 0, 2 * Math.PI);
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.stroke();
      }
    }
  }

  drawRegions(context) {
    const { factor, left, top } = this.placing();
    const { slide, outlined, drawing } = this.panes;
    const trace = (rings) => {
      for (const ring of rings) {
        ring.forEach(([x, y], i) => (i ? context.lineTo(left + factor * x, top + factor * y) : context.moveTo(left + factor * x, top + factor * y)));
        context.closePath();
      }
    };
    const radius = Math.max(slide.radius * factor, 2) + 1.5;
    for (const [region, colour] of drawing ? [...outlined, [{ polygons: [[drawing]] }, "#111"]] : outlined) {
      if (slide.barcodes.length >= MANY_SPOTS && !region.polygons.length) {
        region.outline ??= outlineOf(slide, region.spots);
        context.save();
        context.transform(factor, 0, 0, factor, left, top);
        for (const [stroke, width] of [["#fff", 4], [colour, 2]]) {
          [context.strokeStyle, context.lineWidth] = [stroke, width / factor];
          context.stroke(region.outline);
        }
        context.restore();
        continue;
      }
      context.beginPath();
      for (const polygon of region.polygons) trace(polygon);
      if (!region.polygons.length) {
        region.spots.forEach((one, spot) => {
          if (!one) return;
          const [x, y] = [left + factor * slide.places[2 * spot], top + factor * slide.places[2 * spot + 1]];
          context.moveTo(x + radius, y);
          context.arc(x, y, radius, 0, 2 * Math.PI);
        });
      }
      for (const [stroke, width] of [["#fff", 4], [colour, 2]]) {
        context.strokeStyle = stroke;
        context.lineWidth = region.polygons.length ? width : width / 1.6;
        context.stroke();
      }
    }
  }

  /** Length of the scale bar in screen pixels and its text; null without a resolution. */
  scaleBar() {
    const unit = this.panes.slide.facts.um_per_px;
    if (!unit || !this.ready) return null;
    const { factor } = this.placing();
    const length = LENGTHS_UM.findLast((um) => (um / unit) * factor <= SCALE_BAR_PX) ?? LENGTHS_UM[0];
    return { px: (length / unit) * factor, text: length >= 1000 ? `${length / 1000} mm` : `${length} µm` };
  }

  drawScale(factor) {
    const bar = this.scaleBar();
    this.scale.hidden = !bar;
    if (!bar) return;
    const um = this.panes.slide.facts.um_per_px / factor;
    this.length.textContent = bar.text;
    // an objective of 40 × shows 0.25 µm a pixel
    this.magnification.textContent = `${(10 / um).toPrecision(2)} ×, ${um.toPrecision(3)} µm/px`;
    this.line.style.width = `${bar.px}px`;
  }

  /** The canvas that holds the spots or the map. */
  spotCanvas() {
    return this.points && !this.colours?.grid ? this.points.canvas : this.spots;
  }
}
