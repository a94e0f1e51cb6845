"""Plot scores against the number of training spots, of the table of configs/ablations/scarce.yaml.

hinge ablate configs/ablations/scarce.yaml OUTPUT --ray
python benchmarks/learning_curves.py OUTPUT learning-curves.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

# name of the method, and of the variant after the number of spots
METHODS = {
    "hinge": "hinge",
    "hinge-random": "hinge, random backbone",
    "hinge-untrained": "hinge, one training step",
    "hinge-paper": "the paper's configuration",
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
    path = output / "table.csv"
    if not path.exists():
        raise SystemExit(f"{output} has no scores of configs/ablations/scarce.yaml: table.csv is missing")
    table = pd.read_csv(path, dtype={"variant": str})
    parts = table.variant.str.partition("-")
    names = (table.method + parts[1] + parts[2]).map(METHODS)
    scores = table[[f"{key}_mean" for key in SCORES]].set_axis(list(SCORES), axis=1)
    scores = pd.concat([parts[0].astype(int).rename("spots"), names.rename("method"), scores], axis=1)
    return scores.dropna(subset="method").sort_values(["spots", "method"])


def plot(scores: pd.DataFrame, path: Path) -> None:
    """Write one panel for each score, one line for each method but the paper's, which is far off."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (key, label) in zip(axes.flat, SCORES.items(), strict=True):
        for name in METHODS.values():
            if name == METHODS["hinge-paper"]:
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
