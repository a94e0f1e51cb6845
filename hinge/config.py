"""The settings of a run: what `config.yaml` may hold, checked before anything starts."""

import copy
import os
import reprlib
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hinge.diffusion.defaults import DEFAULT_BATCH_SIZE, DEFAULT_DRAWS, DEFAULT_STEPS
from hinge.evaluation.names import BASELINES, DEFAULT_BASELINES, DEFAULT_RESAMPLES, GENERATIVE_BASELINES
from hinge.models.options import HEADS, needs_library_size
from hinge.training.settings import PretrainConfig, TrainingConfig
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path
from hinge.utils.yaml import read_settings


# absolute, so that a run means the same files from whatever folder it is opened
def _absolute(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]

# where the published implementations of a backbone differ from each other
PUBLISHED_CONSTANTS = ("masked_input", "negative_slope", "layer_norm_eps", "attention")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """Slides: which folder, and which samples in it do what."""

    path: AbsolutePath = Field(description="a data set: file or folder with slides")
    format: str | None = Field(None, description="the name of its format; None: recognised")
    table: AbsolutePath | None = Field(
        None, description="a CSV file with a slide a row, in place of path; its column split says what serves what"
    )
    train: list[str] = Field(min_length=1, description="a list of samples")
    test: list[str] = Field([], description="a list of samples to draw and score")
    pretrain: list[str] = Field(
        [], description="samples with counts, images or not, for the expression backbone; none: the training slides"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_table(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("table"), str | Path):
            return content
        from hinge.data.readers.table import split_table  # imports anndata

        given = str(_absolute(content["table"]))
        if content.get("path") not in (None, given):
            raise ValueError("give either path or table")
        # a finished run names its slides itself, and opens wherever its table is
        try:
            splits = {} if content.get("train") else split_table(given)
        except DataError as error:
            raise ValueError(str(error)) from error
        return {**splits, **content, "table": given, "path": given}

    @model_validator(mode="after")
    def _apart(self):
        for key in ("train", "test", "pretrain"):
            names = getattr(self, key)
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{', '.join(repeated)} stands in {key} more than once")
        for one, other in (("train", "test"), ("pretrain", "train"), ("pretrain", "test")):
            both = sorted(set(getattr(self, one)) & set(getattr(self, other)))
            if both:
                raise ValueError(f"{', '.join(both)} stands in {one} and in {other}; a slide can serve one of them")
        return self


class PanelConfig(_Section):
    """The genes that are predicted."""

    method: Literal["hmhvg", "hvg", "file"] = Field(
        "hmhvg", description="hmhvg (high mean, highly variable), hvg (highly variable) or file"
    )
    genes: int = Field(200, ge=1, description="the number of genes")
    file: AbsolutePath | None = Field(
        None, description="panel.json, or a text file with one symbol a line (method file)"
    )


class FeaturesConfig(_Section):
    """Histology features."""

    encoder: str = Field(
        "stain-texture+efficientnet-lite0",
        description="efficientnet-lite0, stain-texture, a timm or hf-hub: name, or a checkpoint; + joins several",
    )
    pooling: Literal["stages"] | None = Field(
        None, description="stages for the mean of every stage or block of each network; null: the encoder's own pooling"
    )
    patch_um: float | None = Field(None, gt=0, description="side of a patch in µm; None: the encoder's own")
    views: Literal[1, 8] = Field(1, description="1, or 8 for all flips and quarter turns of a patch")
    neighbourhood: bool = Field(True, description="whether the mean over a spot and its neighbours is a condition too")
    standardise_slide: bool = Field(True, description="whether features are in units of their own slide's deviation")
    batch_size: int = Field(64, ge=1, description="the patches in one forward pass")
    folder: AbsolutePath | None = Field(None, description="where feature files lie; None: in the run's folder")


class BackboneConfig(_Section):
    """The expression model: pre-trained weights, or the size of one that is pre-trained here."""

    path: AbsolutePath | None = Field(
        None,
        description="a CellFM, scGPT or Tahoe-x1, published or a folder of hinge's; None: pre-train on data.pretrain",
    )
    vocabulary: AbsolutePath | None = Field(None, description="a table of the genes that the weights at path know")
    gene_names: AbsolutePath | None = Field(None, description="HGNC's table, to find genes under previous names")
    unknown_genes: Literal["drop", "new"] = Field(
        "drop", description="drop (from the panel) or new (a new embedding) for genes that the weights do not know"
    )
    masked_input: Literal["mask_token", "value_plus_zero_token"] | None = Field(
        None, description="what a masked gene enters as: mask_token or value_plus_zero_token; None: the weights' own"
    )
    negative_slope: float | None = Field(
        None, ge=0, lt=1, description="the slope of its leaky ReLU, from 0 to 1; None: the weights' own"
    )
    layer_norm_eps: float | None = Field(None, gt=0, description="a number above 0; None: the weights' own")
    attention: Literal["generative", "full"] | None = Field(
        None, description="generative (a masked gene sees visible ones) or full (all); None: the weights' own"
    )
    hidden_size: int = Field(128, ge=8, description="the width of a token")
    num_hidden_layers: int = Field(4, ge=2, description="the number of layers")
    num_attention_heads: int = Field(4, ge=1, description="the number of attention heads")
    num_value_bins: int = Field(64, ge=4, description="the number of soft bins that expression is embedded by")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained, or random for a backbone of the same size with random weights"
    )
    tuning: Literal["frozen", "full", "lora"] = Field(
        "frozen", description="which of its weights are trained: frozen (none), full (all) or lora (adapters)"
    )
    lora_rank: int = Field(8, ge=1, description="the rank of the adapters")
    pretrain: PretrainConfig = PretrainConfig()

    @model_validator(mode="after")
    def _divisible(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @model_validator(mode="after")
    def _of_given_weights(self):
        for key in ("vocabulary", *PUBLISHED_CONSTANTS):
            if self.path is None and getattr(self, key) is not None:
                raise ValueError(f"{key} says how to read given weights; it needs path")
        return self

    def architecture(self) -> dict[str, Any]:
        """Size of a CellFM that is pre-trained here."""
        return self.model_dump(include={"hidden_size", "num_hidden_layers", "num_attention_heads", "num_value_bins"})

    def constants(self) -> dict[str, Any]:
        """What shall be other than the weights say; arguments of `load_backbone`."""
        return self.model_dump(include=set(PUBLISHED_CONSTANTS), exclude_none=True)


class ModelConfig(_Section):
    """The denoiser; see hinge.models.HingeModel."""

    head: Literal[HEADS] = Field(  # type: ignore[valid-type]
        "rounded_gaussian", description=f"the distribution of a gene: {', '.join(HEADS)}"
    )
    library_size: bool | None = Field(
        None, description="whether a spot's library size is drawn before its genes; None: where the head needs it"
    )
    injection: Literal["soft_adaln", "adaln_zero", "concatenation", "cross_attention"] = Field(
        "soft_adaln", description="how the condition enters: soft_adaln, adaln_zero, concatenation or cross_attention"
    )
    modulation_rank: int | None = Field(None, ge=1, description="the rank of the modulation's matrices; None: full")
    gate: Literal["sigmoid", "linear"] = Field("sigmoid", description="the gate of SoftAdaLN: sigmoid or linear")
    norm: Literal["soft", "layer", "none"] = Field("soft", description="the norm of SoftAdaLN: soft, layer or none")
    start: Literal["identity", "random"] = Field(
        "identity", description="identity (the model starts as the backbone) or random"
    )
    condition_on_visible: Literal["current", "next"] | None = Field(
        "current", description="a condition on the visible share: current, next (after the step) or None"
    )
    gene_factors: bool = Field(True, description="whether a factor model predicts the masked genes from the features")
    masked_decoding: float = Field(
        0.0, ge=0, le=1, description="the weight of the backbone's decoder where no gene is visible"
    )
    standardise_features: bool = Field(True, description="whether features are in units of the training deviation")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="the share of features that training drops")
    dropout: float = Field(0.0, ge=0, lt=1, description="the share of values that dropout drops in the modulation")


