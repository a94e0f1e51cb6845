"""SpatialData stores (Marconato et al., Nature Methods 2025), through the package spatialdata."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import zarr
from anndata import AnnData
from anndata.io import read_elem

from hinge.data.readers.h5ad import pitch_in_px, positive_length, raw_counts
from hinge.data.readers.visium import SPOT_DIAMETER_UM, SPOT_PITCH_UM, um_per_px_of_array
from hinge.data.slide import describe_slide
from hinge.utils.errors import DataError, HingeError
from hinge.utils.packages import require
from hinge.utils.safe_hdf5 import check_sparse
from hinge.utils.safe_zarr import check_zarr

LAYOUT = (
    "a SpatialData store <name>.zarr, or a folder of them, with a table of raw counts that annotates shapes, and an "
    "image in the same coordinate system"
)


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
        for folder in (store / "tables").glob("[!.]*/"):
            check_zarr(zarr.open_group(folder, mode="r"), folder)
        data = spatialdata.read_zarr(store, selection=("images", "shapes", "tables"))
        table = data.tables[table_name]
        check_sparse(table)
        keys = table.uns["spatialdata_attrs"]
        slide = table[(table.obs[keys["region_key"]] == region).to_numpy()].copy()
    except HingeError:
        raise
    except Exception as error:  # a damaged store ends in almost any exception
        raise DataError(f"{store} is not a readable SpatialData store: {' '.join(str(error).split())}") from error
    if region not in data.shapes:
        raise DataError(f"{store} has no shapes {region!r}, and the positions of spots are read from shapes")
    shapes = data.shapes[region]
    missing = ~slide.obs[keys["instance_key"]].isin(shapes.index)
    if missing.any():
        raise DataError(f"{store}: table {table_name} annotates {slide.obs_names[missing][0]}, which {region!r} lacks")
    shapes = shapes.loc[slide.obs[keys["instance_key"]]]
    centres = np.stack([shapes.geometry.centroid.x, shapes.geometry.centroid.y], axis=1)
    scale = 1.0
    if image is None:
        name = _image_beside(data, region)
        if name is not None:
            matrix = _to_pixels(data, region, name)
            centres = centres @ matrix[:2, :2].T + matrix[:2, 2]
            scale = math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
            image = store / "images" / name
        elif require_image:
            raise DataError(
                f"{store} has no RGB image in a coordinate system with {region!r}: "
                "give --image (image= in Python, or require_image=False for counts alone)"
            )

    slide.X = scipy.sparse.csr_matrix(raw_counts(slide, store), dtype=np.float32)
    slide.obsm["spatial"] = centres.astype(np.float64)
    facts = slide.uns.get("hinge", {})
    facts = facts if isinstance(facts, dict) else {}
    pitch_px = pitch_in_px(slide.obsm["spatial"])
    pitch_um, diameter_um = positive_length(facts, "spot_pitch_um"), positive_length(facts, "spot_diameter_um")
    bins = re.search(r"square_(\d{3})um", region)
    on_array = {"array_row", "array_col"} <= set(slide.obs)
    if bins:
        pitch_um = diameter_um = float(bins[1])
    elif on_array and math.isnan(pitch_um):
        pitch_um, diameter_um = SPOT_PITCH_UM, SPOT_DIAMETER_UM
    if um_per_px is None:
        if on_array and not bins and pitch_um == SPOT_PITCH_UM:
            array = slide.obs[["array_row", "array_col"]].to_numpy(np.float64)
            um_per_px = um_per_px_of_array(array, slide.obsm["spatial"])
        else:
            um_per_px = pitch_um / pitch_px
        if math.isnan(um_per_px) and require_image:
            raise DataError(
                f"{store} does not contain the resolution: give --um-per-px, µm per pixel of its image (um_per_px= in "
                "Python)"
            )
    if math.isnan(diameter_um) and "radius" in shapes:
        diameter_um = 2 * float(shapes["radius"].median()) * scale * um_per_px
    del slide.uns["spatialdata_attrs"]
    return describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=pitch_px * um_per_px if math.isnan(pitch_um) else pitch_um,
        spot_diameter_um=diameter_um,
        source_format="spatialdata",
    )


def _stores(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    if _is_store(path):
        return [path]
    return sorted(folder for folder in path.glob("[!.]*.zarr") if _is_store(folder))


def _is_store(path: Path) -> bool:
    return (path / "tables").is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def _samples(path: Path) -> dict[str, tuple[Path, str, str]]:
    """Return store, table and region by sample."""
    found = {}
    for store in _stores(path):
        annotated = []
        for table in sorted(folder.name for folder in (store / "tables").glob("[!.]*/")):
            try:
                group = zarr.open_group(store / "tables" / table, mode="r")["uns/spatialdata_attrs"]
                check_zarr(group, store / "tables" / table / "uns" / "spatialdata_attrs")
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

    systems = set(get_transformation(data.shapes[region], get_all=True))
    sizes = {}
    for name, element in data.images.items():
        array = next(iter(element["scale0"].values())) if hasattr(element, "children") else element
        shape = dict(zip(get_axes_names(element), array.shape, strict=True))
        is_rgb = array.dtype == np.uint8 and shape.get("c") in (3, 4) and "z" not in shape
        if is_rgb and systems & set(get_transformation(element, get_all=True)):
            sizes[name] = shape["x"] * shape["y"]
    return max(sizes, key=sizes.get) if sizes else None


def _to_pixels(data: Any, region: str, image: str) -> np.ndarray:
    """Return the matrix (3, 3) from a region's own units to an image's pixels."""
    from spatialdata.transformations import get_transformation

    shapes = get_transformation(data.shapes[region], get_all=True)
    pixels = get_transformation(data.images[image], get_all=True)
    system = sorted(set(shapes) & set(pixels))[0]
    there, back = (each[system].to_affine_matrix(("x", "y"), ("x", "y")) for each in (shapes, pixels))
    return np.linalg.inv(back) @ there
