"""SpatialData stores (Marconato et al., Nature Methods 2025), through the package spatialdata."""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem

from hinge.data.counts_source import take_counts
from hinge.data.readers.h5ad import array_of, image_resolution, is_hexagonal, without_off_tissue
from hinge.data.readers.visium import SPOT_DIAMETER_UM, SPOT_PITCH_UM
from hinge.data.resolution import (
    choose_resolution,
    lattice_pitch_px,
    pitch_in_px,
    positive_length,
    um_per_px_of_array,
)
from hinge.data.slide import describe_slide
from hinge.utils.errors import DataError, HingeError
from hinge.utils.packages import require
from hinge.utils.safe_hdf5 import check_sparse
from hinge.utils.safe_zarr import check_zarr

LAYOUT = (
    "a SpatialData store <name>.zarr, or a folder of them, with a table of raw counts that annotates shapes or labels, "
    "and an image in the same coordinate system"
)
_BAND_ROWS = 2048
_MOST_LABEL = 100_000_000


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return bool(_stores(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the stores, `<store>_<region>` if the tables of a store annotate several regions."""
    return sorted(_samples(path))


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read one region in pixels of the store's largest RGB image, or in its own units if `image` is given."""
    spatialdata = require("spatialdata", "spatialdata", f"reading {path}")

    store, table_name, region = _samples(path)[sample]
    try:
        tables = _tables(store)
        for folder in tables.glob("[!.]*/"):
            check_zarr(zarr.open_group(folder, mode="r"), folder)
        with warnings.catch_warnings():  # on former versions of the format
            warnings.simplefilter("ignore")
            data = spatialdata.read_zarr(store, selection=("images", "labels", "shapes"))
            table = anndata.read_zarr(tables / table_name)  # the library does not read those of version 0.1
        check_sparse(table)
        keys = table.uns["spatialdata_attrs"]
        slide = table[(table.obs[keys["region_key"]] == region).to_numpy()].copy()
    except HingeError:
        raise
    except Exception as error:  # a damaged store ends in almost any exception
        raise DataError(f"{store} is not a readable SpatialData store: {' '.join(str(error).split())}") from error
    slide, where = take_counts(slide, store)
    notes: dict[str, Any] = {"counts": where}
    slide = without_off_tissue(slide, notes)
    centres, radius = _places(data, region, slide.obs[keys["instance_key"]], store, table_name)
    scale = 1.0
    if image is None:
        name = _image_beside(data, region)
        if name is not None:
            matrix = _to_pixels(data, region, name)
            centres = centres @ matrix[:2, :2].T + matrix[:2, 2]
            scale = math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
            image = store / "images" / name
        elif require_image:
            raise DataError(f"{store} has no RGB image in a coordinate system with {region!r}: give --image")

    slide.obsm["spatial"] = centres.astype(np.float64)
    um_per_px, pitch_um, diameter_um = _lengths(slide, region, um_per_px, image, notes)
    if math.isnan(um_per_px) and require_image:
        raise DataError(f"{store} does not contain the resolution: give --um-per-px, µm per pixel of its image")
    if math.isnan(diameter_um):
        diameter_um = 2 * radius * scale * um_per_px
    del slide.uns["spatialdata_attrs"]
    return describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=pitch_in_px(slide.obsm["spatial"]) * um_per_px if math.isnan(pitch_um) else pitch_um,
        spot_diameter_um=diameter_um,
        source_format="spatialdata",
        source=notes,
    )


def _lengths(
    slide: AnnData, region: str, um_per_px: float | None, image: Path | None, notes: dict[str, Any]
) -> tuple[float, float, float]:
    """Return µm per pixel, and spot pitch and diameter in µm; NaN where unknown."""
    facts = slide.uns.get("hinge", {})
    facts = facts if isinstance(facts, dict) else {}
    pitch_um, diameter_um = positive_length(facts, "spot_pitch_um"), positive_length(facts, "spot_diameter_um")
    bins = re.search(r"square_(\d{3})um", region)
    hexagonal = not bins and is_hexagonal(slide)
    if bins:
        pitch_um = diameter_um = float(bins[1])
    elif hexagonal and math.isnan(pitch_um):
        pitch_um, diameter_um = SPOT_PITCH_UM, SPOT_DIAMETER_UM
    array, lattice_px = array_of(slide), lattice_pitch_px(slide.obsm["spatial"])
    known = {
        "option": um_per_px or math.nan,
        "array": um_per_px_of_array(array, slide.obsm["spatial"])
        if hexagonal and array is not None
        else pitch_um / lattice_px,
        **image_resolution(image),
    }
    known, chosen, origin = choose_resolution(known)
    notes |= {"resolutions": known, "um_per_px_from": origin}
    if math.isnan(chosen):
        chosen = pitch_um / pitch_in_px(slide.obsm["spatial"])
    return chosen, pitch_um, diameter_um


def _places(data: Any, region: str, instances: pd.Series, store: Path, table: str) -> tuple[np.ndarray, float]:
    """Return centres (n, 2) of instances of a region of shapes or labels, and the median radius, NaN if unknown."""
    if region in data.shapes:
        shapes = data.shapes[region]
        missing = ~instances.isin(shapes.index)
        if missing.any():
            raise DataError(f"{store}: table {table} annotates {instances.index[missing][0]}, which {region!r} lacks")
        shapes = shapes.loc[instances]
        centres = np.stack([shapes.geometry.centroid.x, shapes.geometry.centroid.y], axis=1)
        radius = shapes["radius"] if "radius" in shapes else np.sqrt(shapes.geometry.area / math.pi)
        return centres, float(radius.median()) or math.nan
    if region not in data.labels:
        raise DataError(
            f"{store} has no shapes or labels {region!r}, and the positions of spots are read from the region that the "
            f"table {table} annotates; it has {', '.join([*data.shapes, *data.labels]) or 'neither'}"
        )
    element = data.labels[region]
    labels = next(iter(element["scale0"].values())) if hasattr(element, "children") else element
    return _label_centres(labels, instances, f"{store}: table {table}", region)


def _label_centres(labels: Any, instances: pd.Series, named: str, region: str) -> tuple[np.ndarray, float]:
    """Return the centroids of labels in pixels, read in bands of rows, and the median radius of their areas."""
    wanted = instances.to_numpy(np.int64)
    most = int(wanted.max(initial=0)) + 1
    if most > _MOST_LABEL:
        raise DataError(f"{named} annotates the label {most - 1:,}, and at most {_MOST_LABEL:,} are supported")
    sums = np.zeros((3, most))
    height, width = labels.shape[-2:]
    column = np.arange(width) + 0.5
    for top in range(0, height, _BAND_ROWS):
        band = np.asarray(labels[top : top + _BAND_ROWS]).astype(np.int64)
        flat = np.where((band > 0) & (band < most), band, 0).ravel()
        rows = np.repeat(np.arange(top, top + len(band)) + 0.5, width)
        for number, weights in enumerate((None, np.tile(column, len(band)), rows)):
            sums[number] += np.bincount(flat, weights, minlength=most)
    areas = sums[0, wanted]
    if (areas == 0).any():
        raise DataError(f"{named} annotates {instances.index[areas == 0][0]}, which {region!r} lacks")
    return (sums[1:, wanted] / areas).T, float(np.median(np.sqrt(areas / math.pi)))


def _stores(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    if _is_store(path):
        return [path]
    return sorted(folder for folder in path.glob("[!.]*.zarr") if _is_store(folder))


def _is_store(path: Path) -> bool:
    return _tables(path).is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def _tables(store: Path) -> Path:
    """Return the folder of a store's tables, which version 0.1 names otherwise."""
    return store / "table" if (store / "table").is_dir() and not (store / "tables").is_dir() else store / "tables"


def _samples(path: Path) -> dict[str, tuple[Path, str, str]]:
    """Return store, table and region by sample."""
    found = {}
    for store in _stores(path):
        annotated = []
        for table in sorted(folder.name for folder in _tables(store).glob("[!.]*/")):
            try:
                group = zarr.open_group(_tables(store) / table, mode="r")["uns/spatialdata_attrs"]
                check_zarr(group, _tables(store) / table / "uns" / "spatialdata_attrs")
                regions = np.atleast_1d(read_elem(group)["region"])
            except KeyError:  # a table that annotates nothing
                continue
            except HingeError:
                raise
            except Exception as error:  # a damaged store ends in almost any exception
                raise DataError(f"{store} is not a readable SpatialData store: {error}") from error
            annotated += [(store, table, str(region)) for region in regions]
        for store_, table, region in annotated:
            found[store.stem if len(annotated) == 1 else f"{store.stem}_{region}"] = (store_, table, region)
    return found


def _image_beside(data: Any, region: str) -> str | None:
    """Return the largest image with 3 or 4 channels of 8 bits in a coordinate system of a region, or None."""
    from spatialdata.models import get_axes_names
    from spatialdata.transformations import get_transformation

    systems = set(get_transformation(_region(data, region), get_all=True))
    sizes = {}
    for name, element in data.images.items():
        array = next(iter(element["scale0"].values())) if hasattr(element, "children") else element
        shape = dict(zip(get_axes_names(element), array.shape, strict=True))
        is_rgb = array.dtype == np.uint8 and shape.get("c") in (3, 4) and "z" not in shape
        if is_rgb and systems & set(get_transformation(element, get_all=True)):
            sizes[name] = shape["x"] * shape["y"]
    # of equal ones, that which is not named as a thumbnail
    return max(sizes, key=lambda name: (sizes[name], not re.search("hires|lowres", name))) if sizes else None


def _to_pixels(data: Any, region: str, image: str) -> np.ndarray:
    """Return the matrix (3, 3) from a region's own units to an image's pixels."""
    from spatialdata.transformations import get_transformation

    shapes = get_transformation(_region(data, region), get_all=True)
    pixels = get_transformation(data.images[image], get_all=True)
    system = sorted(set(shapes) & set(pixels))[0]
    there, back = (each[system].to_affine_matrix(("x", "y"), ("x", "y")) for each in (shapes, pixels))
    return np.linalg.inv(back) @ there


def _region(data: Any, region: str) -> Any:
    """Return shapes or labels by name."""
    return data.shapes[region] if region in data.shapes else data.labels[region]
