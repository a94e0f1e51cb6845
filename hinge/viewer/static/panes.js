// Panes: each an OpenSeadragon viewer with the spots on a canvas over it. All show the same part of the slide.

import { TABLES, paintLegend, step } from "./colours.js";
import { fixed, make } from "./page.js";

export const LAYERS = {
  measured: "Measured",
  mean: "Predicted mean",
  std: "Uncertainty (SD)",
  draw: "One draw",
  image: "H&E alone",
};
const SMALLEST_CIRCLE_PX = 1.3;
const SCALE_BAR_PX = 110; // at most
const LENGTHS_UM = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000];

export class Panes {
  /** `on` has functions layer(), hover(spot, event), choose(spot), draw(kind, place, factor), close(). */
  constructor(parent, on) {
    this.parent = parent;
    this.on = on;
    this.panes = [];
    this.opacity = 0.8;
    this.map = "viridis";
    this.hover = this.chosen = -1;
    this.drawing = null; // corners of the region that is being drawn
    this.outlined = []; // regions to outline: [region, colour]
    this.tool = null;
  }

  get leader() {
    return this.panes.find((pane) => pane.leads) ?? this.panes[0];
  }

  lead(pane) {
    for (const each of this.panes) {
      each.leads = each === pane;
      each.root.classList.toggle("leads", each.leads && this.panes.length > 1);
    }
  }

  /** After a pane moved: the leader takes the others along, and what moved another (a new size) is undone. */
  follow(moved) {
    const { leader } = this;
    if (!leader.ready) return;
    const { viewport } = leader.viewer;
    const [zoom, centre] = [viewport.getZoom(true), viewport.getCenter(true)];
    for (const pane of moved === leader ? this.panes : [moved]) {
      if (pane === leader || !pane.ready) continue;
      const own = pane.viewer.viewport;
      const away = own.getCenter(true).minus(centre);
      if (Math.abs(own.getZoom(true) / zoom - 1) < 1e-6 && Math.hypot(away.x, away.y) * zoom < 1e-5) continue;
      own.zoomTo(zoom, null, true);
      own.panTo(centre, true);
    }
  }

  showSlide(slide) {
    this.slide = slide;
    this.gene = null;
    this.hover = this.chosen = -1;
    for (const pane of this.panes) pane.open();
  }

  /** One pane for each of some settings, {layer, draw}; panes that are there stay. */
  arrange(settings) {
    while (this.panes.length > settings.length) this.panes.pop().close();
    this.parent.dataset.count = settings.length;
    settings.forEach((setting, i) => {
      if (!this.panes[i]) {
        this.panes.push(new Pane(this, i));
        this.parent.append(this.panes[i].root);
        if (this.slide) this.panes[i].open();
      }
      this.panes[i].setting = setting;
    });
    if (!this.panes.some((pane) => pane.leads)) this.lead(this.panes[0]);
    this.paint();
  }

  paint() {
    for (const pane of this.panes) pane.paint();
  }

  mark(hover, chosen) {
    [this.hover, this.chosen] = [hover, chosen];
    for (const pane of this.panes) pane.drawMarks();
  }

  /** While a tool is chosen, the pointer draws instead of moving the slide. */
  setTool(tool) {
    this.tool = tool;
    for (const pane of this.panes) pane.setTool(tool);
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    for (const pane of this.panes) pane.spots.style.opacity = opacity;
  }

  zoom(factor) {
    const viewport = this.leader?.ready && this.leader.viewer.viewport;
    if (viewport) viewport.zoomBy(factor).applyConstraints();
  }

  pan(right, down) {
    const viewport = this.leader?.ready && this.leader.viewer.viewport;
    if (!viewport) return;
    const { width } = viewport.getBounds();
    viewport.panBy(new OpenSeadragon.Point(0.15 * width * right, 0.15 * width * down)).applyConstraints();
  }

  fit(immediately = false) {
    if (this.leader?.ready) this.leader.fit(immediately);
  }

  /** Move to a spot if it is out of sight. */
  reveal(spot) {
    const pane = this.leader;
    if (!pane?.ready) return;
    const [x, y] = pane.onScreen(spot);
    const { clientWidth: width, clientHeight: height } = pane.view;
    if (x > 20 && y > 20 && x < width - 20 && y < height - 20) return;
    const { places, facts } = this.slide;
    pane.viewer.viewport.panTo(new OpenSeadragon.Point(places[2 * spot] / facts.image.width, places[2 * spot + 1] / facts.image.width));
  }
}

