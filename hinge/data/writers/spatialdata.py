"""Write SpatialData stores, for napari-spatialdata, squidpy and spatialdata-plot."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from hinge.data.layers import named_layers
from hinge.data.slide import slide_name
from hinge.data.slide_image import SlideImage
from hinge.utils.errors import DataError
from hinge.utils.files import atomic_path
from hinge.utils.packages import require

_TILE_PX = 2048
_SMALLEST_LEVEL_PX = 1024


def write_spatialdata(draws: AnnData, path: str | Path, full_image: bool = False) -> Path:
    """Write image, spots as circles and a table of draws, all in full-resolution pixels ("global").

    Parameters
    ----------
    draws
        One slide's draws.
    path
        Folder to write, e.g. `C5.zarr`; an existing one is replaced.
    full_image
        Write the image at full resolution as a pyramid (about 3 bytes a pixel) instead of its thumbnail.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DataError
        The package spatialdata is missing, the draws lack the size of the spots, or the full image is missing.
    """
    spatialdata = require("spatialdata", "spatialdata", f"writing {path}")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    name, facts = slide_name(draws), draws.uns["hinge"]
    library = next(iter(draws.uns.get("spatial", {}).values()), None)
    diameter = library["scalefactors"]["spot_diameter_fullres"] if library else math.nan
    if not diameter > 0:
        raise DataError(f"the draws of {name} lack the size of a spot: uns['spatial'] needs spot_diameter_fullres")
    images = {}
    if full_image:
        pixels, factors = _full_resolution(facts.get("image_path", ""))
        images[f"{name}_full_image"] = Image2DModel.parse(
            pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], scale_factors=factors, chunks=(3, 1024, 1024)
        )
    else:
        thumbnail, scale = library["images"]["hires"], 1 / library["scalefactors"]["tissue_hires_scalef"]
        images[f"{name}_hires_image"] = Image2DModel.parse(
            np.moveaxis(np.asarray(thumbnail), -1, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={"global": Scale([scale, scale], axes=("x", "y"))},
        )
    table = AnnData(draws.X, obs=draws.obs.copy(), var=draws.var, layers=named_layers(draws))
    table.obsm["spatial"] = draws.obsm["spatial"]
    table.uns["hinge"] = facts
    table.obs["region"] = np.full(draws.n_obs, name)
    table.obs["region"] = table.obs["region"].astype("category")
    table.obs["spot"] = np.arange(draws.n_obs)
    store = spatialdata.SpatialData(
        images=images,
        shapes={
            name: ShapesModel.parse(
                np.asarray(draws.obsm["spatial"]),
                geometry=0,
                radius=diameter / 2,
                index=table.obs["spot"].to_numpy(),
                transformations={"global": Identity()},
            )
        },
        tables={"table": TableModel.parse(table, region=name, region_key="region", instance_key="spot")},
    )
    with atomic_path(path) as temporary:
        store.write(temporary)
    return Path(path)


def _full_resolution(image_path: str) -> tuple[Any, list[int]]:
    """Return an image as a lazy array (3, h, w), read by tile, and the steps of its pyramid."""
    import dask
    import dask.array

    if not image_path or not Path(image_path).exists():
        raise DataError(f"there is no image file {image_path or '(none in the draws)'} for --full-image")
    with SlideImage(image_path) as opened:
        width, height = opened.dimensions
    image = SlideImage(image_path)

    def tile(left: int, top: int, columns: int, rows: int) -> np.ndarray:
        return np.moveaxis(image.read_pixels(left, top, columns, rows), -1, 0)

    rows = [
        [
            dask.array.from_delayed(
                dask.delayed(tile, pure=False)(left, top, columns, lines), (3, lines, columns), dtype=np.uint8
            )
            for left in range(0, width, _TILE_PX)
            for columns in [min(_TILE_PX, width - left)]
        ]
        for top in range(0, height, _TILE_PX)
        for lines in [min(_TILE_PX, height - top)]
    ]
    steps = max(0, math.floor(math.log2(max(width, height) / _SMALLEST_LEVEL_PX)))
    return dask.array.block(rows), [2] * steps
