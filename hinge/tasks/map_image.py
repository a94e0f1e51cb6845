"""The image of a dense map: an OME-TIFF with one channel per gene."""

import hashlib
import math
import uuid
from pathlib import Path

import numpy as np
import tifffile
from anndata import AnnData

from hinge.data.slide import slide_name

_SMALLEST_LEVEL = 128  # side of the coarsest level of the pyramid, in pixels


def write_ome_tiff(path: Path, planes: np.ndarray, names: list[str], grid: AnnData, pitch_um: float) -> None:
    """Write the channels of a dense map as an OME-TIFF pyramid.

    Parameters
    ----------
    path
        The file.
    planes
        Channels (C, H, W), 0 off the tissue; the first is 1 on tissue. Each level has half the resolution of the one
        before.
    names
        Names of the channels.
    grid
        The slide of the map's points.
    pitch_um
        Side of a pixel.
    """
    facts = grid.uns["hinge"]
    cells = grid.obs[["array_x", "array_y"]].to_numpy(float)
    # centre of the first cell on the slide, in µm
    left, top = (np.asarray(grid.obsm["spatial"])[0] * facts["um_per_px"] - cells[0] * pitch_um).tolist()
    channels, content = len(planes), hashlib.sha256(repr((names, left, top, pitch_um)).encode())
    for plane in planes:
        content.update(plane.tobytes())
    metadata = {
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hinge/{content.hexdigest()}")),  # equal maps are equal files
        "axes": "CYX",
        "Name": f"{slide_name(grid)}, {facts['transform']}",
        "Channel": {"Name": names},
        "PhysicalSizeX": pitch_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pitch_um,
        "PhysicalSizeYUnit": "µm",
        "Plane": {
            "PositionX": [left] * channels,
            "PositionXUnit": ["µm"] * channels,
            "PositionY": [top] * channels,
            "PositionYUnit": ["µm"] * channels,
        },
    }
    levels = max(1, math.ceil(math.log2(max(1, max(planes.shape[1:]) / _SMALLEST_LEVEL))))
    settings = {"tile": (256, 256), "compression": "zlib", "photometric": "minisblack", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as file:
        file.write(planes, subifds=levels, resolution=(1e4 / pitch_um,) * 2, metadata=metadata, **settings)
        for level in range(1, levels + 1):
            planes = _halved(planes)
            resolution = (1e4 / (pitch_um * 2**level),) * 2
            file.write(planes, subfiletype=1, resolution=resolution, metadata=None, **settings)


def _halved(planes: np.ndarray) -> np.ndarray:
    """Return planes (C, H, W) at half the resolution: the mean over the tissue in 2 × 2 pixels, tissue first."""
    height, width = planes.shape[1:]
    padding = ((0, height % 2), (0, width % 2))

    def blocks(plane: np.ndarray) -> np.ndarray:
        padded = np.pad(plane, padding)
        return padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).sum(axis=(1, 3))

    area = blocks(planes[0])
    # values are 0 off the tissue, so that a sum over pixels is a sum over tissue
    genes = [blocks(plane * planes[0]) / np.maximum(area, 1) for plane in planes[1:]]
    return np.stack([(area > 0).astype(np.float32), *genes]).astype(np.float32)
