"""Grids of runs: named variants of one configuration, over held-out slides and seeds, and their table.

    OUT/slides/               simulated tissue, if the grid has any
    OUT/features/             one HDF5 file per slide and encoder, shared by all cells
    OUT/shared/DIGEST/        panel and pre-trained backbone, shared by all cells with the same settings and slides
    OUT/VARIANT/SLIDE/seedN/  a cell: the folder of a run, and cell.json with its scores
    OUT/table.csv, table.md   mean and standard deviation over slides and seeds

Cells that differ in sampling alone share the trained model too. Finished work is skipped: the same command continues
where it stopped.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hinge.experiments.cells import extract, pretrain, run_cells
from hinge.experiments.grid import Cell, Grid, make_cells
from hinge.experiments.table import summarise_cells, write_table
from hinge.utils.files import read_json
from hinge.utils.locks import lock_folder
from hinge.utils.parallel import RunTasks, task_runner
from hinge.utils.ray_workers import Cluster

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A cell without scores, and the reason in one sentence."""

    name: str
    message: str


@dataclass(frozen=True)
class Tables:
    """The files of the tables, and the cells that are missing in them."""

    csv: Path
    markdown: Path
    failures: list[Failure]


def ablate(grid: Grid, output: str | Path, overrides: Sequence[str] = (), cluster: Cluster | None = None) -> Tables:
    """Run the unfinished cells of a grid and write `table.csv` and `table.md`.

    Parameters
    ----------
    grid, output, overrides, cluster
        As for `run_grid`.

    Returns
    -------
    Tables
        Tables of the finished cells; the failures name the others.
    """
    with lock_folder(output):
        rows, failures = run_grid(grid, output, overrides, cluster)
        return Tables(*write_table(Path(output), summarise_cells(rows)), failures)


def run_grid(
    grid: Grid, output: str | Path, overrides: Sequence[str] = (), cluster: Cluster | None = None
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Run the unfinished cells of a grid.

    Parameters
    ----------
    grid, overrides
        As for `make_cells`.
    output
        Folder for all results.
    cluster
        Where cells run; None: in this process, one after the other.

    Returns
    -------
    tuple
        The rows of scores of all finished cells, each with `variant`, `seed` and costs; and the failures.
    """
    output = Path(output)
    cells = make_cells(grid, output, overrides)
    with lock_folder(output):
        if grid.simulate is not None:
            grid.simulate.write(Path(os.path.realpath(output)) / "slides")
        waiting = [cell for cell in cells if not cell.is_finished()]
        logger.info("%d cells, %d of them finished", len(cells), len(cells) - len(waiting))
        failures: list[Failure] = []
        if waiting:
            with task_runner(cluster) as run:
                failures = _run_waiting(waiting, run)
        rows = [row for cell in cells if cell.is_finished() for row in read_json(cell.result_path)["rows"]]
        return rows, failures


def _run_waiting(waiting: list[Cell], run: RunTasks) -> list[Failure]:
    patches = {}
    for cell in waiting:
        cell.error_path.unlink(missing_ok=True)
        data, features = cell.config.data, cell.config.features
        for slide in (*data.train, *data.test):
            patches[f"{features.encoder_name} features of {data.path}/{slide} in {features.folder}"] = (cell, slide)
    # an error here appears again in every cell that needs these features
    _reasons(run, "features", extract, patches)
    foundations = {str(cell.foundation.output): cell.foundation for cell in waiting if cell.foundation is not None}
    broken = _reasons(run, "backbones", pretrain, foundations)

    failures = []
    groups: dict[str, list[Cell]] = {}
    for cell in waiting:
        path = "" if cell.foundation is None else str(cell.foundation.output)
        if path in broken:
            failures.append(Failure(cell.name, f"no backbone: {broken[path]}"))
        else:
            groups.setdefault(cell.training_digest(), []).append(cell)
    reasons = _reasons(run, "cells", run_cells, groups)
    # a worker may be lost between two cells of its group: the files show which cells are finished
    for digest, group in groups.items():
        for cell in group:
            if cell.is_finished():
                continue
            if cell.error_path.exists():
                reason = cell.error_path.read_text().splitlines()[0]
            else:
                reason = reasons.get(digest, "it did not end")
            failures.append(Failure(cell.name, reason))
    return failures


def _reasons(run: RunTasks, what: str, function: Callable[[Any], None], tasks: Mapping[str, Any]) -> dict[str, str]:
    """Call a function for every task; return name → reason of those that failed."""
    outcomes = run(what, tasks, partial(_given, function))
    return {outcome.name: outcome.failure for outcome in outcomes if outcome.failure}


def _given(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Open a worker whose tasks share nothing but their code."""
    return function
