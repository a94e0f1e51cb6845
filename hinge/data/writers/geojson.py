"""Write GeoJSON for QuPath: spots as detections with measurements."""

import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData
from tqdm import tqdm

from hinge.data.layers import draw_names
from hinge.data.slide import slide_name
from hinge.utils.errors import DataError
from hinge.utils.files import atomic_path

_CORNERS = 24  # of the polygon of a round spot
_COLOUR = [96, 96, 160]
_DIGITS = 5  # significant ones of a measurement


def write_geojson(
    draws: AnnData, path: str | Path, genes: Sequence[str] | None = None, threshold: float | None = None
) -> Path:
    """Write each spot as a polygon in full-resolution pixels, with measurements `<gene> mean` and `<gene> sd`.

    QuPath reads the file through "Import objects from file". Round spots become polygons of 24 corners, the bins of
    Visium HD squares.

    Parameters
    ----------
    draws
        One slide's draws.
    path
        File to write, e.g. `C5.geojson`.
    genes
        Genes that become measurements; None for all.
    threshold
        Value in units of the transform: the share of draws above it becomes `<gene> P(> <threshold>)`; None for none.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DataError
        The draws lack a gene or the size of the spots.
    """
    name = slide_name(draws)
    genes = list(draws.var_names) if genes is None else list(genes)
    columns = draws.var_names.get_indexer(genes)
    if (columns < 0).any():
        missing = [gene for gene, column in zip(genes, columns, strict=True) if column < 0]
        raise DataError(f"the draws of {name} lack {', '.join(missing[:5])}")
    outline = spot_outline(draws)
    mean, deviation = np.asarray(draws.X)[:, columns], np.asarray(draws.layers["std"])[:, columns]
    above = None
    if threshold is not None:
        each = [np.asarray(draws.layers[layer])[:, columns] > threshold for layer in draw_names(draws)]
        if not each:
            raise DataError(f"the draws of {name} have no layers draw_000, …, for shares above --threshold {threshold}")
        above = np.mean(each, axis=0)
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, f"hinge/{name}")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        # spot by spot, so that the whole file is not held in memory
        file.write('{"type": "FeatureCollection", "features": [\n')
        spots = zip(draws.obs_names, np.asarray(draws.obsm["spatial"]), mean, deviation, strict=True)
        for number, (barcode, place, values, spread) in enumerate(
            tqdm(spots, total=draws.n_obs, desc=Path(path).name, unit="spot", disable=None)
        ):
            measurements = {}
            for column, gene in enumerate(genes):
                measurements[f"{gene} mean"] = _short(values[column])
                measurements[f"{gene} sd"] = _short(spread[column])
                if above is not None:
                    measurements[f"{gene} P(> {threshold:g})"] = _short(above[number, column])
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(namespace, barcode)),
                "geometry": {"type": "Polygon", "coordinates": [np.round(place + outline, 2).tolist()]},
                "properties": {
                    "objectType": "detection",
                    "name": str(barcode),
                    "classification": {"name": "Spot", "color": _COLOUR},
                    "measurements": measurements,
                },
            }
            file.write((",\n" if number else "") + json.dumps(feature))
        file.write("\n]}\n")
    return Path(path)


def spot_outline(slide: AnnData) -> np.ndarray:
    """Return a closed ring around the centre of a spot of a slide, full-resolution pixels (corners + 1, 2)."""
    name, facts = slide_name(slide), slide.uns["hinge"]
    diameter = facts.get("spot_diameter_um", math.nan)
    if not math.isfinite(diameter):
        diameter = facts.get("spot_pitch_um", math.nan) / 2
    radius = diameter / facts.get("um_per_px", math.nan) / 2
    if not (math.isfinite(radius) and radius > 0):
        raise DataError(
            f"the draws of {name} lack the size of a spot: uns['hinge'] needs spot_diameter_um and um_per_px"
        )
    if facts.get("source_format") == "visium_hd":
        return radius * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)], dtype=float)
    angles = np.arange(_CORNERS + 1) % _CORNERS * 2 * math.pi / _CORNERS
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
