"""The best possible prediction, known for simulated tissue only."""

from typing import TYPE_CHECKING

import numpy as np

from hinge.evaluation.names import DEFAULT_DRAWS
from hinge.evaluation.predictions import Prediction

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
    from hinge.data.simulate.counts import activity_root, oracle_draws
    from hinge.data.transforms import get_transform

    rows = slide.obs_names.get_indexer(spots.barcodes)
    columns = slide.var_names.get_indexer(spots.genes)
    transform = get_transform(spots.transform)
    mean = np.zeros(spots.values.shape)
    kept, root = [], activity_root(slide)
    # one draw at a time: the counts of all genes in all draws of a large slide would not fit into memory
    for number in range(DRAWS_OF_THE_MEAN):
        counts = oracle_draws(slide, 1, seed=seed * DRAWS_OF_THE_MEAN + number, root=root)[0][rows]
        values = transform.forward(counts[:, columns], counts.sum(axis=1))
        mean += values / DRAWS_OF_THE_MEAN
        if number < n_draws:
            kept.append(values)
    return Prediction("oracle", mean=mean.astype(np.float32), draws=np.stack(kept))
