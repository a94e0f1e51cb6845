"""Pre-train a histology encoder from a YAML configuration: `hinge pretrain-histology`."""

import os
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import scanpy as sc
from anndata import AnnData
from pydantic import Field, ValidationError, model_validator
from sklearn.cluster import KMeans

from hinge.config import AbsolutePath, explain
from hinge.data.readers import list_samples, read_slide
from hinge.data.simulate import simulate_slides
from hinge.training.ibot import pretrain_histology
from hinge.training.ibot_config import IbotConfig, VitConfig
from hinge.training.loop import make_accelerator
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.settings import LARGEST_SEED, Settings
from hinge.utils.yaml import read_settings

CLUSTERS = 6
"""Number of expression clusters that the probes classify."""

_COMPONENTS = 20
_PATHS = (("output",), ("data", "path"))


class PretrainingSlides(Settings):
    """The slides of the pre-training and of the probes."""

    path: AbsolutePath | None = Field(None, description="a data set: file or folder with slides")
    samples: list[str] | None = Field(None, description="a list of samples of it; None: all")
    simulated: int = Field(0, ge=0, description="the number of simulated slides beside them")
    probe: list[str] = Field(
        [], description="samples with counts; none: the simulated slides' regions are found, where there are any"
    )

    @model_validator(mode="after")
    def _something(self):
        if self.path is None and not self.simulated:
            raise ValueError("give data.path, or a number of simulated slides")
        if self.path is None and (self.samples or self.probe):
            raise ValueError("samples and probe name samples of data.path, which is missing")
        return self


class PretrainHistologyConfig(Settings):
    """The configuration of a pre-training."""

    output: AbsolutePath = Field(description="the folder of the encoder")
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    data: PretrainingSlides
    vit: VitConfig = VitConfig()
    training: IbotConfig = IbotConfig()

    @model_validator(mode="after")
    def _ends(self):
        if self.training.steps is None and self.training.epochs is None:
            raise ValueError("give either training.steps or training.epochs")
        return self


def load_pretraining(path: str | Path, overrides: list[str] | None = None) -> PretrainHistologyConfig:
    """Return the configuration in a YAML file with overrides; paths and errors as in `load_config`."""
    try:
        return PretrainHistologyConfig.model_validate(read_settings(path, overrides, _PATHS))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, PretrainHistologyConfig)}") from error


def pretrain(config: PretrainHistologyConfig, continue_with: str = "the same command") -> Path:
    """Pre-train an encoder on all launched processes.

    The probes' classes are expression clusters of `data.probe` (see `expression_clusters`) or, without it, the regions
    of the simulated tissue. The probes are tested on the last slide and trained on the others.

    Returns
    -------
    Path
        The encoder's folder, for `load_encoder`.

    Raises
    ------
    ConfigError, DataError
        As `hinge.training.ibot.pretrain_histology`.
    """
    data = config.data
    accelerator = make_accelerator(config.training, config.output.with_name(f"{config.output.name}-training"))
    slides, simulated = [], []
    if data.path is not None:
        names = data.samples or list_samples(data.path)
        slides = [read_slide(data.path, name, require_counts=False) for name in names]
    if data.simulated:
        folder = config.output.with_name(f"{config.output.name}-slides")
        names = [f"sim{number}" for number in range(data.simulated)]
        if accelerator.is_main_process and not all((folder / f"{name}.h5ad").exists() for name in names):
            simulate_slides(folder, n_slides=data.simulated, seed=config.seed)
        accelerator.wait_for_everyone()
        simulated = [read_slide(folder, name) for name in names]
    if data.probe:
        probe = [read_slide(data.path, name) for name in data.probe]
        labels = expression_clusters(probe, config.seed)
    else:
        probe = simulated
        labels = [slide.obs["domain"].to_numpy(str) for slide in simulated]
    pretrain_histology(
        [*slides, *simulated],
        config.vit,
        config.training,
        config.output,
        seed=config.seed,
        probe_slides=probe,
        probe_labels=labels,
        accelerator=accelerator,
        continue_with=continue_with,
    )
    return Path(os.path.relpath(config.output)) if config.output.is_relative_to(Path.cwd()) else config.output


def expression_clusters(slides: Sequence[AnnData], seed: int = 0, clusters: int = CLUSTERS) -> list[np.ndarray]:
    """Return classes of spots by expression: k-means on 20 principal components of log1p(count / total · 10⁴).

    Parameters
    ----------
    slides
        Slides with counts; they are clustered together on their common genes.
    seed
        Seed of PCA and k-means.
    clusters
        Number of classes.

    Returns
    -------
    list of numpy.ndarray
        (n,) classes of each slide's spots.

    Raises
    ------
    DataError
        The slides share fewer genes, or have fewer spots, than components and clusters need.
    """
    joined = anndata.concat(
        {str(number): AnnData(slide.X, slide.obs[[]], slide.var[[]]) for number, slide in enumerate(slides)},
        index_unique=":",
    )
    if min(joined.shape) <= max(_COMPONENTS, clusters):
        raise DataError(f"{joined.n_obs} spots with {joined.n_vars} shared genes are too few for expression clusters")
    sc.pp.normalize_total(joined, target_sum=1e4)
    sc.pp.log1p(joined)
    sc.pp.pca(joined, n_comps=_COMPONENTS, random_state=seed)
    found = KMeans(clusters, n_init=10, random_state=seed).fit_predict(joined.obsm["X_pca"])
    return np.split(found, np.cumsum([slide.n_obs for slide in slides])[:-1])
