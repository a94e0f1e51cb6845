"""A run: its folder, and the stages that fill it.

Each stage reads what the one before wrote, recognises what is finished and can be run again. The files are listed in
`hinge.run.paths`. A stage is imported when it starts: who only reads a run needs no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.config import RunConfig, load_config
from hinge.data.bulk import Bulk
from hinge.data.checks import Finding
from hinge.data.condition_tokens import ConditionTokens
from hinge.data.count_table import CountTable
from hinge.data.panel import Panel
from hinge.data.slide import patient_of_slide, slide_name
from hinge.data.spots import SpotTable
from hinge.run.paths import read_run_config
from hinge.run.preparation import Preparation

if TYPE_CHECKING:
    import torch

    from hinge.backbones import ExpressionBackbone
    from hinge.diffusion import HingePipeline
    from hinge.encoders import Encoder
    from hinge.evaluation.predictions import PredictionFiles


class Run:
    """The stages of one run, and access to what its folder holds.

    Parameters
    ----------
    config
        Its `output` is the folder of the run.
    opened
        Whether the configuration was read from that folder, see `hinge.run.paths.RunPaths`.

    Attributes
    ----------
    paths
        Where the files of the run lie, see `hinge.run.paths.RunPaths`.
    """

    def __init__(self, config: RunConfig, opened: bool = False):
        self.config = config
        self._inputs = Preparation(config, opened)
        self.paths = self._inputs.paths
        self.folder = self.paths.folder

    def __getattr__(self, name: str) -> Any:
        file = name.removesuffix("_path")
        if file == name or file.startswith("_") or not hasattr(self.paths, file):
            raise AttributeError(f"a run has no attribute {name!r}")
        warnings.warn(f"Run.{name} is now Run.paths.{file}", DeprecationWarning, stacklevel=2)
        return getattr(self.paths, file)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the run in a folder, finished or not.

        Raises
        ------
        DataError
            The folder holds no run.
        """
        return cls(read_run_config(folder), opened=True)

    # --- stages ----------------------------------------------------------------------------------

    def pretrain(self) -> Path:
        """Pre-train the backbone, unless its weights are given; return its folder."""
        from hinge.run.training import pretrain_backbone

        return pretrain_backbone(self._inputs)

    def train(self, allow: Collection[str] = (), check: Collection[str] = ()) -> Path:
        """Make panel, features, backbone and model, as far as they are missing; return the folder of the model.

        Parameters
        ----------
        allow
            Codes of findings that do not stop the training, see `hinge.check_slide`.
        check
            Names of slides to be checked beside the training slides.

        Raises
        ------
        ConfigError
            The folder holds a run with other settings.
        DataError
            A slide has a finding that is an error.
        """
        from hinge.run.training import train_model

        return train_model(self._inputs, [*self.config.data.train, *check], allow)

    def sample(
        self,
        name: str | None = None,
        slide: AnnData | None = None,
        output: Path | None = None,
        draws: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        observed: Path | None = None,
        genes: list[str] | None = None,
        allow: Collection[str] = (),
        patient: str | None = None,
        bulk: Bulk | None = None,
        bulk_sd: float | None = None,
        library_size: float | str | None = None,
        pipeline: HingePipeline | None = None,
        condition: Mapping[str, str] | None = None,
    ) -> Path:
        """Draw the expression of a slide's spots; finished draws with the same settings are kept.

        Parameters
        ----------
        name
            A slide of the data set, or
        slide
            any slide with an image.
        output
            h5ad to write; `samples/<slide>.h5ad` in the folder of the run by default.
        draws, steps, seed
            None for those of the configuration.
        batch_size
            Spot-draws in one forward pass, without effect on the draws.
        observed
            h5ad with measured counts of some genes in some or all spots: they are kept, and the others are drawn
            given them. See `hinge.data.observed.read_observed`.
        genes
            Genes outside the panel that are drawn too, see `HingePipeline.__call__`; the default file is then
            `samples/<slide>.outside-panel.h5ad`.
        allow
            Codes of findings that do not stop it, see `hinge.check_slide`.
        patient
            Name of the slide's patient; None: as the data set names it, or a new one.
        bulk, bulk_sd, library_size
            What else is known of the slide as a whole, see `hinge.diffusion.evidence.slide_evidence`.
        pipeline
            The result of `pipeline()`, which is loaded once for many slides; None: it is loaded here.
        condition
            Category of each condition token, see `HingePipeline.__call__`.

        Returns
        -------
        Path
            The file of the draws.
        """
        self.paths.require_model()
        if slide is None:
            slide = self._inputs.slide_to_sample(name)
            patient = patient or self.patient(slide_name(slide))
        from hinge.run.sampling import sample_slide

        return sample_slide(
            self._inputs,
            slide,
            output,
            draws,
            steps,
            seed,
            batch_size,
            observed,
            genes,
            allow,
            patient or patient_of_slide(slide),
            bulk,
            bulk_sd,
            library_size,
            pipeline,
            condition,
        )

    def fit_baselines(self, slides: list[str] | None = None) -> dict[str, Path]:
        """Fit the baselines on the training slides and predict slides by them; finished predictions are kept.

        Parameters
        ----------
        slides
            Names; None for the test slides.

        Returns
        -------
        dict
            Name of each slide → the file of the predictions.
        """
        from hinge.run.baselines import fit_baselines

        return fit_baselines(self._inputs, slides or self.config.data.test)

    def evaluate(
        self,
        slides: list[str] | None = None,
        predictions: list[PredictionFiles] | None = None,
        output: Path | None = None,
    ) -> Path:
        """Score the draws of the test slides, predictions of other programs and the baselines, which are fitted first.

        Parameters
        ----------
        slides
            Names; None for the test slides.
        predictions
            Of other programs. With them, slides of which this run has no draws are scored too.
        output
            The file of scores to write; None for `scores.json` in the folder of the run.

        Returns
        -------
        Path
            The file of scores.
        """
        from hinge.run.evaluation import evaluate_run, slides_to_evaluate

        names = slides_to_evaluate(self._inputs, slides, predictions)
        return evaluate_run(self._inputs, names, self.fit_baselines(names), predictions, output)

    def log_likelihoods(self, name: str) -> dict[str, float] | None:
        """Return the log-likelihood of a slide's measured counts on the panel, mean over spots in nats.

        Returns
        -------
        dict
            `model` (see `chain_log_likelihood`), `marginal`, and on simulated tissue `oracle` and `share`, the model's
            gain over the marginal as a share of the oracle's. None for a head whose values are no counts.
        """
        from hinge.run.evaluation import log_likelihoods

        return log_likelihoods(self._inputs, name)

    def check(self, slide: AnnData, allow: Collection[str] = ()) -> tuple[list[Finding], NDArray | None]:
        """Check a slide for sampling by this run, and compare its features with those of training.

        Parameters
        ----------
        slide
            Any slide with an image. Its features are extracted, if they are not there yet.
        allow
            Codes of findings that do not hinder the comparison.

        Returns
        -------
        tuple
            The findings (see `hinge.check_slide`), and how far the features of each spot (n,) are from those of
            training, 1 for the 99th percentile there; None after an error.

        Raises
        ------
        DataError
            The run has not been trained, or by a version that did not keep what this needs.
        """
        from hinge.run.checking import check_against_training

        return check_against_training(self._inputs, slide, allow)

    # --- what the folder holds -------------------------------------------------------------------

    def slide(self, name: str, require_image: bool = True) -> AnnData:
        """Return a slide of the data set by name."""
        return self._inputs.slide(name, require_image)

    def slide_at(
        self,
        path: Path,
        um_per_px: float | None = None,
        image: Path | None = None,
        sample: str | None = None,
        spot_um: float | None = None,
    ) -> AnnData:
        """Return a slide outside the data set; on an image without counts, place spots at the pitch of training.

        Cells are pooled in squares of `spot_um`, by default as the cells that the run was trained on.
        """
        return self._inputs.slide_at(path, um_per_px, sample, image, spot_um)

    def patient(self, name: str) -> str:
        """Return the patient of a slide of the data set."""
        return self._inputs.patient(name)

    def spot_grid(self) -> tuple[float, float]:
        """Return the distance between the training slides' spots and their diameter, µm."""
        return self._inputs.spot_grid()

    def panel(self) -> Panel:
        """Return the panel; select and write it if it is not there yet."""
        return self._inputs.panel()

    @property
    def tokens(self) -> ConditionTokens:
        """The condition tokens and their categories."""
        return self._inputs.tokens

    @property
    def encoder(self) -> Encoder:
        """The histology encoder."""
        return self._inputs.encoder

    def features(self, slide: AnnData) -> Path:
        """Return the feature file of a slide; extract it if it is not there yet."""
        return self._inputs.features(slide)

    def conditions(self, slide: AnnData, path: Path) -> np.ndarray:
        """Return the condition of every spot of a slide: float32 (n, V, d)."""
        return self._inputs.conditions(slide, path)

    def spots(self, names: list[str]) -> SpotTable:
        """Return the spots of some slides on the panel, with features; spots without a count are left out."""
        return self._inputs.spots(names)

    def backbone(self) -> ExpressionBackbone:
        """Return the backbone, given or pre-trained in this run."""
        return self._inputs.backbone()

    def gene_ids(self, backbone: ExpressionBackbone) -> torch.Tensor:
        """Return the vocabulary ids (G,) of the panel."""
        return self._inputs.gene_ids(backbone)

    def pretraining_counts(self) -> CountTable:
        """Return the counts, on the panel, of the slides to pre-train the backbone on."""
        return self._inputs.pretraining_counts()

    def pipeline(self) -> HingePipeline:
        """Return the trained model and its scheduler, ready to sample."""
        from hinge.run.sampling import load_pipeline

        return load_pipeline(self._inputs)


def train(config: RunConfig | str | Path) -> Run:
    """Train a run and return it.

    Parameters
    ----------
    config
        Settings, or the YAML file that holds them.

    Raises
    ------
    ConfigError
        A setting is wrong, or the output folder holds a run with other settings.
    """
    run = Run(config if isinstance(config, RunConfig) else load_config(config))
    run.train()
    return run


def evaluate(run: Run | str | Path) -> Path:
    """Score the draws of a run's test slides and return the file of scores.

    Parameters
    ----------
    run
        A run, or its folder.
    """
    return (run if isinstance(run, Run) else Run.open(run)).evaluate()
