"""Predict on LazySlide's whole slides with a hinge run: an encoder and a model for `zs.tl`, and their registration.

LazySlide cuts tiles and keeps them with their features in a `WSIData`. The encoder here extracts the features that a
run was trained on, and the model draws all tiles of a slide together, because the draws of neighbouring tiles are
correlated.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from hinge.diffusion.pipeline import HingePipeline
from hinge.utils.errors import DataError
from hinge.utils.packages import require


def lazyslide_models(run: str | Path | HingePipeline, num_draws: int | None = None, seed: int | None = None) -> Any:
    """Return an encoder and a model of a run for LazySlide's `feature_extraction` and `feature_prediction`.

    Parameters
    ----------
    run
        The folder of a trained run, `owner/name` on the Hugging Face Hub, or a loaded pipeline.
    num_draws, seed
        Of the draws; None for the run's own.

    Returns
    -------
    tuple
        `(encoder, model)`: an `ImageModel`, whose `tile_px` and `mpp` are the size of the tiles that it takes, and a
        `FeaturePredictionModel`, whose output is one column `<gene>` (mean) and one `<gene> sd` for each gene, in units
        of the run's transform.

    Raises
    ------
    DataError
        The folder holds no trained run.
    ConfigError
        LazySlide is not installed.
    """
    require("lazyslide_models", "lazyslide", "predicting on a WSIData")
    from lazyslide_models import FeaturePredictionModel, ImageModel, ModelTask

    pipeline = run if isinstance(run, HingePipeline) else HingePipeline.from_pretrained(run)
    encoder, settings = pipeline.encoder, pipeline.settings
    patch_um = settings.patch_um or encoder.patch_um

    class HingeEncoder(ImageModel):
        """The histology encoder of a hinge run."""

        task = ModelTask.vision
        tile_px, mpp = encoder.patch_px, patch_um / encoder.patch_px
        name = "hinge-encoder"

        def __init__(self, model_path: Any = None, token: Any = None) -> None:  # which the registry's caller gives
            self.model = torch.nn.Sequential(encoder.transform, encoder.module)

        def get_transform(self) -> Any:
            return lambda tile: torch.as_tensor(np.array(tile))

        @torch.inference_mode()
        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            if image.shape[1:] != (self.tile_px, self.tile_px, 3):
                raise DataError(
                    f"the encoder {encoder.name} takes tiles of {self.tile_px} px at {self.mpp:.4g} µm per px, not of "
                    f"{tuple(image.shape[1:3])} px: cut them by zs.pp.tile_tissues(wsi, encoder.tile_px, "
                    "mpp=encoder.mpp)"
                )
            return self.model(image).to(torch.float32)

    class HingePrediction(FeaturePredictionModel):
        """Draws of gene expression by a hinge run."""

        task = ModelTask.feature_prediction
        features_model_name = HingeEncoder.name
        needs_coords = whole_slide = True
        name = "hinge"

        def __init__(self) -> None:
            self.model = pipeline.model

        def to(self, device: Any) -> Any:
            pipeline.to(device)
            return self

        def predict(self, features: ArrayLike, coords: ArrayLike | None = None) -> dict[str, NDArray[np.float32]]:
            draws = draw_tiles(pipeline, features, coords, num_draws, seed)
            columns = {gene: draws.X[:, number] for number, gene in enumerate(draws.var_names)}
            sd = draws.layers["std"]
            return columns | {f"{gene} sd": sd[:, number] for number, gene in enumerate(draws.var_names)}

    return HingeEncoder(), HingePrediction()


def draw_tiles(
    pipeline: HingePipeline,
    features: ArrayLike,
    coords: ArrayLike | None,
    num_draws: int | None = None,
    seed: int | None = None,
    name: str = "wsi",
) -> AnnData:
    """Return draws of the tiles of a slide, as `HingePipeline` returns those of spots.

    Parameters
    ----------
    pipeline
        Of a trained run.
    features
        Features (n, d) of all tiles, by the run's encoder.
    coords
        Corners of the tiles (n, 2), in any unit.
    num_draws, seed
        None for the pipeline's own.
    name
        Name of the slide, which the random numbers depend on.

    Raises
    ------
    DataError
        Positions are missing, or the features do not fit the model.
    """
    given = np.asarray(features, dtype=np.float32)
    if coords is None:
        raise DataError("the draws of tiles need the tiles' positions (coords)")
    slide = AnnData(np.zeros((len(given), 0), dtype=np.float32))
    slide.obs_names = [f"tile{number}" for number in range(len(given))]
    slide.obsm["spatial"] = np.asarray(coords, dtype=np.float64)
    slide.uns["hinge"] = {"name": name}
    with torch.inference_mode():
        return pipeline(slide, num_draws=num_draws, seed=seed, features=given, progress=False)


def register_lazyslide(run: str | Path, key: str = "hinge", **options: Any) -> None:
    """Register the encoder `<key>-encoder` and the model `<key>` of a run with LazySlide, in this process.

    `zs.tl.feature_extraction(wsi, "hinge-encoder")` and `zs.tl.feature_prediction(wsi, "hinge")` then find them.

    Parameters
    ----------
    run
        As of `lazyslide_models`.
    key
        Name of the model.
    **options
        `num_draws`, `seed`.
    """
    require("lazyslide_models", "lazyslide", "registering a model")
    from lazyslide_models import MODEL_REGISTRY

    encoder, model = lazyslide_models(run, **options)
    type(model).features_model_name = type(encoder).name = f"{key}-encoder"
    type(model).name = key
    MODEL_REGISTRY[f"{key}-encoder"], MODEL_REGISTRY[key] = type(encoder), type(model)
