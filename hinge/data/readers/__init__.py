"""Read slides: one module per source format, and recognition of the format of a path.

The module of a format has `LAYOUT` (a description of its files), `recognises(path)`, `list_samples(path)` and
`read(path, sample, *, image, um_per_px, require_image)`. `FORMATS` lists all formats in the order of recognition.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from anndata import AnnData

from hinge.data.checks import check_slide, tell
from hinge.data.pseudo_spots import pool_cells
from hinge.data.readers import h5ad, her2st, hest, image_only, spatialdata, table, visium, xenium
from hinge.data.readers.gene_names import tidy_genes
from hinge.data.readers.unknown_layout import describe_unknown
from hinge.data.slide import require_slide, spots_outside
from hinge.utils.errors import DataError

MOST_OUTSIDE = 0.2
"""Share of spots outside the image up to which they are left out."""

FORMATS: dict[str, ModuleType] = {
    "her2st": her2st,
    "hest": hest,
    "xenium": xenium,
    "visium": visium,
    "spatialdata": spatialdata,
    "h5ad": h5ad,
    "table": table,
    "image": image_only,
}


def recognise_format(path: str | Path) -> str:
    """Return the name of the format of a file or folder.

    Raises
    ------
    DataError
        The path does not exist, or its format is unknown; the message tells what is there and the nearest format.
    """
    path = _existing(path)
    for name, reader in FORMATS.items():
        if reader.recognises(path):
            return name
    raise DataError(describe_unknown(path, FORMATS))


def list_samples(path: str | Path, format: str | None = None) -> list[str]:
    """Return the sorted names of the slides at a path.

    Parameters
    ----------
    path
        File or folder.
    format
        Name of the format; None to recognise it.
    """
    path = _existing(path)
    return _reader(path, format).list_samples(path)


def require_samples(path: str | Path, names: list[str] | None = None, format: str | None = None) -> list[str]:
    """Return the names of slides at a path, all of them by default.

    Raises
    ------
    DataError
        A name is not that of a slide; the message lists the slides.
    """
    samples = list_samples(path, format)
    for name in names or []:
        if name not in samples:
            raise DataError(f"there is no sample {name!r} in {path}, which has {listed_names(samples)}")
    return names or samples


def listed_names(samples: list[str]) -> str:
    """Return names for a message, at most 40 of them."""
    return (", ".join(samples[:40]) + (", ..." if len(samples) > 40 else "")) or "none"


def read_slide(
    path: str | Path,
    sample: str | None = None,
    *,
    format: str | None = None,
    image: str | Path | None = None,
    um_per_px: float | None = None,
    require_image: bool = True,
    require_counts: bool = True,
    spot_um: float | None = None,
    **grid: float,
) -> AnnData:
    """Read one slide and check it; what the checks find is logged once, and only what is no slide raises an error.

    Parameters
    ----------
    path
        File or folder in one of the `FORMATS`.
    sample
        Name of the slide; None if there is only one.
    format
        Name of the format; None to recognise it.
    image
        Full-resolution image; None for the image at the place that the format defines.
    um_per_px
        Microns per full-resolution pixel; None to take it from the metadata or compute it from the spots.
    require_image
        False also reads slides without an image; their `um_per_px` may be NaN.
    require_counts
        False also reads images without counts: the slide has a grid of spots on the detected tissue and no genes.
    spot_um
        Side of the pseudo-spots in which cells are pooled, µm; None for the cells themselves. Only for cells (Xenium,
        CosMx, segmented Visium HD).
    **grid
        `spot_pitch_um` and `spot_diameter_um` of that grid; ignored for slides with counts.

    Returns
    -------
    AnnData
        A slide as defined in `hinge.data.slide`.

    Raises
    ------
    DataError
        The path, the sample or its image is missing or damaged, or it holds no slide.
    """
    slide = build_slide(
        path,
        sample,
        format=format,
        image=image,
        um_per_px=um_per_px,
        require_image=require_image,
        require_counts=require_counts,
        spot_um=spot_um,
        **grid,
    )
    findings = check_slide(slide)
    if slide.uns["hinge"]["source"].get("outside", 0) > slide.n_obs / 2:
        # other findings on such an image may follow from this one
        first = next((each for each in findings if each.code == "spots-outside"), findings[0])
        raise DataError(f"slide {slide.uns['hinge']['name']}: {first}")
    tell(slide, findings)
    return slide


def build_slide(
    path: str | Path,
    sample: str | None = None,
    *,
    format: str | None = None,
    image: str | Path | None = None,
    um_per_px: float | None = None,
    require_image: bool = True,
    require_counts: bool = True,
    spot_um: float | None = None,
    **grid: float,
) -> AnnData:
    """Read one slide as `read_slide`, without checks beyond what makes it a slide."""
    path = _existing(path)
    reader = _reader(path, format)
    samples = reader.list_samples(path)
    if sample is None and len(samples) == 1:
        sample = samples[0]
    if sample not in samples:
        asked = "no sample was named" if sample is None else f"there is no sample {sample!r}"
        raise DataError(f"{asked} in {path}, which has {listed_names(samples)}")
    if um_per_px is not None and not 0 < um_per_px < float("inf"):
        raise DataError(f"--um-per-px takes a positive number of microns per pixel, not {um_per_px}")
    if reader is image_only and require_counts:
        raise DataError(
            f"{path} is an image without counts: training and evaluation need counts, hinge sample does not"
        )
    slide = reader.read(
        path,
        sample,
        image=None if image is None else Path(image),
        um_per_px=um_per_px,
        require_image=require_image,
        **(grid if reader in (image_only, table) else {}),
    )
    notes = slide.uns["hinge"].setdefault("source", {})
    if slide.n_vars:
        slide = tidy_genes(slide, notes)
    require_slide(slide, require_image=require_image, require_counts=require_counts)
    slide = _without_outside(slide, notes)
    return slide if spot_um is None else pool_cells(slide, spot_um)


def _without_outside(slide: AnnData, notes: dict[str, Any]) -> AnnData:
    """Return a slide without the spots outside its image, if they are few; many mean a wrong image, which is told."""
    outside = spots_outside(slide)
    if not outside.any():
        return slide
    if outside.mean() >= MOST_OUTSIDE:
        notes["outside"] = int(outside.sum())
        return slide
    notes.setdefault("left_out", {})["outside"] = int(outside.sum())
    return slide[~outside].copy()


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    return path


def _reader(path: Path, format: str | None) -> ModuleType:
    if format is None:
        return FORMATS[recognise_format(path)]
    if format not in FORMATS:
        raise DataError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[format]
