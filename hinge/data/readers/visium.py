"""Space Ranger's output folders: Visium, and each bin size of Visium HD as a sample of its own."""

import json
import logging
import math
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData
from scipy.spatial.distance import pdist

from hinge.data.slide import describe_slide
from hinge.data.slide_image import IMAGE_SUFFIXES, SlideImage, image_name
from hinge.utils.errors import DataError, HingeError, one_line
from hinge.utils.packages import require
from hinge.utils.safe_hdf5 import check_gzip, check_hdf5, check_size

LAYOUT = (
    "Space Ranger's outs folder, or a folder of such, with filtered_feature_bc_matrix.h5 and spatial/ (Visium) or "
    "binned_outputs/square_008um/ and similar (Visium HD), and the full-resolution image beside them"
)
SPOT_PITCH_UM, SPOT_DIAMETER_UM = 100.0, 55.0
# array_row and array_col of a hexagonal array count half rows: one step is √3/2 pitches down, half a pitch right
_STEP_UM = np.array([SPOT_PITCH_UM * math.sqrt(3) / 2, SPOT_PITCH_UM / 2])
# Space Ranger's spot_diameter_fullres is that of a 65 µm circle
_SCALEFACTOR_DIAMETER_UM = 65.0

_MATRIX = "filtered_feature_bc_matrix"
_POSITION_FILES = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_MOST_PAIRED = 3000  # spots among which all pairs are measured
_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return path.is_dir() and bool(_samples(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the samples, `<sample>_square_008um` and similar for the bin sizes of Visium HD."""
    return sorted(_samples(path))


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read the spots under tissue; without the full-resolution image, Space Ranger's own thumbnails are kept."""
    folder = _samples(path)[sample]
    slide = _read_counts(folder)
    positions = _read_positions(folder / "spatial")
    shared = slide.obs_names.intersection(positions.index, sort=False)
    if not len(shared):
        raise DataError(f"{folder}: the counts and spatial/ share no barcode; they belong to different samples")
    positions = positions.loc[shared]
    positions = positions[positions["in_tissue"] == 1]
    if positions.empty:
        raise DataError(f"slide {sample} has no spots: {folder / 'spatial'} marks none with counts as in_tissue")
    if len(positions) < slide.n_obs:
        _logger.info("%s: left out %d barcodes that are not on tissue", sample, slide.n_obs - len(positions))
    slide = slide[positions.index].copy()
    slide.obs[["array_row", "array_col"]] = positions[["array_row", "array_col"]]
    slide.obsm["spatial"] = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)

    scales = _read_scalefactors(folder / "spatial")
    bin_um = scales.get("bin_size_um")
    pitch_um, diameter_um = (bin_um, bin_um) if bin_um else (SPOT_PITCH_UM, SPOT_DIAMETER_UM)
    if um_per_px is None:
        um_per_px = scales.get("microns_per_pixel")
    if um_per_px is None:
        array = positions[["array_row", "array_col"]].to_numpy(np.float64)
        um_per_px = um_per_px_of_array(array, slide.obsm["spatial"])
    if math.isnan(um_per_px):
        um_per_px = _SCALEFACTOR_DIAMETER_UM / scales.get("spot_diameter_fullres", math.nan)
    image = image or _find_image(folder, sample, require_image)
    if image is not None:
        _check_image(image, folder, scales)
    describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=pitch_um,
        spot_diameter_um=diameter_um,
        source_format="visium_hd" if bin_um else "visium",
    )
    if image is None:
        _add_thumbnails(slide, sample, folder / "spatial", scales, diameter_um / um_per_px)
    return slide


def _samples(path: Path) -> dict[str, Path]:
    """Return the folder with counts and spatial/ of each sample: in an outs folder, its parent, or a folder of such."""
    here = _outs(path)
    if here:
        return here
    found: dict[str, Path] = {}
    for folder in sorted(path.glob("[!.]*/")):
        for name, outs in _outs(folder).items():
            found[name] = outs
    return found


