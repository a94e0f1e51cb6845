"""The definition of a slide, an AnnData of raw counts with its image, and what makes an AnnData one.

X                    (n, G) CSR float32, raw integer counts; G = 0 for a slide that is an image alone
obs_names            unique barcodes, var_names unique gene symbols
obsm["spatial"]      (n, 2) float64, x and y in full-resolution pixels
uns["spatial"][name] images and scalefactors as scanpy and squidpy write them (slides with an image)
uns["hinge"]         name, image_path (absolute; slides with an image), um_per_px, spot_pitch_um,
                     spot_diameter_um, source_format; unknown lengths are NaN; source, what the reader found out:
                     resolutions (µm per px by where it is told), um_per_px_from, counts (where they lie), left_out
                     (spots and genes, by reason), and what else `hinge.data.checks` compares
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from anndata import AnnData
from PIL import Image

from hinge.data.slide_image import SlideImage
from hinge.utils.errors import DataError

HIRES_PX, LOWRES_PX = 2000, 600
LARGEST_COUNT = 2**31 - 1
"""Of a gene in a spot; what is larger is no count of molecules, and overflows in sums."""


def patient_of_slide(slide: AnnData) -> str | None:
    """Return the patient of a slide: of its table, or that `obs["patient"]` names for all spots; None: not known."""
    if patient := slide.uns["hinge"].get("patient"):
        return str(patient)
    if "patient" not in slide.obs:
        return None
    names = slide.obs["patient"].dropna().astype(str).unique()
    return names[0] if len(names) == 1 else None


def slide_name(slide: AnnData) -> str:
    """Return the name of a slide.

    Raises
    ------
    DataError
        The AnnData has no name and is not a slide.
    """
    try:
        return str(slide.uns["hinge"]["name"])
    except (KeyError, TypeError, IndexError) as error:
        raise DataError("this AnnData is not a slide: it has no uns['hinge']['name']; use read_slide") from error


def describe_slide(
    slide: AnnData,
    name: str,
    *,
    image_path: Path | None,
    um_per_px: float,
    spot_pitch_um: float,
    spot_diameter_um: float,
    source_format: str,
    source: dict[str, Any] | None = None,
) -> AnnData:
    """Write the metadata and thumbnails of a slide to `slide.uns`.

    Parameters
    ----------
    slide
        Counts and `obsm["spatial"]`; changed in place.
    name
        The slide's name.
    image_path
        Full-resolution image; None for a slide without an image.
    um_per_px, spot_pitch_um, spot_diameter_um
        Lengths in µm; NaN where unknown.
    source_format
        Name of the reader.
    source
        What the reader found out beside that, for the checks.

    Returns
    -------
    AnnData
        `slide`.

    Raises
    ------
    DataError
        If the image is missing or damaged.
    """
    slide.uns["hinge"] = {
        "name": name,
        "um_per_px": float(um_per_px),
        "spot_pitch_um": float(spot_pitch_um),
        "spot_diameter_um": float(spot_diameter_um),
        "source_format": source_format,
        "source": source or {},
    }
    slide.uns.pop("spatial", None)
    if image_path is None:
        return slide
    image_path = Path(image_path).absolute()
    slide.uns["hinge"]["image_path"] = str(image_path)
    with SlideImage(image_path) as image:
        width = image.dimensions[0]
        hires = image.thumbnail(HIRES_PX)
    small = Image.fromarray(hires)
    small.thumbnail((LOWRES_PX, LOWRES_PX))
    lowres = np.asarray(small)
    # scanpy plots spots with this diameter; half the pitch, where it is unknown, keeps them apart
    drawn_um = spot_diameter_um if math.isfinite(spot_diameter_um) else spot_pitch_um / 2
    slide.uns["spatial"] = {
        name: {
            "images": {"hires": hires, "lowres": lowres},
            "scalefactors": {
                "tissue_hires_scalef": hires.shape[1] / width,
                "tissue_lowres_scalef": lowres.shape[1] / width,
                "spot_diameter_fullres": drawn_um / um_per_px,
            },
        }
    }
    return slide


def require_slide(slide: AnnData, require_image: bool = True, require_counts: bool = True) -> None:
    """Require that an AnnData is a slide; `hinge.data.checks.check_slide` finds what else may be wrong with it.

    Parameters
    ----------
    slide
        Slide as a reader returns it.
    require_image
        Whether a slide without an image or without a resolution raises an error.
    require_counts
        Whether a slide that is an image without counts raises an error.

    Raises
    ------
    DataError
        The slide is not valid; the message names the slide, the fault, and the first spot or gene that has it.
    """
    name = slide_name(slide)
    if slide.n_obs == 0:
        raise DataError(f"slide {name} has no spots")
    if slide.n_vars == 0 and slide.uns["hinge"].get("source_format") == "image":
        if require_counts:
            raise DataError(
                f"slide {name} is an image without counts: training and evaluation need counts, hinge sample does not"
            )
    elif slide.n_vars == 0:
        raise DataError(f"slide {name} has no genes")
    for what, index in (("barcode", slide.obs_names), ("gene", slide.var_names)):
        repeated = index[index.duplicated()]
        if len(repeated):
            raise DataError(
                f"slide {name} has {what} {repeated[0]} more than once"
                f"{f' (and {repeated.nunique() - 1} others)' if repeated.nunique() > 1 else ''}: "
                f"every {what} must be unique"
            )
    _check_counts(slide, name)
    _check_coordinates(slide, name)
    if require_image:
        _check_image(slide, name)


def validate_slide(slide: AnnData, require_image: bool = True, require_counts: bool = True) -> None:
    """Deprecated: use `check_slide`, which returns findings."""
    warnings.warn("validate_slide is deprecated; use check_slide", DeprecationWarning, stacklevel=2)
    require_slide(slide, require_image, require_counts)


def _check_counts(slide: AnnData, name: str) -> None:
    counts = slide.X
    if counts is None:
        raise DataError(f"slide {name} has no counts in X")
    values = counts.data if scipy.sparse.issparse(counts) else np.asarray(counts)
    if values.dtype.kind not in "iufb":
        raise DataError(f"slide {name} has counts of type {values.dtype}, not numbers")
    for wrong, what in (
        (~np.isfinite(values), "is not a finite number"),
        (values < 0, "is below 0"),
        (values > LARGEST_COUNT, f"is larger than {LARGEST_COUNT:,}, and raw counts are needed"),
        (values != np.round(values), "is not an integer, and raw counts are needed"),
    ):
        if not wrong.any():
            continue
        if scipy.sparse.issparse(counts):
            entries = counts.tocoo()
            first = int(np.flatnonzero(wrong)[0])
            spot, gene, value = entries.row[first], entries.col[first], entries.data[first]
        else:
            spot, gene = np.argwhere(wrong)[0]
            value = values[spot, gene]
        raise DataError(
            f"slide {name}, spot {slide.obs_names[spot]}, gene {slide.var_names[gene]}: "
            f"count {value:g} {what} ({int(wrong.sum())} such counts)"
        )


def _check_coordinates(slide: AnnData, name: str) -> None:
    coordinates = slide.obsm.get("spatial")
    if coordinates is None:
        raise DataError(f"slide {name} has no spot coordinates in obsm['spatial']")
    coordinates = np.asarray(coordinates)
    if coordinates.shape != (slide.n_obs, 2) or coordinates.dtype.kind not in "iuf":
        raise DataError(
            f"slide {name} needs numbers of shape ({slide.n_obs}, 2), pixel x and y, in obsm['spatial'], "
            f"not {coordinates.dtype} {coordinates.shape}"
        )
    wrong = ~np.isfinite(coordinates).all(axis=1)
    if wrong.any():
        raise DataError(
            f"slide {name}, spot {slide.obs_names[wrong][0]}: its coordinates are not finite numbers "
            f"({int(wrong.sum())} such spots)"
        )


def _check_image(slide: AnnData, name: str) -> None:
    facts: dict[str, Any] = slide.uns["hinge"]
    if not facts.get("image_path"):
        raise DataError(f"slide {name} has no image: give one with --image")
    um_per_px = facts.get("um_per_px", math.nan)
    if not (math.isfinite(um_per_px) and um_per_px > 0):
        raise DataError(f"slide {name} has {um_per_px} µm per pixel, and a positive number is needed: give --um-per-px")


def spots_outside(slide: AnnData) -> np.ndarray:
    """Return which spots lie outside the slide's image, bool (n,); none does where there is no image."""
    path = slide.uns["hinge"].get("image_path")
    if not path:
        return np.zeros(slide.n_obs, dtype=bool)
    with SlideImage(path) as image:
        width, height = image.dimensions
    x, y = np.asarray(slide.obsm["spatial"]).T
    return (x < 0) | (y < 0) | (x > width) | (y > height)
