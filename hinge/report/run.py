"""The report of a run: its scores and draws, read from the run's folder and written as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hinge.data.draws import read_draws
from hinge.report.html import report_slide, write_report
from hinge.utils.errors import DataError
from hinge.utils.files import read_json

if TYPE_CHECKING:
    from hinge.run.run import Run


def report_run(run: Run) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Parameters
    ----------
    run
        A run with scores. Scored slides without draws appear in the table of scores alone.

    Raises
    ------
    DataError
        The run has no scores.
    """
    if not run.paths.scores.exists():
        raise DataError(f"there are no scores in {run.folder}; run hinge evaluate first")
    scores = read_json(run.paths.scores)
    names = list(dict.fromkeys(row["slide"] for row in scores["rows"]))
    names = [name for name in names if run.paths.samples(name).exists()]
    slides = [report_slide(read_draws(run.paths.samples(name)), run.slide(name)) for name in names]
    settings = run.config.model_dump(mode="json", exclude={"output"})
    return write_report(run.paths.report, scores, slides, f"hinge: {run.folder.name}", settings)
