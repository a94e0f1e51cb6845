"""The best possible prediction, known for simulated tissue only."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hinge.evaluation.names import DEFAULT_DRAWS
from hinge.evaluation.predictions import Prediction
from hinge.utils.threads import in_threads

if TYPE_CHECKING:
    from anndata import AnnData

    from hinge.data.spots import SpotTable

# enough that the Monte-Carlo error of the mean is small against the spread of expression
DRAWS_OF_THE_MEAN = 200


def oracle_prediction(slide: "AnnData", spots: "SpotTable", n_draws: int = DEFAULT_DRAWS, seed: int = 0) -> Prediction:
    """Return draws of simulated spots from the distribution that generated them, given the cells in the image.

    Parameters
    ----------
    slide
        A slide of `hinge.data.simulate_slides`.
    spots
        Its spots on the panel.
    n_draws
        Draws to return, K.
    seed
        Seed of the draws.

    Returns
    -------
    Prediction
        Method `oracle`; in the units of `spots`.
    """
    from scipy.linalg import cholesky

    from hinge.data.simulate.counts import activity_correlation, oracle_draws
    from hinge.data.simulate.expected import expected_log_counts
    from hinge.data.transforms import get_transform

    rows = slide.obs_names.get_indexer(spots.barcodes)
    transform = get_transform(spots.transform)
    if spots.transform == "log2p1":  # which needs no library size, so that other genes need not be drawn
        slide = slide[:, spots.genes].copy()
    columns = slide.var_names.get_indexer(spots.genes)
    # in place, with the columns of the symmetric matrix as its rows: 200 MB for 5,000 spots, and not three times that
    root = cholesky(activity_correlation(slide).T, lower=True, overwrite_a=True, check_finite=False)

    def draw(number: int) -> NDArray[np.float32]:
        counts = oracle_draws(slide, 1, seed=seed * DRAWS_OF_THE_MEAN + number, root=root)[0][rows]
        return transform.forward(counts[:, columns], counts.sum(axis=1)).astype(np.float32, copy=False)

    exact = spots.transform == "log2p1"
    mean = expected_log_counts(slide)[np.ix_(rows, columns)] if exact else np.zeros(spots.values.shape)
    draws = np.empty((n_draws, *spots.values.shape), dtype=np.float32)
    # a few draws at a time: the counts of all genes in all draws of a large slide would not fit into memory
    for number, values in enumerate(in_threads(draw, range(n_draws if exact else max(DRAWS_OF_THE_MEAN, n_draws)))):
        if not exact and number < DRAWS_OF_THE_MEAN:
            mean += values / DRAWS_OF_THE_MEAN
        if number < n_draws:
            draws[number] = values
    return Prediction("oracle", mean=mean.astype(np.float32), draws=draws)