def _outs(path: Path) -> dict[str, Path]:
    outs = path / "outs" if (path / "outs").is_dir() else path
    path = outs.absolute()
    name = path.parent.name if path.name in ("outs", "binned_outputs") else path.name
    if name == "outs":
        name = path.parent.parent.name
    bins = outs if outs.name == "binned_outputs" else outs / "binned_outputs"
    if bins.is_dir():
        return {f"{name}_{folder.name}": folder for folder in sorted(bins.glob("square_*/"))}
    matrix = _matrix(outs) is not None
    # counts or spatial/ alone suffice to recognise the format; reading reports the missing part
    if (outs / "spatial").is_dir() and (matrix or _positions_file(outs / "spatial")):
        return {name: outs}
    if matrix and not any(outs.glob("*.h5ad")):
        return {name: outs}
    return {}


def _matrix(folder: Path) -> Path | None:
    """Return the filtered counts: h5 (10x's web site adds the sample's name as prefix) or a folder of matrix.mtx.gz."""
    files = sorted(folder.glob(f"*{_MATRIX}.h5"))
    if files:
        return files[0]
    return folder / _MATRIX if (folder / _MATRIX).is_dir() else None


def _read_counts(folder: Path) -> AnnData:
    """Return the counts of genes, CSR; repeated gene symbols get a suffix from the second on, as in scanpy."""
    matrix = _matrix(folder)
    if matrix is None:
        raise DataError(f"{folder} has no counts: {_MATRIX}.h5 is missing")
    if matrix.is_file():
        check_hdf5(matrix, "readable as Space Ranger's counts")
    else:
        for file in sorted(matrix.glob("*.gz")):
            check_gzip(file)
    import scanpy as sc  # takes seconds

    try:
        with warnings.catch_warnings():  # on repeated symbols, which are made unique below
            warnings.filterwarnings("ignore", "Variable names are not unique")
            if matrix.is_file():
                _check_indices(matrix)
            slide = sc.read_10x_h5(matrix) if matrix.is_file() else sc.read_10x_mtx(matrix, make_unique=False)
    except Exception as error:  # a damaged HDF5 file ends in almost any exception
        raise DataError(f"{matrix} is not readable as Space Ranger's counts: {error}") from error
    if not slide.obs_names.is_unique:
        twice = slide.obs_names[slide.obs_names.duplicated()][0]
        raise DataError(f"{matrix} has the barcode {twice!r} more than once")
    slide.var.index.name = None
    slide.var["symbol"] = slide.var_names
    slide.var_names_make_unique()
    slide.X = slide.X.tocsr().astype(np.float32)
    return slide


def _check_indices(file: Path) -> None:
    """Check that the indices are within the matrix: scanpy truncates it without a check."""
    with h5py.File(file) as content:
        for group in content.values():
            if isinstance(group, h5py.Group) and {"data", "indices", "indptr", "shape"} <= set(group):
                parts = tuple(group[name][:] for name in ("data", "indices", "indptr"))
                scipy.sparse.csc_matrix(parts, shape=tuple(group["shape"][:])).check_format(full_check=True)


def _positions_file(spatial: Path) -> Path | None:
    return next((spatial / name for name in _POSITION_FILES if (spatial / name).is_file()), None)


def _read_positions(spatial: Path) -> pd.DataFrame:
    """Return array and pixel coordinates by barcode."""
    file = _positions_file(spatial)
    if file is None:
        raise DataError(f"{spatial} has no spot positions: one of {', '.join(_POSITION_FILES)} is needed")
    try:
        if file.suffix == ".parquet":
            facts = require("pyarrow.parquet", "visium-hd", f"reading {file}").read_metadata(file)
            check_size(file, file.stat().st_size, 8 * facts.num_rows * facts.num_columns)
            positions = pd.read_parquet(file)
        else:
            # Space Ranger 1 wrote no header, Space Ranger 2 does, and files are renamed
            with open(file) as lines:
                header = lines.readline().startswith("barcode")
            positions = pd.read_csv(file, header=0 if header else None, names=None if header else _POSITION_COLUMNS)
    except HingeError:
        raise
    except Exception as error:  # pandas and pyarrow raise a dozen kinds
        raise DataError(f"{file} is not a readable table of spot positions: {one_line(error)}") from error
    for column in _POSITION_COLUMNS:
        if column not in positions:
            raise DataError(f"{file} has no column {column}; it needs {', '.join(_POSITION_COLUMNS)}")
        if column != "barcode" and positions[column].dtype.kind not in "iuf":
            raise DataError(f"{file} has values in column {column} that are not numbers")
    positions.index = pd.Index(positions["barcode"].astype(str), name=None)
    if positions.index.has_duplicates:
        raise DataError(f"{file} has barcode {positions.index[positions.index.duplicated()][0]} more than once")
    return positions


