"""The noise ceiling: the correlation that counting noise leaves attainable, and the share of it that methods reach."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.accuracy import as_matrix, constant_genes, gene_pcc
from hinge.utils.errors import DataError

CEILING = "noise-ceiling"

_ROUNDED = 1e-6  # share of a library size above 2²⁴ that float32 may lose
_CORRELATIONS = ("pcc_10", "pcc_50", "pcc_200", "pcc_mean", "pcc_hvg50")
_ATTAINABLE = (*_CORRELATIONS, "mse", "mae", "crps", "energy", "variogram")


def attained_shares(rows: Sequence[Mapping[str, Any]], training_mean: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the share of the way from the training mean to the attainable score that each method reaches.

    Parameters
    ----------
    rows
        Rows of scores of one slide. The attainable scores are those of the row `oracle`, which simulated tissue has;
        elsewhere, for correlations only, those of the row `noise-ceiling`.
    training_mean
        Scores of the training mean, as a forecast without spread for scores of draws. Empty if it was not predicted:
        then only correlations, which are 0 for it, have a share.

    Returns
    -------
    list of dict
        One for each row that has such a score, with `slide`, `method`, `transform`, `of` (`oracle` or
        `noise-ceiling`), and score → (score - training mean's) / (attainable - training mean's): 0 for the training
        mean and 1 for the attainable score.
    """
    best = next((row for row in rows if row["method"] == "oracle"), None)
    best = best or next((row for row in rows if row["method"] == CEILING), None)
    if best is None:
        return []
    start = dict.fromkeys(_CORRELATIONS, 0.0) | {key: training_mean[key] for key in _ATTAINABLE if key in training_mean}
    way = {key: best[key] - start[key] for key in start if np.isfinite(best[key]) and np.isfinite(start[key])}
    attained = []
    for row in rows:
        shares = {
            key: float((row[key] - start[key]) / length)
            for key, length in way.items()
            if abs(length) > 1e-9 and np.isfinite(row[key])
        }
        if shares and row["method"] != CEILING:
            about = {key: row[key] for key in ("slide", "method", "transform")}
            attained.append({**about, "of": best["method"], **shares})
    return attained


def noise_ceiling(
    counts: ArrayLike, library_size: ArrayLike, transform_name: str, *, n_repeats: int = 10, seed: int = 0
) -> NDArray[np.float64]:
    """Return the correlation that a prediction without error would have with the measured values of each gene.

    Every count goes to one of two halves with probability 1/2, which gives two measurements of the same tissue at half
    the library size. Both are transformed with the library sizes of their own half. The Pearson correlation r of
    the halves, mean of `n_repeats` splits, is stepped up to full library size by Spearman-Brown [1]_, 2 r / (1 +
    r); its square root is the correlation of one measurement with the values without counting noise.

    Spearman-Brown holds for additive noise; after a logarithm of small counts the ceiling may be off by some
    hundredths. Only counting noise is considered. The library size of a spot is the same in both halves and therefore
    counts as signal: it accounts for much of the ceiling of `log2p1`.

    Parameters
    ----------
    counts
        Raw counts (n, G) of the panel.
    library_size
        Counts (n,) over all genes of the slide. Counts outside the panel are split too, so that the library sizes of
        the halves have counting noise.
    transform_name
        As `hinge.data.get_transform` takes it.
    n_repeats
        Number of splits to average.
    seed
        Seed of the splits.

    Returns
    -------
    ndarray
        (G,) between 0 and 1; NaN for a gene that is constant in the measured values.

    Raises
    ------
    DataError
        If counts are not whole numbers from 0, or exceed the library size.

    References
    ----------
    .. [1] Spearman, "Correlation calculated from faulty data", British Journal of Psychology 3, 1910.
    """
    from hinge.data.transforms import get_transform

    counts = as_matrix(counts, "the counts")
    library_size = as_matrix(np.atleast_2d(np.asarray(library_size)), "the library sizes")[0]
    if library_size.shape != counts.shape[:1]:
        raise DataError(f"{len(counts)} spots have counts, but {len(library_size)} have a library size")
    if (counts < 0).any() or (counts % 1).any() or (library_size % 1).any():
        raise DataError("the noise ceiling takes raw counts, whole numbers from 0, but these are not")
    rest = library_size - counts.sum(axis=1)
    # slides hold float32, in which sums of many counts are rounded
    rest[(rest < 0) & (rest >= -_ROUNDED * library_size)] = 0.0
    if (rest < 0).any():
        raise DataError(f"spot {int(np.argmax(rest < 0))} has more counts in the panel than over all genes")

    library_size = counts.sum(axis=1) + rest
    transform = get_transform(transform_name)
    constant = constant_genes(np.asarray(transform.forward(counts, library_size), dtype=np.float64))
    counts, rest, library_size = counts.astype(np.int64), rest.astype(np.int64), library_size.astype(np.int64)
    generator = np.random.default_rng(seed)
    correlation = np.zeros(counts.shape[1])
    for _ in range(n_repeats):
        half = generator.binomial(counts, 0.5)  # type: ignore[arg-type]
        half_library_size = half.sum(axis=1) + generator.binomial(rest, 0.5)
        first = transform.forward(half, half_library_size)
        second = transform.forward(counts - half, library_size - half_library_size)
        # a gene without counts in one half has correlation 0
        correlation += np.nan_to_num(gene_pcc(first, second), nan=0.0)
    correlation = np.clip(correlation / n_repeats, 0.0, 1.0)
    ceiling = np.sqrt(2.0 * correlation / (1.0 + correlation))
    ceiling[constant] = np.nan
    return ceiling
