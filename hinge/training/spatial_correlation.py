"""Spatial correlation of residuals: which share of their variance is smooth over a slide, and over which distance."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from hinge.data.neighbourhood import spot_positions

# distances, in spot pitches, at which residuals of neighbouring spots are compared, and ranges that are tried
LAGS = ((0.5, 1.2), (1.2, 1.7), (1.7, 2.5), (2.5, 3.5), (3.5, 5.0), (5.0, 7.0))
RANGES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
LARGEST_SHARE = 0.95


class SpatialCorrelation:
    """Correlation of the values of neighbouring spots on the training slides.

    Residuals have mean zero on each slide. That removes the mean of a smooth field over the slide: of a correlation
    k(r) with mean k̄ over all pairs of a slide's spots, (k(r) − k̄) / (1 − k̄) is left.

    Parameters
    ----------
    coords, slide_of
        Coordinates (n, 2) of the spots, and the number (n,) of each one's slide.
    """

    def __init__(self, coords: np.ndarray, slide_of: np.ndarray):
        self.slides = []
        for number in np.unique(slide_of):
            rows = np.flatnonzero(slide_of == number)
            positions = spot_positions(coords[rows])
            tree = cKDTree(positions)
            near = tree.sparse_distance_matrix(tree, LAGS[-1][1], output_type="coo_matrix")
            # a sample of pairs is enough for the mean over all of them
            some = positions[:: max(1, len(positions) // 500)]
            self.slides.append((rows, near, cdist(some, some).ravel()))

    def observed(self, y: np.ndarray, measured: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the correlation (lags, C) of the columns of y (n, C), and mean distances and weights (lags,).

        measured (S, C) says which columns the slides have; y is 0 where they have not. None: all have all.
        """
        products, counts, distances = np.zeros((len(LAGS), y.shape[1])), np.zeros(len(LAGS)), np.zeros(len(LAGS))
        of_columns = np.zeros_like(products)
        for number, (rows, near, _) in enumerate(self.slides):
            own = y[rows]
            for lag, (low, high) in enumerate(LAGS):
                chosen = (near.data >= low) & (near.data < high)
                pairs = coo_matrix((np.ones(chosen.sum()), (near.row[chosen], near.col[chosen])), shape=near.shape)
                products[lag] += (own * (pairs.tocsr() @ own)).sum(axis=0)
                counts[lag] += chosen.sum()
                if measured is not None:
                    of_columns[lag] += chosen.sum() * measured[number]
                distances[lag] += near.data[chosen].sum()
        seen = counts > 0
        variance, pairs_of = np.maximum(self._variance(y, measured), 1e-12), counts[seen, None]
        if measured is not None:
            pairs_of = np.maximum(of_columns[seen], 1)
        return products[seen] / pairs_of / variance, distances[seen] / counts[seen], np.sqrt(counts[seen])

    def _variance(self, y: np.ndarray, measured: np.ndarray | None) -> np.ndarray:
        if measured is None:
            return y.var(axis=0)
        count = np.maximum(np.array([len(rows) for rows, _, _ in self.slides]) @ measured, 1)
        return (y**2).sum(axis=0) / count - (y.sum(axis=0) / count) ** 2

    def common(self, spatial_range: float) -> float:
        """Return k̄ of k(r) = exp(−r / range), averaged over slides."""
        return float(np.mean([np.exp(-distances / spatial_range).mean() for _, _, distances in self.slides]))

    def share(self, y: np.ndarray, spatial_range: float, measured: np.ndarray | None = None) -> np.ndarray:
        """Return the share (C,) of the variance of the columns of y (n, C) that is smooth with this range."""
        correlation, distance, weight = self.observed(y, measured)
        if not len(distance):
            return np.zeros(y.shape[1])
        left = self._left(distance, spatial_range)[:, None]
        share = (weight[:, None] * left * correlation).sum(axis=0) / (weight[:, None] * left**2).sum()
        return np.clip(share, 0, LARGEST_SHARE)

    def range(self, y: np.ndarray, measured: np.ndarray | None = None) -> float:
        """Return the range in spot pitches that fits the average correlation of the columns of y (n, C) best."""
        correlation, distance, weight = self.observed(y, measured)
        variance = self._variance(y, measured)
        if not len(distance) or variance.sum() == 0:
            return 1.0
        average = correlation @ variance / variance.sum()

        def error(spatial_range: float) -> float:
            left = self._left(distance, spatial_range)
            share = np.clip((weight * left * average).sum() / (weight * left**2).sum(), 0, LARGEST_SHARE)
            return float((weight * (average - share * left) ** 2).sum())

        return min(RANGES, key=error)

    def _left(self, distance: np.ndarray, spatial_range: float) -> np.ndarray:
        common = self.common(spatial_range)
        return (np.exp(-distance / spatial_range) - common) / (1 - common)
