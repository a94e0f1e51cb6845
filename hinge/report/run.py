"""The report of a run: its scores and draws, read from the run's folder and written as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hinge.data.draws import read_draws
from hinge.data.regions import read_regions
from hinge.evaluation.tables import read_scores
from hinge.report.html import write_report
from hinge.report.slides import ReportSlide, report_slide
from hinge.tasks.regions import compare_regions, region_area
from hinge.utils.errors import DataError

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
    scores = read_scores(run.paths.scores)
    names = list(dict.fromkeys(row["slide"] for row in scores["rows"]))
    names = [name for name in names if run.paths.samples(name).exists()]
    slides = [_slide(run, name) for name in names]
    settings = run.config.model_dump(exclude={"output"})
    title = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}: predicted expression" if names else "Scores"
    return write_report(run.paths.report, scores, slides, f"{title} ({run.folder.name})", settings)


def _slide(run: Run, name: str) -> ReportSlide:
    """Return a slide with the comparison of the first two regions in its saved file of regions, if there is one."""
    draws, slide = read_draws(run.paths.samples(name)), run.slide(name)
    shown = report_slide(draws, slide, run.panel().shares)
    if run.paths.regions(name).exists():
        regions = [region for region in read_regions(run.paths.regions(name), draws).values() if region.spots.any()]
        if len(regions) > 1:
            first, second = regions[:2]
            shown.comparison = {
                "table": compare_regions(draws, first.spots, second.spots, measured=slide),
                **{
                    key: {
                        "name": region.name,
                        "spots": int(region.spots.sum()),
                        "mm2": region_area(draws, region.spots),
                    }
                    for key, region in (("first", first), ("second", second))
                },
            }
    return shown
