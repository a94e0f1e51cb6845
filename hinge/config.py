"""The settings of a run: what `config.yaml` may hold, checked before anything starts."""

import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from hinge.diffusion.defaults import DEFAULT_DRAWS, DEFAULT_STEPS
from hinge.encoders.names import with_pooling
from hinge.evaluation.names import BASELINES, DEFAULT_BASELINES, DEFAULT_RESAMPLES, GENERATIVE_BASELINES
from hinge.models.options import DEFAULT_HEAD, DEFAULT_TRANSFORM, HEADS
from hinge.training.settings import Precision, PretrainConfig, TrainingConfig
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path
from hinge.utils.former_settings import update_settings
from hinge.utils.settings import LARGEST_SEED, Settings
from hinge.utils.yaml import read_settings


# absolute, so that a run refers to the same files from every working directory
def _absolute(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


# the published implementations of a backbone differ in these
PUBLISHED_CONSTANTS = ("masked_input", "negative_slope", "layer_norm_eps", "attention")


class DataConfig(Settings):
    """Slides: which folder, and which samples in it do what."""

    path: AbsolutePath = Field(
        description="a data set: a folder or file of slides, or a CSV table of them, whose column split may take the "
        "place of train, test and pretrain"
    )
    format: str | None = Field(None, description="the name of its format; null: recognised")
    images: dict[str, AbsolutePath] = Field(
        {}, description="full-resolution images by sample, where the data set has none or another is meant"
    )
    um_per_px: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="µm per full-resolution pixel by sample, where the data set does not state it"
    )
    spot_um: float | None = Field(
        None, gt=0, description="side in µm of the pseudo-spots that cells are pooled in; null: each cell is a spot"
    )
    train: list[str] = Field(min_length=1, description="a list of training samples")
    test: list[str] = Field([], description="a list of samples to draw and score")
    pretrain: list[str] = Field(
        [],
        description="a list of samples to pre-train the backbone on, with or without images; []: those of train",
    )
    train_spots: int | None = Field(
        None, ge=10, description="the number of training spots, a random choice from all of train; null: all"
    )
    patient_prefix: int | None = Field(
        None,
        ge=1,
        description="how many first characters of a sample's name are its patient; null: every sample is a patient",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_table(cls, content: Any) -> Any:
        path = content.get("path") if isinstance(content, dict) else None
        # the configuration in the folder of a run names all slides: it opens where the table is missing
        if not isinstance(path, str | Path) or Path(path).suffix.lower() != ".csv" or content.get("train"):
            return content
        from hinge.data.readers.table import split_table  # imports anndata

        try:
            return {**split_table(_absolute(path)), **content}
        except DataError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _apart(self):
        for key in ("train", "test", "pretrain"):
            names = getattr(self, key)
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{key} lists {', '.join(repeated)} more than once")
        for one, other in (("train", "test"), ("pretrain", "train"), ("pretrain", "test")):
            both = sorted(set(getattr(self, one)) & set(getattr(self, other)))
            if both:
                raise ValueError(f"{one} and {other} both list {', '.join(both)}; a slide can be in one of them")
        return self


class PanelConfig(Settings):
    """The genes that are predicted."""

    method: Literal["hmhvg", "hvg", "union", "file"] = Field(
        "hmhvg",
        description="hmhvg (high mean, highly variable), hvg (highly variable), union (genes that some training slides "
        "may lack) or file",
    )
    genes: int | None = Field(200, ge=1, description="the number of genes; null: all that union finds")
    min_slides: int | None = Field(
        None,
        ge=1,
        description="the smallest number of training slides that have a gene, for union or file; null: 1 for union, "
        "all training slides for file",
    )
    file: AbsolutePath | None = Field(
        None, description="panel.json, or a text file with one symbol a line (method file)"
    )


class FeaturesConfig(Settings):
    """Histology features."""

    encoder: str = Field(
        "stain-texture+efficientnet-lite0",
        description="efficientnet-lite0, stain-texture, a timm or hf-hub: name, or a checkpoint; + joins several",
    )
    pooling: Literal["stages"] | None = Field(
        None, description="stages for the mean of every stage or block of each network; null: the encoder's own pooling"
    )
    patch_um: float | None = Field(None, gt=0, description="the side of a patch in µm; null: the encoder's default")
    views: Literal[1, 8] = Field(1, description="1, or 8 for all flips and quarter turns of a patch")
    neighbourhood: bool = Field(
        True, description="whether the mean over a spot and its neighbours is part of the condition"
    )
    standardise_slide: bool = Field(
        True, description="whether features are standardised in each slide, and again over the training spots"
    )
    folder: AbsolutePath | None = Field(None, description="the folder of feature files; null: features in the run's")

    @property
    def encoder_name(self) -> str:
        """The name for `load_encoder`, with the pooling."""
        return with_pooling(self.encoder, self.pooling)


class ConditionConfig(Settings):
    """What is known of whole slides and is part of the condition."""

    tokens: list[str] = Field(
        [],
        description="a list of categorical columns of the table of slides, or of the metadata of samples, such as "
        "organ and technology",
    )


class BackboneConfig(Settings):
    """The expression model: pre-trained weights, or the size of one that is pre-trained here."""

    path: AbsolutePath | None = Field(
        None,
        description="weights of CellFM, scGPT or Tahoe-x1, published or in a folder that hinge wrote; null: pre-train "
        "one on data.pretrain, or, without these, start from hinge-cellfm-mini",
    )
    vocabulary: AbsolutePath | None = Field(None, description="a table of the genes in the vocabulary of the weights")
    gene_names: AbsolutePath | None = Field(None, description="HGNC's table, to find genes by previous symbols")
    unknown_genes: Literal["drop", "new"] = Field(
        "drop", description="drop (from the panel) or new (a new embedding) for genes outside the vocabulary"
    )
    masked_input: Literal["mask_token", "value_plus_zero_token"] | None = Field(
        None, description="the input of a masked gene: mask_token or value_plus_zero_token; null: as in the weights"
    )
    negative_slope: float | None = Field(
        None, ge=0, lt=1, description="the slope of the leaky ReLU, from 0 to 1; null: as in the weights"
    )
    layer_norm_eps: float | None = Field(None, gt=0, description="a number above 0; null: as in the weights")
    attention: Literal["generative", "full"] | None = Field(
        None,
        description="generative (masked genes attend to visible genes) or full (to all); null: as in the weights",
    )
    architecture: Literal["cellfm", "scgpt", "tahoe"] = Field(
        "cellfm", description="of a backbone that is pre-trained here: cellfm, scgpt or tahoe"
    )
    hidden_size: int = Field(64, ge=8, description="the width of a token")
    num_hidden_layers: int = Field(4, ge=2, description="the number of layers")
    num_attention_heads: int = Field(4, ge=1, description="the number of attention heads")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained, or random for a backbone of the same size with random weights"
    )
    tuning: Literal["frozen", "full", "lora"] = Field(
        "frozen", description="which weights of the backbone are trained: frozen (none), full (all) or lora (adapters)"
    )
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
        if self.path is not None:
            if self.architecture != "cellfm":
                raise ValueError("architecture is for a backbone that is pre-trained here and does not go with path")
            return self
        for key in ("vocabulary", *PUBLISHED_CONSTANTS):
            if getattr(self, key) is not None and not (key == "attention" and self.architecture != "cellfm"):
                raise ValueError(f"{key} is for given weights and needs path")
        return self

    @model_validator(mode="after")
    def _prior_of_cellfm(self):
        if self.architecture != "cellfm":
            if self.pretrain.expression_prior and "expression_prior" in self.pretrain.model_fields_set:
                raise ValueError(
                    f"pretrain.expression_prior is of the architecture cellfm; {self.architecture} has none"
                )
            self.pretrain = self.pretrain.model_copy(update={"expression_prior": False})
        return self

    def size(self) -> dict[str, Any]:
        """Architecture and size of a backbone that is pre-trained here; arguments of `new_config`."""
        keys = {"architecture", "hidden_size", "num_hidden_layers", "num_attention_heads", "attention"}
        return self.model_dump(include=keys)

    def constants(self) -> dict[str, Any]:
        """Constants that replace those of the weights; arguments of `load_backbone`."""
        return self.model_dump(include=set(PUBLISHED_CONSTANTS), exclude_none=True)


