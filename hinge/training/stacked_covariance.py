"""A covariance of many genes that is never made as a matrix: rows and a diagonal, and its factor analysis."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

SMALLEST = 1e-12
MOST_ROUNDS = 60
TOLERANCE = 1e-7
"""Change of the log-likelihood, as a share of it, below which the factor analysis ends."""


@dataclass(frozen=True, eq=False)
class StackedCovariance:
    """The covariance rowsᵀ·rows + diag(diagonal).

    Attributes
    ----------
    rows
        (m, G).
    diagonal
        (G,) variances.
    """

    rows: NDArray[np.float64]
    diagonal: NDArray[np.float64]

    @property
    def variance(self) -> NDArray[np.float64]:
        """The variances (G,)."""
        return np.einsum("mg,mg->g", self.rows, self.rows) + self.diagonal

    def dense(self) -> NDArray[np.float64]:
        """Return the matrix (G, G)."""
        return self.rows.T @ self.rows + np.diag(self.diagonal)

    def shrunk(self, loadings: NDArray, noise: NDArray, share: float) -> "StackedCovariance":
        """Return the covariance whose correlations are shrunk by a share towards those of other factors.

        As `hinge.evaluation.ridge.shrink_correlations` with the correlations of loadings (G, K) and noise (G,).
        """
        scale = np.sqrt(share * self.variance / ((loadings**2).sum(axis=1) + noise))
        rows = np.concatenate([np.sqrt(1 - share) * self.rows, (loadings * scale[:, None]).T])
        return StackedCovariance(rows, (1 - share) * self.diagonal + scale**2 * noise)

    def factor_analysis(
        self, num_factors: int, most_rounds: int = MOST_ROUNDS, tolerance: float = TOLERANCE
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return loadings (G, K) and noise variances (G,) of the factor analysis with the largest likelihood.

        The fixed point of scikit-learn's `FactorAnalysis` (Barber, Bayesian Reasoning and Machine Learning, 2012,
        algorithm 21.1): loadings are the leading eigenvectors of the covariance in units of the noise. They are found
        by Lanczos' method, which multiplies by the rows only.
        """
        variance, noise, last = self.variance, np.ones(len(self.diagonal)), -np.inf
        start, loadings = np.random.default_rng(0).standard_normal(len(noise)), np.zeros((len(noise), num_factors))
        for _ in range(most_rounds):
            deviation = np.sqrt(noise) + SMALLEST
            sizes, directions = self._leading(deviation, num_factors, start)
            start = directions.sum(axis=1)
            loadings = directions * np.sqrt(np.maximum(sizes - 1, 0)) * deviation[:, None]
            unexplained = float((variance / deviation**2).sum() - sizes.sum())
            likelihood = -(np.log(sizes).sum() + unexplained + np.log(noise).sum())
            if likelihood - last < tolerance * abs(likelihood):
                break
            last, noise = likelihood, np.maximum(variance - (loadings**2).sum(axis=1), SMALLEST)
        return loadings, noise

    def _leading(self, deviation: NDArray, count: int, start: NDArray) -> tuple[NDArray, NDArray]:
        """Return the largest eigenvalues (K,) and eigenvectors (G, K) of the covariance divided by deviations (G,)."""
        rows, diagonal = self.rows / deviation, self.diagonal / deviation**2

        def times(vector: NDArray) -> NDArray:
            return rows.T @ (rows @ vector) + (diagonal * vector.T).T

        size = len(deviation)
        operator = LinearOperator((size, size), matvec=times, matmat=times, dtype=np.float64)
        sizes, directions = eigsh(operator, k=count, v0=start, which="LA")
        return sizes[::-1], directions[:, ::-1]
