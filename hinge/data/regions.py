"""Regions of a slide: sets of spots from polygons (GeoJSON as QuPath writes it) or from a table, and as GeoJSON."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data.slide import slide_name
from hinge.data.writers.geojson import spot_outline
from hinge.utils.errors import DataError, one_line
from hinge.utils.files import atomic_path

_MOST_BYTES = 256 << 20  # of a GeoJSON file
_BARCODES = ("barcode", "spot", "index", "")
_LABELS = ("label", "region", "annotation", "class", "cluster")
_SLIDES = ("slide", "sample", "section", "library_id")


@dataclass(frozen=True)
class Region:
    """A named set of spots of a slide.

    Attributes
    ----------
    name
        Its name: in QuPath the class of an annotation.
    spots
        Bool (n,): the spots whose centre lies in the region.
    polygons
        Its polygons, each a list of rings (corners, 2) in full-resolution pixels, the outer ring first; empty if the
        region is given by its spots.
    """

    name: str
    spots: NDArray[np.bool_]
    polygons: list[list[NDArray[np.float64]]] = field(default_factory=list)


def read_regions(path: str | Path, slide: AnnData) -> dict[str, Region]:
    """Return the regions in a file, by name.

    Parameters
    ----------
    path
        GeoJSON of annotations as QuPath exports it (coordinates in full-resolution pixels; annotations of one class
        are one region, one without a class has its own name), or a CSV or TSV file with a column of barcodes and one
        of labels, which is named `label` where there are further columns.
    slide
        The slide or its draws: barcodes and `obsm["spatial"]`.

    Returns
    -------
    dict
        Name → region, in the order of the file.

    Raises
    ------
    DataError
        The file is unreadable, has no region, or none of its regions holds a spot of the slide.
    """
    path = Path(path)
    found = _of_table(path, slide) if path.suffix.lower() in (".csv", ".tsv", ".txt") else _of_geojson(path, slide)
    if not any(region.spots.any() for region in found.values()):
        raise DataError(
            f"no region of {path} holds a spot of slide {slide_name(slide)}, whose {slide.n_obs} spots lie at "
            f"{_range(slide)}; regions need its full-resolution pixels, or its barcodes"
        )
    return found


def _range(slide: AnnData) -> str:
    (left, top), (right, bottom) = (np.asarray(slide.obsm["spatial"]).min(0), np.asarray(slide.obsm["spatial"]).max(0))
    return f"x {left:.0f} to {right:.0f} and y {top:.0f} to {bottom:.0f}"


def _of_geojson(path: Path, slide: AnnData) -> dict[str, Region]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} is larger than {_MOST_BYTES >> 20} MB; export the annotations alone")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable GeoJSON: {one_line(error)}") from error
    features = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(features, list):
        raise DataError(f"{path} holds no list of GeoJSON features; export annotations from QuPath as GeoJSON")
    places = np.asarray(slide.obsm["spatial"], dtype=np.float64)
    found: dict[str, Region] = {}
    for number, feature in enumerate(features, 1):
        try:
            polygons = _polygons(feature.get("geometry") or {})
            name = _feature_name(feature.get("properties") or {}, number)
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"feature {number} of {path} is not a GeoJSON polygon: {one_line(error)}") from error
        if not polygons:
            continue  # a point or a line holds no spot
        spots = np.zeros(len(places), dtype=bool)
        for polygon in polygons:
            spots |= inside(places, polygon)
        known = found.get(name, Region(name, np.zeros(len(places), dtype=bool)))
        found[name] = Region(name, known.spots | spots, [*known.polygons, *polygons])
    if not found:
        raise DataError(f"{path} holds no polygon; export annotations from QuPath as GeoJSON")
    return found


def _feature_name(properties: Mapping[str, Any], number: int) -> str:
    """Return the class of an annotation, else its name."""
    kind = properties.get("classification")
    if isinstance(kind, Mapping) and (kind.get("name") or kind.get("names")):
        return str(kind.get("name") or ": ".join(map(str, kind["names"])))
    return str(properties.get("name") or f"region {number}")


def _polygons(geometry: Mapping[str, Any]) -> list[list[NDArray[np.float64]]]:
    """Return the polygons of a geometry as lists of rings (corners, 2)."""
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        return [polygon for part in geometry["geometries"] for polygon in _polygons(part)]
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    polygons = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    rings = [[np.asarray(ring, dtype=np.float64)[:, :2] for ring in polygon] for polygon in polygons]
    for ring in (ring for polygon in rings for ring in polygon):
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
            raise ValueError("a ring needs at least 3 corners x, y")
    return [polygon for polygon in rings if polygon]


def inside(places: NDArray[np.float64], polygon: list[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """Return which places (n, 2) lie in a polygon, whose rings after the first are holes."""
    from skimage.measure import points_in_poly

    outer, *holes = polygon
    found = ((places >= outer.min(axis=0)) & (places <= outer.max(axis=0))).all(axis=1)
    candidates = np.flatnonzero(found)
    found[candidates] = points_in_poly(places[candidates], outer)
    for hole in holes:
        found &= ~inside(places, [hole])
    return found


def _of_table(path: Path, slide: AnnData) -> dict[str, Region]:
    try:
        table = pd.read_csv(path, sep=None, engine="python", dtype=str)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path} is not a readable table: {one_line(error)}") from error
    if table.shape[1] < 2:
        raise DataError(f"{path} has one column; it needs a column of barcodes and one of labels")
    names = {str(column).lower().removeprefix("unnamed: 0"): column for column in table.columns}
    first = next((names[name] for name in _BARCODES if name in names), table.columns[0])
    several = table.shape[1] > 2
    of_slides = next((names[name] for name in _SLIDES if name in names), None) if several else None
    others = [column for column in table.columns if column not in (first, of_slides)]
    second = others[0] if len(others) == 1 else next((names[name] for name in _LABELS if name in names), None)
    if second is None:
        raise DataError(f"{path} has {len(others)} columns beside {first!r}; name the one of labels 'label'")
    if of_slides is not None and (table[of_slides] == slide_name(slide)).any():
        table = table[table[of_slides] == slide_name(slide)]
    labels = table.dropna(subset=[first, second]).drop_duplicates([first, second]).set_index(first)[second]
    if labels.index.has_duplicates:  # such as barcodes of several slides
        spot = labels.index[labels.index.duplicated()][0]
        raise DataError(
            f"{path} has several labels for spot {spot}: it needs one row a spot, or a column 'slide' with the value "
            f"{slide_name(slide)!r}"
        )
    return regions_of_labels(labels.reindex(slide.obs_names))


def regions_of_labels(labels: pd.Series) -> dict[str, Region]:
    """Return one region for each label; spots without a label (NaN) are in none."""
    return {str(label): Region(str(label), (labels == label).to_numpy()) for label in labels.dropna().unique()}


def write_regions(path: str | Path, regions: Mapping[str, Region], slide: AnnData) -> Path:
    """Write regions as GeoJSON annotations that QuPath and `read_regions` read.

    A region given by its spots becomes the outlines of these spots.

    Parameters
    ----------
    path
        File to write.
    regions
        Name → region.
    slide
        The slide or its draws, which give the size of the spots.

    Returns
    -------
    Path
        `path`.
    """
    features, namespace = [], uuid.uuid5(uuid.NAMESPACE_URL, f"hinge/{slide_name(slide)}/regions")
    for name, region in regions.items():
        polygons = region.polygons
        if not polygons:
            outline = spot_outline(slide)
            polygons = [[place + outline] for place in np.asarray(slide.obsm["spatial"])[region.spots]]
        rings = [[np.round(_closed(ring), 2).tolist() for ring in polygon] for polygon in polygons]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(namespace, name)),
                "geometry": {"type": "MultiPolygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "name": name, "classification": {"name": name}},
            }
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return Path(path)


def _closed(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    return ring if np.array_equal(ring[0], ring[-1]) else np.vstack([ring, ring[:1]])
