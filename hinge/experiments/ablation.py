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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hinge.experiments.cells import extract, pretrain, run_cells
from hinge.experiments.grid import Cell, Grid, make_cells
from hinge.experiments.table import summarise_cells, write_table
from hinge.experiments.workers import run_tasks
from hinge.utils.files import read_json
from hinge.utils.locks import lock_folder

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


def ablate(grid: Grid, output: str | Path, overrides: Sequence[str] = (), jobs: int = 1) -> Tables:
    """Run the unfinished cells of a grid and write `table.csv` and `table.md`.

    Parameters
    ----------
    grid, output, overrides, jobs
        As for `run_grid`.

    Returns
    -------
    Tables
        Tables of the finished cells; the failures name the others.
    """
    with lock_folder(output):
        rows, failures = run_grid(grid, output, overrides, jobs)
        return Tables(*write_table(Path(output), summarise_cells(rows)), failures)


def run_grid(
    grid: Grid, output: str | Path, overrides: Sequence[str] = (), jobs: int = 1
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Run the unfinished cells of a grid.

    Parameters
    ----------
    grid, overrides
        As for `make_cells`.
    output
        Folder for all results.
    jobs
        Number of processes, each with its share of the cores and, where there are several GPUs, one of them.

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
        failures = _run_waiting(waiting, jobs)
        rows = [row for cell in cells if cell.is_finished() for row in read_json(cell.result_path)["rows"]]
        return rows, failures


def _run_waiting(waiting: list[Cell], jobs: int) -> list[Failure]:
    patches = {}
    for cell in waiting:
        cell.error_path.unlink(missing_ok=True)
        data, features = cell.config.data, cell.config.features
        for slide in (*data.train, *data.test):
            patches[f"{features.encoder_name} features of {data.path}/{slide} in {features.folder}"] = (cell, slide)
    # an error here appears again in every cell that needs these features
    run_tasks("features", extract, patches, jobs)
    foundations = {str(cell.foundation.output): (cell.foundation,) for cell in waiting if cell.foundation is not None}
    broken = run_tasks("backbones", pretrain, foundations, jobs)

    failures = []
    groups: dict[str, list[Cell]] = {}
    for cell in waiting:
        path = "" if cell.foundation is None else str(cell.foundation.output)
        if path in broken:
            failures.append(Failure(cell.name, f"no backbone: {broken[path]}"))
        else:
            groups.setdefault(cell.training_digest(), []).append(cell)
    reasons = run_tasks("cells", run_cells, {digest: (group,) for digest, group in groups.items()}, jobs)
    # a process may die between two cells of its group: the files show which cells are finished
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
