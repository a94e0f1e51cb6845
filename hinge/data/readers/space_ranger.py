"""The files of Space Ranger's samples: outs folders of all versions, bins, cells, and flat folders as on GEO."""

import re
from dataclasses import dataclass
from pathlib import Path

from hinge.data.readers.tenx import find_file
from hinge.data.slide_image import image_name

POSITION_FILES = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_MATRICES = ("filtered_feature_bc_matrix", "filtered_feature_cell_matrix", "raw_feature_bc_matrix")
_OWN_IMAGES = re.compile(
    r"(tissue_(hi|low)res_image|aligned_fiducials|aligned_tissue_image|detected_tissue_image|cytassist_image|"
    r"qc_overlay)",
    re.IGNORECASE,
)
_CELLS = "cell_segmentations.geojson"


@dataclass(frozen=True)
class SampleFiles:
    """The files of one sample.

    Attributes
    ----------
    folder
        Its folder; `outs` or one below it.
    prefix
        What the names of its files start with, "" for most.
    matrix
        Counts: an HDF5 file, or a folder of matrix.mtx; None if missing.
    filtered
        Whether the counts are those of the spots on tissue alone.
    cells
        Outlines of segmented cells; None for spots and bins.
    """

    folder: Path
    prefix: str
    matrix: Path | None
    filtered: bool = True
    cells: Path | None = None

    def beside(self, *names: str) -> Path | None:
        """Return the first file of these names in spatial/ or in the folder, with the prefix or without."""
        for folder in (self.folder / "spatial", self.folder):
            for prefix in dict.fromkeys((self.prefix, "")):
                if found := find_file(folder, prefix, *names):
                    return found
            others = [file for name in names for file in sorted(folder.glob(f"*{name}*")) if _is(file, name)]
            if len(others) == 1:
                return others[0]
        return None

    @property
    def positions(self) -> Path | None:
        """The table of spot positions."""
        return self.beside(*POSITION_FILES)


def find_samples(path: Path) -> dict[str, SampleFiles]:
    """Return the samples of an outs folder, its parent, or a folder of such, by name."""
    here = _in_folder(path)
    if here:
        return here
    found: dict[str, SampleFiles] = {}
    for folder in sorted(path.glob("[!.]*/")):
        found |= _in_folder(folder)
    return found


def is_own_image(file: Path) -> bool:
    """Return whether an image is one that Space Ranger writes, and not the slide's."""
    return bool(_OWN_IMAGES.search(file.name))


def slide_images(files: SampleFiles) -> tuple[Path, list[Path]]:
    """Return the folder that has whole-slide images, the sample's own or one above it, and these images."""
    places = [files.folder]
    while places[-1].name in ("outs", "binned_outputs", "segmented_outputs") or places[-1].name.startswith("square_"):
        places.append(places[-1].parent)
    for place in places:
        images = [file for file in sorted(place.glob("[!.]*")) if file.is_file() and image_name(file)]
        images = [file for file in images if not is_own_image(file)]
        own = [file for file in images if files.prefix and file.name.startswith(files.prefix)]
        if images:
            return place, own or images
    return places[-1], []


def _in_folder(path: Path) -> dict[str, SampleFiles]:
    outs = path / "outs" if (path / "outs").is_dir() else path
    name = _sample_name(outs.absolute())
    found = {f"{name}_{folder.name}": _files(folder) for folder in _bins(outs)}
    cells = outs if outs.name == "segmented_outputs" else outs / "segmented_outputs"
    if cells.is_dir() and any(_matrix_of(cells, "")):
        matrix, _ = _matrix_of(cells, "")
        found[f"{name}_segmented"] = SampleFiles(cells, "", matrix, cells=cells / _CELLS)
    if found:
        return found
    prefixes = _prefixes(outs)
    spatial = (outs / "spatial").is_dir()
    if len(prefixes) > 1 and not spatial:
        flat = {prefix: _files(outs, prefix) for prefix in prefixes}
        return {prefix.strip("_-. "): files for prefix, files in flat.items() if files.positions}
    files = _files(outs, next(iter(prefixes), ""))
    # counts or spatial/ alone suffice to recognise the format; reading reports the missing part
    if files.matrix is None:
        return {name: files} if spatial and files.positions else {}
    if spatial or files.positions:
        return {name: files}
    named = files.matrix.name.removeprefix(files.prefix).startswith(_MATRICES)
    return {name: files} if named and not any(outs.glob("*.h5ad")) else {}


def _sample_name(path: Path) -> str:
    name = path.parent.name if path.name in ("outs", "binned_outputs", "segmented_outputs") else path.name
    return path.parent.parent.name if name == "outs" else name


def _bins(outs: Path) -> list[Path]:
    """Return the folders of bin sizes: in binned_outputs/, or in the folder itself where only they were copied."""
    inside = outs if outs.name == "binned_outputs" else outs / "binned_outputs"
    folders = inside if inside.is_dir() else outs
    found = [folder for folder in sorted(folders.glob("square_*um/")) if folder.is_dir()]
    # a SpatialData store names its tables alike
    return found if inside.is_dir() else [folder for folder in found if (folder / "spatial").is_dir()]


def _files(folder: Path, prefix: str = "") -> SampleFiles:
    matrix, filtered = _matrix_of(folder, prefix)
    return SampleFiles(folder, prefix, matrix, filtered)


def _matrix_of(folder: Path, prefix: str) -> tuple[Path | None, bool]:
    """Return counts, the filtered ones first, and whether they are filtered."""
    for name in _MATRICES:
        filtered = name.startswith("filtered")
        if (file := folder / f"{prefix}{name}.h5").is_file():
            return file, filtered
        if (inside := folder / f"{prefix}{name}").is_dir():
            return inside, filtered
    if find_file(folder, prefix, "matrix.mtx"):
        return folder, False
    return None, True


def _prefixes(folder: Path) -> list[str]:
    """Return what stands before the name of counts in a folder, "" first."""
    found = set()
    for file in folder.glob("[!.]*"):
        for name in (*(f"{matrix}.h5" for matrix in _MATRICES), *_MATRICES, "matrix.mtx", "matrix.mtx.gz"):
            folder_of_mtx = name in _MATRICES
            if file.name.endswith(name) and file.is_dir() == folder_of_mtx:
                prefix = file.name.removesuffix(name)
                if not prefix.endswith(("bc_", "cell_")):
                    found.add(prefix)
    return sorted(found)


def _is(file: Path, name: str) -> bool:
    return file.is_file() and file.name.endswith((name, f"{name}.gz"))
