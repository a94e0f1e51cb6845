"""How close a predicted slide is to the measured one, gene by gene."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.utils.errors import DataError

# A gene whose standard deviation is below this share of its largest value is constant: what varies is
# rounding.
CONSTANT_SHARE = 1e-6


def as_matrix(values: ArrayLike, what: str) -> NDArray[np.float64]:
    """Give `values` as a float64 (n, G) matrix that holds spots, genes and only finite numbers.

    Raises
    ------
    DataError
        If it is not a matrix, has no spot or no gene, or holds a NaN or an infinity.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DataError(f"{what} must be a matrix of spots x genes, not an array of shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        spot, gene = np.argwhere(~np.isfinite(matrix))[0]
        raise DataError(f"{what} must hold finite numbers only, but spot {spot}, gene {gene} is {matrix[spot, gene]}")
    return matrix


def constant_genes(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which genes of `values` (n, G) do not vary over the spots, as (G,) booleans."""
    return values.std(axis=0) <= CONSTANT_SHARE * np.abs(values).max(axis=0)


def gene_pcc(measured: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation over the spots between the measured and the predicted values of each gene.

    Parameters
    ----------
    measured, predicted
        Values (n, G) in transform units.

    Returns
    -------
    ndarray
        (G,). A gene that is constant in the measured slide has no correlation: NaN. A gene that varies there
        but is predicted constant gets 0, since the prediction says nothing about where it is high.
    """
    measured, predicted = as_matrix(measured, "the measured slide"), as_matrix(predicted, "the prediction")
    nothing_measured, nothing_predicted = constant_genes(measured), constant_genes(predicted)
    measured, predicted = measured - measured.mean(axis=0), predicted - predicted.mean(axis=0)
    size = np.linalg.norm(measured, axis=0) * np.linalg.norm(predicted, axis=0)
    size[nothing_measured | nothing_predicted] = 1.0
    pcc = np.clip((measured * predicted).sum(axis=0) / size, -1.0, 1.0)
    pcc[nothing_predicted] = 0.0
    pcc[nothing_measured] = np.nan
    return pcc


def summarise_pcc(pcc: ArrayLike, variance: ArrayLike) -> dict[str, float]:
    """Summarise the genes' correlations in the ways in which papers print them.

    Parameters
    ----------
    pcc
        Correlation of each gene (G,); NaN where the measured gene is constant. Such genes are left out.
    variance
        Measured variance of each gene (G,).

    Returns
    -------
    dict
        `pcc_10`, `pcc_50`, `pcc_200`: mean over the 10, 50 and 200 genes of highest correlation, as Stem [1]_
        prints them (over all genes where there are fewer); `pcc_mean`: over all genes; `pcc_hvg50`: over the
        50 genes of largest measured variance, a choice that does not look at the prediction. NaN where every
        gene is constant.

    References
    ----------
    .. [1] Zhu et al., "Diffusion Generative Modeling for Spatially Resolved Gene Expression Inference from
       Histology Images", ICLR 2025.
    """
    pcc, variance = np.asarray(pcc, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    valid = ~np.isnan(pcc)
    if not valid.any():
        return dict.fromkeys(("pcc_10", "pcc_50", "pcc_200", "pcc_mean", "pcc_hvg50"), float("nan"))
    best = np.sort(pcc[valid])[::-1]
    most_variable = pcc[valid][np.argsort(-variance[valid], kind="stable")]
    return {
        "pcc_10": float(best[:10].mean()),
        "pcc_50": float(best[:50].mean()),
        "pcc_200": float(best[:200].mean()),
        "pcc_mean": float(best.mean()),
        "pcc_hvg50": float(most_variable[:50].mean()),
    }


def mean_scores(measured: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Score one predicted value for each spot and gene.

    Parameters
    ----------
    measured, predicted
        Values (n, G) in transform units.

    Returns
    -------
    dict
        The entries of `summarise_pcc`; `mse` and `mae`, over all spots and genes; `rvd`, relative variance
        distance, mean over the genes of ((var_predicted - var_measured) / var_measured)²; `n_genes_constant`,
        the number of genes constant in the measured slide, which `pcc_*` and `rvd` leave out. Scores for
        which no gene is left are NaN.

    Raises
    ------
    DataError
        If the shapes differ, or a value is not finite.
    """
    measured, predicted = as_matrix(measured, "the measured slide"), as_matrix(predicted, "the prediction")
    if measured.shape != predicted.shape:
        raise DataError(
            f"the prediction has {predicted.shape[0]} spots x {predicted.shape[1]} genes, "
            f"the measured slide {measured.shape[0]} x {measured.shape[1]}"
        )
    variance, constant, error = measured.var(axis=0), constant_genes(measured), predicted - measured
    ratio = predicted.var(axis=0)[~constant] / variance[~constant]
    return {
        **summarise_pcc(gene_pcc(measured, predicted), variance),
        "mse": float(np.mean(error**2)),
        "mae": float(np.mean(np.abs(error))),
        "rvd": float(np.mean((ratio - 1.0) ** 2)) if ratio.size else float("nan"),
        "n_genes_constant": int(constant.sum()),
    }


def error_parts(measured: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Divide the mean squared error into level, slope and pattern.

    With means m and p over spots, deviations s and q, and the correlation r of a gene, its error is
    (p − m)² + (q − r·s)² + (1 − r²)·s² (Murphy, Monthly Weather Review 116, 1988, who calls the first two
    unconditional and conditional bias).

    Parameters
    ----------
    measured, predicted
        Values (n, G) in transform units.

    Returns
    -------
    dict
        `mse_level`, `mse_slope` and `mse_pattern`, means over genes, whose sum is the mean squared error.
    """
    measured, predicted = as_matrix(measured, "the measured slide"), as_matrix(predicted, "the prediction")
    level = (predicted.mean(axis=0) - measured.mean(axis=0)) ** 2
    measured, predicted = measured - measured.mean(axis=0), predicted - predicted.mean(axis=0)
    spread = np.sqrt((predicted**2).mean(axis=0))
    # the measured pattern along the predicted one, in units of values
    along = np.where(spread > 0, (measured * predicted).mean(axis=0) / np.maximum(spread, 1e-300), 0.0)
    slope, pattern = (spread - along) ** 2, (measured**2).mean(axis=0) - along**2
    parts = {"level": level, "slope": slope, "pattern": np.maximum(pattern, 0.0)}
    return {f"mse_{name}": float(part.mean()) for name, part in parts.items()}
