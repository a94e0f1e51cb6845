"""Write and read draws as a chunked Zarr array, for draws that are too large for layers."""

from pathlib import Path

import numpy as np
import zarr
from anndata import AnnData

from hinge.data.layers import draw_names, named_layers
from hinge.utils import checksums
from hinge.utils.errors import DataError, HingeError, one_line
from hinge.utils.files import atomic_path
from hinge.utils.safe_zarr import check_zarr

_CHUNK_SPOTS, _CHUNK_GENES = 1024, 32


def write_draws_zarr(draws: AnnData, path: str | Path) -> Path:
    """Write an AnnData Zarr store whose `obsm["draws"]` (spots, genes, draws) is chunked over spots and genes.

    The draws of some spots and genes can be read without the rest:
    `zarr.open_group(path)["obsm/draws"][rows, columns]`.

    Parameters
    ----------
    draws
        One slide's draws, as layers.
    path
        Folder to write, e.g. `C5.zarr`; an existing one is replaced.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DataError
        If there are no draws in the layers.
    """
    names = draw_names(draws)
    if not names:
        raise DataError(f"there are no draws in the layers to write to {path}")
    kept = {name: layer for name, layer in named_layers(draws).items() if name not in names}
    rest = AnnData(draws.X, obs=draws.obs, var=draws.var, uns=draws.uns, obsm=dict(draws.obsm), layers=kept)
    with atomic_path(path) as temporary:
        rest.write_zarr(temporary)
        group = zarr.open_group(temporary, mode="r+", use_consolidated=False)["obsm"]
        shape = (*draws.shape, len(names))
        chunks = (min(_CHUNK_SPOTS, shape[0]), min(_CHUNK_GENES, shape[1]), shape[2])
        array = group.create_array("draws", shape=shape, chunks=chunks, dtype="float32")
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, shape[0], _CHUNK_SPOTS):
            rows = slice(start, start + _CHUNK_SPOTS)
            array[rows] = np.stack([np.asarray(draws.layers[name][rows]) for name in names], axis=-1)
        zarr.consolidate_metadata(temporary)
    return Path(path)


def attach_draws(draws: AnnData, path: str | Path) -> AnnData:
    """Add the draws of a store to an AnnData as layers `draw_000`…; changed in place.

    Raises
    ------
    DataError
        The store is missing or damaged, or has other numbers of spots or genes.
    """
    try:
        group = zarr.open_group(checksums.verified(path), mode="r")
        check_zarr(group, Path(path))
        values = np.moveaxis(group["obsm/draws"][:], -1, 0)
    except HingeError:
        raise
    except Exception as error:  # a damaged store ends in almost any exception
        raise DataError(f"{path} is not a readable store of draws: {one_line(error)}") from error
    if values.shape[1:] != draws.shape:
        raise DataError(f"{path} holds draws of {values.shape[1:]} spots and genes, not of {draws.shape}")
    for number, draw in enumerate(values):
        draws.layers[f"draw_{number:03d}"] = draw
    return draws
