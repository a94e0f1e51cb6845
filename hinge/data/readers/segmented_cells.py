"""Cells that Space Ranger 4 segments in Visium HD, as the spots of a slide."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from hinge.data.resolution import pitch_in_px
from hinge.utils.errors import DataError

_MOST_BYTES = 4 << 30


def read_cells(slide: AnnData, outlines: Path, notes: dict[str, Any]) -> AnnData:
    """Return the cells of a table of counts at the centroids of their outlines.

    Parameters
    ----------
    slide
        Counts of cells, named `cellid_000000001-1`.
    outlines
        GeoJSON of one polygon a cell, in full-resolution pixels, with the property `cell_id`.
    notes
        `pitch_px`, `diameter_px` (medians) and the number of cells without an outline are added.

    Raises
    ------
    DataError
        The file is missing or damaged, or has the outline of no cell.
    """
    numbers, centres, areas = _read_outlines(outlines)
    wanted = slide.obs_names.str.extract(r"(\d+)(?:-\d+)?$", expand=False).fillna("-1").astype(np.int64)
    place = {int(number): row for row, number in enumerate(numbers)}
    rows = np.array([place.get(int(number), -1) for number in wanted])
    if not (rows >= 0).any():
        raise DataError(
            f"{outlines} has the outlines of {len(numbers)} cells, and none of them is one of the {slide.n_obs} cells "
            "with counts: positions of cells are read from their outlines; copy the whole segmented_outputs folder, or "
            "use a sample of binned_outputs with --sample"
        )
    if (rows < 0).any():
        notes.setdefault("left_out", {})["without_outline"] = int((rows < 0).sum())
    slide = slide[rows >= 0].copy()
    rows = rows[rows >= 0]
    slide.obsm["spatial"] = centres[rows]
    slide.obs["area_px"] = areas[rows]
    notes["pitch_px"] = pitch_in_px(centres[rows])
    notes["diameter_px"] = float(np.median(2 * np.sqrt(areas[rows] / math.pi)))
    notes["objects"] = "cells"
    return slide


def _read_outlines(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers (n,), centroids x and y (n, 2) and areas (n,) of the cells in a GeoJSON file."""
    if not file.is_file():
        raise DataError(f"{file} is missing, and positions of cells are read from it")
    if file.stat().st_size > _MOST_BYTES:
        raise DataError(f"{file} is too large")
    try:
        features = json.loads(file.read_bytes())["features"]
        numbers, places = [], []
        for feature in features:
            rings = feature["geometry"]["coordinates"]
            ring = np.asarray(rings[0] if feature["geometry"]["type"] == "Polygon" else rings[0][0], dtype=np.float64)
            numbers.append(int(str(feature["properties"]["cell_id"]).split("_")[-1].split("-")[0]))
            places.append(_centroid(ring))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is not a readable file of cell outlines: {error}") from error
    values = np.array(places, dtype=np.float64).reshape(-1, 3)
    return np.array(numbers, dtype=np.int64), values[:, :2], values[:, 2]


def _centroid(ring: np.ndarray) -> tuple[float, float, float]:
    """Return the centroid x, y and the area of a polygon (n, 2), by the shoelace formula."""
    origin = ring[0]
    x, y = (ring - origin).T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    if abs(area) < 1e-9:
        return (*ring.mean(axis=0), 0.0)
    centre = np.array([((x + np.roll(x, -1)) * cross).sum(), ((y + np.roll(y, -1)) * cross).sum()]) / (6 * area)
    return (*(origin + centre), abs(float(area)))
