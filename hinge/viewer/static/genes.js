// The list of genes and the search that narrows it down while one types; it finds what the backbone knows beside the panel.

import { readJson } from "./data.js";
import { byId, fixed, make } from "./page.js";

const SHOWN = 300; // at most; the search finds the others
const OUTSIDE_SHOWN = 12;

export class GeneList {
  /** `choose` gets the index of a gene of the draws, `offer` the name of a gene that only the backbone knows. */
  constructor(choose, offer) {
    this.choose = (gene) => (gene < this.names.length ? choose(gene) : offer(this.nameOf(gene)));
    this.outside = []; // names of the genes that only the backbone knows, numbered after those of the draws
    this.search = byId("gene-search");
    this.list = byId("genes");
    this.chosen = this.active = -1;
    this.search.addEventListener("input", () => {
      this.active = -1;
      this.readVocabulary();
      this.render();
    });
    this.search.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("click", (event) => {
      const item = event.target.closest("[data-gene]");
      if (item) this.choose(Number(item.dataset.gene));
    });
  }

  /** Read the genes of the backbone when something is looked for: it may know tens of thousands. */
  async readVocabulary() {
    if (this.vocabulary) return;
    this.vocabulary = [];
    this.vocabulary = await readJson("vocabulary.json").then(({ genes }) => genes, () => []);
    this.nameOutside();
    this.render();
  }

  nameOutside() {
    const drawn = new Set(this.names);
    this.outside = (this.vocabulary ?? []).filter((name) => !drawn.has(name)).sort();
    this.lower = [...this.names, ...this.outside].map((name) => name.toLowerCase());
  }

  nameOf(gene) {
    return this.names[gene] ?? this.outside[gene - this.names.length];
  }

  open(facts) {
    this.names = facts.genes;
    this.pcc = facts.pcc;
    byId("gene-measure").hidden = !this.pcc;
    this.predicted = new Set(facts.outside);
    this.nameOutside();
    const by = (a, b) => (this.pcc ? (this.pcc[b] ?? -2) - (this.pcc[a] ?? -2) : 0) || this.names[a].localeCompare(this.names[b]);
    this.ranked = this.names.map((_, i) => i).sort(by);
    this.search.value = "";
    this.chosen = this.active = -1;
    this.render();
  }

  matches() {
    const wanted = this.search.value.trim().toLowerCase();
    if (!wanted) return this.ranked;
    const found = this.ranked.filter((gene) => this.lower[gene].includes(wanted));
    // what begins with it first, and of these the shortest: ER before ERBB2
    const rank = (gene) => (this.lower[gene] === wanted ? 0 : this.lower[gene].startsWith(wanted) ? 1 : 2);
    return found.sort((a, b) => rank(a) - rank(b));
  }

  /** Genes that only the backbone knows, what begins with the text first. */
  matchesOutside() {
    const wanted = this.search.value.trim().toLowerCase();
    if (!wanted) return [];
    const found = this.outside.map((_, i) => this.names.length + i).filter((gene) => this.lower[gene].includes(wanted));
    const rank = (gene) => (this.lower[gene].startsWith(wanted) ? this.lower[gene].length : 1000);
    return found.sort((a, b) => rank(a) - rank(b)).slice(0, OUTSIDE_SHOWN);
  }

  render() {
    this.found = this.matches();
    const outside = this.matchesOutside();
    const items = this.found.slice(0, SHOWN).map((gene) => {
      const pcc = this.pcc?.[gene];
      const fill = make("i");
      fill.style.width = `${100 * Math.max(0, pcc ?? 0)}%`;
      const item = make(
        "li",
        { role: "option", id: `gene-${gene}`, "data-gene": gene, "aria-selected": gene === this.chosen },
        make("span", { class: "name" }, this.names[gene]),
      );
      if (this.predicted.has(gene)) item.title = "Outside the panel: predicted by the backbone from the drawn panel";
      if (this.pcc) item.append(make("span", { class: "meter" }, fill), make("span", { class: "number" }, fixed(pcc)));
      return item;
    });
    const rest = this.found.length - items.length;
    const note = (text) => items.push(make("li", { class: "more", role: "option", "aria-disabled": true, "aria-selected": false }, text));
    if (rest > 0) note(`and ${rest.toLocaleString("en")} more: type to find them`);
    if (!this.found.length) note(this.nothingText(outside.length));
    for (const gene of outside) {
      items.push(make("li", { role: "option", id: `gene-${gene}`, "data-gene": gene, "aria-selected": false, class: "outside" }, make("span", { class: "name" }, this.nameOf(gene)), make("span", {}, "outside the panel")));
    }
    this.list.replaceChildren(...items);
    const [all, count] = [this.names.length, this.found.length];
    byId("gene-count").textContent = count === all ? `${all.toLocaleString("en")} genes` : `${count.toLocaleString("en")} of ${all.toLocaleString("en")} genes`;
    this.reachable = [...this.found.slice(0, SHOWN), ...outside];
    this.activate(this.active);
  }

  nothingText(outside) {
    if (outside) return "Not among the genes of the draws. The backbone can draw:";
    if (this.vocabulary?.length) return "Neither the draws nor the backbone have a gene with this in its name.";
    return "No gene of the draws has this in its name, and the backbone of this run draws no genes outside the panel.";
  }

  key(event) {
    const { reachable } = this;
    const at = reachable.indexOf(this.active >= 0 ? this.active : this.chosen);
    if (event.key === "ArrowDown") this.activate(reachable[Math.min(reachable.length - 1, this.active < 0 && at < 0 ? 0 : at + 1)]);
    else if (event.key === "ArrowUp") this.activate(reachable[Math.max(0, at - 1)]);
    else if (event.key === "Enter" && reachable.length) this.choose(this.active >= 0 ? this.active : reachable[0]);
    else if (event.key === "Escape" && this.search.value) {
      this.search.value = "";
      this.render();
    } else if (event.key === "Escape") this.search.blur();
    else return;
    event.preventDefault();
  }

  activate(gene = -1) {
    this.list.querySelector(".active")?.classList.remove("active");
    this.active = gene;
    const item = byId(`gene-${gene}`);
    if (item) {
      item.classList.add("active");
      item.scrollIntoView({ block: "nearest" });
      this.search.setAttribute("aria-activedescendant", item.id);
    } else this.search.removeAttribute("aria-activedescendant");
  }

  /** Mark the gene that is shown. */
  mark(gene) {
    this.chosen = gene;
    for (const item of this.list.querySelectorAll("[role=option]")) item.setAttribute("aria-selected", item.dataset.gene === String(gene));
    byId(`gene-${gene}`)?.scrollIntoView({ block: "nearest" });
  }

  /** The gene that stands before or after the one that is shown. */
  beside(by) {
    const at = this.found.indexOf(this.chosen);
    return this.found[Math.max(0, Math.min(this.found.length - 1, at + by))] ?? this.chosen;
  }
}
