"""Values and bins of the training spots, for a backbone that ranks expression."""

import numpy as np
import torch

from hinge.backbones import ExpressionBackbone
from hinge.data.count_table import panel_counts
from hinge.data.transforms import get_transform
from hinge.run.preparation import Preparation

_SPOTS_AT_A_TIME = 256


def ranked_values(
    inputs: Preparation, backbone: ExpressionBackbone, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return values and bins (n, G) of the training spots on the panel, for a backbone that ranks expression.

    As in the published code, a spot's bins depend on all of its genes that the backbone knows. A gene of the panel
    that a slide lacks, or that is new to the backbone, has the bin 0, as genes without a count. Of each slide, an equal
    share of `most` spots is used at most; None: all.
    """
    panel, names, values, bins = inputs.panel().genes, inputs.config.data.train, [], []
    for name in names:
        slide = inputs.slide(name)
        if most is not None and slide.n_obs > (share := max(1, most // len(names))):
            slide = slide[np.linspace(0, slide.n_obs - 1, share).astype(int)]
        known = inputs.matcher.match(list(slide.var_names), "drop")
        column = {gene: number for number, gene in enumerate(known.genes)}
        there = [number for number, gene in enumerate(panel) if gene in column]
        of_slide = np.zeros((slide.n_obs, len(panel)), dtype=np.float32)
        for start in range(0, slide.n_obs, _SPOTS_AT_A_TIME):
            rows = slice(start, start + _SPOTS_AT_A_TIME)
            counts = torch.from_numpy(slide.X[rows][:, known.index].toarray().astype(np.float32))
            ranked = backbone.encode_values(counts, counts.sum(dim=1), torch.from_numpy(known.ids)).numpy()
            of_slide[rows, there] = ranked[:, [column[panel[number]] for number in there]]
        found, sizes = panel_counts(slide, panel)
        values.append(get_transform(inputs.config.transform).forward(np.nan_to_num(found), sizes))
        bins.append(of_slide)
    return np.concatenate(values), np.concatenate(bins)
