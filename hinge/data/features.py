"""Read feature files: one HDF5 file per slide and encoder.

    features   (n, views, d) float16 or float32, view 0 the unaugmented patch; with fletcher32 checksums, as coords
    coords     (n, 2) float64, full-resolution pixel x, y of the centres of the patches
    barcodes   (n,) UTF-8 strings
    attributes encoder, digest, patch_um, patch_px, hinge_version

Files of TRIDENT and CLAM, with `features` (n, d) and `coords` (n, 2), are read too. Their coords are the upper left
corners of the patches and they have no barcodes, so each spot takes the patch that it lies in. Files may come from
untrusted sources: only numbers and strings stored in the file itself are read.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import KDTree

from hinge.data.slide import slide_name
from hinge.utils.errors import DataError
from hinge.utils.notices import tell_once
from hinge.utils.safe_hdf5 import check_hdf5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FeatureHeader:
    """The metadata of a feature file.

    Attributes
    ----------
    n_views, dim
        Shape of `features` beside the number of spots.
    coords
        Full-resolution pixel x, y, float64 (n, 2): the patches' centres; TRIDENT and CLAM write their upper
        left corners.
    barcodes
        str (n,), None if the file has none.
    encoder, digest
        Name and digest of the encoder, None if not stored.
    patch_um, patch_px
        Side of a patch, None if not stored.
    level0_px
        Side of a patch in full-resolution pixels as TRIDENT and CLAM store it, None if not stored.
    """

    n_views: int
    dim: int
    coords: np.ndarray
    barcodes: np.ndarray | None
    encoder: str | None
    digest: str | None
    patch_um: float | None
    patch_px: int | None
    level0_px: float | None


@dataclass(frozen=True, eq=False)
class Features:
    """Features of spots in the requested order.

    Attributes
    ----------
    features
        float32 (n, views, d), view 0 the unaugmented patch.
    coords, barcodes, encoder, digest, patch_um, patch_px
        As in `FeatureHeader`.
    """

    features: np.ndarray
    coords: np.ndarray
    barcodes: np.ndarray | None
    encoder: str | None
    digest: str | None
    patch_um: float | None
    patch_px: int | None


def read_feature_header(path: str | Path) -> FeatureHeader:
    """Read the metadata of a feature file.

    Raises
    ------
    DataError
        As `read_features`.
    """
    with _open(path) as file:
        return _header(file, path)


def read_features(path: str | Path, barcodes: Sequence[str] | None = None, digest: str | None = None) -> Features:
    """Read features of all spots, or of some in a given order.

    Parameters
    ----------
    path
        A feature file of this package, TRIDENT or CLAM; the latter two count as one view.
    barcodes
        Barcodes of the requested spots; None for all, in the file's order.
    digest
        Required digest of the encoder; None accepts any.

    Returns
    -------
    Features
        One row per requested spot.

    Raises
    ------
    DataError
        If the file is missing, damaged, points outside itself, lacks a dataset or holds one of another shape
        or type, a feature is not finite, a spot is missing or repeated, or the digest differs.
    """
    with _open(path) as file:
        header = _header(file, path)
        if digest is not None and header.digest != digest:
            made_by = f"{header.encoder or 'an unnamed encoder'} (digest {(header.digest or 'none')[:12]})"
            raise DataError(
                f"{path} was made by {made_by}, not by the encoder with digest {digest[:12]}; run hinge features with "
                "--overwrite"
            )
        values = file["features"][:]
    values = values.reshape(len(values), header.n_views, header.dim)
    wrong = ~np.isfinite(values).all(axis=(1, 2))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        spot = first if header.barcodes is None else header.barcodes[first]
        raise DataError(f"{path}, spot {spot}: a feature is not a finite number ({int(wrong.sum())} such spots)")
    if len(values) > 2 and np.array_equal(values.min(axis=0), values.max(axis=0)):
        tell_once(
            _logger,
            f"{path}: the features of all {len(values)} spots are equal, so that nothing can be predicted from them; "
            "run hinge check, since the image may be blank",
            logging.WARNING,
        )
    rows = slice(None) if barcodes is None else _rows(header, list(barcodes), path)
    return Features(
        features=values[rows].astype(np.float32),
        coords=header.coords[rows],
        barcodes=None if header.barcodes is None else header.barcodes[rows],
        encoder=header.encoder,
        digest=header.digest,
        patch_um=header.patch_um,
        patch_px=header.patch_px,
    )


def read_features_at(path: str | Path, coords: np.ndarray) -> Features:
    """Read the features of the patches nearest to some places, from a file without barcodes.

    Parameters
    ----------
    path
        A feature file of TRIDENT or CLAM, whose `coords` are the patches' upper left corners.
    coords
        Full-resolution pixel x, y of spots, (n, 2).

    Returns
    -------
    Features
        One row per place; its `coords` are the patches' centres.

    Raises
    ------
    DataError
        As `read_features`; and if the file has no patch size and fewer than two patches, or a place is outside all
        patches.
    """
    header, stored = read_feature_header(path), read_features(path)
    side = header.level0_px or _grid_step(stored.coords)
    if side is None:
        raise DataError(
            f"{path} has no patch size: 'coords' needs the attribute patch_size_level0, or two different places"
        )
    if header.level0_px is None:
        tell_once(
            _logger,
            f"{path} has no patch size: {side:g} px, the distance between patches, is taken for their side, which is "
            "wrong for patches that overlap; set the attribute patch_size_level0 of 'coords'",
            logging.WARNING,
        )
    centres = stored.coords + side / 2
    coords = np.asarray(coords, dtype=np.float64)
    # Chebyshev's distance: a patch is a square
    away, rows = KDTree(centres).query(coords, p=np.inf)
    outside = away > side / 2 + 1
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{path} has no patch at pixel ({coords[first, 0]:g}, {coords[first, 1]:g}): {int(outside.sum())} of "
            f"{len(coords)} spots lie outside its patches of {side:g} px"
        )
    _logger.info("%s: patches' centres lie %.0f px from their spots in the median", path, np.median(away))
    return replace(stored, features=stored.features[rows], coords=centres[rows])


def _grid_step(corners: np.ndarray) -> float | None:
    """Return the most frequent distance of neighbours, which is the side of patches that do not overlap."""
    if len(corners) < 2:
        return None
    steps, counts = np.unique(KDTree(corners).query(corners, k=2, p=np.inf)[0][:, 1].round(), return_counts=True)
    return float(steps[counts.argmax()]) or None


def difference_from(
    path: str | Path,
    slide: AnnData,
    encoder: str,
    digest: str,
    views: int,
    patch_um: float,
    patch_px: int | None = None,
) -> str | None:
    """Return how a feature file differs from the one that would be written, None if it does not differ.

    Parameters
    ----------
    path
        The file.
    slide
        Slide with the spots of the file.
    encoder, digest
        Name and digest of the encoder.
    views, patch_um, patch_px
        Views of a patch and its side in µm and pixels. The digest of an encoder includes the side in pixels; None
        leaves it out.

    Raises
    ------
    DataError
        As `read_features`.
    """
    header = read_feature_header(path)
    if header.digest != digest:
        return f"by another encoder ({header.encoder or 'unnamed'}, not {encoder})"
    made, asked = (header.patch_um, header.patch_px), (float(patch_um), patch_px or header.patch_px)
    if made != asked:
        return f"with patches of {made[0]} µm and {made[1]} px, not {asked[0]} µm and {asked[1]} px"
    if header.n_views != views:
        return f"with {header.n_views} views, not {views}"
    if header.barcodes is None or list(header.barcodes) != list(slide.obs_names):
        return f"for other spots than those of slide {slide_name(slide)}"
    if not np.array_equal(header.coords, np.asarray(slide.obsm["spatial"], dtype=np.float64)):
        return f"for other coordinates than those of slide {slide_name(slide)}"
    return None


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[h5py.File]:
    if not Path(path).is_file():
        raise DataError(f"there is no feature file {path}")
    check_hdf5(path, "a readable feature file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:  # raised by h5py for damaged files
        raise DataError(f"{path} is not a readable feature file: {error}") from error


def _dataset(file: h5py.File, name: str, path: str | Path) -> h5py.Dataset:
    """Return a dataset whose values are all stored in this file."""
    link = file.get(name, getlink=True)
    if link is None:
        there = ", ".join(sorted(map(str, file))) or "nothing"
        raise DataError(f"{path} has no dataset {name!r}; it holds {there}")
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise DataError(f"{path}: {name!r} must be a dataset in the file itself, not a link or a group")
    return dataset


def _header(file: h5py.File, path: str | Path) -> FeatureHeader:
    features, coords = _dataset(file, "features", path), _dataset(file, "coords", path)
    for name, dataset, kinds in (("features", features, "f"), ("coords", coords, "iuf")):
        if dataset.dtype.kind not in kinds:
            raise DataError(f"{path}: {name!r} must hold plain numbers, not {dataset.dtype}")
    if features.ndim not in (2, 3) or 0 in features.shape:
        raise DataError(f"{path}: 'features' must have shape (n, views, d) or (n, d), not {features.shape}")
    n = len(features)
    if coords.shape != (n, 2):
        raise DataError(f"{path}: 'coords' must have shape ({n}, 2) like its features, not {coords.shape}")
    places = coords[:].astype(np.float64)
    if not np.isfinite(places).all():
        raise DataError(f"{path}: 'coords' holds values that are not finite numbers")
    attributes = {
        "encoder": _attribute(file, "encoder", str, path),
        "digest": _attribute(file, "digest", str, path),
        "patch_um": _attribute(file, "patch_um", float, path),
        "patch_px": _attribute(file, "patch_px", int, path),
    }
    return FeatureHeader(
        n_views=features.shape[1] if features.ndim == 3 else 1,
        dim=features.shape[-1],
        coords=places,
        barcodes=None if file.get("barcodes", getlink=True) is None else _barcodes(file, n, path),
        level0_px=_level0_px(coords, path),
        **attributes,
    )


def _barcodes(file: h5py.File, n: int, path: str | Path) -> np.ndarray:
    dataset = _dataset(file, "barcodes", path)
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise DataError(f"{path}: 'barcodes' must hold strings, not {dataset.dtype}")
    if dataset.shape != (n,):
        raise DataError(f"{path}: 'barcodes' must have shape ({n},) like its features, not {dataset.shape}")
    barcodes = pd.Index(dataset.asstr()[:])
    if barcodes.has_duplicates:
        raise DataError(f"{path} has barcode {barcodes[barcodes.duplicated()][0]} more than once")
    return barcodes.to_numpy(dtype=str)


def _level0_px(coords: h5py.Dataset, path: str | Path) -> float | None:
    """Return the side of a patch at level 0, which TRIDENT stores; CLAM stores the side at another level too."""
    side = _attribute(coords, "patch_size_level0", float, path)
    if side is None and _attribute(coords, "patch_level", int, path) == 0:
        side = _attribute(coords, "patch_size", float, path)
    if side is not None and not 0 < side < float("inf"):
        raise DataError(f"{path}: the patches' side must be above 0, not {side:g} px")
    return side


def _attribute(file: h5py.File | h5py.Dataset, name: str, kind: type, path: str | Path) -> Any:
    if name not in file.attrs:
        return None
    value = file.attrs[name]
    try:
        if isinstance(value, str | bytes) != (kind is str):
            raise TypeError
        return kind(value.decode() if isinstance(value, bytes) else value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: attribute {name!r} must be one {kind.__name__}, not {value!r}") from error


def _rows(header: FeatureHeader, barcodes: list[str], path: str | Path) -> np.ndarray:
    if header.barcodes is None:
        raise DataError(f"{path} has no barcodes, so its features cannot be matched to spots by name")
    rows = pd.Index(header.barcodes).get_indexer(barcodes)
    missing = [barcode for barcode, row in zip(barcodes, rows, strict=True) if row < 0]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} of {len(barcodes)} spots, the first of them {missing[0]}")
    return rows
