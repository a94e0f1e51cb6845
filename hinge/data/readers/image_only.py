"""Whole-slide images without counts, with a grid of spots on their tissue."""

from pathlib import Path

from anndata import AnnData

from hinge.data.slide_image import IMAGE_SUFFIXES, image_name
from hinge.data.tissue_detection import DEFAULT_DIAMETER_UM, DEFAULT_PITCH_UM, slide_from_image
from hinge.utils.errors import DataError

LAYOUT = f"an image without counts, or a folder of them ({', '.join(IMAGE_SUFFIXES)})"


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return bool(_files(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the images without their ending."""
    return sorted({image_name(file) for file in _files(path)})


def read(
    path: Path,
    sample: str,
    *,
    image: Path | None,
    um_per_px: float | None,
    require_image: bool,
    spot_pitch_um: float = DEFAULT_PITCH_UM,
    spot_diameter_um: float = DEFAULT_DIAMETER_UM,
) -> AnnData:
    """Return a slide with a grid of spots on the tissue of one image, and 0 genes."""
    files = [file for file in _files(path) if image_name(file) == sample]
    if len(files) > 1 and image is None:
        raise DataError(f"{path} has {len(files)} images of {sample}, not one: give the image with --image")
    return slide_from_image(image or files[0], um_per_px, spot_pitch_um, spot_diameter_um, name=sample)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.glob("[!.]*") if file.is_file() and image_name(file))
    return [path] if image_name(path) and path.is_file() else []
