"""Cells of imaging platforms with an H&E image of the same section: Xenium bundles, and CosMx flat files.

The H&E image is registered by a 3 x 3 matrix in a CSV file, which maps its pixels to those of the platform's
morphology image: Xenium Explorer exports `<image>_imagealignment.csv`. Cells become the spots of a slide;
`hinge.data.pseudo_spots` pools them.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData

from hinge.data.readers.h5ad import image_resolution
from hinge.data.readers.tenx import find_file, open_text, read_10x
from hinge.data.resolution import choose_resolution, pitch_in_px
from hinge.data.slide import describe_slide
from hinge.data.slide_image import image_name
from hinge.utils.errors import DataError, HingeError, one_line
from hinge.utils.packages import require
from hinge.utils.safe_hdf5 import check_size

LAYOUT = (
    "a Xenium bundle (experiment.xenium, cell_feature_matrix.h5, cells.parquet) or CosMx flat files "
    "(<run>_exprMat_file.csv, <run>_metadata_file.csv), with the H&E image and its alignment matrix beside them"
)
_XENIUM_UM, _COSMX_UM = 0.2125, 0.12028  # µm per pixel of the morphology images, where the files do not say
_EXPRESSION, _METADATA = "exprMat_file.csv", "metadata_file.csv"


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return path.is_dir() and bool(_samples(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the bundles or runs."""
    return sorted(_samples(path))


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read the cells of one bundle at their centroids in pixels of the H&E image; control probes are left out later."""
    folder = _samples(path)[sample]
    xenium = (folder / "experiment.xenium").is_file()
    slide, centres_px, areas_um2, step_um = _read_xenium(folder) if xenium else _read_cosmx(folder, sample)
    image = image or _find_image(folder, require_image)
    if image is not None and not require_image and _alignment_of(folder, image) is None:
        image = None
    notes: dict[str, Any] = {"objects": "cells", "technology": "Xenium" if xenium else "CosMx"}
    known: dict[str, float] = {"option": um_per_px or math.nan}
    if image is not None:
        matrix = _read_alignment(folder, image)
        centres_px = (np.c_[centres_px, np.ones(len(centres_px))] @ np.linalg.inv(matrix).T)[:, :2]
        known["alignment"] = step_um * math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        known |= image_resolution(image)
    else:
        known["metadata"] = step_um
    known, chosen, origin = choose_resolution(known)
    slide.obsm["spatial"] = centres_px
    diameter_um = float(np.median(2 * np.sqrt(areas_um2 / math.pi))) if len(areas_um2) else math.nan
    return describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=chosen,
        spot_pitch_um=pitch_in_px(centres_px) * chosen,
        spot_diameter_um=diameter_um,
        source_format="xenium" if xenium else "cosmx",
        source={**notes, "resolutions": known, "um_per_px_from": origin},
    )


def _samples(path: Path) -> dict[str, Path]:
    folders = [path] if _is_bundle(path) else [folder for folder in sorted(path.glob("[!.]*/")) if _is_bundle(folder)]
    return {folder.absolute().name: folder for folder in folders}


def _is_bundle(folder: Path) -> bool:
    if (folder / "experiment.xenium").is_file():
        return True
    return _with_ending(folder, _EXPRESSION) is not None and _with_ending(folder, _METADATA) is not None


def _with_ending(folder: Path, name: str) -> Path | None:
    return next((file for ending in ("", ".gz") for file in sorted(folder.glob(f"[!.]*{name}{ending}"))), None)


def _read_xenium(folder: Path) -> tuple[AnnData, np.ndarray, np.ndarray, float]:
    """Return counts, centroids in pixels of the morphology image (n, 2), areas in µm² (n,) and µm per pixel."""
    try:
        step_um = float(json.loads((folder / "experiment.xenium").read_text()).get("pixel_size", _XENIUM_UM))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'experiment.xenium'} is not readable: {one_line(error)}") from error
    matrix = folder / "cell_feature_matrix.h5"
    matrix = matrix if matrix.is_file() else folder / "cell_feature_matrix"
    if not matrix.exists():
        raise DataError(f"{folder} has no counts of cells: cell_feature_matrix.h5 is missing")
    slide = read_10x(matrix)
    cells = _read_cells(folder, ["cell_id", "x_centroid", "y_centroid", "cell_area"])
    slide, cells = _matched(slide, cells, folder)
    places = cells[["x_centroid", "y_centroid"]].to_numpy(np.float64) / step_um
    areas = cells["cell_area"].to_numpy(np.float64) if "cell_area" in cells else np.array([])
    return slide, places, areas, step_um


def _read_cells(folder: Path, columns: list[str]) -> pd.DataFrame:
    file = folder / "cells.parquet"
    try:
        if file.is_file():
            facts = require("pyarrow.parquet", "visium-hd", f"reading {file}").read_metadata(file)
            check_size(file, file.stat().st_size, 8 * facts.num_rows * facts.num_columns)
            cells = pd.read_parquet(file)
        elif found := find_file(folder, "", "cells.csv"):
            file = found
            with open_text(file) as lines:
                cells = pd.read_csv(lines)
        else:
            raise DataError(f"{folder} has no positions of cells: cells.parquet or cells.csv.gz is missing")
    except HingeError:
        raise
    except Exception as error:  # pandas and pyarrow raise a dozen kinds
        raise DataError(f"{file} is not a readable table of cells: {one_line(error)}") from error
    for column in columns[:3]:
        if column not in cells:
            raise DataError(f"{file} has no column {column}; it needs {', '.join(columns[:3])}")
    ids = cells["cell_id"]
    cells.index = pd.Index([each.decode() if isinstance(each, bytes) else str(each) for each in ids])
    return cells


def _read_cosmx(folder: Path, sample: str) -> tuple[AnnData, np.ndarray, np.ndarray, float]:
    """Return counts, centroids in global pixels (n, 2), areas in µm² (n,) and µm per pixel."""
    tables = []
    for name in (_EXPRESSION, _METADATA):
        file = _with_ending(folder, name)
        assert file is not None
        try:
            with open_text(file) as lines:
                table = pd.read_csv(lines)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{file} is not a readable table of {sample}: {one_line(error)}") from error
        if not {"fov", "cell_ID"} <= set(table):
            raise DataError(f"{file} has no columns fov and cell_ID, which name the cells")
        table = table[table["cell_ID"] != 0]  # what lies outside cells
        table.index = pd.Index(table["fov"].astype(str) + "_" + table["cell_ID"].astype(str))
        tables.append(table)
    counts, cells = tables
    genes = [column for column in counts if column not in ("fov", "cell_ID", "cell")]
    if not {"CenterX_global_px", "CenterY_global_px"} <= set(cells):
        raise DataError(f"{folder} has no columns CenterX_global_px and CenterY_global_px in its {_METADATA}")
    slide = AnnData(
        X=scipy.sparse.csr_matrix(counts[genes].to_numpy(np.float32)),
        obs=pd.DataFrame(index=counts.index),
        var=pd.DataFrame(index=pd.Index(genes)),
    )
    slide, cells = _matched(slide, cells, folder)
    areas = cells["Area"].to_numpy(np.float64) * _COSMX_UM**2 if "Area" in cells else np.array([])
    places = cells[["CenterX_global_px", "CenterY_global_px"]].to_numpy(np.float64)
    return slide, places, areas, _COSMX_UM


def _matched(slide: AnnData, cells: pd.DataFrame, folder: Path) -> tuple[AnnData, pd.DataFrame]:
    """Return counts and positions of the cells that have both."""
    if cells.index.has_duplicates:
        raise DataError(f"{folder} has the cell {cells.index[cells.index.duplicated()][0]} more than once")
    shared = slide.obs_names.intersection(cells.index, sort=False)
    if not len(shared):
        raise DataError(f"{folder}: counts and positions share no cell; they belong to different samples")
    slide = slide[shared].copy()
    slide.var_names_make_unique()
    return slide, cells.loc[shared]


def _find_image(folder: Path, require_image: bool) -> Path | None:
    """Return the H&E image in the folder: the one with an alignment matrix of its name, or the only one."""
    images = [file for file in sorted(folder.glob("[!.]*")) if file.is_file() and image_name(file)]
    images = [file for file in images if not file.name.startswith("morphology")]
    aligned = [file for file in images if _alignment_of(folder, file)]
    chosen = aligned if len(aligned) == 1 else images
    if len(chosen) == 1:
        return chosen[0]
    if require_image:
        raise DataError(f"{folder} has {len(chosen)} H&E images, not one: give the image with --image")
    return None


def _alignment_of(folder: Path, image: Path) -> Path | None:
    """Return the alignment matrix of an image: the file named after it, or the only one."""
    found = {file for place in (image.parent, folder) for file in place.glob("[!.]*alignment*.csv")}
    named = sorted(file for file in found if file.name.startswith(image_name(image)))
    return (named or sorted(found) if len(named or found) == 1 else [None])[0]


def _read_alignment(folder: Path, image: Path) -> np.ndarray:
    """Return the matrix (3, 3) from pixels of the H&E image to those of the morphology image."""
    file = _alignment_of(folder, image)
    if file is None:
        raise DataError(
            f"{image} needs the matrix that aligns it with the cells: export {image_name(image)}_imagealignment.csv "
            "from Xenium Explorer and put it beside the image"
        )
    try:
        matrix = pd.read_csv(file, header=None).to_numpy(np.float64)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
            raise ValueError(f"shape {matrix.shape}, or it cannot be inverted")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no alignment matrix of 3 x 3 numbers: {one_line(error)}") from error
    return matrix
