"""Uncertainty of scores: over spots, over slides and seeds, and between methods."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.accuracy import as_matrix, constant_genes
from hinge.evaluation.names import DEFAULT_RESAMPLES


def bootstrap_spots(n_spots: int, n_resamples: int, seed: int) -> NDArray[np.int64]:
    """Return how often each spot is in each resample: (B, n), the sum of every row is n."""
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

    They measure how much a score depends on which spots were measured. Spots of one slide are not independent, so
    the intervals are too narrow for another slide; that variation is seen over several slides only.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    mean
        Predicted mean (n, G), or None: no intervals of correlations.
    of_spots
        Score → its value in each spot (n,): the score is their mean.
    n_resamples, level, seed
        Resamples, nominal level of the intervals, and seed of the resamples.

    Returns
    -------
    dict
        Score → [lower, upper]: those of `of_spots` that are not NaN, and with a mean `pcc_50` and `pcc_mean`.
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
    # centred at the mean of the slide, so that differences of sums of squares lose no digits
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
        Which scores.

    Returns
    -------
    list of dict
        One for each transform and method, in order of appearance: `transform`, `method`, `n` (rows), `mean` and
        `sd` (score → number; of the rows that have it, `sd` with n - 1 and only of two or more).
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
    """Return Wilcoxon signed-rank tests between one method and each other, paired by slide.

    Several rows of one slide and method (seeds) are averaged first, because the slide is the unit of replication. With
    n slides no p can be below 2 / 2^n: four slides cannot give less than 0.125, six are needed for 0.05.

    Parameters
    ----------
    rows
        Rows of scores.
    metrics
        Which scores.
    reference
        The method that the others are compared with.

    Returns
    -------
    list of dict
        `transform`, `metric`, `method`, `reference`, `n_slides`, `difference` (median over slides of reference -
        method) and `p` (two-sided, exact where scipy has it; 1 where all differences are 0). Pairs with fewer
        than two common slides are left out.
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
