"""The pipeline: a slide in, an AnnData with draws of every spot's expression out."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from anndata import AnnData
from diffusers import DiffusionPipeline

from hinge.backbones import ExpressionBackbone
from hinge.data.bulk import Bulk
from hinge.data.condition_tokens import ConditionTokens, categories_of_slide
from hinge.data.draws import draws_of_slide
from hinge.data.neighbourhood import slide_features
from hinge.data.observed import observed_digest, read_observed
from hinge.data.slide import patient_of_slide, slide_name
from hinge.diffusion.evidence import log_evidence, slide_evidence
from hinge.diffusion.features import features_of_slide
from hinge.diffusion.inputs import SamplingSettings, SlideInputs
from hinge.diffusion.outside_panel import OutsideGenes
from hinge.diffusion.pipeline_settings import (
    BACKBONE_FOLDER,
    BackboneSource,
    PipelineSettings,
    precision_of_run,
    read_run_config,
    sampling_of_run,
    settings_of_run,
)
from hinge.diffusion.sampler import Draws, draw_parts
from hinge.diffusion.scheduler import MaskedDiffusionScheduler, load_scheduler
from hinge.encoders import Encoder, load_encoder
from hinge.models.hinge import HingeModel
from hinge.models.pretrained import genes_digest
from hinge.utils import hub
from hinge.utils.errors import ConfigError, DataError, WeightsError
from hinge.utils.files import atomic_path, read_json
from hinge.utils.licences import check_licence, recorded_licence

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


def _not_offered(name: str, instead: str) -> Callable[..., NoReturn]:
    """Return a method in place of one of diffusers' that this pipeline cannot offer."""

    def method(self: Any, *arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError(f"HingePipeline has no {name}: {instead}")

    method.__name__, method.__doc__ = name, f"Raise NotImplementedError: {instead}."
    return method


_WHOLE = "it is one small model that computes as a whole; use pipe.to(device) and a smaller batch_size"
_NO_ATTENTION = "the backbone computes its attention itself"


class HingePipeline(DiffusionPipeline):
    """A denoiser and a scheduler that draw the expression of a slide's spots.

    Load one with `HingePipeline.from_pretrained`.

    Parameters
    ----------
    model
        With its backbone attached.
    scheduler
        As used in training.
    settings
        The panel, the encoder and the defaults, as `PipelineSettings.to_dict` writes them; None for a pipeline that
        draws from features alone (`draw_parts`, `hinge.diffusion.draw_spots`).
    """

    def __init__(
        self, model: HingeModel, scheduler: MaskedDiffusionScheduler, settings: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)
        self.register_to_config(settings=settings)
        self._load_backbone: Callable[[], ExpressionBackbone] | None = None
        self._model_digest: str | None = None
        self._encoder: Encoder | None = None

    @property
    def settings(self) -> PipelineSettings:
        """The panel, the encoder and the defaults.

        Raises
        ------
        ConfigError
            The pipeline was made without them.
        """
        if self.config.settings is None:
            raise ConfigError(
                "this pipeline knows no panel and no encoder: load one with HingePipeline.from_pretrained, or draw "
                "from features with hinge.diffusion.draw_spots"
            )
        return PipelineSettings.from_dict(json.loads(json.dumps(self.config.settings)))

    @property
    def genes(self) -> list[str]:
        """The symbols of the panel, in the order of the draws."""
        return list(self.settings.genes)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the backbone computes in; what was trained stays in float32."""
        return self.model.backbone.dtype

    @property
    def encoder(self) -> Encoder:
        """The histology encoder, loaded at first use; a WeightsError unless the model was trained with its weights."""
        if self._encoder is None:
            encoder, digest = load_encoder(self.settings.encoder), self.settings.encoder_digest
            if digest is not None and encoder.digest != digest:
                raise WeightsError(
                    f"the encoder {self.settings.encoder} has other weights than the model was trained with: digest "
                    f"{encoder.digest[:12]}, not {digest[:12]}"
                )
            self._encoder = encoder
        return self._encoder

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the pipeline to a device, or let the backbone compute in another type.

        Parameters
        ----------
        *args, **kwargs
            A device, `torch.float32` or `torch.bfloat16`, or both. The type is that of the backbone; trained parts,
            random numbers and quantiles keep theirs.
        """
        dtype = kwargs.pop("dtype", None) or next((each for each in args if isinstance(each, torch.dtype)), None)
        if dtype is not None and dtype not in PRECISIONS.values():
            raise ConfigError(f"the backbone computes in torch.float32 or torch.bfloat16, not in {dtype}")
        super().to(*[each for each in args if not isinstance(each, torch.dtype)], **kwargs)
        if dtype is not None and dtype != self.dtype:
            self._model_digest = self.model_digest
            self.model.backbone.to(dtype)
        return self

    # --- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | Path, torch_dtype: torch.dtype | None = None, revision: str | None = None
    ) -> Self:
        """Load a pipeline, on the CPU.

        Parameters
        ----------
        path
            The folder of a trained run, a folder that `save_pretrained` wrote, or `owner/name` on the Hugging Face Hub.
        torch_dtype
            Type that the backbone computes in; None: as the run samples.
        revision
            Branch, tag or commit of a repository.

        Raises
        ------
        DataError
            The folder holds no trained run and no pipeline, or a file is damaged.
        WeightsError
            Weights are missing, damaged, or of another backbone.
        """
        folder = hub.fetch(str(path), revision=revision) if hub.is_repository(path) else Path(path)
        index, is_run = folder / cls.config_name, (folder / "config.yaml").is_file()
        if not index.is_file() and not is_run:
            raise DataError(
                f"{folder} is the folder of no run and no pipeline: it has no config.yaml or model_index.json"
            )
        if not (folder / "model" / HingeModel.config_name).is_file():
            raise DataError(f"{folder} holds no trained model; run hinge train first")
        if index.is_file():
            content = read_json(index)
            settings = PipelineSettings.from_dict(content.get("settings") or {}, str(index))
            if is_run:  # the run's configuration may have been edited since
                config = read_run_config(folder)
                settings = replace(settings, sampling=sampling_of_run(config), precision=precision_of_run(config))
        else:
            settings = settings_of_run(folder)
        backbone = settings.backbone.load(folder)
        model = HingeModel.from_pretrained(folder / "model", backbone)
        if model.config.panel_digest not in (None, genes_digest(settings.genes)):
            named = index if index.is_file() else folder / "panel.json"
            raise DataError(
                f"{named} names other genes, or in another order, than the model was trained with: restore it"
            )
        backbone.float()  # whatever type the weights are stored in
        pipeline = cls(model, load_scheduler(folder), replace(settings, backbone=BackboneSource()).to_dict())
        pipeline._load_backbone = partial(settings.backbone.load, folder)
        return pipeline.to(torch_dtype or PRECISIONS[settings.precision])

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `model_index.json`, `model/`, `scheduler/` and `backbone/`, which `from_pretrained` reads.

        Raises
        ------
        WeightsError
            The backbone was changed since it was loaded, and its weights are no longer where they were; or a backbone
            that was trained along is rounded to bfloat16.
        """
        if self.model.config.tuning != "frozen" and self.dtype != torch.float32:
            raise WeightsError(
                "the trained backbone is rounded to bfloat16; load the pipeline with torch_dtype=torch.float32 to save"
            )
        with atomic_path(save_directory) as folder:
            folder.mkdir()
            self.save_config(folder)
            self.model.save_pretrained(folder / "model")
            self.scheduler.save_pretrained(folder / "scheduler")
            self._original_backbone().save_pretrained(folder / BACKBONE_FOLDER)

    def _original_backbone(self) -> ExpressionBackbone:
        """Return the backbone as it was before it was cast or tuned: the one that the model's digest names."""
        digest, attached = self.model.config.backbone_digest, self.model.backbone
        if self._load_backbone is not None:
            attached = self._load_backbone()
        if digest is not None and attached.digest() != digest:
            raise WeightsError(
                "the backbone cannot be saved: it is no longer the one the model was made for; load the pipeline with "
                "HingePipeline.from_pretrained"
            )
        return attached

    def push_to_hub(self, repo_id: str, private: bool = True, allow_licence: bool = False) -> str:
        """Upload what `save_pretrained` writes to `owner/name` on the Hugging Face Hub and return the address.

        `hinge push` uploads a run with a model card instead.

        Raises
        ------
        ConfigError
            The licence of the backbone, which is uploaded too, forbids sharing it, and `allow_licence` does not state
            that its authors gave permission; or the Hub refuses.
        """
        check_licence("the pipeline", recorded_licence(self.model.backbone.config.to_dict()), allow_licence)
        return hub.upload_saved(self.save_pretrained, repo_id, private)

    download = _not_offered("download", "HingePipeline.from_pretrained fetches a repository")
    from_pipe = _not_offered("from_pipe", "make one with HingePipeline(model, scheduler)")
    enable_model_cpu_offload = _not_offered("enable_model_cpu_offload", _WHOLE)
    enable_sequential_cpu_offload = _not_offered("enable_sequential_cpu_offload", _WHOLE)
    enable_group_offload = _not_offered("enable_group_offload", _WHOLE)
    enable_attention_slicing = _not_offered("enable_attention_slicing", _NO_ATTENTION)
    enable_xformers_memory_efficient_attention = _not_offered(
        "enable_xformers_memory_efficient_attention", _NO_ATTENTION
    )
    enable_freeu = _not_offered("enable_freeu", "it has no U-Net")
    fuse_qkv_projections = _not_offered("fuse_qkv_projections", "they are fused")

    # --- draws -----------------------------------------------------------------------------------

    def __call__(
        self,
        slide: AnnData,
        num_draws: int | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        observed: AnnData | str | Path | None = None,
        batch_size: int | None = None,
        features: np.ndarray | str | Path | None = None,
        genes: list[str] | None = None,
        progress: bool = True,
        patient: str | None = None,
        bulk: Bulk | None = None,
        bulk_sd: float | None = None,
        library_size: float | str | None = None,
        condition: Mapping[str, str] | None = None,
    ) -> AnnData:
        """Draw the expression of every spot of a slide.

        Parameters
        ----------
        slide
            From `hinge.read_slide`, with its image unless `features` are given.
        num_draws, seed, num_inference_steps, batch_size
            Draws of every spot, seed, reverse steps, and spot-draws in one forward pass; None: the pipeline's own.
        observed
            Measured counts of some genes in some or all spots, an h5ad file or its content: they are kept, and the rest
            is drawn given them. See `hinge.data.observed.read_observed`.
        features
            Features of the spots by the pipeline's encoder, as `hinge features` extracts them: an HDF5 file, or an
            array (n, d) in the order of the spots. None: extract them.
        genes
            Genes outside the panel that the backbone knows, to be drawn too: given each draw of the panel, by what the
            backbone and its expression prior know of the relation between genes. They follow the panel in the result,
            and `var["in_panel"]` is False.
        progress
            Whether to show a bar (only in a terminal).
        patient, bulk, bulk_sd, library_size
            What is known of the slide as a whole, see `hinge.diffusion.evidence.slide_evidence`.
        condition
            Category of condition tokens, `{"organ": "breast"}` or `"unknown"`; of others as the slide's metadata say.

        Returns
        -------
        AnnData
            What `hinge sample` writes: spots × genes in units of the run's transform, the mean of the draws in `X`,
            `layers["std"]`, `layers["expected"]`, `layers["draw_000"]` …, and in `uns["hinge"]` what is needed to
            repeat the draws.

        Raises
        ------
        DataError
            The slide has no image and no features are given, or a file does not fit.
        ConfigError
            More steps than the model was trained with, or the backbone does not know one of `genes`.
        """
        settings = self.settings
        outside = None if genes is None else self.outside_genes(genes)
        given = {
            "num_draws": num_draws,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "batch_size": batch_size,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        sampling = replace(settings.sampling, **changes)
        trained = self.scheduler.config.num_train_timesteps
        if not 1 <= sampling.num_inference_steps <= trained:
            raise ConfigError(
                f"{sampling.num_inference_steps} steps cannot be taken, the model was trained with {trained} timesteps"
            )
        panel = (settings.genes, settings.transform)
        measured, sizes = (None, None) if observed is None else read_observed(observed, slide, *panel)
        categories = self.categories(slide, condition)
        conditions, encoder, digest = self._conditions(slide, features, categories)
        patient = patient or settings.patients.get(slide_name(slide)) or patient_of_slide(slide)
        given_slide = (patient, bulk, bulk_sd, library_size, settings.shares, self.tokens, categories)
        evidence, known = slide_evidence(self.model, slide, self.genes, *given_slide)
        log_evidence(self.model, slide, known)
        inputs = self.with_slide_effect(SlideInputs.of_slide(slide, conditions, measured, sizes, evidence))
        values = np.zeros((sampling.num_draws, len(inputs), len(settings.genes)), dtype=np.float32)
        expected = np.zeros(values.shape[1:], dtype=np.float32)
        for part, draws in self.draw_parts(inputs, sampling, progress=progress):
            values[:, part], expected[part] = draws.values, draws.expected
        seen = "" if observed is None else observed_digest(observed)
        about = known | self.provenance(sampling, encoder, digest, seen, outside.genes if outside else None)
        if outside is not None:
            values, expected = outside.append(values, expected, inputs.spots, sampling)
        genes = settings.genes if outside is None else [*settings.genes, *outside.genes]
        return draws_of_slide(values, expected, slide, genes, about, inputs.levels(sampling), inputs.novelty())

    def with_slide_effect(self, inputs: SlideInputs) -> SlideInputs:
        """Return the inputs of a whole slide with its effect, given what is known of it."""
        return inputs.with_slide_effect(self.model, self.scheduler, torch.tensor(self.settings.gene_ids))

    def outside_genes(self, genes: list[str]) -> OutsideGenes:
        """Return the distribution of genes outside the panel given the panel; see `OutsideGenes.of_genes`."""
        known = self.settings
        ids = torch.tensor(known.gene_ids)
        return OutsideGenes.of_genes(self.model.backbone, self.genes, ids, genes, known.transform)

    def draw_parts(
        self,
        inputs: SlideInputs,
        sampling: SamplingSettings,
        parts: list[slice] | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[slice, Draws]]:
        """Draw the panel of a slide part by part; see `hinge.diffusion.sampler.draw_parts`."""
        gene_ids = torch.tensor(self.settings.gene_ids)
        return draw_parts(self.model, self.scheduler, gene_ids, inputs, sampling, parts, progress)

    def provenance(
        self,
        sampling: SamplingSettings,
        encoder: str,
        encoder_digest: str,
        observed: str = "",
        genes: list[str] | None = None,
    ) -> dict[str, Any]:
        """Return what is needed to repeat draws, for `uns["hinge"]` of their AnnData.

        Parameters
        ----------
        sampling
            How they are made.
        encoder, encoder_digest
            Name and digest of the encoder of the features.
        observed
            Digest of the measured values; empty without any.
        genes
            Genes outside the panel; None for none.
        """
        outside = {} if genes is None else {"outside_panel": list(genes)}
        return outside | {
            "transform": self.settings.transform,
            "seed": sampling.seed,
            "draws": sampling.num_draws,
            "steps": sampling.num_inference_steps,
            "observed": observed,
            "spatially_correlated": sampling.spatially_correlated,
            "remasking": sampling.remasking,
            "precision": next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype),
            "model_digest": self.model_digest,
            "backbone_digest": self.model.config.backbone_digest,
            "encoder": encoder,
            "encoder_digest": encoder_digest,
        }

    @property
    def model_digest(self) -> str:
        """SHA-256 over the trained weights, as they were before a cast."""
        return self._model_digest or self.model.digest()

    def _conditions(
        self, slide: AnnData, features: np.ndarray | str | Path | None, categories: Mapping[str, str | None]
    ) -> tuple[np.ndarray, str, str]:
        """Return features (n, d) as the model takes them, and name and digest of their encoder."""
        settings = self.settings
        array, name, digest = features_of_slide(settings, lambda: self.encoder, slide, features)
        conditions = slide_features(array, slide.obsm["spatial"], settings.neighbourhood, settings.standardise_slide)
        conditions = self.tokens.append(conditions, categories)[:, 0]
        if conditions.shape[1] != self.model.config.feature_dim:
            raise DataError(
                f"the model takes {self.model.config.feature_dim} features of a spot, these are {conditions.shape[1]}"
            )
        return conditions, name, digest or ""

    @property
    def tokens(self) -> ConditionTokens:
        """The categories of slides that are part of the condition."""
        return ConditionTokens(self.settings.tokens)

    def categories(self, slide: AnnData, condition: Mapping[str, str] | None = None) -> dict[str, str | None]:
        """Return the category of a slide for each condition token: as given, or else as its metadata say."""
        return categories_of_slide(slide, self.settings.tokens) | self.tokens.checked(condition or {})


def write_model_index(
    folder: Path,
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    encoder: Encoder,
    tokens: ConditionTokens | None = None,
) -> None:
    """Write `model_index.json` into the folder of a run whose model is trained: its panel, encoder and defaults."""
    settings = settings_of_run(folder)
    patch_um = encoder.patch_um if settings.patch_um is None else settings.patch_um
    settings = replace(
        settings, encoder_digest=encoder.digest, patch_um=patch_um, tokens={} if tokens is None else tokens.shares
    )
    pipeline = HingePipeline(model, scheduler, settings.to_dict())
    with atomic_path(folder / HingePipeline.config_name) as temporary:
        temporary.write_text(pipeline.to_json_string(), "utf-8")
