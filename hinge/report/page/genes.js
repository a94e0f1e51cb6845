// ---------------------------------------------------------------- state shared by the figures
const state = { slide: null, gene: 0, draw: 0, spot: null, opacity: 0.85, view: { zoom: 1, x: 0, y: 0 }, panels: [], matrices: [] };
const spotValues = (values) => {
  const n = state.slide.x.length;
  return values ? values.subarray(state.gene * n, (state.gene + 1) * n) : null;
};

// ---------------------------------------------------------------- gene list
const SORTS = {
  pcc: ["PCC", (slide) => (a, b) => (slide.genewise.pcc?.[b] ?? -9) - (slide.genewise.pcc?.[a] ?? -9)],
  variance: ["measured variance", (slide) => (a, b) => slide.genewise.variance[b] - slide.genewise.variance[a]],
  name: ["name", (slide) => (a, b) => slide.genes[a].localeCompare(slide.genes[b])],
};

function visibleGenes() {
  const { slide } = state;
  const wanted = byId("gene-search").value.trim().toLowerCase();
  return slide.genes
    .map((_, gene) => gene)
    .filter((gene) => slide.genes[gene].toLowerCase().includes(wanted))
    .sort(SORTS[byId("gene-sort").value][1](slide));
}

function listGenes() {
  const { slide } = state;
  const items = visibleGenes().map((gene) => {
    const pcc = slide.genewise.pcc?.[gene];
    const fill = make("i");
    fill.style.width = `${100 * Math.max(0, pcc ?? 0)}%`;
    const item = make(
      "li",
      { role: "option", id: `gene-${gene}`, "aria-selected": gene === state.gene },
      make("span", { class: "name" }, slide.genes[gene]),
      make("span", { class: "meter" }, fill),
      make("span", { class: "number" }, fixed(pcc)),
    );
    item.addEventListener("click", () => chooseGene(gene));
    return item;
  });
  byId("gene-list").replaceChildren(...(items.length ? items : [make("li", { class: "empty" }, "No gene of the panel has this in its name.")]));
}

function chooseGene(gene, scroll = false) {
  state.gene = gene;
  for (const item of byId("gene-list").children) item.setAttribute("aria-selected", item.id === `gene-${gene}`);
  byId("gene-search").setAttribute("aria-activedescendant", `gene-${gene}`);
  const item = byId(`gene-${gene}`);
  const list = byId("gene-list");
  if (item && scroll) list.scrollTop = item.offsetTop - list.offsetTop - list.clientHeight / 2;
  drawGene();
}

function setUpGenes() {
  for (const [name, [label]] of Object.entries(SORTS)) byId("gene-sort").append(new Option(label, name));
  byId("gene-sort").addEventListener("change", listGenes);
  byId("gene-search").addEventListener("input", listGenes);
  for (const id of ["gene-search", "gene-list"]) {
    byId(id).addEventListener("keydown", (event) => {
      const genes = visibleGenes();
      const at = genes.indexOf(state.gene);
      const next = { ArrowDown: at + 1, ArrowUp: at < 0 ? 0 : at - 1, Enter: Math.max(at, 0) }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      if (next >= 0 && next < genes.length) chooseGene(genes[next], true);
    });
  }
}

// ---------------------------------------------------------------- the table of genes

function buildGeneTable() {
  const { slide } = state;
  const { genewise } = slide;
  const number = (key, label, title, digits = 2) =>
    genewise[key] && { label, title, text: (gene) => fixed(genewise[key][gene], digits), value: (gene) => genewise[key][gene] };
  const columns = [
    { label: "Gene", text: (gene) => slide.genes[gene], value: (gene) => slide.genes[gene] },
    number("pcc", "PCC", "Pearson correlation over spots of measured values and predicted mean"),
    number("rmse", "RMSE", "Root mean squared difference of measured values and predicted mean"),
    slide.n_draws >= 19 && number("coverage_90", "In 90 % interval", "Share of measured values in the central 90 % of the draws"),
    number("measured", "Measured mean", `Mean over the spots, ${slide.transform}`),
    number("variance", "Measured variance", "Variance over the spots"),
  ].filter(Boolean);
  const rows = slide.genes.map((_, gene) => gene);
  fillTable(byId("genes-table"), {
    caption: `Scores of each gene on slide ${slide.name}`,
    columns,
    rows,
    search: byId("genes-search"),
    sortBy: genewise.pcc ? 1 : columns.length - 1,
    choose: (gene) => {
      chooseGene(gene, true);
      byId("slide").scrollIntoView();
    },
  });
  byId("genes-csv").onclick = () =>
    downloadCsv(`${slide.name}-genes.csv`, columns.map((column) => column.label), rows.map((gene) => columns.map((column) => column.value(gene))));
}
