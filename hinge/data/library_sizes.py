"""Library sizes of slides that did not measure the same genes."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

ROUNDS, TOLERANCE = 200, 1e-12


def gene_shares(slides: Sequence[AnnData]) -> dict[str, float]:
    """Return the share of every gene in all counts of a spot, from slides that need not have the same genes.

    The expected count of a gene is the product of its share and the slide's total over all genes. Both are found by
    alternating maximum likelihood of Poisson counts, in which a gene that a slide did not measure does not occur.

    Parameters
    ----------
    slides
        With counts.

    Returns
    -------
    dict
        Gene → share, of all genes of all slides; the shares sum to 1.
    """
    sums = [pd.Series(np.asarray(each.X.sum(axis=0), dtype=np.float64).ravel(), each.var_names) for each in slides]
    table = pd.concat(sums, axis=1).sort_index()
    counts, measured = np.nan_to_num(table.to_numpy()), table.notna().to_numpy(dtype=np.float64)
    of_genes, of_slides = counts.sum(axis=1), counts.sum(axis=0)
    totals = of_slides
    shares = of_genes / max(of_genes.sum(), 1e-12)
    for _ in range(ROUNDS):
        before = shares
        shares = of_genes / np.maximum(measured @ totals, 1e-12)
        shares = shares / max(shares.sum(), 1e-12)
        totals = of_slides / np.maximum(shares @ measured, 1e-12)
        if np.abs(shares - before).max() < TOLERANCE:
            break
    return dict(zip(table.index.tolist(), shares.tolist(), strict=True))


def library_sizes(slide: AnnData, shares: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the count over all genes of each spot (n,), comparable between slides with different genes.

    Parameters
    ----------
    slide
        With counts.
    shares
        Of `gene_shares`: a spot's count over these genes is divided by the share of all counts that the slide's genes
        have. Empty: the count over all genes of the slide, as it is.
    """
    if not shares:
        return np.asarray(slide.X.sum(axis=1, dtype=np.float64)).ravel()
    known = np.array([shares.get(gene, np.nan) for gene in slide.var_names])
    counted = np.isfinite(known)
    sums = np.asarray(slide.X[:, counted].sum(axis=1, dtype=np.float64)).ravel()
    return sums if counted.sum() == len(shares) else sums / max(known[counted].sum(), 1e-12)
