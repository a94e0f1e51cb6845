// Spots by WebGL: of a slide with many, the canvas of the browser draws a few frames a second only.

import { make } from "./page.js";

export const MANY_SPOTS = 20000; // from which spots are drawn by WebGL

const VERTEX = `#version 300 es
in vec2 place;
in vec4 colour;
uniform vec4 view; // factor, left, top, device pixels for one CSS pixel
uniform vec3 size; // width and height of the pane, diameter of a spot in device pixels
out vec4 shade;
void main() {
  vec2 at = (view.x * place + view.yz) / size.xy;
  gl_Position = vec4(2.0 * at.x - 1.0, 1.0 - 2.0 * at.y, 0.0, 1.0);
  gl_PointSize = size.z;
  shade = colour;
}`;

const FRAGMENT = `#version 300 es
precision highp float; // as in the vertex shader, which shares a uniform
in vec4 shade;
uniform vec3 size;
out vec4 colour;
void main() {
  float away = 2.0 * length(gl_PointCoord - 0.5);
  if (size.z > 3.0 && away > 1.0) discard;
  // rings for spots without a value, and a thin rim around others where there is room for it
  if (shade.a < 0.5 && away < 0.75) discard;
  float rim = size.z > 6.0 && shade.a > 0.5 ? smoothstep(1.0 - 2.5 / size.z, 1.0, away) * 0.45 : 0.0;
  colour = vec4(shade.rgb * (1.0 - rim), 1.0);
}`;

const WITHOUT = [138, 141, 146];

function rgbOf(css) {
  if (css.startsWith("#")) return [1, 3, 5].map((at) => parseInt(css.slice(at, at + 2), 16));
  return css.match(/\d+/g).slice(0, 3).map(Number);
}

function programOf(gl) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  return gl.getProgramParameter(program, gl.LINK_STATUS) ? program : null;
}

export class Points {
  /** Points of a slide on a canvas of their own; null where the browser has no WebGL. */
  static of(slide) {
    const canvas = make("canvas", { "aria-hidden": "true" });
    const gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: true });
    const program = gl && programOf(gl);
    return program ? new Points(canvas, gl, program, slide) : null;
  }

  constructor(canvas, gl, program, slide) {
    Object.assign(this, { canvas, gl, program, count: 0, n: slide.barcodes.length });
    gl.useProgram(program);
    this.uniforms = Object.fromEntries(["view", "size"].map((name) => [name, gl.getUniformLocation(program, name)]));
    this.#attribute("place", 2, gl.FLOAT, false, slide.places);
    this.colours = this.#attribute("colour", 4, gl.UNSIGNED_BYTE, true, new Uint8Array(4 * this.n));
    this.order = gl.createBuffer();
  }

  #attribute(name, size, type, normalised, values) {
    const { gl } = this;
    const buffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    const at = gl.getAttribLocation(this.program, name);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, size, type, normalised, 0, 0);
    return buffer;
  }

  /** Result of `coloursOf`; null for no spots. */
  setColours(colours) {
    const { gl } = this;
    this.count = colours?.order.length ?? 0;
    if (!this.count) return;
    const table = new Map();
    const shades = new Uint8Array(4 * this.n);
    for (const spot of colours.order) {
      const code = colours.codes[spot];
      if (!table.has(code)) table.set(code, colours.css[code] ? [...rgbOf(colours.css[code]), 255] : [...WITHOUT, 0]);
      shades.set(table.get(code), 4 * spot);
    }
    gl.bindBuffer(gl.ARRAY_BUFFER, this.colours);
    gl.bufferData(gl.ARRAY_BUFFER, shades, gl.STATIC_DRAW);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.order);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, Uint32Array.from(colours.order), gl.STATIC_DRAW);
  }

  /** Draw all points; lengths are CSS pixels. */
  draw(width, height, factor, left, top, radius) {
    const { gl, canvas } = this;
    const ratio = devicePixelRatio || 1;
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    gl.viewport(0, 0, ...size);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!this.count) return;
    gl.uniform4f(this.uniforms.view, factor, left, top, ratio);
    gl.uniform3f(this.uniforms.size, width, height, Math.max(2 * radius * ratio, 1));
    gl.drawElements(gl.POINTS, this.count, gl.UNSIGNED_INT, 0);
  }

  close() {
    this.canvas.remove();
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }
}
