// The list of genes and the search that narrows it down while one types.

import { byId, fixed, make } from "./page.js";

const SHOWN = 300; // at most; the search finds the others

export class GeneList {
  constructor(choose) {
    this.choose = choose;
    this.search = byId("gene-search");
    this.list = byId("genes");
    this.chosen = this.active = -1;
    this.search.addEventListener("input", () => {
      this.active = -1;
      this.render();
    });
    this.search.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("click", (event) => {
      const item = event.target.closest("[data-gene]");
      if (item) choose(Number(item.dataset.gene));
    });
  }

  open(facts) {
    this.names = facts.genes;
    this.pcc = facts.pcc;
    byId("gene-measure").hidden = !this.pcc;
    this.lower = this.names.map((name) => name.toLowerCase());
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

  render() {
    this.found = this.matches();
    const items = this.found.slice(0, SHOWN).map((gene) => {
      const pcc = this.pcc?.[gene];
      const fill = make("i");
      fill.style.width = `${100 * Math.max(0, pcc ?? 0)}%`;
      const item = make(
        "li",
        { role: "option", id: `gene-${gene}`, "data-gene": gene, "aria-selected": gene === this.chosen },
        make("span", { class: "name" }, this.names[gene]),
      );
      if (this.pcc) item.append(make("span", { class: "meter" }, fill), make("span", { class: "number" }, fixed(pcc)));
      return item;
    });
    const rest = this.found.length - items.length;
    if (rest > 0) items.push(make("li", { class: "more" }, `and ${rest.toLocaleString("en")} more: type to find them`));
    if (!this.found.length) items.push(make("li", { class: "more" }, `No gene of the draws has this in its name. With hinge sample and --genes, genes outside the panel are drawn where the backbone knows them.`));
    this.list.replaceChildren(...items);
    const all = this.names.length;
    byId("gene-count").textContent = this.found.length === all ? `${all.toLocaleString("en")} genes` : `${this.found.length.toLocaleString("en")} of ${all.toLocaleString("en")} genes`;
    this.activate(this.active);
  }

  key(event) {
    const at = this.found.indexOf(this.active >= 0 ? this.active : this.chosen);
    const last = Math.min(this.found.length, SHOWN) - 1;
    if (event.key === "ArrowDown") this.activate(this.found[Math.min(last, this.active < 0 && at < 0 ? 0 : at + 1)]);
    else if (event.key === "ArrowUp") this.activate(this.found[Math.max(0, at - 1)]);
    else if (event.key === "Enter" && this.found.length) this.choose(this.active >= 0 ? this.active : this.found[0]);
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
