"""The table of a grid: mean and standard deviation of every score over slides and seeds."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hinge.evaluation.statistics import summarise_rows
from hinge.utils.files import atomic_path

COLUMNS = {
    "pcc_50": "PCC-50",
    "pcc_mean": "mean PCC",
    "mse": "MSE",
    "crps": "CRPS",
    "energy": "energy",
    "variogram": "variogram",
    "coverage_50": "50 % covers",
    "coverage_90": "90 % covers",
    "coexpression_r": "co-expr. r",
    "coexpression_rmse": "RMSE",
    "coexpression_r_pooled": "pooled r",
    "coexpression_rmse_pooled": "RMSE",
    "moran_ratio": "Moran's I ratio",
    "c2st_auc": "C2ST AUC",
    "likelihood_gain": "log-likelihood gain, nats",
    "likelihood_share": "of the oracle's",
    "seconds_training": "training, s",
    "seconds_sampling": "sampling, s",
    "trainable": "trained parameters",
}
"""Columns of a table and their headings. The log-likelihood gain is per spot, over the marginal distribution of the
training spots."""


def write_table(folder: Path, entries: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write the result of `summarise_cells` as `table.csv` and `table.md`; return their paths."""
    csv_path, markdown_path = folder / "table.csv", folder / "table.md"
    parts = ("mean", "sd", "sd_seeds", "sd_slides")
    with atomic_path(csv_path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "method", "n", *(f"{key}_{part}" for key in COLUMNS for part in parts)])
        for entry in entries:
            numbers = [entry[part].get(key) for key in COLUMNS for part in parts]
            cells = ["" if number is None else f"{number:.6g}" for number in numbers]
            writer.writerow([entry["variant"], entry["method"], entry["n"], *cells])
    with atomic_path(markdown_path) as temporary:
        temporary.write_text(markdown(entries) + "\n")
    return csv_path, markdown_path


def summarise_cells(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation of the scores of each variant and method.

    Returns
    -------
    list of dict
        `variant`, `method`, `n` (number of rows) and, each as score → number, `mean`, `sd` (over all rows), `sd_seeds`
        (over seeds, of the mean over slides) and `sd_slides` (over slides, of the mean over seeds).
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["method"]), []).append(row)
    entries = []
    for (variant, method), members in groups.items():
        summary = summarise_rows(members, list(COLUMNS))[0]
        entry = {"variant": variant, "method": method, "n": summary["n"], "mean": summary["mean"], "sd": summary["sd"]}
        for part, key in (("sd_seeds", "seed"), ("sd_slides", "slide")):
            levels = {row[key] for row in members}
            means = [
                summarise_rows([row for row in members if row[key] == level], list(COLUMNS))[0]["mean"]
                for level in levels
            ]
            entry[part] = {
                name: float(np.std([mean[name] for mean in means if name in mean], ddof=1))
                for name in COLUMNS
                if sum(name in mean for mean in means) > 1
            }
        entries.append(entry)
    return entries


def markdown(entries: Sequence[dict[str, Any]], spread: str = "sd", with_variant: bool = True) -> str:
    """Return the result of `summarise_cells` as a Markdown table without empty columns.

    Parameters
    ----------
    entries
        Rows.
    spread
        The standard deviation beside the mean: `sd`, `sd_seeds` or `sd_slides`.
    with_variant
        Whether the table has a column with the variant.
    """
    keys = [key for key in COLUMNS if any(key in entry["mean"] for entry in entries)]
    names = ["variant", "method"] if with_variant else ["method"]
    lines = ["| " + " | ".join([*names, *(COLUMNS[key] for key in keys)]) + " |"]
    lines.append("| --- " * (len(names) + len(keys)) + "|")
    for entry in entries:
        cells = [entry[name] for name in names]
        for key in keys:
            if key not in entry["mean"]:
                cells.append("")
                continue
            digits = 0 if key == "trainable" else 1 if key.startswith("seconds") else 3
            deviation = entry[spread].get(key, 0.0)
            cell = f"{entry['mean'][key]:,.{digits}f}"
            cells.append(f"{cell} ± {deviation:,.{digits}f}" if deviation >= 0.5 * 10**-digits else cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
