// ---------------------------------------------------------------- configuration and scores
function fillSettings() {
  const entries = Object.entries(report.settings);
  const list = (pairs) => pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  byId("configuration").hidden = !entries.length;
  byId("settings").append(...list(entries));
}

const MODEL = "hinge";
const CEILINGS = new Set(["noise-ceiling", "oracle"]);
const ALL = "\u0000all";
const MAIN = ["pcc_mean", "crps", "coverage_90", "coexpression_r"]; // columns of the first table; the others are folded

const betterMark = (better) => {
  if (better === "higher") return "↑ higher";
  if (better === "lower") return "↓ lower";
  return better ? String(better).replace("nearest", "→") : "";
};

// How far a printed score is from the ideal; the smallest is the best. Ties at the printed digits stay ties.
function distanceFromIdeal(value, better) {
  const printed = Number(value.toFixed(3));
  if (better === "higher") return -printed;
  if (better === "lower") return printed;
  const target = parseFloat(String(better).replace("nearest", ""));
  return Number.isFinite(target) ? Number(Math.abs(printed - target).toFixed(3)) : NaN;
}

function setUpScores() {
  const { rows, definitions, methods } = report.scores;
  if (!rows.length) {
    byId("scores-bar").hidden = byId("definitions").hidden = true;
    byId("scores-note").textContent = "This report was written without scores.";
    return;
  }
  const metrics = Object.keys(definitions).filter((metric) => rows.some((row) => isNumber(row[metric])));
  const unique = (name) => [...new Set(rows.map((row) => row[name]).filter((value) => value !== undefined && value !== null))];
  const slides = unique("slide");
  const transforms = unique("transform");
  const methodOrder = unique("method").sort((a, b) => (b === MODEL) - (a === MODEL) || CEILINGS.has(a) - CEILINGS.has(b));

  for (const transform of transforms) byId("scores-transform").append(new Option(transform, transform));
  byId("scores-transform-label").hidden = transforms.length < 2;
  if (slides.length > 1) byId("scores-slide").append(new Option(`mean over ${slides.length} slides`, ALL));
  for (const slide of slides) byId("scores-slide").append(new Option(slide, slide));

  const describe = (node, head, lines) => {
    node.tabIndex = 0;
    const show = () => {
      const box = node.getBoundingClientRect();
      showTip(box.left, box.bottom - 8, head, lines);
    };
    for (const name of ["pointerenter", "focus"]) node.addEventListener(name, show);
    for (const name of ["pointerleave", "blur"]) node.addEventListener(name, hideTip);
    return node;
  };

  function draw() {
    const transform = transforms.length ? byId("scores-transform").value : undefined;
    const chosen = byId("scores-slide").value;
    const mean = chosen === ALL;
    byId("scores-each-label").hidden = !mean;
    const here = rows.filter((row) => transform === undefined || row.transform === transform);
    const scoreOf = (row, metric) => (row && isNumber(row[metric]) ? row[metric] : null);
    const lines = methodOrder
      .map((method) => {
        const own = here.filter((row) => row.method === method && (mean || row.slide === chosen));
        const values = {};
        for (const metric of metrics) {
          const known = own.map((row) => scoreOf(row, metric)).filter(isNumber);
          values[metric] = known.length ? { value: known.reduce((a, b) => a + b, 0) / known.length, slides: known.length } : null;
        }
        return { method, own, values };
      })
      .filter((line) => line.own.length);
    const shown = metrics.filter((metric) => lines.some((line) => line.values[metric]));
    const most = Math.max(...lines.flatMap((line) => shown.map((metric) => line.values[metric]?.slides ?? 0)));
    const best = {};
    for (const metric of shown) {
      const rivals = lines.filter((line) => !CEILINGS.has(line.method) && line.values[metric]?.slides === most);
      const distances = rivals.map((line) => distanceFromIdeal(line.values[metric].value, definitions[metric].better));
      best[metric] = rivals.length > 1 ? Math.min(...distances) : NaN;
    }

    let partial = false;
    const metricHead = (metric, scope) => {
      const meaning = definitions[metric];
      const label = (meaning.label || metric).replaceAll("-", "\u2011"); // a hyphen that does not break
      const cell = make("th", { scope }, label, " ", make("span", { class: "better" }, betterMark(meaning.better)));
      const unit = meaning.unit ? [["unit", meaning.unit]] : [];
      return describe(cell, meaning.label || metric, [[meaning.definition || ""], ...unit, ["better", meaning.better || "–"]]);
    };
    const methodHead = ({ method }, scope) => {
      const name = make("th", { scope }, method.replaceAll("+", "+\u200b"));
      return methods[method] ? describe(name, method, [[methods[method]]]) : name;
    };
    const scoreCell = (line, metric) => {
      const entry = line.values[metric];
      const cell = make("td", { class: entry ? "" : "none" }, make("span", {}, entry ? fixed(entry.value, 3) : "–"));
      if (entry && entry.slides < most) {
        partial = true;
        cell.append("*");
      } else if (entry && !CEILINGS.has(line.method) && distanceFromIdeal(entry.value, definitions[metric].better) === best[metric]) {
        cell.className = "best";
      }
      return cell;
    };
    const tableOf = (columns) => {
      const header = make("tr", {}, make("th", { scope: "col" }, "Method"), ...columns.map((metric) => metricHead(metric, "col")));
      const bodies = [make("tbody"), make("tbody", { class: "ceiling" })];
      for (const line of lines) {
        const body = bodies[CEILINGS.has(line.method) ? 1 : 0];
        body.append(make("tr", { class: line.method === MODEL ? "model" : "" }, methodHead(line, "row"), ...columns.map((metric) => scoreCell(line, metric))));
        if (!mean || !byId("scores-each").checked) continue;
        for (const slide of slides) {
          const one = line.own.find((item) => item.slide === slide);
          if (!one) continue;
          body.append(
            make("tr", { class: "one" }, make("th", { scope: "row" }, slide), ...columns.map((metric) => make("td", {}, fixed(scoreOf(one, metric), 3)))),
          );
        }
      }
      return [make("thead", {}, header), ...bodies.filter((part) => part.children.length)];
    };
    // all scores by methods: there are more scores than the width of a page holds
    const byMethods = () => [
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Score"), ...lines.map((line) => methodHead(line, "col")))),
      make("tbody", {}, ...shown.map((metric) => make("tr", {}, metricHead(metric, "row"), ...lines.map((line) => scoreCell(line, metric))))),
    ];
    let columns = MAIN.filter((metric) => shown.includes(metric));
    if (!columns.length) columns = shown.slice(0, MAIN.length);
    const caption = (text) => make("caption", { class: "unseen" }, text);
    byId("scores-table").replaceChildren(caption("Main scores of the model, the baselines and the noise ceiling"), ...tableOf(columns));
    byId("all-scores").hidden = shown.length <= columns.length;
    byId("all-scores-table").replaceChildren(caption("All scores"), ...byMethods());
    byId("scores-note").textContent = [
      "The best method of each column is marked, ties at the printed digits included.",
      lines.some((line) => CEILINGS.has(line.method)) ? "The noise ceiling is what a perfect prediction could reach on counts this noisy; it does not compete." : "",
      partial ? "* known on fewer slides than the others, so not compared." : "",
    ].join(" ");
  }
  for (const id of ["scores-transform", "scores-slide", "scores-each"]) byId(id).addEventListener("change", draw);
  draw();
  const list = byId("definitions").querySelector("dl");
  for (const metric of metrics) {
    const { label, definition, unit, better } = definitions[metric];
    const notes = [unit ? `Unit: ${unit}.` : "", better ? `Better: ${better}.` : ""].join(" ");
    list.append(make("dt", {}, label || metric), make("dd", {}, `${definition || ""} ${notes}`));
  }
  for (const method of methodOrder) {
    if (methods[method]) list.append(make("dt", {}, method), make("dd", {}, methods[method]));
  }
}
