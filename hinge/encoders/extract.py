"""From a slide to its feature file."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
from anndata import AnnData
from tqdm import tqdm

from hinge.data.features import FeatureWriter, read_feature_header
from hinge.data.patches import PatchReader, dihedral_views
from hinge.data.slide import slide_name
from hinge.encoders.registry import Encoder
from hinge.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


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
    """Encode the patch of every spot and write them as a feature file.

    A finished file of the same spots, encoder, patch and views is left as it is. Patches are read in the
    background and features written as they come: memory does not grow with the slide.

    Parameters
    ----------
    slide
        A slide with image.
    encoder
        As `load_encoder` gives it.
    path
        File to write.
    views
        1: each patch as it is; 8: also its flips and quarter turns.
    batch_size
        Patches in one forward pass.
    patch_um
        Side of a patch in µm; None: the encoder's.
    overwrite
        Replace a file that was made otherwise.
    workers
        Threads that read patches.
    dtype
        What the encoder computes in; see `Encoder.encode`.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ConfigError
        If `views`, `batch_size`, `patch_um` or `workers` cannot be used.
    DataError
        If the slide has no image, the image is damaged, or a file of other features is at `path`.
    """
    path = Path(path)
    if views not in (1, 8):
        raise ConfigError(f"a patch has 1 or 8 views, not {views}")
    side = encoder.patch_um if patch_um is None else patch_um
    reader = PatchReader(slide, side, encoder.patch_px, batch_size, workers)
    if path.exists() and not overwrite:
        difference = _difference(path, slide, encoder, views, side)
        if difference is None:
            logger.info("%s is finished", path)
            return path
        raise DataError(f"{path} was made {difference}: overwrite it, or write to another folder")
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
        dtype=encoder.feature_dtype,
    )
    progress = tqdm(total=slide.n_obs, desc=f"{encoder.name} {slide_name(slide)}", unit="spot", disable=None)
    with progress, writer:
        for indices, patches in reader:
            features = [encoder.encode(view, dtype) for view in dihedral_views(patches, views)]
            writer.write(indices, np.stack(features, axis=1))
            progress.update(len(indices))
    logger.info("wrote %s (%d spots, %d views, %d features)", path, slide.n_obs, views, encoder.dim)
    return path


def _difference(path: Path, slide: AnnData, encoder: Encoder, views: int, patch_um: float) -> str | None:
    """In what a feature file differs from the one that would be written, None if in nothing."""
    header = read_feature_header(path)
    if header.digest != encoder.digest or header.dim != encoder.dim:
        return f"by another encoder ({header.encoder or 'unnamed'}, not {encoder.name})"
    made, asked = (header.patch_um, header.patch_px), (float(patch_um), encoder.patch_px)
    if made != asked:
        return f"with patches of {made[0]} µm and {made[1]} px, not {asked[0]} µm and {asked[1]} px"
    if header.n_views != views:
        return f"with {header.n_views} views, not {views}"
    if header.barcodes is None or list(header.barcodes) != list(slide.obs_names):
        return f"for other spots than those of slide {slide_name(slide)}"
    if not np.array_equal(header.coords, np.asarray(slide.obsm["spatial"], dtype=np.float64)):
        return f"for spots at other places than those of slide {slide_name(slide)}"
    return None
