// Genes outside the panel that the backbone knows: the command that draws them.

import { byId, download, make } from "./page.js";

const FILE = "genes.txt";
const quoted = (text) => (/^[\w./+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

export class OutsideGenes {
  constructor() {
    this.genes = [];
    byId("outside-copy").addEventListener("click", async () => {
      await navigator.clipboard.writeText(byId("outside-command").textContent).catch(() => {});
      byId("spoken").textContent = "copied";
    });
    byId("outside-file").addEventListener("click", () => download(FILE, `${this.genes.join("\n")}\n`, "text/plain"));
    byId("outside-clear").addEventListener("click", () => {
      this.genes = [];
      byId("outside-dialog").close();
    });
  }

  /** Add a gene, and show the command that draws all that were added. */
  offer(name, run, slide) {
    if (!this.genes.includes(name)) this.genes.push(name);
    const { genes } = this;
    byId("outside-genes").replaceChildren(...genes.map((gene) => make("li", {}, gene)));
    byId("outside-command").textContent = `hinge sample ${quoted(run)} --slide ${quoted(slide)} --genes ${FILE}`;
    if (!byId("outside-dialog").open) byId("outside-dialog").showModal();
  }
}
