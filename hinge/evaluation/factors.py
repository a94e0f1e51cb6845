"""Factor analysis of many spots, from about as many rows as there are genes."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert
from sklearn.decomposition import FactorAnalysis

from hinge.utils.threads import limit_threads


def fit_factor_analysis(
    values: NDArray[np.float64], num_factors: int, tol: float = 1e-2, max_iter: int = 1000
) -> FactorAnalysis:
    """Return the factor analysis of values, to rounding and signs as `FactorAnalysis` finds it with LAPACK.

    Every round of `FactorAnalysis` decomposes all rows. Here it decomposes G + 1 rows of the same covariance, which is
    all that the result depends on.

    Parameters
    ----------
    values
        (n, G).
    num_factors
        K.
    tol, max_iter
        As of `FactorAnalysis`; `tol` is of the log-likelihood of n rows.
    """
    num_rows, num_genes = values.shape
    mean = values.mean(axis=0)
    rows = values - mean
    with limit_threads():
        if num_rows > num_genes + 1:
            root = np.linalg.qr(rows, mode="r") * np.sqrt((num_genes + 1) / num_rows)
            # Helmert's matrix is orthonormal and orthogonal to ones: the products stay, and the mean is zero
            rows = helmert(num_genes + 1).T @ root
        tol *= len(rows) / num_rows
        analysis = FactorAnalysis(num_factors, svd_method="lapack", tol=tol, max_iter=max_iter).fit(rows)
    analysis.mean_ = mean
    return analysis
