"""The map between values of a run's transform and the bins of a backbone that ranks a spot's own expression.

scGPT and Tahoe-x1 take the rank of a gene within its cell, in 50 bins whose edges are quantiles of the cell. While a
profile is being generated these edges do not exist. One map for all spots takes their place: the mean bin of each value
over the training spots, with straight lines between. Its inverse turns what the backbone predicts into values.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_NATURAL = {"log2p1": math.log(2.0), "log1p_cp10k": 1.0, None: 1.0}
_LEAST_STEP = 1e-3  # of bins between two knots, so that the map can be inverted
_TYPICAL_VALUE = 0.2  # of a bin, before anything is fitted


class ValueBins(nn.Module):
    """An increasing map from values to bins, and its inverse.

    Parameters
    ----------
    num_genes
        G.
    transform
        Name of the transform of the values; None: values are treated as natural logarithms.
    num_bins
        Bins of the backbone, the one of 0 included.
    """

    NUM_KNOTS = 64

    value_knots: Tensor
    bin_knots: Tensor
    gene_scale: Tensor
    fitted: Tensor

    def __init__(self, num_genes: int, transform: str | None, num_bins: int):
        super().__init__()
        self.unit, self.largest = _NATURAL[transform], float(num_bins - 1)
        bins = torch.linspace(0, self.largest, self.NUM_KNOTS)
        self.register_buffer("bin_knots", bins)
        self.register_buffer("value_knots", _TYPICAL_VALUE * bins)
        # by what counts are divided before they are ranked
        self.register_buffer("gene_scale", torch.ones(num_genes))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def fit(self, values: np.ndarray, bins: np.ndarray, gene_scale: np.ndarray) -> None:
        """Set the map from training spots.

        Parameters
        ----------
        values, bins
            (n, G) values, and their bins as the published code computes them from all genes of the spot.
        gene_scale
            (G,) by what the backbone divides counts of a gene before it ranks them.
        """
        self.gene_scale.copy_(torch.from_numpy(np.asarray(gene_scale)))
        ranked = self._scaled(torch.from_numpy(np.asarray(values, dtype=np.float32)), None).numpy()
        expressed = bins > 0
        x, y = ranked[expressed].astype(np.float64), np.asarray(bins, dtype=np.float64)[expressed]
        if len(x) == 0:
            return
        # knots at distinct values, or, where there are many, at groups of as many spots
        edges = np.unique(np.quantile(x, np.linspace(0, 1, self.NUM_KNOTS), method="inverted_cdf"))
        group = np.searchsorted(edges, x)
        count = np.bincount(group, minlength=len(edges))
        there = count > 0
        centre = np.bincount(group, x, len(edges))[there] / count[there]
        mean = np.bincount(group, y, len(edges))[there] / count[there]
        knots, rank = np.concatenate([[0.0], centre]), np.concatenate([[0.0], np.maximum.accumulate(mean)])
        rank = np.maximum.accumulate(rank - _LEAST_STEP * np.arange(len(rank))) + _LEAST_STEP * np.arange(len(rank))
        # as many knots for every data set: the last straight line goes on
        missing = self.NUM_KNOTS - len(knots)
        if missing > 0:
            slope = (rank[-1] - rank[-2]) / (knots[-1] - knots[-2])
            step = np.arange(1, missing + 1) * (knots[-1] / self.NUM_KNOTS)
            knots, rank = np.concatenate([knots, knots[-1] + step]), np.concatenate([rank, rank[-1] + slope * step])
        self.value_knots.copy_(torch.from_numpy(knots[: self.NUM_KNOTS]))
        self.bin_knots.copy_(torch.from_numpy(rank[: self.NUM_KNOTS]))
        self.fitted.fill_(True)

    def encode(self, values: Tensor) -> Tensor:
        """Return bins (B, G), real numbers from 0 to the largest, of values (B, G)."""
        ranked = self._scaled(values.float().clamp_min(0), None)
        return _interpolate(ranked, self.value_knots, self.bin_knots).clamp(0, self.largest).to(values.dtype)

    def decode(self, bins: Tensor, index: Tensor | None = None) -> Tensor:
        """Return values (B, n) of bins (B, n) of all genes, or of those with the numbers `index` (B, n)."""
        ranked = _interpolate(bins, self.bin_knots.to(bins.dtype), self.value_knots.to(bins.dtype))
        return self._unscaled(ranked, index)

    def _scale(self, index: Tensor | None) -> Tensor | None:
        if bool((self.gene_scale == 1).all()):
            return None
        return self.gene_scale if index is None else self.gene_scale[index]

    def _scaled(self, values: Tensor, index: Tensor | None) -> Tensor:
        scale = self._scale(index)
        if scale is None:
            return values
        return torch.log1p(torch.expm1(values * self.unit) / scale.to(values)) / self.unit

    def _unscaled(self, ranked: Tensor, index: Tensor | None) -> Tensor:
        scale = self._scale(index)
        if scale is None:
            return ranked
        # a prediction below 0 has no count; it stays below 0 by as much
        counts = torch.expm1(ranked.clamp_min(0) * self.unit) * scale.to(ranked)
        return torch.log1p(counts) / self.unit + ranked.clamp_max(0)


def _interpolate(x: Tensor, knots: Tensor, heights: Tensor) -> Tensor:
    """Return the piecewise linear function with these heights at increasing knots (K,), its ends prolonged."""
    last = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    left, low = knots[last - 1], heights[last - 1]
    return low + (x - left) * (heights[last] - low) / (knots[last] - left)


def bins_of_spots(backbone: Any, counts: np.ndarray, gene_ids: np.ndarray) -> np.ndarray:
    """Return the bins (n, G), by the published code, of counts (n, G) of genes with vocabulary ids (G,)."""
    table = torch.from_numpy(np.asarray(counts, dtype=np.float32))
    return backbone.encode_values(table, table.sum(dim=1), torch.from_numpy(gene_ids)).numpy()
