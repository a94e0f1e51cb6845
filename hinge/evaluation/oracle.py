"""The best possible prediction, which simulated tissue knows."""

import numpy as np
import pandas as pd
from anndata import AnnData

from hinge.data.simulate import oracle_draws
from hinge.data.spots import SpotTable
from hinge.data.transforms import get_transform
from hinge.evaluation.baselines import Prediction

# enough that the mean's own Monte-Carlo error is small beside the spread of expression
DRAWS_OF_THE_MEAN = 200


def oracle_prediction(slide: AnnData, spots: SpotTable, n_draws: int = 20, seed: int = 0) -> Prediction:
    """Draw simulated spots from the distribution they were drawn from, given what the image shows.

    Parameters
    ----------
    slide
        A slide of `hinge.data.simulate_slides`.
    spots
        Its spots on the panel.
    n_draws
        Draws that are kept, K.
    seed
        Of the draws.

    Returns
    -------
    Prediction
        Method `oracle`; in the units of `spots`.
    """
    rows = pd.Index(slide.obs_names).get_indexer(spots.barcodes)
    columns = slide.var_names.get_indexer(spots.genes)
    transform = get_transform(spots.transform)
    mean = np.zeros(spots.values.shape)
    kept = []
    # one at a time: the counts of all genes of all draws would not fit into memory for a large slide
    for number in range(DRAWS_OF_THE_MEAN):
        counts = oracle_draws(slide, 1, seed=seed * DRAWS_OF_THE_MEAN + number)[0][rows]
        values = transform.forward(counts[:, columns], counts.sum(axis=1))
        mean += values / DRAWS_OF_THE_MEAN
        if number < n_draws:
            kept.append(values)
    return Prediction("oracle", mean=mean.astype(np.float32), draws=np.stack(kept))
