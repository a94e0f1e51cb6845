"""The maps between values of a run's transform and the bins of a backbone that ranks a spot's own expression.

scGPT and Tahoe-x1 take the rank of a gene within its cell, in 50 bins whose edges are quantiles of the cell. While a
profile is being generated these edges do not exist. Two maps that are the same for all spots take their place: the mean
bin of each value over the training spots, by which values enter the backbone, and the mean value of each bin, by which
its predictions become values. Both are straight lines between knots; the value encoder takes any real number.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_NATURAL = {"log2p1": math.log(2.0), "log1p_cp10k": 1.0, None: 1.0}
_TYPICAL_VALUE = 0.2  # of a bin, before anything is fitted


class ValueBins(nn.Module):
    """Increasing maps from values to bins, and from bins to values.

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
    bins_of_knots: Tensor
    value_of_bin: Tensor
    gene_scale: Tensor
    fitted: Tensor

    def __init__(self, num_genes: int, transform: str | None, num_bins: int):
        super().__init__()
        self.unit, self.largest = _NATURAL[transform], float(num_bins - 1)
        knots = torch.linspace(0, self.largest, self.NUM_KNOTS)
        self.register_buffer("value_knots", _TYPICAL_VALUE * knots)
        self.register_buffer("bins_of_knots", knots)
        self.register_buffer("value_of_bin", _TYPICAL_VALUE * torch.arange(num_bins))
        # by what counts are divided before they are ranked
        self.register_buffer("gene_scale", torch.ones(num_genes))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        # whether a gene has another scale than 1; looked up once, because it makes the host wait for the device
        self._scales: bool | None = None
        self.register_load_state_dict_post_hook(_forget_scales)

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
        self._scales = None
        ranked = self._scaled(torch.from_numpy(np.asarray(values, dtype=np.float32)), None).numpy()
        expressed = bins > 0
        x, y = ranked[expressed].astype(np.float64), np.asarray(bins, dtype=np.float64)[expressed]
        if len(x) == 0:
            return
        # knots at distinct values, or, where there are many, at groups of as many spots
        edges = np.unique(np.quantile(x, np.linspace(0, 1, self.NUM_KNOTS - 1), method="inverted_cdf"))
        knots, rank = _group_means(np.searchsorted(edges, x), x, y)
        # as many knots for every data set
        missing = self.NUM_KNOTS - 1 - len(knots)
        knots = np.concatenate([[0.0], knots, knots[-1] * (1 + 0.01 * np.arange(1, missing + 1))])
        rank = np.concatenate([[0.0], rank, np.full(missing, rank[-1])])
        self.value_knots.copy_(torch.from_numpy(knots))
        self.bins_of_knots.copy_(torch.from_numpy(rank))
        found, value = _group_means(np.round(y).astype(int), y, x)
        every = np.arange(len(self.value_of_bin))
        self.value_of_bin.copy_(torch.from_numpy(np.interp(every, [0.0, *found], [0.0, *value])))
        self.fitted.fill_(True)

    def encode(self, values: Tensor) -> Tensor:
        """Return bins (B, G), real numbers from 0 to the largest, of values (B, G)."""
        ranked = self._scaled(values.float().clamp_min(0), None).contiguous()
        above = torch.searchsorted(self.value_knots, ranked).clamp(1, len(self.value_knots) - 1)
        low, high = self.value_knots[above - 1], self.value_knots[above]
        share = ((ranked - low) / (high - low)).clamp(0, 1)
        return torch.lerp(self.bins_of_knots[above - 1], self.bins_of_knots[above], share).to(values.dtype)

    def decode(self, bins: Tensor, index: Tensor | None = None) -> Tensor:
        """Return values (B, n) of bins (B, n) of all genes, or of those with the numbers `index` (B, n).

        Beyond the first and the last bin the map goes on with its mean slope.
        """
        table = self.value_of_bin.to(bins.dtype)
        within = bins.clamp(0, self.largest)
        below = within.detach().floor().long().clamp_max(len(table) - 2)
        ranked = torch.lerp(table[below], table[below + 1], within - below)
        ranked = ranked + (bins - within) * (table[-1] / self.largest)
        return self._unscaled(ranked, index)

    def _scale(self, index: Tensor | None) -> Tensor | None:
        if self._scales is None:
            self._scales = bool((self.gene_scale != 1).any())
        if not self._scales:
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


def _forget_scales(bins: ValueBins, _: Any) -> None:
    bins._scales = None


def _group_means(group: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of x and of y in each group that has a member, those of y made to increase."""
    count = np.bincount(group)
    there = count > 0
    means = [np.bincount(group, each)[there] / count[there] for each in (x, y)]
    return means[0], np.maximum.accumulate(means[1])


def fit_to_panel(model: Any, gene_ids: Tensor, counts: np.ndarray, values: np.ndarray) -> None:
    """Fit the map of a `HingeModel` to spots of which no genes beside the panel are known.

    Parameters
    ----------
    model
        With `value_bins` and its backbone.
    gene_ids
        (G,) vocabulary ids of the panel.
    counts, values
        (n, G) of the training spots.
    """
    ids = gene_ids.cpu()
    table = torch.from_numpy(np.asarray(counts, dtype=np.float32))
    bins = model.backbone.encode_values(table, table.sum(dim=1), ids).numpy()
    model.value_bins.fit(values, bins, model.backbone.config.gene_scale(ids.numpy()))
