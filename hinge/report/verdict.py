"""The verdict of the report: two sentences that the scores decide, on the predicted mean and on the draws."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MODEL = "hinge"
_ATTAINABLE = ("noise-ceiling", "oracle")  # limits, not rivals
_NAMES = {
    "mean": "the mean of the training spots",
    "ridge-hest": "ridge regression on principal components",
    "ridge-cv": "ridge regression",
    "ridge-cv+residual": "ridge regression with correlated residuals",
    "knn": "nearest neighbours",
    "mlp": "a one-layer network",
    "gaussian-diffusion": "Gaussian diffusion",
    "flow-matching": "flow matching",
}
_TOLERANCE = {"pcc_mean": 0.005, "crps": 0.005}  # without intervals: a difference that does not count
_COVERED = 0.03  # deviation of the coverage of 90 % intervals up to which draws count as calibrated

RULE = (
    "Methods count as equal on one slide if the score of one lies in the other's 90 % bootstrap interval over spots, "
    "and on several slides if the 90 % interval of the mean difference over slides contains 0. Draws count as "
    f"calibrated if their 90 % intervals contain between {90 - 100 * _COVERED:.0f} % and {90 + 100 * _COVERED:.0f} % "
    "of the measured values."
)
"""How the verdict is decided, as the page states it."""


def verdict(scores: Mapping[str, Any], slide: str | None = None, transform: str | None = None) -> list[str]:
    """Return two sentences that compare the run with its best baseline: the predicted mean, and the draws.

    Parameters
    ----------
    scores
        Content of `scores.json`.
    slide
        Name of a slide; None for all slides together.
    transform
        Transform of the rows; None for the first one in the file.

    Returns
    -------
    list of str
        Two sentences; a single one if the model was not scored.
    """
    rows = [row for row in scores.get("rows", []) if slide in (None, row.get("slide"))]
    transforms = [row.get("transform") for row in rows]
    transform = transform or next(iter(transforms), None)
    rows = [row for row in rows if row.get("transform") == transform]
    intervals = {
        (entry.get("slide"), entry.get("method")): entry.get("intervals", {}) for entry in scores.get("details", [])
    }
    if not any(row.get("method") == MODEL for row in rows):
        return ["The model was not scored on measured values, so its predictions cannot be judged here."]
    where = f"On {len({row['slide'] for row in rows})} slides" if slide is None else "On this slide"
    if slide is None and len({row["slide"] for row in rows}) == 1:
        where = "On this slide"
    return [_of_mean(rows, intervals, where), _of_draws(rows, intervals)]


def _of_mean(rows: Sequence[Mapping[str, Any]], intervals: Mapping, where: str) -> str:
    own = _values(rows, MODEL, "pcc_mean")
    if not own:
        return f"{where} the predicted mean has no score: no gene varies in the measured spots."
    rival = _best_rival(rows, "pcc_mean", higher=True)
    if rival is None:
        return f"{where} the mean PCC of the predicted mean is {_number(own)}; no baseline was scored beside it."
    figures = f"(mean PCC {_number(own)} against {_number(_values(rows, rival, 'pcc_mean'))})"
    sign = _better(rows, intervals, rival, "pcc_mean", higher=True)
    if sign > 0:
        return f"{where} the predicted mean is more accurate than {_name(rival)}, the best baseline {figures}."
    if sign < 0:
        return f"{where} the predicted mean is less accurate than {_name(rival)}, the best baseline {figures}."
    return f"{where} the predicted mean is as accurate as {_name(rival)}, the best baseline {figures}."


def _of_draws(rows: Sequence[Mapping[str, Any]], intervals: Mapping) -> str:
    own = _values(rows, MODEL, "crps")
    if not own:
        return "There are too few draws to judge their spread; sample at least 2."
    covered = _values(rows, MODEL, "coverage_90")
    if covered:
        share = float(np.mean(list(covered.values())))
        off = share - 0.9
        kind = "calibrated" if abs(off) <= _COVERED + 1e-9 else "too wide" if off > 0 else "too narrow"
        calibration = f"their 90 % intervals are {kind} and contain {100 * share:.0f} % of the measured values"
    else:
        calibration = "fewer than 19 draws do not resolve 90 % intervals"
    rival = _best_rival(rows, "crps", higher=False)
    if rival is None:
        return f"The CRPS of the draws is {_number(own)} without a baseline beside it; {calibration}."
    figures = f"(CRPS {_number(own)} against {_number(_values(rows, rival, 'crps'))})"
    word = {1: "better than", 0: "as good as", -1: "worse than"}[_better(rows, intervals, rival, "crps", higher=False)]
    return f"The draws are {word} those of {_name(rival)} {figures}; {calibration}."


def _values(rows: Sequence[Mapping[str, Any]], method: str, metric: str) -> dict[str, float]:
    """Return slide → score, averaged over the rows of a slide that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(metric)
        if row.get("method") == method and value is not None and math.isfinite(value):
            found.setdefault(row["slide"], []).append(float(value))
    return {slide: float(np.mean(values)) for slide, values in found.items()}


def _best_rival(rows: Sequence[Mapping[str, Any]], metric: str, higher: bool) -> str | None:
    """Return the other method with the best mean score among those scored on all slides of the model."""
    own = _values(rows, MODEL, metric)
    scored = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        values = _values(rows, method, metric)
        if method not in (MODEL, *_ATTAINABLE) and set(own) <= set(values):
            scored[method] = float(np.mean([values[slide] for slide in own]))
    if not scored:
        return None
    return max(scored, key=lambda method: scored[method] if higher else -scored[method])


def _better(rows: Sequence[Mapping[str, Any]], intervals: Mapping, rival: str, metric: str, higher: bool) -> int:
    """Return 1 if the model is better than a rival, -1 if it is worse, 0 if they count as equal; see `RULE`."""
    own, other = _values(rows, MODEL, metric), _values(rows, rival, metric)
    differences = np.array([own[slide] - other[slide] for slide in own]) * (1 if higher else -1)
    mean = float(differences.mean())
    if len(differences) == 1:
        (slide,) = own
        ranges = [intervals.get((slide, method), {}).get(metric) for method in (MODEL, rival)]
        if all(ranges):
            (low, high), (other_low, other_high) = ranges
            equal = low <= other[slide] <= high or other_low <= own[slide] <= other_high
        else:
            equal = abs(mean) <= _TOLERANCE[metric]
    else:
        from scipy.stats import t

        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        equal = abs(mean) <= t.ppf(0.95, len(differences) - 1) * error or mean == 0
    return 0 if equal else int(np.sign(mean))


def _name(method: str) -> str:
    return f"{_NAMES[method]} ({method})" if method in _NAMES else method


def _number(values: Mapping[str, float]) -> str:
    return f"{np.mean(list(values.values())):.3f}"