class ModelConfig(Settings):
    """The denoiser; see hinge.models.HingeModel."""

    head: Literal[HEADS] = Field(  # type: ignore[valid-type]
        DEFAULT_HEAD, description=f"the distribution of a gene: {', '.join(HEADS)}"
    )
    injection: Literal["soft_adaln", "adaln_zero", "concatenation", "cross_attention"] = Field(
        "soft_adaln", description="how the condition enters: soft_adaln, adaln_zero, concatenation or cross_attention"
    )
    modulation_rank: int | None = Field(None, ge=1, description="the rank of the modulation matrices; null: full rank")
    gate: Literal["sigmoid", "linear"] = Field("sigmoid", description="the gate of SoftAdaLN: sigmoid or linear")
    norm: Literal["soft", "layer", "none"] = Field("soft", description="the norm of SoftAdaLN: soft, layer or none")
    start: Literal["identity", "random"] = Field(
        "identity", description="identity (the model starts as the backbone) or random"
    )
    condition_on_visible: Literal["current", "next"] | None = Field(
        "current", description="a condition on the visible share: current, next (after the step) or null"
    )
    gene_factors: bool = Field(True, description="whether a factor model predicts the masked genes from the features")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="the dropout rate of the features")
    dropout: float = Field(0.0, ge=0, lt=1, description="the dropout rate in the modulation")


