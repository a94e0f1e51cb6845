// ---------------------------------------------------------------- comparison of two regions

function buildRegions() {
  const { comparison } = state.slide;
  byId("regions").hidden = byId("regions-link").hidden = !comparison;
  if (!comparison) return;
  const { first, second, table } = comparison;
  const area = ({ name, spots, mm2 }) => `${name} (${spots} spots${isNumber(mm2) ? `, ${fixed(mm2)} mm²` : ""})`;
  byId("regions-text").textContent = `${area(first)} minus ${area(second)}: difference of the means, its 90 % interval over the draws, and the share of draws in which ${first.name} is higher.`;
  const number = (key, label, digits = 2) =>
    table[key] && { label, text: (row) => fixed(table[key][row], digits), value: (row) => table[key][row] };
  const columns = [
    { label: "Gene", text: (row) => table.gene[row], value: (row) => table.gene[row] },
    number("difference", "Difference"),
    { label: "90 % interval", text: (row) => `${fixed(table.low[row])} to ${fixed(table.high[row])}`, value: (row) => table.low[row] },
    number("probability", `P(${first.name} higher)`),
    number("measured_difference", "Measured difference"),
  ].filter(Boolean);
  const rows = table.gene.map((_, row) => row).sort((a, b) => Math.abs(table.difference[b]) - Math.abs(table.difference[a]));
  fillTable(byId("regions-table"), {
    caption: `Difference between ${first.name} and ${second.name}`,
    columns,
    rows,
    search: byId("regions-search"),
    choose: (row) => {
      chooseGene(Math.max(0, state.slide.genes.indexOf(table.gene[row])), true);
      byId("slide").scrollIntoView();
    },
  });
  const keys = Object.keys(table);
  byId("regions-csv").onclick = () =>
    downloadCsv(`${state.slide.name}-regions.csv`, keys, rows.map((row) => keys.map((key) => table[key][row])));
}