def _read_scalefactors(spatial: Path) -> dict[str, float]:
    file = spatial / "scalefactors_json.json"
    if not file.is_file():
        raise DataError(f"{spatial} has no scalefactors_json.json, which holds the scale of its images")
    try:
        return {key: float(value) for key, value in json.loads(file.read_text()).items() if value is not None}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{file} is not a readable table of scale factors: {error}") from error


def um_per_px_of_array(array: np.ndarray, pixels: np.ndarray) -> float:
    """Return microns per pixel by a hexagonal array's geometry: the median over all pairs of spots; NaN for one spot.

    Parameters
    ----------
    array
        Array row and column, float (n, 2).
    pixels
        Full-resolution pixel coordinates, float (n, 2).
    """
    step = math.ceil(len(array) / _MOST_PAIRED)
    apart_um, apart_px = pdist(array[::step] * _STEP_UM), pdist(pixels[::step])
    apart = (apart_um > 0) & (apart_px > 0)
    return float(np.median(apart_um[apart] / apart_px[apart])) if apart.any() else math.nan


def _find_image(folder: Path, sample: str, require_image: bool) -> Path | None:
    """Return the only whole-slide image in the folder, or in one above it up to the sample's own."""
    places = [folder]
    while places[-1].name in ("outs", "binned_outputs") or places[-1].name.startswith("square_"):
        places.append(places[-1].parent)
    for place in places:
        files = sorted(file for file in place.glob("[!.]*") if file.is_file() and image_name(file))
        if len(files) == 1:
            return files[0]
        if files and require_image:
            raise DataError(f"{place} has {len(files)} images, not one: give the image with --image (image= in Python)")
    if require_image:
        raise DataError(
            f"{sample} has no full-resolution image in {places[-1]} ({', '.join(IMAGE_SUFFIXES[:3])}, .tif, ...): give "
            "the input image of Space Ranger with --image (image= in Python, or require_image=False for counts alone)"
        )
    return None


def _check_image(image: Path, folder: Path, scales: dict[str, float]) -> None:
    """Check by its size that an image is the one Space Ranger was run on."""
    thumbnail, scale = folder / "spatial" / "tissue_hires_image.png", scales.get("tissue_hires_scalef")
    if not scale or not thumbnail.is_file():
        return
    with SlideImage(image) as opened, SlideImage(thumbnail) as small:
        size, expected = opened.dimensions, tuple(side / scale for side in small.dimensions)
    # each side of the thumbnail was rounded to a whole pixel
    if any(abs(one - other) > 1.5 / scale for one, other in zip(size, expected, strict=True)):
        raise DataError(
            f"{image} has {size[0]} x {size[1]} pixels, and Space Ranger was run on an image of about "
            f"{expected[0]:.0f} x {expected[1]:.0f}: give that image with --image (image= in Python)"
        )


def _add_thumbnails(slide: AnnData, name: str, spatial: Path, scales: dict[str, float], diameter_px: float) -> None:
    images = {}
    for size in ("hires", "lowres"):
        file = spatial / f"tissue_{size}_image.png"
        if not file.is_file() or f"tissue_{size}_scalef" not in scales:
            continue
        with SlideImage(file) as picture:
            images[size] = picture.read_pixels(0, 0, *picture.dimensions)
    if images:
        kept = {f"tissue_{size}_scalef": scales[f"tissue_{size}_scalef"] for size in images}
        slide.uns["spatial"] = {
            name: {"images": images, "scalefactors": {**kept, "spot_diameter_fullres": diameter_px}}
        }
