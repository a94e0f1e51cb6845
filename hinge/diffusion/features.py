"""Histology features of a slide that a pipeline draws."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from anndata import AnnData

from hinge.data.features import read_features
from hinge.data.slide import slide_name
from hinge.diffusion.pipeline_settings import PipelineSettings
from hinge.encoders import Encoder, extract_features
from hinge.utils.errors import DataError


def features_of_slide(
    settings: PipelineSettings,
    load_encoder: Callable[[], Encoder],
    slide: AnnData,
    features: np.ndarray | str | Path | None,
) -> tuple[np.ndarray, str, str | None]:
    """Return features (n, V, d) of the spots of a slide, and name and digest of their encoder.

    Parameters
    ----------
    settings
        Of the pipeline.
    load_encoder
        Its encoder, asked for where features are extracted.
    slide, features
        As of `HingePipeline.__call__`.

    Raises
    ------
    DataError
        The features do not fit the slide.
    """
    barcodes, name, digest = list(slide.obs_names), settings.encoder, settings.encoder_digest
    if features is None:
        encoder = load_encoder()
        with tempfile.TemporaryDirectory() as folder:
            path = extract_features(
                slide,
                encoder,
                Path(folder) / f"{slide_name(slide)}.h5",
                batch_size=settings.feature_batch_size,
                patch_um=settings.patch_um,
            )
            return read_features(path, barcodes=barcodes, digest=encoder.digest).features, encoder.name, encoder.digest
    if isinstance(features, str | Path):
        stored = read_features(features, barcodes=barcodes, digest=digest)
        return stored.features, stored.encoder or name, stored.digest or digest
    array = np.asarray(features, dtype=np.float32)
    array = array[:, None] if array.ndim == 2 else array
    if array.ndim != 3 or len(array) != slide.n_obs or not np.isfinite(array).all():
        raise DataError(
            f"features must be finite numbers of shape ({slide.n_obs}, d), one row a spot of slide "
            f"{slide_name(slide)}; these are of shape {np.shape(features)}"
        )
    return array, name, digest