class DiffusionConfig(Settings):
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


class SamplingConfig(Settings):
    """How slides are sampled."""

    draws: int = Field(DEFAULT_DRAWS, ge=1, description="the number of draws of a slide")
    steps: int = Field(DEFAULT_STEPS, ge=1, description="the number of steps in which genes are revealed")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="the seed of the draws")
    spatially_correlated: bool = Field(True, description="whether the noise of a draw is smooth over the slide")
    remasking: int = Field(0, ge=0, description="the number of passes that mask a tenth of the genes and redraw them")
    precision: Precision = Field("no", description="no for float32, or bf16 for the backbone")


class EvaluationConfig(Settings):
    """Baselines and scores."""

    baselines: list[Literal[*BASELINES, *GENERATIVE_BASELINES]] = Field(  # type: ignore[valid-type]
        list(DEFAULT_BASELINES), description=f"a list of {', '.join((*BASELINES, *GENERATIVE_BASELINES))}"
    )
    gene_sets: AbsolutePath | None = Field(
        None, description="a GMT or JSON file of gene sets; null: markers of breast tumours"
    )
    bootstrap: int = Field(DEFAULT_RESAMPLES, ge=0, description="the number of bootstrap resamples of the spots")


class RunConfig(Settings):
    """Everything one run needs."""

    output: AbsolutePath = Field(description="the folder of the run")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="the seed of everything but the draws")
    transform: Literal["log2p1", "log1p_cp10k"] = Field(
        DEFAULT_TRANSFORM,
        description="of counts: log2p1, log2(count + 1), or log1p_cp10k, ln(1 + 10⁴ · count / library size)",
    )
    data: DataConfig
    panel: PanelConfig = PanelConfig()
    features: FeaturesConfig = FeaturesConfig()
    condition: ConditionConfig = ConditionConfig()
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
        if self.panel.method == "file" and self.panel.file is None:
            raise ValueError("panel.method file needs panel.file")
        if self.panel.method not in ("union", "file") and self.panel.min_slides is not None:
            raise ValueError("panel.min_slides is for panel.method union or file")
        if self.panel.method in ("hmhvg", "hvg") and self.panel.genes is None:
            raise ValueError(f"panel.method {self.panel.method} needs a number as panel.genes; null is for union")
        if (self.panel.min_slides or 1) > len(self.data.train):
            raise ValueError(
                f"panel.min_slides {self.panel.min_slides} exceeds the {len(self.data.train)} training slides"
            )
        if self.training.store == "disk" and self.data.train_spots is not None:
            raise ValueError("data.train_spots is for training.store memory, and not for disk, which has all spots")
        if self.condition.tokens and not self.features.standardise_slide:
            raise ValueError("condition.tokens needs features.standardise_slide: true")
        if len(set(self.condition.tokens)) < len(self.condition.tokens):
            raise ValueError("condition.tokens names a token more than once")
        if self.sampling.steps > self.diffusion.num_train_timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} cannot exceed diffusion.num_train_timesteps "
                f"{self.diffusion.num_train_timesteps}"
            )
        return self


# keys that hold paths
PATHS = (
    ("output",),
    ("data", "path"),
    ("data", "table"),  # of version 0.1
    ("data", "images"),
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
        Whether the run is trained: removed keys are then ignored with a warning, whatever their values.

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
        return RunConfig.model_validate(update_settings(content, name, trained))
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, RunConfig)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first mistake in one sentence: the key of `model`, what it takes, and its value."""
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
    """Return what a key takes: the keys of a section, or the description of a value."""
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
