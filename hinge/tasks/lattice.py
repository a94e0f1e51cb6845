"""The lattice of a dense map: blocks of rows, and means over the points around each point."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from scipy.spatial import KDTree

from hinge.data.neighbourhood import NEIGHBOUR_DISTANCE, spot_positions


@dataclass
class Lattice:
    """The points of a grid, row by row.

    Attributes
    ----------
    cells
        Column and row of each point (n, 2).
    number
        Index of the point in each cell (rows, columns), -1 for a cell without a point.
    """

    cells: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, grid: AnnData) -> "Lattice":
        """Return the lattice of a slide's points, from `obs["array_x"]` and `obs["array_y"]`."""
        cells = grid.obs[["array_x", "array_y"]].to_numpy(int)
        number = np.full(cells.max(axis=0)[::-1] + 1, -1, np.int64)
        number[cells[:, 1], cells[:, 0]] = np.arange(len(cells))
        return cls(cells, number)

    def blocks(self, points: int) -> Iterator[tuple[int, int]]:
        """Yield the first and the last + 1 point of blocks of whole rows with about `points` points each."""
        starts = np.flatnonzero(np.diff(self.cells[:, 1], prepend=-1))
        first = 0
        for start in [*starts[1:], len(self.cells)]:
            if start - first >= points or start == len(self.cells):
                yield first, int(start)
                first = int(start)

    def halo(self, first: int, last: int, rows: int) -> tuple[int, int]:
        """Return the first and last + 1 point of a block with `rows` rows added above and below."""
        top, bottom = self.cells[first, 1] - rows, self.cells[last - 1, 1] + rows
        return tuple(np.searchsorted(self.cells[:, 1], [top, bottom + 1]).tolist())

    def weighted_mean(
        self, values: np.ndarray, low: int, first: int, last: int, offsets: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Return, for each point of a block, the weighted mean of the values of the points around it.

        Parameters
        ----------
        values
            Values (m, d) of the points from `low` on: the block with its halo.
        low
            First point of the halo.
        first, last
            First and last + 1 point of the block.
        offsets, weights
            Cells (k, 2) relative to a point, and their weights (k,); cells without a point are left out.

        Returns
        -------
        ndarray
            (last - first, d).
        """
        cells = self.cells[first:last]
        total = np.zeros((last - first, values.shape[1]))
        weight = np.zeros(last - first)
        height, width = self.number.shape
        for (x, y), share in zip(offsets, weights, strict=True):
            column, row = cells[:, 0] + x, cells[:, 1] + y
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            found = np.where(inside, self.number[np.where(inside, row, 0), np.where(inside, column, 0)], -1)
            here = np.flatnonzero(found >= 0)
            total[here] += share * values[found[here] - low]
            weight[here] += share
        return total / weight[:, None]


def window_offsets(radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells (k, 2) within a radius in cells, nearest first, and the raised cosine of their distance (k,)."""
    reach = math.ceil(radius)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1)))
    distance = np.hypot(x, y)
    near = (distance < radius) | (distance == 0)
    weights = 0.5 * (1 + np.cos(np.pi * np.minimum(distance[near] / max(radius, 1e-9), 1)))
    weights[distance[near] == 0] = 1.0
    order = np.argsort(distance[near], kind="stable")
    return np.stack([x, y], axis=1)[near][order], weights[order]


def neighbour_offsets(coords: np.ndarray, pitch_cells: float) -> np.ndarray:
    """Return the positions of a spot and its neighbours on the lattice of a slide's spots, relative to the spot.

    Parameters
    ----------
    coords
        Spots of the slide (n, 2).
    pitch_cells
        Distance between spots in cells.

    Returns
    -------
    ndarray
        In cells: (9, 2) on a square lattice, (7, 2) on a hexagonal one.
    """
    places = spot_positions(coords)
    near = KDTree(places).query_ball_point(places, NEIGHBOUR_DISTANCE, return_length=True)
    # spots at an edge have fewer neighbours
    if np.quantile(near, 0.9) > 7:
        x, y = np.meshgrid([0, -1, 1], [0, -1, 1])
        around = np.stack([x.ravel(), y.ravel()], axis=1).astype(float)
    else:
        angles = np.arange(6) * np.pi / 3
        around = np.vstack([[0, 0], np.stack([np.cos(angles), np.sin(angles)], axis=1)])
    return np.rint(around * pitch_cells).astype(int)
