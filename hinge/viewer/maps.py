"""The smooth maps of `hinge map` as the viewer shows them: one gene as a grid of cells over the image."""

import math
import re
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.utils.errors import DataError, one_line
from hinge.utils.safe_hdf5 import check_hdf5

MOST_CELLS = 2048  # on a side; a finer map is averaged over blocks of cells

_PITCH = re.compile(r"(\d+(?:\.\d+)?)um", re.ASCII)


def find_map(folder: Path, slide: str) -> Path | None:
    """Return the finest map of a slide in a folder that `hinge map` wrote; None if there is none."""
    found = []
    for path in folder.glob("*um.h5ad"):
        match = _PITCH.fullmatch(path.stem.removeprefix(f"{slide}."))
        if match and path.name.startswith(f"{slide}."):
            found.append((float(match[1]), path))
    return min(found)[1] if found else None


class SlideMap:
    """A map of a slide.

    Parameters
    ----------
    path
        File that `hinge map` wrote.
    draws
        The draws that it is shown with.

    Raises
    ------
    DataError
        The file is damaged, or the map has other units or comes from another model than the draws.
    """

    def __init__(self, path: Path, draws: AnnData):
        self.path, facts = path, draws.uns["hinge"]
        check_hdf5(path, "a map of hinge map")
        try:
            with h5py.File(path) as file:
                about = anndata.io.read_elem(file["uns/hinge"])
                obs, var = anndata.io.read_elem(file["obs"]), anndata.io.read_elem(file["var"])
                coords = np.asarray(anndata.io.read_elem(file["obsm/spatial"]), dtype=np.float64)
                self._layer = "layers/expected" if "layers/expected" in file else "X"
                shape = file[self._layer].shape  # of a sparse matrix there is none
            cells = obs[["array_x", "array_y"]].to_numpy(int)
            self.pitch_um, self.method = float(about["spot_pitch_um"]), str(about["method"])
            self._pitch_px = self.pitch_um / float(about["um_per_px"])
        except Exception as error:  # h5py and pandas raise many kinds of exception for a damaged file
            raise DataError(f"{path} is not a map of hinge map: {one_line(error)}") from error
        finite = math.isfinite(self._pitch_px) and self._pitch_px > 0 and np.isfinite(coords).all()
        right = shape == (len(cells), len(var)) and coords.shape == (len(cells), 2) and len(cells)
        if not finite or not right or cells.min() < 0 or cells.max() >= 1 << 16:
            raise DataError(f"{path} is not a map of hinge map: its grid is damaged")
        for key, what in (("transform", "units"), ("model_digest", "a model")):
            if key in about and about[key] != facts.get(key):
                raise DataError(f"{path} has {what} other than the draws: run hinge map again")
        step = math.ceil((int(cells.max()) + 1) / MOST_CELLS)
        self._cells = cells // step
        self._corner = coords[0] - (cells[0] + 0.5) * self._pitch_px
        self._step_px = step * self._pitch_px
        self.genes = var.index.get_indexer(draws.var_names)  # column of each gene of the draws, -1 for none

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        columns, rows = (self._cells.max(axis=0) + 1).tolist()
        return rows, columns

    def index(self, scale: float) -> dict[str, Any]:
        """Return what the page needs to place the map.

        Parameters
        ----------
        scale
            Pixels of the shown image per full-resolution pixel.
        """
        (rows, columns), (left, top) = self.shape, (self._corner * scale).tolist()
        return {
            "pitch_um": self.pitch_um,
            "method": self.method,
            "rows": rows,
            "columns": columns,
            "left": left,
            "top": top,
            "cell_px": self._step_px * scale,
            "genes": np.flatnonzero(self.genes >= 0).tolist(),
        }

    def gene(self, gene: int) -> NDArray[np.float32]:
        """Return the map (rows, columns) of a gene of the draws, NaN off the tissue."""
        with h5py.File(self.path) as file:
            values = np.asarray(file[self._layer][:, self.genes[gene]], dtype=np.float64)
        rows, columns = self.shape
        cells = self._cells[:, 1] * columns + self._cells[:, 0]
        count = np.bincount(cells, minlength=rows * columns)
        total = np.bincount(cells, weights=values, minlength=rows * columns)
        mean = np.where(count, total / np.maximum(count, 1), np.nan)
        return mean.reshape(rows, columns).astype(np.float32)