class DiffusionConfig(_Section):
    """See hinge.diffusion.MaskedDiffusionScheduler."""

    num_train_timesteps: int = Field(50, ge=1, description="the number of timesteps")
    schedule: Literal["power", "linear", "cosine", "sqrt", "exp", "poly_auto"] = Field(
        "poly_auto", description="of the masked share: power, linear, cosine, sqrt, exp or poly_auto"
    )
    exponent: float = Field(1.0, gt=0, description="the exponent of the schedule power")
    reveal: Literal["budget", "bernoulli"] = Field(
        "budget", description="budget (a step reveals a fixed number of genes) or bernoulli (each gene independently)"
    )
    fill: Literal["zero", "noise", "mask_token"] = Field(
        "mask_token", description="what a masked gene is filled with: zero, noise or mask_token"
    )


class SamplingConfig(_Section):
    """How slides are sampled."""

    draws: int = Field(DEFAULT_DRAWS, ge=1, description="the number of draws of a slide")
    steps: int = Field(DEFAULT_STEPS, ge=1, description="the number of steps in which genes are revealed")
    seed: int = Field(0, ge=0, description="the seed of the draws")
    batch_size: int = Field(DEFAULT_BATCH_SIZE, ge=1, description="the spot-draws in one forward pass")
    spatially_correlated: bool = Field(True, description="whether the noise of a draw is smooth over the slide")
    remasking: int = Field(0, ge=0, description="the passes that mask a tenth of the genes again and draw them anew")
    precision: Literal["no", "bf16"] = Field("no", description="no for float32, or bf16 for the backbone")


