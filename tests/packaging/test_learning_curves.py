"""The plot of learning curves takes each score from the cell and the method that it is of."""

import subprocess
import sys
from pathlib import Path

import pytest

from hinge.experiments.table import summarise_cells, write_table

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "learning_curves.py"
NAMES = ["mse", "crps", "energy", "variogram", "coexpression_r_pooled", "coverage_90"]


def cell(variant: str, seed: int, crps: dict[str, float]) -> list[dict]:
    of_cell = {"variant": variant, "slide": "S1", "seed": seed, "transform": "log2p1", **dict.fromkeys(NAMES, 0.5)}
    return [{**of_cell, "method": method, "crps": value} for method, value in crps.items()]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.full
def test_means_of_cells(tmp_path):
    rows = cell("25", 0, {"hinge": 0.4, "ridge-cv+residual": 0.6})
    rows += cell("25", 1, {"hinge": 0.2, "ridge-cv+residual": 0.6})
    rows += cell("25-random", 0, {"hinge": 0.7, "ridge-cv+residual": 0.9})
    rows += cell("100", 0, {"hinge": 0.1, "mean": 5.0})
    write_table(tmp_path, summarise_cells(rows))
    done = run(tmp_path, tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(maxsplit=len(NAMES)) for line in done.stdout.splitlines()[1:]]
    found = {" ".join(line[0].split()): float(line[2]) for line in lines}
    assert found == {"25 hinge": 0.3, "25 ridge + residual": 0.6, "25 hinge, random backbone": 0.7, "100 hinge": 0.1}
    assert (tmp_path / "plot.png").stat().st_size > 1000
    (tmp_path / "empty").mkdir()
    assert "has no scores" in run(tmp_path / "empty", tmp_path / "no.png").stderr
