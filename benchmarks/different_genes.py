"""What it costs that training slides measured different genes: HER2ST with a half of the panel taken from two slides.

C2 keeps all genes, C3 lacks a random half of the panel and C4 the other half; C5, with all genes, is scored. The same
training with all genes everywhere is the reference.

    python benchmarks/different_genes.py HER2ST OUTPUT [key=value ...]
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import hinge
from hinge.config import load_config
from hinge.run.run import Run

CONFIG = Path(__file__).parent.parent / "configs" / "her2st.yaml"
COLUMNS = ["mse", "crps", "coverage_50", "coverage_90", "energy", "coexpression_r_pooled"]


def write_slides(source: Path, folder: Path, names: list[str], lacking: dict[str, list[str]]) -> dict[str, str]:
    """Write slides without some of their genes as h5ad files; return the images of those that have one."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for name in names:
        path = folder / f"{name}.h5ad"
        slide = hinge.read_slide(source, name, require_image=False)
        if slide.uns["hinge"].get("image_path"):
            images[name] = str(slide.uns["hinge"]["image_path"])
        if not path.exists():
            slide[:, ~slide.var_names.isin(lacking.get(name, []))].copy().write_h5ad(path)
    return images


def main(source: Path, output: Path, overrides: list[str]) -> None:
    """Train both runs, draw and score C5, and print the scores."""
    data = load_config(CONFIG).data
    panel = hinge.select_panel([hinge.read_slide(source, name, require_image=False) for name in data.train])
    half = np.random.default_rng(0).permutation(panel.genes)
    lacking = {"C3": half[:100].tolist(), "C4": half[100:].tolist()}
    output.mkdir(parents=True, exist_ok=True)
    (output / "genes.txt").write_text("\n".join(panel.genes))
    rows = {}
    for name, genes in (("all", {}), ("halves", lacking)):
        images = write_slides(source, output / f"slides-{name}", [*data.train, *data.test, *data.pretrain], genes)
        kept = {each: images[each] for each in [*data.train, *data.test]}
        settings = [
            f"output={output / name}",
            f"data.path={output / f'slides-{name}'}",
            f"data.images={json.dumps(kept)}",
            "panel.method=file",
            f"panel.file={output / 'genes.txt'}",
            "panel.min_slides=2",
            "evaluation.baselines=[mean, ridge-cv]",
            "evaluation.bootstrap=0",
        ]
        if name == "halves" and (output / "all" / "backbone").exists() and not (output / name / "backbone").exists():
            # the slides of other patients, on which it is pre-trained, are the same
            (output / name).mkdir(exist_ok=True)
            shutil.copytree(output / "all" / "backbone", output / name / "backbone")
        run = Run(load_config(CONFIG, [*settings, *overrides]))
        run.train()
        run.sample("C5")
        scores = json.loads(run.evaluate().read_text())
        for row in scores["rows"]:
            if row["method"] in ("hinge", "ridge-cv"):
                rows[f"{row['method']}, {name}"] = row
    table = pd.DataFrame(rows).T[COLUMNS].astype(float)
    print(table.round(4).to_string())
    print(f"change of hinge: {100 * (table.loc['hinge, halves'] / table.loc['hinge, all'] - 1).round(4)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
