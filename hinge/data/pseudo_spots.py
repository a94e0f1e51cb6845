"""Pseudo-spots: cells of a slide pooled in squares."""

import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData

from hinge.data.slide import slide_name
from hinge.utils.errors import ConfigError


def pool_cells(slide: AnnData, spot_um: float) -> AnnData:
    """Return a slide whose spots are squares of a grid, each with the sum of the counts of the cells in it.

    Parameters
    ----------
    slide
        Slide whose spots are cells (Xenium, CosMx, segmented Visium HD).
    spot_um
        Side of a square in µm, which is the distance between the pseudo-spots too.

    Returns
    -------
    AnnData
        Squares with at least one cell, at their centres; `obs["cells"]` is their number of cells.

    Raises
    ------
    ConfigError
        The slide has spots or bins, or no resolution, or `spot_um` is not above 0.
    """
    facts = slide.uns["hinge"]
    if facts.get("source", {}).get("objects") != "cells":
        raise ConfigError(f"--spot-um pools cells, and slide {slide_name(slide)} has spots of its own")
    if not spot_um > 0:
        raise ConfigError(f"--spot-um takes a number above 0, not {spot_um}")
    if not facts["um_per_px"] > 0:
        raise ConfigError(
            f"--spot-um needs the resolution of slide {slide_name(slide)}, which has none: give --um-per-px, or "
            "data.um_per_px in the configuration"
        )
    side_px = spot_um / facts["um_per_px"]
    squares = np.floor(np.asarray(slide.obsm["spatial"], dtype=np.float64) / side_px).astype(np.int64)
    places, member = np.unique(squares, axis=0, return_inverse=True)
    member = member.ravel()
    pooling = scipy.sparse.csr_matrix(
        (np.ones(len(member), dtype=np.float32), (member, np.arange(len(member)))), shape=(len(places), len(member))
    )
    pooled = AnnData(
        X=(pooling @ slide.X).tocsr().astype(np.float32),
        obs=pd.DataFrame(
            {"array_x": places[:, 0], "array_y": places[:, 1], "cells": np.bincount(member, minlength=len(places))},
            index=[f"{column}x{row}" for column, row in places],
        ),
        var=slide.var,
        uns=dict(slide.uns),
    )
    pooled.obsm["spatial"] = (places + 0.5) * side_px
    pooled.uns["hinge"] = {
        **facts,
        "spot_pitch_um": float(spot_um),
        "spot_diameter_um": float(spot_um),
        "source": {**facts["source"], "objects": "pseudo-spots", "cells": slide.n_obs},
    }
    if "spatial" in pooled.uns:
        library = next(iter(pooled.uns["spatial"].values()))
        library = {**library, "scalefactors": {**library["scalefactors"], "spot_diameter_fullres": side_px}}
        pooled.uns["spatial"] = {slide_name(slide): library}
    return pooled
