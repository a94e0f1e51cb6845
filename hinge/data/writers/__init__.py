"""Write draws for other tools: one module per target format.

Each takes an AnnData in the format of `hinge.data.draws.write_draws`: X the mean of the draws, layers `std`,
`expected` and `draw_000`…, full-resolution pixels in `obsm["spatial"]`, image and scale factors in `uns["spatial"]`.
"""

from hinge.data.writers.cellxgene import write_cellxgene
from hinge.data.writers.geojson import write_geojson
from hinge.data.writers.spatialdata import write_spatialdata
from hinge.data.writers.vitessce import write_vitessce
from hinge.data.writers.zarr import attach_draws, write_draws_zarr

__all__ = [
    "attach_draws",
    "write_cellxgene",
    "write_draws_zarr",
    "write_geojson",
    "write_spatialdata",
    "write_vitessce",
]
