"""Counts as deeper or shallower sequencing would give them."""

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from hinge.data.transforms import get_transform

POOL_SHARE, MOST_POOLED = 0.4, 8
THIN_SHARE, LEAST_KEPT = 0.5, 0.1
COMPONENTS = 15


class CountAugmentation:
    """Random pooling of similar spots of a sample, and random thinning of counts.

    A sum of similar spots resembles one spot with a larger library size and less noise; a binomial part of its counts
    resembles one with a smaller library size. The library sizes of other patients differ tenfold.

    Parameters
    ----------
    counts
        (n, G), 0 where a gene was not measured.
    library_size
        (n,).
    sample
        (n,) names.
    rows
        Rows that may be pooled.
    """

    def __init__(self, counts: Tensor, library_size: Tensor, sample: np.ndarray, rows: np.ndarray):
        self.counts, self.library_size = counts, library_size
        self.similar = torch.arange(len(counts)).unsqueeze(1).repeat(1, MOST_POOLED)
        for name in np.unique(sample[rows]):
            own = rows[sample[rows] == name]
            if len(own) < MOST_POOLED:
                continue
            index = torch.from_numpy(own)
            values = get_transform("log1p_cp10k").forward(counts[index], library_size[index]).numpy()
            places = PCA(min(COMPONENTS, *values.shape), svd_solver="randomized", random_state=0).fit_transform(values)
            nearest = NearestNeighbors(n_neighbors=MOST_POOLED).fit(places).kneighbors(places, return_distance=False)
            # a spot is its own nearest neighbour, but for spots that are equal
            nearest[:, 0] = np.arange(len(own))
            self.similar[index] = index[torch.from_numpy(nearest)]

    def __call__(self, rows: np.ndarray, genes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return counts (B, n) of genes (n,), and library sizes (B,), of rows (B,), pooled and thinned at random."""
        size = len(rows)
        pooled = torch.rand(size, generator=generator) < POOL_SHARE
        number = torch.randint(2, MOST_POOLED + 1, (size,), generator=generator)
        number = torch.where(pooled, number, 1)
        thinned = torch.rand(size, generator=generator) < THIN_SHARE
        kept = torch.exp(np.log(LEAST_KEPT) * torch.rand(size, generator=generator))
        kept = torch.where(thinned, kept, 1.0)

        members = self.similar[rows]
        weight = (torch.arange(MOST_POOLED) < number.unsqueeze(1)).float()
        with torch.autocast("cpu", enabled=False):  # bfloat16 cannot hold counts
            counts = torch.einsum("bk,bkg->bg", weight, self.counts[members][:, :, genes])
        library_size = (weight * self.library_size[members]).sum(dim=1)
        fewer = torch.binomial(counts, kept.unsqueeze(1).expand_as(counts), generator=generator)
        return fewer, (library_size * kept).clamp_min(1)
