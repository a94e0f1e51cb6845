"""Plot scores against the number of training spots, of the cells that configs/ablations/scarce.yaml has made.

hinge ablate configs/ablations/scarce.yaml OUTPUT --ray
python benchmarks/learning_curves.py OUTPUT learning-curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

# scores.json has the names of methods, a folder of the grid has the variant of the model
METHODS = {
    "": "hinge",
    "-random": "hinge, random backbone",
    "-untrained": "hinge, one training step",
    "-paper": "the paper's configuration",
    "ridge-cv+residual": "ridge + residual",
    "ridge-cv+residual+pretrained": "ridge + residual, covariance of the pre-training counts",
}
SCORES = {
    "mse": "MSE",
    "crps": "CRPS",
    "energy": "energy score",
    "variogram": "variogram score",
    "coexpression_r_pooled": "pooled co-expression r",
    "coverage_90": "coverage of 90 % intervals",
}


def scores_of(output: Path) -> pd.DataFrame:
    """Return one row for each number of spots and method, the mean over slides and seeds."""
    rows = []
    for path in sorted(output.glob("*/*/*/scores.json")):
        spots, _, kind = path.relative_to(output).parts[0].partition("-")
        for row in json.loads(path.read_text())["rows"]:
            name = f"-{kind}" if kind and row["method"] == "hinge" else row["method"].replace("hinge", "")
            if name in METHODS and (row["method"] == "hinge" or not kind):
                rows.append({"spots": int(spots), "method": METHODS[name], **{key: row[key] for key in SCORES}})
    if not rows:
        raise SystemExit(f"{output} has no scores of configs/ablations/scarce.yaml")
    return pd.DataFrame(rows).groupby(["spots", "method"]).mean().reset_index()


def plot(scores: pd.DataFrame, path: Path) -> None:
    """Write one panel for each score, one line for each method but the paper's, which is far off."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (key, label) in zip(axes.flat, SCORES.items(), strict=True):
        for name in METHODS.values():
            if name == METHODS["-paper"]:
                continue
            of_method = scores[scores.method == name].sort_values("spots")
            style = "--" if name.startswith("ridge") else "-"
            axis.plot(of_method.spots, of_method[key], style, marker="o", markersize=3, label=name)
        axis.set(xscale="log", xlabel="training spots", ylabel=label)
        ticks = sorted(scores.spots.unique())
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes.flat[-1].axhline(0.9, color="0.6", linewidth=0.8)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the grid")
    parser.add_argument("plot", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    scores = scores_of(arguments.output)
    print(scores.round(4).to_string(index=False))
    plot(scores, arguments.plot)


if __name__ == "__main__":
    main()
