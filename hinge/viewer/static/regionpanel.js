// The tab of regions: tools to draw them, their list, and the table of one region or of two compared.

import { readJson } from "./data.js";
import { byId, download, fixed, make } from "./page.js";
import { countOf, decodeSpots, encodeSpots, readRegions, toGeoJson } from "./regions.js";

const ROLES = ["a", "b"];
const ROWS_SHOWN = 200;
const HEADS = {
  gene: "Gene",
  mean: "Mean",
  difference: "A − B",
  interval: "90 %",
  probability: "P(A > B)",
  measured: "Measured",
  measured_difference: "Measured",
  share_above: "Share above",
  share_above_first: "A above",
  share_above_second: "B above",
};
const TITLES = {
  mean: "Mean over the region, mean of the draws",
  difference: "Mean of region A minus mean of region B, mean of the draws",
  interval: "Interval of 90 % of the draws, each of which gives one mean over the region",
  probability: "Share of draws in which region A is higher",
  measured: "Mean of the measured values in the region",
  measured_difference: "Measured mean of region A minus that of region B",
  share_above: "Share of draws and spots above the threshold",
  share_above_first: "Share of draws and spots of region A above the threshold",
  share_above_second: "Share of draws and spots of region B above the threshold",
};

export class RegionPanel {
  /** `on` has functions changed(), chooseGene(index), tool(name or null), say(text). */
  constructor(on) {
    this.on = on;
    this.regions = [];
    this.chosen = { a: null, b: null };
    this.sort = { key: null, down: true };
    for (const button of byId("region-tools").children) {
      button.addEventListener("click", () => this.setTool(this.tool === button.dataset.tool ? null : button.dataset.tool));
    }
    byId("region-file").addEventListener("change", (event) => this.read(event.target));
    byId("region-labels").addEventListener("change", (event) => this.addLabels(event.target));
    byId("region-save").addEventListener("click", () => {
      download(`${this.slide.facts.name}.geojson`, toGeoJson(this.regions, this.slide), "application/geo+json");
    });
    byId("region-threshold").addEventListener("change", () => this.update());
    byId("region-search").addEventListener("input", () => this.fill());
    byId("region-csv").addEventListener("click", () => this.saveCsv());
    byId("region-enlarge").addEventListener("click", () => {
      byId("region-large").append(byId("region-result"));
      byId("region-dialog").showModal();
    });
    byId("region-dialog").addEventListener("close", () => byId("panel-regions").append(byId("region-result")));
  }

  setTool(tool) {
    this.tool = tool;
    for (const button of byId("region-tools").children) button.setAttribute("aria-pressed", button.dataset.tool === tool);
    this.on.tool(tool);
  }

  async open(slide) {
    this.slide = slide;
    this.regions = [];
    this.chosen = { a: null, b: null };
    this.found = null;
    this.setTool(null);
    const { columns, regions } = await readJson(`${slide.path}labels.json`);
    if (this.slide !== slide) return;
    this.columns = columns;
    const choices = columns.map((column, i) => new Option(`${column.name} (${column.labels.length} labels)`, i));
    byId("region-labels").replaceChildren(new Option("From labels …", ""), ...choices);
    byId("region-labels").hidden = !columns.length;
    for (const region of regions) {
      this.regions.push({ ...region, spots: await decodeSpots(region.spots, slide.barcodes.length) });
    }
    if (this.regions.length > 1) this.chosen = { a: this.regions[0], b: this.regions[1] };
    await this.update();
  }

  addLabels(select) {
    const column = this.columns[select.value];
    select.value = "";
    if (!column) return;
    const added = column.labels.map((name, label) => ({ name, spots: Uint8Array.from(column.codes, (code) => Number(code === label)), polygons: [] }));
    this.add(added.filter(({ spots }) => countOf(spots)));
  }

