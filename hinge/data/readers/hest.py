"""A local copy of HEST-1k (Jaume et al., NeurIPS 2024), or of some of its samples."""

import math
from pathlib import Path

from anndata import AnnData

from hinge.data.readers.h5ad import image_resolution, open_h5ad
from hinge.data.resolution import choose_resolution, lattice_pitch_px, pitch_in_px, positive_length
from hinge.data.slide import describe_slide
from hinge.utils.errors import DataError
from hinge.utils.files import read_json

LAYOUT = "a folder with st/<sample>.h5ad, wsis/<sample>.tif and metadata/<sample>.json"


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return path.is_dir() and (path / "st").is_dir() and any((path / part).is_dir() for part in ("wsis", "metadata"))


def list_samples(path: Path) -> list[str]:
    """Return the names of the samples with counts."""
    return sorted(file.stem for file in (path / "st").glob("[!.]*.h5ad"))


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read one sample; repeated gene symbols get a suffix from the second on, as in scanpy."""
    slide, notes = open_h5ad(path / "st" / f"{sample}.h5ad")  # its column in_tissue means nothing
    slide.var_names_make_unique()
    file = path / "metadata" / f"{sample}.json"
    facts = read_json(file) if file.is_file() else {}
    if not isinstance(facts, dict):
        raise DataError(f"{file} must hold a JSON object with the sample's metadata")
    if image is None:
        image = path / "wsis" / f"{sample}.tif"
        if not image.is_file():
            if require_image:
                raise DataError(f"there is no image {image}: run hinge download hest, or give --image")
            image = None
    pitch_um = positive_length(facts, "inter_spot_dist")
    known = {
        "option": um_per_px or math.nan,
        "metadata": positive_length(facts, "pixel_size_um_estimated"),
        **image_resolution(image),
        "array": pitch_um / lattice_pitch_px(slide.obsm["spatial"]),
    }
    known, um_per_px, origin = choose_resolution(known)
    if math.isnan(um_per_px) and require_image:
        raise DataError(
            f"neither {file} nor the image contains the resolution: give --um-per-px, µm per full-resolution pixel"
        )
    notes |= {"resolutions": known, "um_per_px_from": origin}
    for key, name in (("species", "species"), ("st_technology", "technology"), ("organ", "organ")):
        if facts.get(key):
            notes[name] = str(facts[key])
    described = describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        # Xenium's cells are pooled into a grid that the metadata do not describe
        spot_pitch_um=pitch_in_px(slide.obsm["spatial"]) * um_per_px if math.isnan(pitch_um) else pitch_um,
        spot_diameter_um=positive_length(facts, "spot_diameter"),
        source_format="hest",
        source=notes,
    )
    patient = facts.get("patient")
    if isinstance(patient, str) and patient.strip():
        # studies number their patients alike
        described.uns["hinge"]["patient"] = f"{facts.get('dataset_title') or 'study'}: {patient.strip()}"
    return described
