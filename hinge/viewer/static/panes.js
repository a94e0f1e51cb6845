// Panes: each an OpenSeadragon viewer with the spots on a canvas over it. All show the same part of the slide.

import { Display } from "./layers.js";
import { Pane } from "./pane.js";

const GAP_PX = 12;
const HEADER_PX = 41;

export class Panes {
  /** `on` has functions layer(), hover(spot, event), choose(spot), draw(kind, place, factor), close(), moved(), say(text). */
  constructor(parent, on) {
    this.parent = parent;
    this.on = on;
    this.panes = [];
    this.opacity = 0.8;
    this.display = new Display();
    new ResizeObserver(() => this.layOut()).observe(parent);
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
    this.layOut();
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
    this.layOut();
    this.paint();
  }

  /** As many columns as show the slide largest. */
  layOut() {
    const { clientWidth: width, clientHeight: height } = this.parent;
    const count = this.panes.length;
    if (!count || !width) return;
    const aspect = this.slide ? (this.slide.box.width + this.slide.pitch) / (this.slide.box.height + this.slide.pitch) : 1;
    const sizeOf = (columns) => {
      const rows = Math.ceil(count / columns);
      const wide = (width - GAP_PX * (columns + 1)) / columns;
      const high = (height - GAP_PX * (rows + 1)) / rows - HEADER_PX;
      return Math.min(wide / aspect, high);
    };
    const choices = [4, 3, 2, 1].filter((columns) => columns <= count);
    const best = choices.reduce((one, other) => (sizeOf(other) > sizeOf(one) * 1.02 ? other : one));
    this.parent.style.gridTemplateColumns = `repeat(${best}, minmax(0, 1fr))`;
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
    for (const pane of this.panes) for (const canvas of [pane.spots, pane.points?.canvas]) if (canvas) canvas.style.opacity = opacity;
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

  /** Centre and zoom of the slide, as numbers for the address; null before the slide is open. */
  get view() {
    if (!this.leader?.ready) return null;
    const { viewport } = this.leader.viewer;
    const { x, y } = viewport.getCenter(false);
    return [x, y, viewport.getZoom(false)].map((value) => Number(value.toPrecision(5)));
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