class EvaluationConfig(_Section):
    """What draws are scored beside, and how."""

    baselines: list[Literal[*BASELINES, *GENERATIVE_BASELINES]] = Field(  # type: ignore[valid-type]
        list(DEFAULT_BASELINES), description=f"a list of {', '.join((*BASELINES, *GENERATIVE_BASELINES))}"
    )
    gene_sets: AbsolutePath | None = Field(
        None, description="a GMT or JSON file of gene sets; None: well-known markers of breast tumours"
    )
    bootstrap: int = Field(DEFAULT_RESAMPLES, ge=0, description="resamples of the spots for intervals")


class RunConfig(_Section):
    """Everything one run needs."""

    output: AbsolutePath = Field(description="the folder of the run")
    seed: int = Field(0, ge=0, description="the seed of everything but the draws")
    transform: Literal["log2p1", "log1p_cp10k"] = Field(
        "log2p1", description="of counts: log2p1, log2(count + 1), or log1p_cp10k, ln(1 + 10⁴ · count / library size)"
    )
    data: DataConfig
    panel: PanelConfig = PanelConfig()
    features: FeaturesConfig = FeaturesConfig()
    backbone: BackboneConfig = BackboneConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self):
        if self.training.steps is None and self.training.epochs is None:
            raise ValueError("give either training.steps or training.epochs")
        if self.model.library_size is False and needs_library_size(self.model.head, self.transform):
            raise ValueError(f"model.head {self.model.head} needs model.library_size under {self.transform}")
        if self.panel.method == "file" and self.panel.file is None:
            raise ValueError("panel.method file needs panel.file")
        if self.sampling.steps > self.diffusion.num_train_timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} cannot exceed diffusion.num_train_timesteps "
                f"{self.diffusion.num_train_timesteps}"
            )
        return self


# where a path may stand in a configuration file
PATHS = (
    ("output",),
    ("data", "path"),
    ("data", "table"),
    ("panel", "file"),
    ("features", "folder"),
    ("evaluation", "gene_sets"),
    ("backbone", "path"),
    ("backbone", "vocabulary"),
    ("backbone", "gene_names"),
)


def load_config(path: str | Path, overrides: list[str] | None = None, trained: bool = False) -> RunConfig:
    """Read a run's YAML file and apply overrides.

    Parameters
    ----------
    path
        YAML file. Relative paths in it are relative to the file's own folder.
    overrides
        `key=value` with dots for sections, e.g. `training.epochs=10`; values are YAML. Relative paths in them
        are relative to the working directory.
    trained
        Whether the run is trained: settings that were removed since are then ignored, whatever they were.

    Raises
    ------
    ConfigError
        One sentence that names the key and what it takes.
    """
    return check_config(read_settings(path, overrides, PATHS), str(path), trained)


def check_config(content: dict[str, Any], name: str, trained: bool = False) -> RunConfig:
    """Validate a run's keys and values; a ConfigError names the first key that is wrong and what it takes.

    Keys of version 0.1 are read with a DeprecationWarning. Relative paths are relative to the working directory.
    """
    try:
        return RunConfig.model_validate(_updated(content, name, trained))
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, RunConfig)}") from error


