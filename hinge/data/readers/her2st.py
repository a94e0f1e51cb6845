"""Spatial Transcriptomics arrays in the layout of the repository almaan/her2st (Andersson et al. 2021)."""

import gzip
import logging
import math
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData
from scipy.spatial.distance import pdist

from hinge.data.readers.h5ad import image_resolution
from hinge.data.resolution import choose_resolution
from hinge.data.slide import describe_slide
from hinge.utils.errors import DataError
from hinge.utils.notices import tell_once
from hinge.utils.safe_hdf5 import check_gzip

LAYOUT = (
    "a folder with ST-cnts/<sample>.tsv.gz and ST-spotfiles/<sample>_selection.tsv, "
    "and ST-imgs/<first letter>/<sample>/*.jpg for slides with image (the folder may be called data)"
)
SPOT_PITCH_UM, SPOT_DIAMETER_UM = 200.0, 100.0

_COUNTS_SUFFIX = ".tsv.gz"
_POSITION_COLUMNS = ["x", "y", "pixel_x", "pixel_y", "selected"]
_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return (_root(path) / "ST-cnts").is_dir()


def list_samples(path: Path) -> list[str]:
    """Return the names of the sections with counts."""
    files = (_root(path) / "ST-cnts").glob(f"[!.]*{_COUNTS_SUFFIX}")
    return sorted(file.name.removesuffix(_COUNTS_SUFFIX) for file in files)


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read one section: the spots that are selected and have counts, in the order of the counts."""
    root = _root(path)
    genes, counts = _read_counts(root / "ST-cnts" / f"{sample}{_COUNTS_SUFFIX}")
    positions = _read_positions(root / "ST-spotfiles" / f"{sample}_selection.tsv")
    kept = counts.index.isin(positions.index)
    n_without_counts = int((~positions.index.isin(counts.index)).sum())
    if n_without_counts or not kept.all():
        tell_once(
            _logger,
            f"{sample}: left out {n_without_counts} selected spots without counts and {int((~kept).sum())} spots with "
            "counts that are not selected",
        )
    counts = counts[kept]
    positions = positions.loc[counts.index]
    coordinates = positions[["pixel_x", "pixel_y"]].to_numpy(np.float64)
    image = image or _find_image(root / "ST-imgs" / sample[0] / sample, require_image)
    known, um_per_px, origin = choose_resolution(
        {
            "option": um_per_px or math.nan,
            "array": _um_per_px(positions[["x", "y"]].to_numpy(np.float64), coordinates),
            **image_resolution(image),
        }
    )
    slide = AnnData(
        X=scipy.sparse.csr_matrix(counts.to_numpy(np.float32)),
        obs=pd.DataFrame(
            {"array_x": positions["x"].to_numpy(), "array_y": positions["y"].to_numpy()}, index=counts.index
        ),
        var=pd.DataFrame(index=genes),
        obsm={"spatial": coordinates},
    )
    return describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=SPOT_PITCH_UM,
        spot_diameter_um=SPOT_DIAMETER_UM,
        source_format="her2st",
        source={"resolutions": known, "um_per_px_from": origin},
    )


def _root(path: Path) -> Path:
    return path / "data" if (path / "data" / "ST-cnts").is_dir() else path


def _read_counts(file: Path) -> tuple[pd.Index, pd.DataFrame]:
    """Return gene names and a table spots x genes."""
    check_gzip(file)
    try:
        # pandas renames repeated columns, so the names come from the line itself
        with gzip.open(file, "rt") as lines:
            genes = pd.Index(lines.readline().rstrip("\r\n").split("\t")[1:], dtype=str)
        # one type per column in one pass (low_memory reads in chunks): three times as fast on 15,000 columns
        counts = pd.read_csv(file, sep="\t", index_col=0, low_memory=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{file} is not a readable table of counts: {error}") from error
    if counts.shape[1] != len(genes):
        raise DataError(f"{file} has {len(genes)} gene names over {counts.shape[1]} columns of counts")
    text = [gene for gene, dtype in zip(genes, counts.dtypes, strict=True) if dtype.kind not in "iufb"]
    if text:
        raise DataError(f"{file} has counts of gene {text[0]} that are not numbers")
    counts.index = _unique_barcodes(counts.index.astype(str), file)
    return genes, counts


def _read_positions(file: Path) -> pd.DataFrame:
    """Return array and pixel coordinates of the selected spots by barcode."""
    try:
        positions = pd.read_csv(file, sep="\t")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a readable table of spot positions: {error}") from error
    for column in _POSITION_COLUMNS:
        if column not in positions:
            raise DataError(f"{file} has no column {column}; it needs {', '.join(_POSITION_COLUMNS)}")
        if positions[column].dtype.kind not in "iuf":
            raise DataError(f"{file} has values in column {column} that are not numbers")
    positions = positions[positions["selected"] == 1]
    if positions[["x", "y"]].isna().any(axis=None):
        raise DataError(f"{file} has a spot without array coordinates x and y")
    barcodes = [f"{x:.0f}x{y:.0f}" for x, y in zip(positions["x"], positions["y"], strict=True)]
    positions.index = _unique_barcodes(pd.Index(barcodes, dtype=str), file)
    return positions


def _unique_barcodes(barcodes: pd.Index, file: Path) -> pd.Index:
    if barcodes.has_duplicates:
        raise DataError(f"{file} has spot {barcodes[barcodes.duplicated()][0]} more than once")
    return barcodes


def _um_per_px(array: np.ndarray, pixels: np.ndarray) -> float:
    """Return microns per pixel: the pitch over the median pixel distance per array step of all pairs of spots.

    Distances between neighbours depend on the position of each printed spot, so all pairs are used. The median is
    robust against misplaced spots, and distances do not depend on the rotation of the array.
    """
    if len(array) < 2:
        return math.nan
    steps = pdist(array)
    return float(SPOT_PITCH_UM / np.median(pdist(pixels) / steps))


def _find_image(folder: Path, require_image: bool) -> Path | None:
    images = sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in {".jpg", ".jpeg"})
    if len(images) == 1:
        return images[0]
    if len(images) > 1:
        raise DataError(f"{folder} has {len(images)} images, not one: give the image with --image")
    if require_image:
        raise DataError(f"there is no image in {folder}: give --image")
    return None
