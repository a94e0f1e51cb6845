"""Extract the features of a slide and write its feature file."""

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from anndata import AnnData
from tqdm import tqdm

from hinge.data.feature_writer import FeatureWriter
from hinge.data.features import difference_from
from hinge.data.patches import PatchReader, dihedral_views
from hinge.data.slide import slide_name
from hinge.encoders.encoder import Encoder
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import arrays_digest
from hinge.utils.locks import lock_file
from hinge.utils.memory import with_less_memory
from hinge.utils.resumable import ResumableArrays, remove_leftovers

logger = logging.getLogger(__name__)

# batches per part: the features that are computed again if extraction is killed
BATCHES_IN_A_PART = 8
ROWS_AT_ONCE = 4096


def extract_features(
    slide: AnnData,
    encoder: Encoder,
    path: str | Path,
    views: int = 1,
    batch_size: int = 64,
    patch_um: float | None = None,
    overwrite: bool = False,
    workers: int = 2,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Path:
    """Encode the patch of every spot and write the features to a file.

    A finished file of the same spots, encoder, patch and views is kept, and a stopped extraction is resumed. Patches
    are read in background threads and features are written batch by batch: memory does not grow with the slide. If
    memory runs out, the encoder continues with smaller batches.

    Parameters
    ----------
    slide
        A slide with image.
    encoder
        Encoder as `load_encoder` returns it.
    path
        File to write.
    views
        1: the patch itself; 8: also its flips and rotations by 90°.
    batch_size
        Patches in one forward pass.
    patch_um
        Side of a patch in µm; None: that of the encoder.
    overwrite
        Replace a file of other features.
    workers
        Threads that read patches.
    dtype
        Type of the computation; see `Encoder.encode`.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ConfigError
        `views`, `batch_size`, `patch_um` or `workers` is out of range.
    DataError
        The slide has no image, the image is damaged, `path` holds other features, or another process writes it.
    """
    path = Path(path)
    if views not in (1, 8):
        raise ConfigError(f"a patch has 1 or 8 views, not {views}")
    side = encoder.patch_um if patch_um is None else patch_um
    reader = PatchReader(slide, side, encoder.patch_px, batch_size, workers)
    if path.exists() and not overwrite:
        difference = difference_from(path, slide, encoder.name, encoder.digest, views, side, encoder.patch_px)
        if difference is None:
            remove_leftovers(path)
            logger.info("%s is finished", path)
            return path
        raise DataError(f"{path} was made {difference}: overwrite it, or write to another folder")
    shape, dtype_stored = (slide.n_obs, views, encoder.dim), encoder.feature_dtype
    about = {
        "encoder": encoder.digest,
        "patch_um": side,
        "computed_in": dtype,
        "spots": arrays_digest({"names": np.array(slide.obs_names, dtype=str), "coords": reader.coords}),
    }
    writer = FeatureWriter(
        path,
        slide.obs_names,
        reader.coords,
        views,
        encoder.dim,
        encoder=encoder.name,
        digest=encoder.digest,
        patch_um=side,
        patch_px=encoder.patch_px,
        dtype=dtype_stored,
    )
    unfinished = ResumableArrays(
        path, about, {"features": (shape, dtype_stored, 0)}, slide.n_obs, BATCHES_IN_A_PART * batch_size
    )

    def encode(patches: np.ndarray, at_once: int) -> np.ndarray:
        """Return features (b, views, d) of patches, `at_once` of them in one forward pass."""
        pieces = [patches[start : start + at_once] for start in range(0, len(patches), at_once)]
        encoded = [[encoder.encode(view, dtype) for view in dihedral_views(piece, views)] for piece in pieces]
        return np.concatenate([np.stack(of_views, axis=1) for of_views in encoded])

    with lock_file(path):
        unfinished.prepare()
        missing = unfinished.missing()
        done = slide.n_obs - sum(part.stop - part.start for _, part in missing)
        progress = tqdm(
            total=slide.n_obs, initial=done, desc=f"{encoder.name} {slide_name(slide)}", unit="spot", disable=None
        )
        batches = reader.read([reader.order[part] for _, part in missing])
        with progress, unfinished.kept(), contextlib.closing(batches):
            for number, part in missing:
                spots = reader.order[part]
                found: list[np.ndarray] = []
                while sum(len(each) for each in found) < len(spots):
                    indices, patches = next(batches)
                    features, batch_size = with_less_memory(batch_size, partial(encode, patches))
                    found.append(writer.checked(indices, features))
                    progress.update(len(indices))
                unfinished.write(number, spots, np.concatenate(found))
        with writer:
            stored = unfinished.read()[0]
            for start in range(0, slide.n_obs, ROWS_AT_ONCE):
                rows = np.arange(start, min(start + ROWS_AT_ONCE, slide.n_obs))
                writer.write(rows, stored[rows])
        unfinished.remove()
    logger.info("wrote %s (%d spots, %d views, %d features)", path, slide.n_obs, views, encoder.dim)
    return path
