// The tab of what is shown: range of the colours, threshold, filter, channels, gene sets, category, brightness.

import { CATEGORIES } from "./colours.js";
import { GeneSet } from "./data.js";
import { thresholdOf } from "./layers.js";
import { byId, fixed, make } from "./page.js";

const NAMES_OFFERED = 3000; // genes in the list of suggestions
const MOST_GENES = 200; // of a gene set
const CHANNEL_IDS = ["channel-red", "channel-green", "channel-blue"];

/** Gene sets of a GMT file: name → genes. */
export function readGmt(text) {
  const sets = new Map();
  for (const line of text.split(/\r?\n/)) {
    const [name, , ...genes] = line.split("\t").map((cell) => cell.trim());
    if (name && genes.some(Boolean)) sets.set(name, genes.filter(Boolean));
  }
  return sets;
}

export class DisplayPanel {
  /** `on` has functions changed(), layer(name), gene(gene), say(text); `display` is what all panes share. */
  constructor(display, on) {
    this.display = display;
    this.on = on;
    this.sets = new Map();
    const number = (id, key) =>
      byId(id).addEventListener("change", (event) => {
        display[key] = event.target.value === "" ? null : Number(event.target.value);
        on.changed();
      });
    number("threshold", "threshold");
    number("filter-low", "low");
    number("filter-high", "high");
    byId("clip").addEventListener("change", (event) => {
      display.clip = Number(event.target.value);
      on.changed();
    });
    byId("own-range").addEventListener("change", (event) => {
      display.own = event.target.checked;
      on.changed();
    });
    byId("brightness").addEventListener("input", (event) => {
      display.brightness = Number(event.target.value);
      on.changed();
    });
    byId("category").addEventListener("change", (event) => {
      this.setCategory(event.target.value);
      if (display.label) on.layer("label");
      on.changed();
    });
    CHANNEL_IDS.forEach((id, i) => byId(id).addEventListener("change", (event) => this.setChannel(i, event.target.value.trim())));
    byId("gmt-file").addEventListener("change", (event) => this.readSets(event.target));
    byId("gene-sets").addEventListener("change", (event) => this.chooseSet(event.target.value));
  }

  open(slide) {
    this.slide = slide;
    this.display.label = null;
    this.display.channels = [null, null, null];
    byId("gene-names").replaceChildren(...slide.facts.genes.slice(0, NAMES_OFFERED).map((name) => make("option", { value: name })));
    this.setColumns([]);
  }

  setColumns(columns) {
    this.columns = columns;
    byId("category").replaceChildren(new Option("none", ""), ...columns.map((column) => new Option(column.name, column.name)));
    byId("category").disabled = !columns.length;
    this.setCategory(this.wantedCategory ?? "");
  }

  setCategory(name) {
    this.display.label = this.columns.find((column) => column.name === name) ?? null;
    byId("category").value = this.display.label ? name : "";
    const labels = this.display.label?.labels ?? [];
    byId("category-key").replaceChildren(
      ...labels.map((label, i) => {
        const chip = make("i", { "aria-hidden": "true" });
        chip.style.background = CATEGORIES[i % CATEGORIES.length];
        return make("li", {}, chip, label);
      }),
    );
  }

  async setChannel(i, name, show = true) {
    const { slide, display } = this;
    const index = slide.facts.genes.indexOf(name);
    byId(CHANNEL_IDS[i]).value = name;
    if (name && index < 0) this.on.say(`${name} is not among the ${slide.facts.genes.length} genes of the draws`);
    const gene = index < 0 ? null : await slide.gene(index);
    if (this.slide !== slide) return;
    display.channels[i] = gene;
    if (gene && show) this.on.layer("channels");
    this.on.changed();
  }

  async readSets(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    this.sets = readGmt(await file.text());
    if (!this.sets.size) return this.on.say(`${file.name} holds no gene set; a GMT file has a name, a description and genes in each line, separated by tabs`);
    byId("gene-sets").replaceChildren(new Option("Gene set …", ""), ...[...this.sets.keys()].map((name) => new Option(name, name)));
    byId("gene-sets").hidden = false;
    const [first] = this.sets.keys();
    byId("gene-sets").value = first;
    await this.chooseSet(first);
  }

  async chooseSet(name) {
    const { slide } = this;
    const wanted = this.sets.get(name);
    if (!wanted) return;
    const known = [...new Set(wanted)].map((gene) => slide.facts.genes.indexOf(gene)).filter((index) => index >= 0);
    if (!known.length) return this.on.say(`none of the ${wanted.length} genes of ${name} is among the genes of the draws`);
    this.on.say(`Reading ${Math.min(known.length, MOST_GENES)} genes of ${name} …`);
    const genes = await Promise.all(known.slice(0, MOST_GENES).map((index) => slide.gene(index)));
    if (this.slide !== slide) return;
    const set = new GeneSet(slide, name, genes);
    const used = `${name}: mean of ${set.size} of its ${wanted.length} genes, each scaled to mean 0 and standard deviation 1`;
    this.on.say(set.size < wanted.length ? `${used}; the others are not among the draws, do not vary, or exceed ${MOST_GENES}` : used);
    this.on.gene(set);
  }

  /** Show the settings, of which some depend on the gene. */
  show(gene) {
    const { display } = this;
    byId("clip").value = display.clip;
    byId("own-range").checked = display.own;
    byId("threshold").value = display.threshold ?? "";
    byId("filter-low").value = display.low ?? "";
    byId("filter-high").value = display.high ?? "";
    byId("brightness").value = display.brightness;
    byId("threshold").placeholder = gene ? fixed(thresholdOf(gene, display), 1) : "";
    for (const id of ["threshold-unit", "filter-unit"]) byId(id).textContent = gene?.unit ?? "";
  }
}
