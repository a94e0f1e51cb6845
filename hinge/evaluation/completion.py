"""Training spots without gaps, for baselines that take values of all genes in all spots."""

from dataclasses import replace

import numpy as np

from hinge.data.gene_parts import gene_parts
from hinge.data.spots import SpotTable
from hinge.data.transforms import get_transform
from hinge.evaluation.ridge import fit_ridge_of_parts


def complete_spots(spots: SpotTable, seed: int) -> SpotTable:
    """Return spots in which genes that their slides lack have a value that other slides suggest.

    The value is the prediction of a ridge regression on the features plus the residual of a random spot that has the
    gene; genes that the same slides have take the residuals of one spot.

    Parameters
    ----------
    spots
        With features.
    seed
        Of the random spots.
    """
    found = spots.measured_slides()
    if found is None:
        return spots
    of_slides, slide_of = found
    fit = fit_ridge_of_parts(spots.features[:, 0], spots.values, gene_parts(spots))
    values, rng = spots.values.copy(), np.random.default_rng([seed, 11])
    for number, has in enumerate(of_slides):
        rows, lacking = np.flatnonzero(slide_of == number), np.flatnonzero(~has)
        if not len(lacking):
            continue
        sets, of_genes = np.unique(of_slides[:, lacking].T, axis=0, return_inverse=True)
        for index, slides in enumerate(sets):
            columns = lacking[of_genes.ravel() == index]
            donors = rng.choice(np.flatnonzero(slides[slide_of]), len(rows))
            residual = spots.values[np.ix_(donors, columns)] - fit.held_out[np.ix_(donors, columns)]
            values[np.ix_(rows, columns)] = np.maximum(fit.held_out[np.ix_(rows, columns)] + residual, 0.0)
    counts = np.round(get_transform(spots.transform).inverse(values, spots.library_size))
    counts = np.where(of_slides[slide_of], spots.counts, counts).astype(np.float32)
    return replace(spots, values=values, counts=counts, measured={})
