"""Files and terminal tables of scores."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hinge.evaluation.definitions import METRICS
from hinge.evaluation.statistics import paired_wilcoxon, summarise_rows
from hinge.utils.errors import DataError
from hinge.utils.files import read_json, write_json
from hinge.utils.packages import VERSION

if TYPE_CHECKING:
    from rich.table import Table

    from hinge.evaluation.scores import Evaluation

_PRINTED = (
    "pcc_50",
    "pcc_mean",
    "mse",
    "crps",
    "energy",
    "variogram",
    "coverage_50",
    "coverage_90",
    "c2st_auc",
    "coexpression_r",
    "coexpression_rmse",
    "moran_ratio",
    "ssc",
)


def read_scores(path: Path) -> dict[str, Any]:
    """Return the content of a file of `write_scores`.

    Raises
    ------
    DataError
        The file is damaged, or holds something else.
    """
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    named = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("slide", "method", "transform"))
        for row in rows
    )
    if not named or not isinstance(content.get("definitions"), dict):
        raise DataError(f"{path} holds no scores: definitions, and rows with slide, method and transform, are needed")
    return content


def write_scores(path: str | Path, evaluations: Sequence["Evaluation"], reference: str = "hinge") -> Path:
    """Write evaluations of one or several slides as JSON, with the definition of each metric; return the path.

    The file holds `hinge_version`, `definitions` (metric → label, definition, unit, better), `rows`, `attained`
    and `details` of the evaluations, `summary` (mean and standard deviation over slides, see `summarise_rows`) and
    `comparisons` (paired Wilcoxon tests over slides of `reference` with each other method, see `paired_wilcoxon`).
    A score that does not exist is null.
    """
    together = {
        part: [entry for evaluation in evaluations for entry in getattr(evaluation, part)]
        for part in ("rows", "attained", "details")
    }
    return write_json(
        path,
        {
            "hinge_version": VERSION,
            "definitions": {name: asdict(metric) for name, metric in METRICS.items()},
            "rows": together["rows"],
            "attained": together["attained"],
            "summary": summarise_rows(together["rows"], list(METRICS)),
            "comparisons": paired_wilcoxon(together["rows"], list(METRICS), reference),
            "details": together["details"],
        },
    )


def scores_table(rows: Sequence[dict[str, Any]], attained: Sequence[dict[str, Any]] = ()) -> "Table":
    """Return a terminal table of the main scores.

    It has a block for each slide, then mean ± standard deviation if there are several slides, then the attained share
    of each method.

    Parameters
    ----------
    rows, attained
        Rows of `Evaluation`s or of a file of scores. Missing scores, NaN or None, are shown as a dash and left out
        of the means; columns without any score are left out.
    """
    from rich.table import Table

    known = [name for name in _PRINTED if any(_number(row.get(name)) is not None for row in rows)]
    printed = known or list(_PRINTED)
    table = Table(title="scores", title_justify="left")
    for column in ("slide", "transform", "method"):
        table.add_column(column, no_wrap=True)
    for name in printed:
        sign = {"higher": "↑", "lower": "↓"}.get(METRICS[name].better, "")
        table.add_column(f"{METRICS[name].label} {sign}".strip(), justify="right")

    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        blocks.setdefault((row["slide"], row["transform"]), []).append(row)
    for (slide, transform), block in blocks.items():
        for row in block:
            numbers = [_number(row.get(name)) for name in printed]
            table.add_row(slide, transform, row["method"], *("–" if x is None else f"{x:.3f}" for x in numbers))
        table.add_section()
    if len({slide for slide, _ in blocks}) > 1:
        for entry in summarise_rows(rows, printed):
            cells = []
            for name in printed:
                cell = f"{entry['mean'][name]:.3f}" if name in entry["mean"] else "–"
                cells.append(f"{cell} ± {entry['sd'][name]:.3f}" if name in entry["sd"] else cell)
            table.add_row(f"mean of {entry['n']}", entry["transform"], entry["method"], *cells)
        table.add_section()
    for row in attained:
        shares = [_number(row.get(name)) for name in printed]
        if row["of"] != row["method"] and any(share is not None for share in shares):
            cells = ("–" if share is None else f"{share:.0%}" for share in shares)
            table.add_row(row["slide"], f"of {row['of']}", row["method"], *cells)
    return table


def _number(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
