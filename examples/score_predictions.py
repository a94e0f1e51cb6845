"""Score the predictions of any other method beside the noise ceiling, without a run.

python examples/score_predictions.py SLIDES SAMPLE OUTPUT
"""

import json
import sys
from pathlib import Path

import anndata
import numpy as np

import hinge
from hinge.evaluation import PredictionFiles
from hinge.run.evaluation import evaluate_files


def main(slides: str, sample: str, output: Path) -> None:
    slide = hinge.read_slide(slides, sample)
    panel = hinge.select_panel([slide], "hmhvg", 10)
    panel_file = panel.save(output / "panel.json")

    # a prediction is an h5ad with the slide's barcodes, here the slide's mean everywhere plus noise
    rng = np.random.default_rng(0)
    counts = slide[:, panel.genes].X.toarray()
    predicted = anndata.AnnData(np.log2(counts + 1).mean(axis=0) + rng.normal(0, 0.1, counts.shape))
    predicted.obs_names, predicted.var_names = slide.obs_names, panel.genes
    predicted.write_h5ad(output / "mine.h5ad")

    scores = evaluate_files(
        Path(slides),
        [sample],
        panel_file,
        "log2p1",
        [PredictionFiles("mine", (str(output / "mine.h5ad"),), "log2p1")],
        output / "scores.json",
    )
    for row in json.loads(scores.read_text())["rows"]:
        print(f"{row['method']:15} PCC {row['pcc_mean'] or float('nan'):.3f}  MSE {row['mse'] or float('nan'):.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
