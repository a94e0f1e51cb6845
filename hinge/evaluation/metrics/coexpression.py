"""Whether genes go together in a prediction as they do in the measured slide."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from hinge.evaluation.metrics.accuracy import as_matrix, constant_genes, gene_pcc
from hinge.utils.errors import DataError


def correlation_matrix(values: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation between the genes of one slide or of one draw.

    Parameters
    ----------
    values
        Values (n, G) in transform units.

    Returns
    -------
    ndarray
        (G, G). Rows and columns of constant genes are NaN, the diagonal included: they have no correlation.
    """
    values = as_matrix(values, "the expression")
    constant = constant_genes(values)
    values = values - values.mean(axis=0)
    size = np.linalg.norm(values, axis=0)
    size[constant] = np.nan
    values /= size
    return np.clip(values.T @ values, -1.0, 1.0)


def matrix_scores(measured: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Compare two gene-gene correlation matrices over the pairs of different genes.

    Parameters
    ----------
    measured, predicted
        Correlation matrices (G, G) of `correlation_matrix`. Pairs that are NaN in `measured` are left out;
        pairs that are NaN only in `predicted` count as correlation 0, as a gene predicted constant goes with
        none.

    Returns
    -------
    dict
        `r`, Pearson correlation of the two matrices' entries [1]_, and `rmse`, root mean squared difference
        of the entries, which unlike `r` also sees correlations that are all too strong. NaN where no pair is
        left; `r` is NaN too with a single pair, and 0 where all predicted entries are the same.

    References
    ----------
    .. [1] Fang et al., CVPR 2026, arXiv 2603.19766.
    """
    measured, predicted = np.asarray(measured, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if measured.shape != predicted.shape:
        raise DataError(f"the predicted correlations are of shape {predicted.shape}, the measured of {measured.shape}")
    upper = np.triu_indices(len(measured), k=1)
    measured, predicted = measured[upper], predicted[upper]
    valid = ~np.isnan(measured)
    if not valid.any():
        return {"r": float("nan"), "rmse": float("nan")}
    measured, predicted = measured[valid], np.nan_to_num(predicted[valid], nan=0.0)
    return {
        "r": float(gene_pcc(measured[:, None], predicted[:, None])[0]),
        "rmse": float(np.sqrt(np.mean((predicted - measured) ** 2))),
    }


def coexpression_scores(measured: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Compare the co-expression of a prediction, or of several draws, with the measured slide's.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    predicted
        One prediction (n, G), or draws (K, n, G). Each draw's matrix is scored and the scores are averaged:
        every draw should look like a measured slide by itself. (The mean of the draws does not: averaging
        removes the scatter that genes do not share, and so inflates their correlation.)

    Returns
    -------
    dict
        `r` and `rmse` of `matrix_scores`; for draws also `r_pooled` and `rmse_pooled`, those of the mean of the
        draws' matrices. A matrix of n spots is uncertain by about 1/√n in every entry: the former count this for
        every draw, as a measured slide has it too; the latter show what dependence the method stands for.
    """
    matrix = correlation_matrix(measured)
    predicted = np.asarray(predicted)
    if predicted.ndim == 2:
        return matrix_scores(matrix, correlation_matrix(predicted))
    if not len(predicted):
        raise DataError("co-expression cannot be scored without any draw")
    total, scores = np.zeros_like(matrix), []
    for draw in predicted:
        drawn = correlation_matrix(draw)
        scores.append(matrix_scores(matrix, drawn))
        # a gene that a draw makes constant goes with none there
        total += np.nan_to_num(drawn, nan=0.0)
    pooled = matrix_scores(matrix, total / len(predicted))
    result = {key: float(np.mean([score[key] for score in scores])) for key in ("r", "rmse")}
    return result | {f"{key}_pooled": value for key, value in pooled.items()}


def gene_order(matrix: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the order of genes by average-linkage clustering of their correlations (G, G), NaN taken as 0."""
    distance = 1 - np.nan_to_num(matrix, nan=0.0)
    np.fill_diagonal(distance, 0.0)
    pairs = squareform(distance, checks=False)
    # the optimal order of the leaves takes minutes for large panels
    tree = hierarchy.linkage(pairs, method="average", optimal_ordering=len(matrix) <= 500)
    return hierarchy.leaves_list(tree)
