"""Slides of a data set and their features, for the tasks."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from anndata import AnnData

from hinge.data.features import read_features
from hinge.data.neighbourhood import slide_features
from hinge.data.readers import list_samples, read_slide
from hinge.data.slide import slide_name
from hinge.encoders import Encoder, extract_features
from hinge.encoders.names import features_file
from hinge.utils.errors import DataError


def read_slides(data: Path, samples: Iterable[str] | None, require_counts: bool = True) -> dict[str, AnnData]:
    """Return slides of a data set by name.

    Parameters
    ----------
    data
        File or folder that `read_slide` reads.
    samples
        Names; None for all.
    require_counts
        See `read_slide`.

    Raises
    ------
    DataError
        A sample is missing, named twice or invalid.
    """
    names = list(samples or list_samples(data))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"sample {repeated[0]} is named more than once")
    return {name: read_slide(data, name, require_counts=require_counts) for name in names}


def embed(
    slide: AnnData,
    encoder: Encoder,
    folder: Path,
    *,
    patch_um: float | None = None,
    standardise: bool = True,
    batch_size: int = 64,
) -> np.ndarray:
    """Return the features of a slide's spots; extract them if there is no file yet.

    Parameters
    ----------
    slide
        A slide with an image.
    encoder
        Result of `load_encoder`.
    folder
        Folder of the feature files.
    patch_um
        Side of a patch in µm; None for the encoder's.
    standardise
        Standardise by the slide's own mean and deviation, which removes effects of staining and scanner.
    batch_size
        Patches in one forward pass.

    Returns
    -------
    numpy.ndarray
        float32 (n, d), in the order of the slide's spots.
    """
    path = features_file(folder, slide_name(slide), encoder.name)
    extract_features(slide, encoder, path, patch_um=patch_um, batch_size=batch_size)
    stored = read_features(path, barcodes=list(slide.obs_names), digest=encoder.digest)
    return slide_features(stored.features, slide.obsm["spatial"], False, standardise)[:, 0]
