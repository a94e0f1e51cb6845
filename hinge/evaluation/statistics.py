"""Uncertainty of scores: over spots, over slides and seeds, and between methods."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.accuracy import as_matrix, constant_genes
from hinge.evaluation.names import DEFAULT_RESAMPLES


def bootstrap_spots(n_spots: int, n_resamples: int, seed: int) -> NDArray[np.int64]:
    """Return the multiplicity (B, n) of each spot in each bootstrap resample; every row sums to n."""
    return np.random.default_rng(seed).multinomial(n_spots, np.full(n_spots, 1 / n_spots), size=n_resamples)


def bootstrap_intervals(
    measured: ArrayLike,
    mean: ArrayLike | None,
    of_spots: Mapping[str, NDArray],
    *,
    n_resamples: int = DEFAULT_RESAMPLES,
    level: float = 0.9,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return percentile intervals of scores under resampling of spots.

    They describe the variation of a score with the sample of spots. Spots of one slide are not independent; the
    variation between slides is larger and must be estimated from several slides.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    mean
        Predicted mean (n, G); without it, correlations have no intervals.
    of_spots
        Score → its values (n,) at the spots, whose mean is the score.
    n_resamples, level, seed
        Number of resamples, nominal level of the intervals, and seed of the resamples.

    Returns
    -------
    dict
        Score → [lower, upper], of the scores in `of_spots` without NaN and, with `mean`, of `pcc_50` and `pcc_mean`.
    """
    measured = as_matrix(measured, "the measured slide")
    counts = bootstrap_spots(len(measured), n_resamples, seed)
    ends = [(1 - level) / 2, (1 + level) / 2]
    resampled = {
        name: counts @ values / len(measured) for name, values in of_spots.items() if np.isfinite(values).all()
    }
    if mean is not None and len(measured) > 1:
        pcc = _weighted_pcc(measured, as_matrix(mean, "the prediction"), counts / len(measured))
        best = -np.sort(-np.nan_to_num(pcc, nan=-np.inf), axis=1)[:, :50]
        if np.isfinite(best).any(axis=1).all():
            resampled["pcc_50"] = np.ma.masked_invalid(best).mean(axis=1).filled(np.nan)
            resampled["pcc_mean"] = np.nanmean(pcc, axis=1)
    return {name: np.quantile(values, ends).tolist() for name, values in resampled.items()}


def _weighted_pcc(measured: NDArray, mean: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """Return Pearson correlations (B, G) over spots with weights (B, n); NaN for genes constant in the resample."""
    constant, predicted_constant = constant_genes(measured), constant_genes(mean)
    # centred at the mean of the slide, which avoids cancellation in differences of sums of squares
    measured, mean = measured - measured.mean(axis=0), mean - mean.mean(axis=0)
    first, second = weights @ measured, weights @ mean
    covariance = weights @ (measured * mean) - first * second
    spread = [weights @ values**2 - centre**2 for values, centre in ((measured, first), (mean, second))]
    size = np.sqrt(np.maximum(spread[0], 0.0) * np.maximum(spread[1], 0.0))
    pcc = np.divide(covariance, size, out=np.zeros_like(size), where=size > 1e-12)
    pcc[:, predicted_constant] = 0.0
    return np.where(constant | (spread[0] <= 1e-12), np.nan, pcc)


def summarise_rows(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return mean and standard deviation of scores over the rows (slides, seeds) of each method.

    Parameters
    ----------
    rows
        Rows of scores, of any number of slides and seeds.
    metrics
        Names of the scores.

    Returns
    -------
    list of dict
        One for each transform and method, in order of appearance: `transform`, `method`, `n` (rows), `mean` and
        `sd` (score → number over the rows that have the score; `sd` with divisor n - 1, for at least two rows).
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["transform"], row["method"]), []).append(row)
    summary = []
    for (transform, method), members in groups.items():
        known = {name: _known(members, name) for name in metrics}
        summary.append(
            {
                "transform": transform,
                "method": method,
                "n": len(members),
                "mean": {name: float(np.mean(values)) for name, values in known.items() if values},
                "sd": {name: float(np.std(values, ddof=1)) for name, values in known.items() if len(values) > 1},
            }
        )
    return summary


def paired_wilcoxon(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], reference: str = "hinge"
) -> list[dict[str, Any]]:
    """Return Wilcoxon signed-rank tests between a reference method and every other method, paired by slide.

    The rows of several seeds of one slide and method are averaged first, because the slide is the unit of replication.
    With n slides the smallest possible p is 2 / 2^n: 0.125 with four slides; p < 0.05 needs six.

    Parameters
    ----------
    rows
        Rows of scores.
    metrics
        Names of the scores.
    reference
        The reference method.

    Returns
    -------
    list of dict
        `transform`, `metric`, `method`, `reference`, `n_slides`, `difference` (median over slides of reference -
        method) and `p` (two-sided; exact where scipy computes it; 1 if all differences are 0). Methods with fewer than
        two slides in common with the reference are left out.
    """
    from scipy.stats import wilcoxon

    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        for name in metrics:
            if _known([row], name):
                key = (row["transform"], name, row["method"])
                values.setdefault(key, {}).setdefault(row["slide"], []).append(row[name])
    tests = []
    for (transform, name, method), others in values.items():
        own = values.get((transform, name, reference), {})
        slides = [slide for slide in own if slide in others]
        if method == reference or len(slides) < 2:
            continue
        differences = np.array([np.mean(own[slide]) - np.mean(others[slide]) for slide in slides])
        p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
        tests.append(
            {
                "transform": transform,
                "metric": name,
                "method": method,
                "reference": reference,
                "n_slides": len(slides),
                "difference": float(np.median(differences)),
                "p": p,
            }
        )
    return tests


def _known(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None and np.isfinite(row[name])]
