"""Space Ranger's output folders: Visium, and each bin size and the cells of Visium HD as samples of their own."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from hinge.data.readers.h5ad import image_resolution
from hinge.data.readers.positions import read_positions
from hinge.data.readers.segmented_cells import read_cells
from hinge.data.readers.space_ranger import POSITION_FILES, SampleFiles, find_samples, slide_images
from hinge.data.readers.tenx import open_text, read_10x
from hinge.data.resolution import choose_resolution, fit_array, um_per_px_of_array
from hinge.data.slide import describe_slide
from hinge.data.slide_image import IMAGE_SUFFIXES
from hinge.data.thumbnails import read_thumbnail
from hinge.utils.errors import DataError
from hinge.utils.notices import tell_once

LAYOUT = (
    "Space Ranger's outs folder, or a folder of such, with filtered_feature_bc_matrix.h5 and spatial/ (Visium), "
    "binned_outputs/square_008um/ and similar or segmented_outputs/ (Visium HD), and the full-resolution image beside "
    "them"
)
SPOT_PITCH_UM, SPOT_DIAMETER_UM = 100.0, 55.0
# Space Ranger's spot_diameter_fullres is that of a 65 µm circle
_SCALEFACTOR_DIAMETER_UM = 65.0
_PACKED_IMAGES = tuple(f"{suffix}.gz" for suffix in (".tif", ".tiff", ".svs", ".ndpi", ".jpg", ".jpeg"))
_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return path.is_dir() and bool(find_samples(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the samples: `<sample>_square_008um` and similar for bins, `<sample>_segmented` for cells."""
    return sorted(find_samples(path))


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read the spots under tissue; without the full-resolution image, Space Ranger's own thumbnails are kept."""
    files = find_samples(path)[sample]
    slide, notes = _read_counts(files)
    scales = _read_scalefactors(files)
    if files.cells is not None:
        slide = read_cells(slide, files.cells, notes)
    else:
        slide = _place_spots(slide, files, sample, notes)
    bin_um = scales.get("bin_size_um", math.nan)
    image = image or _find_image(files, sample, require_image)
    known = {
        "option": um_per_px or math.nan,
        "metadata": scales.get("microns_per_pixel", math.nan),
        "array": math.nan if files.cells else _um_per_px_of_spots(slide, bin_um),
        **image_resolution(image),
    }
    known, um_per_px, origin = choose_resolution(known)
    if math.isnan(um_per_px) or origin == "tag":
        by_diameter = _SCALEFACTOR_DIAMETER_UM / scales.get("spot_diameter_fullres", math.nan)
        if math.isfinite(by_diameter) and not files.cells:
            um_per_px, origin = by_diameter, "scalefactors"
    pitch_um, diameter_um = (bin_um, bin_um) if math.isfinite(bin_um) else (SPOT_PITCH_UM, SPOT_DIAMETER_UM)
    if files.cells is not None:
        pitch_um, diameter_um = (notes.pop(key) * um_per_px for key in ("pitch_px", "diameter_px"))
    notes |= {"resolutions": known, "um_per_px_from": origin}
    hires, scale = files.beside("tissue_hires_image.png"), scales.get("tissue_hires_scalef", math.nan)
    if hires is not None and math.isfinite(scale):
        notes |= {"reference_image": str(hires.absolute()), "reference_scale": scale}
    describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=pitch_um,
        spot_diameter_um=diameter_um,
        source_format="visium" if math.isnan(bin_um) and files.cells is None else "visium_hd",
        source=notes,
    )
    if image is None:
        _add_thumbnails(slide, sample, files, scales, diameter_um / um_per_px)
    return slide


def _read_counts(files: SampleFiles) -> tuple[AnnData, dict[str, Any]]:
    """Return the counts of genes; repeated gene symbols get a suffix from the second on, as in scanpy."""
    if files.matrix is None:
        raise DataError(f"{files.folder} has no counts: filtered_feature_bc_matrix.h5 is missing")
    inside = files.matrix == files.folder
    slide = read_10x(files.matrix, files.prefix if inside else "")
    notes: dict[str, Any] = {"counts": files.matrix.name}
    suffixes = sorted(set(slide.obs_names.str.extract(r"-(\d+)$", expand=False).dropna()), key=int)
    if len(suffixes) > 1:
        notes["suffixes"] = suffixes
    if "feature_types" in slide.var:
        genes = (slide.var["feature_types"] == "Gene Expression").to_numpy()
        if genes.any() and not genes.all():
            notes["left_out"] = {"other_features": int((~genes).sum())}
            slide = slide[:, genes].copy()
    slide.var_names_make_unique()
    return slide, notes


