"""Patches of slides on disk, which training reads in random order."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from hinge.data.patches import PatchReader
from hinge.encoders import Encoder
from hinge.utils.files import atomic_path
from hinge.utils.locks import lock_file

VIEWS = 8
"""All flips and quarter turns of a patch."""


def cut_patches(
    slide: AnnData, encoder: Encoder, patch_um: float, path: Path, barcodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the patches of a slide on disk, uint8 (n, H, W, 3), and the rows of some spots in them.

    Patches are cut once, because training reads spots in random order and images are compressed by tile or as a whole.
    """
    px = encoder.patch_px
    with lock_file(path, wait=True):  # workers with other folds need the same patches
        if not path.exists():
            with atomic_path(path) as temporary:
                stored = np.lib.format.open_memmap(temporary, "w+", np.uint8, (slide.n_obs, px, px, 3))
                for indices, patches in PatchReader(slide, patch_um, px):
                    stored[indices] = patches
                stored.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False), slide.obs_names.get_indexer(barcodes)


def patch_inputs(patches: list[tuple[np.ndarray, np.ndarray]]) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """Return a function of spots (B,) and views (B,) that gives their patches (B, H, W, 3)."""
    source = np.concatenate([np.full(len(rows), number) for number, (_, rows) in enumerate(patches)])
    place = np.concatenate([rows for _, rows in patches])

    def inputs(rows: np.ndarray, turns: np.ndarray) -> Tensor:
        batch = [_turned(patches[source[row]][0][place[row]], turn) for row, turn in zip(rows, turns, strict=True)]
        return torch.from_numpy(np.stack(batch))

    return inputs


def _turned(patch: np.ndarray, view: int) -> np.ndarray:
    """Return one of the eight views of a patch (H, W, 3), in the order of `dihedral_views`."""
    turned = np.rot90(patch, view % 4)
    return turned[:, ::-1] if view >= 4 else turned
