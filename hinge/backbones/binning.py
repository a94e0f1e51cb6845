"""Ranks of expression in bins, and cells as sequences of expressed genes: the input of scGPT and Tahoe-x1.

The edges of the bins are quantiles of the cell's own values that are not zero, so that any increasing transform of
counts gives the same bins. Values between two edges share a bin from 1 to `num_bins` - 1; 0 is no count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 51


def scgpt_bins(values: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Return the bins of one cell's values as scGPT computes them.

    The bin is the number of edges that are not larger than the value. Among the bins that tied edges allow, scGPT
    draws one at random; this is the largest of them, as in scGPT's generative branch.

    Parameters
    ----------
    values
        (G,) counts or an increasing transform of them, 0 for no count.
    num_bins
        Number of bins, the one of 0 included.

    Returns
    -------
    ndarray
        int64 (G,).
    """
    values = np.asarray(values, dtype=np.float64)
    bins = np.zeros(values.shape, dtype=np.int64)
    expressed = values != 0
    if expressed.any():
        edges = np.quantile(values[expressed], np.linspace(0, 1, num_bins - 1))
        bins[expressed] = np.searchsorted(edges, values[expressed], side="right")
    return bins


def tahoe_bins(values: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Return the bins of one cell's values as Tahoe-x1 computes them: 1 + the number of smaller edges, for 0 too.

    Parameters and result as those of `scgpt_bins`; the edges are float32.
    """
    row = torch.from_numpy(np.asarray(values, dtype=np.float32))
    expressed = row != 0
    if not expressed.any():
        return np.ones(row.shape, dtype=np.int64)
    edges = torch.quantile(row[expressed], torch.linspace(0, 1, num_bins - 1))
    return (torch.bucketize(row, edges) + 1).numpy()


def bin_values(bins: np.ndarray, values: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Return the values at the lower edges of bins of one cell, 0 for the bin 0; linear between bins.

    Parameters
    ----------
    bins
        (G,) real numbers; those outside the bins become the first or the last one.
    values
        (H,) values of the cell from which the edges are, 0 for no count.
    num_bins
        As in `scgpt_bins`.

    Returns
    -------
    ndarray
        float64 (G,).
    """
    expressed = values[values != 0]
    if not len(expressed):
        return np.zeros(len(bins))
    edges = np.quantile(expressed, np.linspace(0, 1, num_bins - 1))
    return np.interp(bins, np.arange(num_bins), [0.0, *edges])


@dataclass(frozen=True)
class CellSequences:
    """Cells as sequences of their expressed genes.

    Attributes
    ----------
    gene_ids
        int64 (n, N) vocabulary ids, special tokens in front, padded.
    values
        float32 (n, N) bins; the pad value for special tokens and padding.
    padding
        bool (n, N), True = padding.
    """

    gene_ids: Tensor
    values: Tensor
    padding: Tensor


def cell_sequences(
    values: np.ndarray,
    gene_ids: np.ndarray,
    bins: Callable[[np.ndarray], np.ndarray],
    special_ids: Sequence[int],
    pad_id: int,
    pad_value: float,
) -> CellSequences:
    """Return cells as the published models take them: expressed genes in the order of the columns, none left out.

    Parameters
    ----------
    values
        (n, G) counts or an increasing transform of them.
    gene_ids
        (G,) vocabulary ids.
    bins
        From the values of one cell that are not zero to their bins.
    special_ids
        Ids of the tokens in front of the genes.
    pad_id, pad_value
        Of padding.
    """
    expressed = values != 0
    front, width = len(special_ids), int(expressed.sum(axis=1).max(initial=0))
    ids = torch.full((len(values), front + width), pad_id)
    binned = torch.full(ids.shape, float(pad_value))
    padding = torch.ones(ids.shape, dtype=torch.bool)
    for row, there in enumerate(expressed):
        end = front + int(there.sum())
        ids[row, :front] = torch.tensor(list(special_ids))
        ids[row, front:end] = torch.from_numpy(gene_ids[there])
        binned[row, front:end] = torch.from_numpy(bins(values[row, there])).float()
        padding[row, :end] = False
    return CellSequences(ids, binned, padding)