class Pane {
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
    this.legend = make("span", { class: "legend" }, this.low, this.bar, this.high);
    this.mount = make("div", { class: "osd" });
    this.spots = make("canvas", { "aria-hidden": "true" });
    this.marks = make("canvas", { "aria-hidden": "true" });
    [this.length, this.line] = [make("span"), make("i")];
    this.scale = make("div", { class: "scale", hidden: "" }, this.length, this.line);
    this.view = make("div", { class: "view" }, this.mount, this.spots, this.marks, this.scale);
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
    this.view.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && panes.on.hover(-1));
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
    const layers = Object.entries(LAYERS).filter(([name]) => name !== "measured" || slide.facts.measured);
    this.layer.replaceChildren(...layers.map(([name, label]) => new Option(label, name)));
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
      if (leader === this || !leader.ready) this.fit(true);
      else this.panes.follow(this);
      this.resize();
    });
    this.viewer.addHandler("viewport-change", () => this.panes.follow(this));
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("after-resize", () => this.resize());
    this.viewer.addHandler("canvas-click", (event) => {
      if (!event.quick || this.panes.tool) return;
      const spot = this.spotAt(event.position.x, event.position.y);
      this.panes.on.choose(spot);
    });
  }

  close() {
    this.viewer?.destroy();
    this.root.remove();
  }

  fit(immediately) {
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
    if (event.buttons || !this.ready) return this.panes.on.hover(-1);
    const box = this.view.getBoundingClientRect();
    this.panes.on.hover(this.spotAt(event.clientX - box.left, event.clientY - box.top), event);
  }

  /** Work out each spot's colour; then draw. */
  paint() {
    const { gene, slide, map } = this.panes;
    if (!slide) return;
    const { setting } = this;
    this.layer.value = setting.layer;
    this.stepper.hidden = setting.layer !== "draw";
    this.number.textContent = `${setting.draw + 1} / ${slide.facts.draws}`;
    this.legend.hidden = setting.layer === "image" || !gene;
    this.root.setAttribute("aria-label", `${LAYERS[setting.layer]}${gene ? ` of ${gene.name}` : ""}`);
    this.colours = null;
    if (gene && setting.layer !== "image") {
      const spread = setting.layer === "std";
      const values = setting.layer === "draw" ? gene.draw(setting.draw) : gene[setting.layer];
      const [low, high] = spread ? gene.spread : gene.scale;
      // another map than the values', so that spread is not taken for expression
      const table = TABLES[spread ? (map === "magma" || map === "inferno" ? "viridis" : "magma") : map];
      this.low.textContent = fixed(low);
      this.high.textContent = fixed(high);
      paintLegend(this.bar, table);
      const steps = Int16Array.from(values, (value) => (Number.isNaN(value) ? 256 : step(value, low, high)));
      const order = Uint32Array.from(values, (_, i) => i).sort((a, b) => steps[a] - steps[b]);
      this.colours = { steps, order, css: [...table.map((rgb) => `rgb(${rgb})`), null] };
    }
    this.draw();
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
    if (this.colours) {
      const radius = Math.max(slide.radius * factor, 0.7);
      const [right, bottom] = [this.view.clientWidth + radius, this.view.clientHeight + radius];
      const { steps, order, css } = this.colours;
      let colour = -1;
      const finish = () => {
        if (colour < 0) return;
        if (css[colour]) {
          context.fillStyle = css[colour];
          context.fill();
        } else {
          context.strokeStyle = "#8a8d92"; // not measured
          context.stroke();
        }
      };
      for (const spot of order) {
        const x = left + factor * slide.places[2 * spot];
        const y = top + factor * slide.places[2 * spot + 1];
        if (x < -radius || y < -radius || x > right || y > bottom) continue;
        if (steps[spot] !== colour) {
          finish();
          colour = steps[spot];
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

  drawScale(factor) {
    const unit = this.panes.slide.facts.um_per_px;
    this.scale.hidden = !unit;
    if (!unit) return;
    const length = LENGTHS_UM.findLast((um) => (um / unit) * factor <= SCALE_BAR_PX) ?? LENGTHS_UM[0];
    this.length.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
    this.line.style.width = `${(length / unit) * factor}px`;
  }
}
