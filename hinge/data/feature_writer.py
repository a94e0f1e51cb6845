"""Write feature files batch by batch; `hinge.data.features` describes the format."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from hinge.utils.errors import DataError
from hinge.utils.files import atomic_path
from hinge.utils.packages import VERSION


class FeatureWriter:
    """Write a feature file batch by batch; it appears under its name when all spots are written.

    Use it as a context manager. If the block raises, nothing is left behind.

    Parameters
    ----------
    path
        File to write; an existing one is replaced at the end.
    barcodes
        Spots, in the file's order.
    coords
        Full-resolution pixel x, y, (n, 2).
    views, dim
        Views per spot and numbers per view.
    encoder, digest
        Name and digest of the encoder.
    patch_um, patch_px
        Side of a patch.
    dtype
        `float16` or `float32`.

    Raises
    ------
    DataError
        On leaving the block if spots are missing, and from `write` if a feature is not a finite number that
        `dtype` can hold.
    """

    def __init__(
        self,
        path: str | Path,
        barcodes: Sequence[str],
        coords: np.ndarray,
        views: int,
        dim: int,
        *,
        encoder: str,
        digest: str,
        patch_um: float,
        patch_px: int,
        dtype: str = "float16",
    ) -> None:
        self.path = Path(path)
        self._barcodes = [str(barcode) for barcode in barcodes]
        self._coords = np.asarray(coords, dtype=np.float64)
        self._shape = (len(self._barcodes), views, dim)
        if self._coords.shape != (len(self._barcodes), 2):
            raise ValueError(f"coords need shape ({len(self._barcodes)}, 2), not {self._coords.shape}")
        self._attributes = {
            "encoder": encoder,
            "digest": digest,
            "patch_um": float(patch_um),
            "patch_px": int(patch_px),
            "hinge_version": VERSION,
        }
        self._dtype = np.dtype(dtype)
        self._written = np.zeros(len(self._barcodes), dtype=bool)

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._file = self._stack.enter_context(h5py.File(temporary, "w"))
        self._file.attrs.update(self._attributes)
        # with checksums, because these files are shared between runs
        checked = {"fletcher32": True} if len(self._coords) else {}
        self._file.create_dataset("coords", data=self._coords, **checked)
        self._file.create_dataset("barcodes", data=self._barcodes, dtype=h5py.string_dtype())
        # rows are written in any order and read whole: a chunk of about 64 kB a spot or several
        rows = max(1, 65_536 // (self._shape[1] * self._shape[2] * self._dtype.itemsize))
        chunks = (min(rows, max(1, self._shape[0])), *self._shape[1:])
        self._features = self._file.create_dataset("features", self._shape, self._dtype, chunks=chunks, **checked)
        return self

    def write(self, indices: np.ndarray, features: np.ndarray) -> None:
        """Store features (b, views, d) of the spots at `indices` (b,)."""
        order = np.argsort(indices)
        indices = np.asarray(indices)[order]
        self._features[indices] = self.checked(indices, np.asarray(features)[order])
        self._written[indices] = True

    def checked(self, indices: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Return features (b, views, d) of the spots at `indices` (b,) in the stored type.

        Raises
        ------
        DataError
            A value is not finite in that type.
        """
        with np.errstate(over="ignore"):
            values = np.asarray(features).astype(self._dtype)
        wrong = ~np.isfinite(values).all(axis=(1, 2))
        if wrong.any():
            spot, encoder = self._barcodes[np.asarray(indices)[wrong][0]], self._attributes["encoder"]
            raise DataError(
                f"{self.path} was not written: {encoder} gives spot {spot} a feature that is not a finite "
                f"{self._dtype} ({int(wrong.sum())} such spots in this batch)"
            )
        return values

    def __exit__(self, *raised: Any) -> None:
        late = None
        if raised[0] is None and not self._written.all():
            missing = int((~self._written).sum())
            late = DataError(f"{self.path} was not written: {missing} of {len(self._written)} spots are missing")
            raised = (DataError, late, None)
        self._stack.__exit__(*raised)
        if late is not None:
            raise late
