// ---------------------------------------------------------------- calibration
const FRAME = { width: 420, height: 330, left: 60, right: 12, top: 12, bottom: 42 };
const scaleX = (value) => FRAME.left + value * (FRAME.width - FRAME.left - FRAME.right);
const scaleY = (value) => FRAME.height - FRAME.bottom - value * (FRAME.height - FRAME.top - FRAME.bottom);
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${scaleX(x).toFixed(1)} ${scaleY(y).toFixed(1)}`).join("");

function chart(title, xLabel, yLabel, yTop, marks) {
  const svg = make("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", "aria-label": title });
  for (let i = 0; i <= 4; i++) {
    const at = i / 4;
    const x = scaleX(at);
    const y = scaleY(at);
    svg.append(
      make("line", { class: "axis", x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y, y2: y }),
      make("text", { x, y: FRAME.height - FRAME.bottom + 16, "text-anchor": "middle" }, fixed(at)),
      make("text", { x: FRAME.left - 7, y: y + 4, "text-anchor": "end" }, fixed(at * yTop, yTop < 0.5 ? 3 : 2)),
    );
  }
  svg.append(
    make("text", { x: scaleX(0.5), y: FRAME.height - 6, "text-anchor": "middle" }, xLabel),
    make("text", { transform: `translate(11 ${scaleY(0.5)}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
    ...marks,
  );
  return make("div", { class: "chart" }, make("h3", {}, title), svg);
}

// The next larger number that looks well beside a tick.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((factor) => factor * power >= value * (1 - 1e-9)) * power;
}

function hoverable(node, head, rows) {
  for (const name of ["pointermove", "pointerdown"]) {
    node.addEventListener(name, (event) => showTip(event.clientX, event.clientY, head, rows));
  }
  onLeave(node, hideTip);
  return node;
}

function drawCalibration() {
  const { calibration } = state.slide;
  byId("calibration").hidden = !calibration;
  if (!calibration) return;
  const points = (item) => item.nominal.map((nominal, i) => [nominal, item.empirical[i]]);
  const others = report.slides.map((slide) => slide.calibration).filter((item, i) => item && i !== state.index);
  const coverage = [
    make("path", { class: "guide", d: path([[0, 0], [1, 1]]) }),
    ...others.map((item) => make("path", { class: "others", d: path(points(item)) })),
    make("path", { class: "curve", d: path(points(calibration)) }),
    ...points(calibration).flatMap(([x, y]) => {
      const at = { cx: scaleX(x), cy: scaleY(y) };
      const target = make("circle", { class: "target", r: 11, ...at });
      return [make("circle", { class: "dot", r: 3, ...at }), hoverable(target, `${Math.round(100 * x)} % interval`, [["covers", `${fixed(100 * y, 1)} %`]])];
    }),
  ];
  const { ranks } = calibration;
  const even = 1 / ranks.length;
  const top = roundUp(Math.max(2 * even, 1.05 * Math.max(...ranks)) / 4) * 4;
  const columns = ranks.map((share, i) => {
    const x = scaleX(i / ranks.length);
    const box = { x: x + 0.75, width: scaleX((i + 1) / ranks.length) - x - 1.5 };
    const y = scaleY(share / top);
    const column = make("rect", { class: "column", ...box, y, height: scaleY(0) - y });
    const head = `Rank ${fixed(i / ranks.length)} to ${fixed((i + 1) / ranks.length)}`;
    return hoverable(column, head, [["share of values", fixed(share, 3)], ["if calibrated", fixed(even, 3)]]);
  });
  columns.push(make("path", { class: "guide", d: path([[0, even / top], [1, even / top]]) }));
  byId("charts").replaceChildren(
    chart("Coverage of central intervals", "nominal coverage", "share of measured values inside", 1, coverage),
    chart("Rank of the measured value among the draws", "0 = below every draw, 1 = above", "share of measured values", top, columns),
  );
}