  async read(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      this.add(readRegions(file.name, await file.text(), this.slide));
      this.on.say("");
    } catch (error) {
      this.on.say(error.message);
    }
  }

  /** Add regions; those without a name are numbered. The first two become A and B. */
  add(regions) {
    for (const region of regions) {
      region.name ??= `Region ${this.regions.length + 1}`;
      this.regions.push(region);
      const free = ROLES.find((role) => !this.chosen[role]);
      if (free) this.chosen[free] = region;
    }
    return this.update();
  }

  /** A region of the address: one of the same spots that is known already, or a new one. */
  async recall(role, name, text) {
    const spots = await decodeSpots(text, this.slide.barcodes.length);
    const same = this.regions.find((region) => String(region.spots) === String(spots));
    const region = same ?? { name, spots, polygons: [] };
    if (!same) this.regions.push(region);
    this.chosen[role] = region;
    await this.update();
  }

  choose(region, role) {
    const other = role === "a" ? "b" : "a";
    if (this.chosen[role] === region) this.chosen[role] = null;
    else this.chosen[role] = region;
    if (this.chosen[other] === region) this.chosen[other] = null;
    return this.update();
  }

  remove(region) {
    this.regions = this.regions.filter((each) => each !== region);
    for (const role of ROLES) if (this.chosen[role] === region) this.chosen[role] = null;
    return this.update();
  }

  list() {
    const items = this.regions.map((region) => {
      const name = make("input", { type: "text", value: region.name, "aria-label": "Name of the region" });
      name.addEventListener("change", () => {
        region.name = name.value.trim() || region.name;
        this.update();
      });
      const roles = ROLES.map((role) => {
        const pressed = this.chosen[role] === region;
        const button = make("button", { type: "button", class: `role ${role}`, "aria-pressed": pressed, "aria-label": `${region.name} is region ${role.toUpperCase()}` }, role.toUpperCase());
        button.addEventListener("click", () => this.choose(region, role));
        return button;
      });
      const remove = make("button", { type: "button", class: "plain", "aria-label": `Remove ${region.name}` }, "×");
      remove.addEventListener("click", () => this.remove(region));
      return make("li", {}, name, make("span", { class: "soft" }, `${countOf(region.spots).toLocaleString("en")} spots`), ...roles, remove);
    });
    byId("regions-list").replaceChildren(...items);
    byId("region-hint").hidden = this.regions.length > 0;
    byId("region-save").disabled = !this.regions.length;
  }

  /** Path of the table of what is chosen, null for none. */
  async request(ending) {
    const [a, b] = [this.chosen.a ?? this.chosen.b, this.chosen.a && this.chosen.b];
    if (!a) return null;
    const query = b ? { first: await encodeSpots(a.spots), second: await encodeSpots(b.spots) } : { spots: await encodeSpots(a.spots) };
    const threshold = byId("region-threshold").value;
    if (threshold !== "") query.threshold = threshold;
    return `${this.slide.path}${b ? "compare" : "region"}.${ending}?${new URLSearchParams(query)}`;
  }

  async update() {
    this.list();
    this.on.changed();
    const path = await this.request("json");
    this.path = path;
    this.found = null;
    if (!path) return this.fill();
    try {
      const found = await readJson(path);
      if (this.path !== path) return; // another choice was made meanwhile
      this.found = found;
    } catch (error) {
      byId("region-text").textContent = `${error.message}. Tables of regions need hinge view; a folder of files cannot compute them.`;
      byId("region-table").replaceChildren();
      byId("region-result").hidden = false;
      return;
    }
    this.sort = { key: "difference" in this.found.columns ? "difference" : "mean", down: true };
    this.fill();
  }

  fill() {
    const { found, chosen } = this;
    byId("region-result").hidden = !found;
    byId("region-threshold-unit").textContent = this.slide.facts.transform;
    if (!found) return;
    const one = chosen.a ?? chosen.b;
    const area = (i) => (found.mm2[i] === null ? "" : `, ${fixed(found.mm2[i])} mm²`);
    const of = (region, i) => `${region.name} (${found.spots[i].toLocaleString("en")} spots${area(i)})`;
    byId("region-text").textContent = found.spots.length > 1 ? `A ${of(chosen.a, 0)} minus B ${of(chosen.b, 1)}, ${this.slide.facts.transform}.` : `${of(one, 0)}, ${this.slide.facts.transform}.`;
    const { columns, genes } = found;
    const keys = Object.keys(HEADS).filter((key) => key === "gene" || key === "interval" || key in columns);
    const value = (key, row) => (key === "gene" ? genes[row] : key === "interval" ? columns.low[row] : columns[key][row]);
    const text = (key, row) => (key === "interval" ? `${fixed(columns.low[row])} – ${fixed(columns.high[row])}` : key === "gene" ? genes[row] : fixed(value(key, row)));
    const wanted = byId("region-search").value.trim().toLowerCase();
    const { key, down } = this.sort;
    // a difference is sorted by its size, either way
    const rank = (row) => (key === "difference" ? Math.abs(value(key, row)) : value(key, row));
    const rows = genes.map((_, row) => row).filter((row) => genes[row].toLowerCase().includes(wanted));
    rows.sort((x, y) => (key === "gene" ? rank(x).localeCompare(rank(y)) : (rank(x) ?? -Infinity) - (rank(y) ?? -Infinity)));
    if (down) rows.reverse();
    const head = keys.map((name) => {
      const button = make("button", { type: "button" }, HEADS[name]);
      button.addEventListener("click", () => {
        this.sort = { key: name, down: name === key ? !down : name !== "gene" };
        this.fill();
      });
      const cell = make("th", { scope: "col", title: TITLES[name] ?? "" }, button);
      if (name === key) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      return cell;
    });
    const body = rows.slice(0, ROWS_SHOWN).map((row) => {
      const gene = make("button", { type: "button", class: "plain" }, genes[row]);
      gene.addEventListener("click", () => this.on.chooseGene(row));
      return make("tr", {}, make("th", { scope: "row" }, gene), ...keys.slice(1).map((name) => make("td", {}, text(name, row))));
    });
    byId("region-table").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
    byId("region-rest").textContent = rows.length > ROWS_SHOWN ? `and ${rows.length - ROWS_SHOWN} more: type to find them, or save the CSV` : "";
  }

  async saveCsv() {
    const path = await this.request("csv");
    const response = await fetch(path);
    const names = [this.chosen.a, this.chosen.b].filter(Boolean).map((region) => region.name);
    if (response.ok) download(`${this.slide.facts.name} ${names.join(" - ")}.csv`, await response.text(), "text/csv");
    else this.on.say(`the table cannot be read (${response.status})`);
  }
}