def _place_spots(slide: AnnData, files: SampleFiles, sample: str, notes: dict[str, Any]) -> AnnData:
    """Return the spots on tissue with their positions."""
    file = files.positions
    if file is None:
        raise DataError(
            f"{files.folder / 'spatial'} has no spot positions: one of {', '.join(POSITION_FILES)} is needed"
        )
    positions = read_positions(file)
    shared = slide.obs_names.intersection(positions.index, sort=False)
    if not len(shared):  # one of the tables may lack the number of the sample, -1
        plain = positions.index.str.replace(r"-1$", "", regex=True)
        positions.index = plain if slide.obs_names.isin(plain).any() else plain + "-1"
        shared = slide.obs_names.intersection(positions.index, sort=False)
    if not len(shared):
        raise DataError(f"{files.folder}: the counts and spatial/ share no barcode; they belong to different samples")
    on_tissue = positions.index[positions["in_tissue"] == 1]
    positions = positions.loc[shared]
    positions = positions[positions["in_tissue"] == 1]
    if positions.empty:
        raise DataError(f"slide {sample} has no spots: {file} marks none with counts as in_tissue")
    left_out = slide.n_obs - len(positions)
    if files.filtered:
        notes |= {"barcodes": slide.n_obs, "not_on_tissue": left_out, "without_counts": len(on_tissue) - len(positions)}
    if left_out:
        tell_once(_logger, f"{sample}: left out {left_out} barcodes that are not on tissue")
    if not slide.obs_names.equals(positions.index):
        slide = slide[positions.index].copy()
    slide.obs[["array_row", "array_col"]] = positions[["array_row", "array_col"]]
    slide.obsm["spatial"] = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
    return slide


def _um_per_px_of_spots(slide: AnnData, bin_um: float) -> float:
    array = slide.obs[["array_row", "array_col"]].to_numpy(np.float64)
    if math.isnan(bin_um):
        return um_per_px_of_array(array, slide.obsm["spatial"])
    fit = fit_array(array, slide.obsm["spatial"])
    return bin_um / fit.column_px if fit else math.nan


def _read_scalefactors(files: SampleFiles) -> dict[str, float]:
    file = files.beside("scalefactors_json.json")
    if file is None:
        if files.cells is not None:
            return {}
        raise DataError(
            f"{files.folder / 'spatial'} has no scalefactors_json.json, which holds the scale of its images"
        )
    try:
        with open_text(file) as text:
            content = json.loads(text.read())
        return {key: float(value) for key, value in content.items() if value is not None}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{file} is not a readable table of scale factors: {error}") from error


def _find_image(files: SampleFiles, sample: str, require_image: bool) -> Path | None:
    """Return the only whole-slide image in the folder, or in one above it up to the sample's own."""
    place, images = slide_images(files)
    if len(images) == 1:
        return images[0]
    if not require_image:
        return None
    if images:
        raise DataError(f"{place} has {len(images)} images, not one: give the image with --image")
    packed = [file.name for file in place.glob("[!.]*.gz") if file.name.lower().endswith(_PACKED_IMAGES)]
    if packed:
        raise DataError(f"{place / packed[0]} is compressed: unpack it with gunzip, or give an image with --image")
    raise DataError(
        f"{sample} has no full-resolution image in {place} ({', '.join(IMAGE_SUFFIXES[:3])}, .tif, ...): give the "
        "input image of Space Ranger with --image"
    )


def _add_thumbnails(
    slide: AnnData, name: str, files: SampleFiles, scales: dict[str, float], diameter_px: float
) -> None:
    images = {}
    for size in ("hires", "lowres"):
        file = files.beside(f"tissue_{size}_image.png")
        if file is not None and f"tissue_{size}_scalef" in scales:
            images[size] = read_thumbnail(file)
    if images:
        kept = {f"tissue_{size}_scalef": scales[f"tissue_{size}_scalef"] for size in images}
        slide.uns["spatial"] = {
            name: {"images": images, "scalefactors": {**kept, "spot_diameter_fullres": diameter_px}}
        }