# keys of version 0.1, which version 0.2 still reads
RENAMED = {
    "features.neighbours": "neighbourhood",
    "model.gene_path": "gene_factors",
    "model.depth": "library_size",
    "training.closed_form_start": "initialisation",
    "sampling.coherent": "spatially_correlated",
    "sampling.corrections": "remasking",
}
# keys of version 0.1 that version 0.2 has no more, with the only value that may still stand there
REMOVED: dict[str, Any] = {
    "model.feature_noise": 0.0,
    "model.drop_masked": None,
    "model.num_factors": 8,
    "model.num_slide_factors": 4,
    "diffusion.beta": 3.0,
    "diffusion.tail": 1,
    "sampling.order": "random",
    "sampling.temperature": 1.0,
    "training.accumulation": 1,
    "training.decay_at": [0.5, 0.875],
    "training.decay_by": 0.2,
    "training.betas": [0.9, 0.999],
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "training.warm_start_masked_share": 0.2,
    "backbone.pretrain.epochs": None,
    "backbone.pretrain.accumulation": 1,
    "backbone.pretrain.schedule": "cosine",
    "backbone.pretrain.warmup_steps": 100,
    "backbone.pretrain.decay_at": [0.5, 0.875],
    "backbone.pretrain.decay_by": 0.2,
    "backbone.pretrain.betas": [0.9, 0.999],
    "backbone.pretrain.weight_decay": 0.0,
    "backbone.pretrain.max_grad_norm": 1.0,
    "backbone.pretrain.ema_decay": None,
    "backbone.pretrain.evaluate_from": 0.0,
    "backbone.pretrain.patience": None,
    "backbone.pretrain.tracker": "none",
    "backbone.pretrain.min_mask_ratio": 0.05,
    "backbone.pretrain.genes_per_step": 2048,
    "backbone.pretrain.validation_share": 0.1,
}


def _updated(content: dict[str, Any], name: str, trained: bool) -> dict[str, Any]:
    """Return settings with the keys of this version; one warning names those of version 0.1 among them.

    Raises
    ------
    ConfigError
        A key that is no more has a value with an effect.
    """
    content, notes = copy.deepcopy(content), []
    for key, new in RENAMED.items():
        section, old = _section_of(content, key)
        if section is not None and old in section:
            if new in section:
                raise ConfigError(f"{name}: {key} is now {new}; give one of them")
            section[new] = section.pop(old)
            notes.append(f"{key} is now {key.rpartition('.')[0]}.{new}")
    for key, neutral in REMOVED.items():
        section, old = _section_of(content, key)
        if section is None or old not in section or old in _section_class(key).model_fields:
            continue
        used = section[old] != neutral and not _without_effect(key, section)
        if used and not trained:
            raise ConfigError(f"{name}: {key} was removed and {section[old]!r} had an effect; leave it out")
        notes.append(f"{key} is ignored" + (f", it was {section[old]!r}" if used else ""))
        del section[old]
    if notes:
        warnings.warn(f"{name} has settings of version 0.1: {', '.join(notes)}", DeprecationWarning, stacklevel=4)
    return content


def _section_of(content: Any, key: str) -> tuple[dict[str, Any] | None, str]:
    """Return the section that a dotted key stands in, None where there is none, and the key's last part."""
    *parts, last = key.split(".")
    for part in parts:
        content = content.get(part) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None, last


def _section_class(key: str) -> type[BaseModel]:
    model: Any = RunConfig
    for part in key.split(".")[:-1]:
        model = model.model_fields[part].annotation
    return model


def _without_effect(key: str, section: dict[str, Any]) -> bool:
    """Return whether a removed key has no effect beside the other keys of its section."""
    if key.endswith(("decay_at", "decay_by")):
        return section.get("schedule") != "step"
    # tokens of masked genes are dropped where there are gene factors
    return key == "model.drop_masked" and section["drop_masked"] == section.get("gene_factors", True)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake in one sentence: which key of `model`, what it takes, what it was."""
    first = error.errors()[0]
    location, kind, message = first["loc"], first["type"], first["msg"]
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
    elif kind == "extra_forbidden":
        message = f"there is no such key; {_takes(model, location[:-1])}"
    elif kind == "missing":
        message = f"is missing; {_takes(model, location)}"
    elif kind == "model_type":
        message = f"{_takes(model, location)}, not {reprlib.repr(first['input'])}"
    elif kind == "path_type":
        message = f"it takes a path, not {reprlib.repr(first['input'])}"
    elif kind == "too_short":
        message = "it takes at least one item"
    else:
        message = f"{message[0].lower()}{message[1:]}, not {reprlib.repr(first['input'])}"
    return ": ".join([*filter(None, [".".join(str(part) for part in location)]), message])


def _takes(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What stands at a key: the keys of a section, or the description of a value."""
    description = None
    for part in location:
        field = model.model_fields[str(part)]
        model, description = field.annotation, field.description
    if description is not None:
        return f"it takes {description}"
    return f"it takes the keys {', '.join(model.model_fields)}"


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
