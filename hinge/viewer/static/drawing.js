// Drawing of a region on a pane: lasso, polygon and rectangle, in pixels of the shown image.

const NEAREST_PX = 4; // between two corners of a lasso

export class Drawing {
  /** `on` has functions changed(corners), done(corners). */
  constructor(on) {
    this.on = on;
    this.tool = null;
    this.corners = [];
  }

  setTool(tool) {
    this.tool = tool;
    this.cancel();
  }

  cancel() {
    this.corners = [];
    this.start = null;
    this.on.changed(null);
  }

  finish() {
    const { corners } = this;
    this.cancel();
    if (corners.length > 2) this.on.done(corners);
  }

  /** A pointer went down, moved, or up on a pane, at a place in image pixels; `factor` is screen pixels for one of these. */
  event(kind, [x, y], factor) {
    if (this.tool === "polygon") {
      if (kind === "down") this.corners.push([x, y]);
      if (this.corners.length) this.on.changed([...this.corners, [x, y]]);
      return;
    }
    if (kind === "down") [this.start, this.corners] = [[x, y], [[x, y]]];
    else if (!this.start) return;
    else if (this.tool === "rectangle") {
      const [left, top] = this.start;
      this.corners = [[left, top], [x, top], [x, y], [left, y]];
    } else {
      const [lastX, lastY] = this.corners.at(-1);
      if (Math.hypot(x - lastX, y - lastY) * factor >= NEAREST_PX) this.corners.push([x, y]);
    }
    if (kind === "up") this.finish();
    else this.on.changed(this.corners);
  }
}
