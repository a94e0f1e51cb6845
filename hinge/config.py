"""A run as a configuration: YAML file plus `key=value` overrides, checked before anything starts."""

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hinge.data.readers.table import split_table
from hinge.evaluation.baselines import BASELINES, DEFAULT_BASELINES, GENERATIVE_BASELINES
from hinge.models.heads import needs_library_size
from hinge.training import PretrainConfig, TrainingConfig
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path


# absolute, so that a run means the same files from whatever folder it is opened
def _absolute(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


# where the published implementations of CellFM differ from each other
PUBLISHED_CONSTANTS = ("masked_input", "negative_slope", "layer_norm_eps")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """Slides: which folder, and which samples in it do what."""

    path: AbsolutePath = Field(description="a data set: file or folder with slides")
    format: str | None = None
    table: AbsolutePath | None = Field(
        None, description="a CSV file with a slide a row, in place of path; its column split says what serves what"
    )
    train: list[str] = Field(min_length=1, description="a list of samples")
    test: list[str] = []
    pretrain: list[str] = Field(
        [], description="samples with counts, images or not, for the expression backbone; none: the training slides"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_table(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("table"), str | Path):
            return content
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

    method: Literal["hmhvg", "hvg", "file"] = "hmhvg"
    genes: int = Field(200, ge=1)
    file: AbsolutePath | None = Field(
        None, description="panel.json, or a text file with one symbol a line (method file)"
    )


class FeaturesConfig(_Section):
    """Histology features."""

    encoder: str = "stain-texture"
    patch_um: float | None = Field(None, gt=0, description="side of a patch in µm; None: the encoder's own")
    views: Literal[1, 8] = 1
    neighbourhood: bool = Field(True, description="whether the mean over a spot and its neighbours is a condition too")
    standardise_slide: bool = Field(True, description="whether features are in units of their own slide's deviation")
    batch_size: int = Field(64, ge=1)
    folder: AbsolutePath | None = Field(None, description="where feature files lie; None: in the run's folder")


class BackboneConfig(_Section):
    """The expression model: pre-trained weights, or the size of one that is pre-trained here."""

    path: AbsolutePath | None = Field(
        None,
        description="a pre-trained CellFM, published file or folder of hinge's; None: pre-train one on data.pretrain",
    )
    vocabulary: AbsolutePath | None = Field(None, description="a table of the genes that the weights at path know")
    gene_names: AbsolutePath | None = Field(None, description="HGNC's table, to find genes under previous names")
    unknown_genes: Literal["drop", "new"] = Field(
        "drop", description="drop (from the panel) or new (a new embedding) for genes that the weights do not know"
    )
    masked_input: Literal["mask_token", "value_plus_zero_token"] | None = None
    negative_slope: float | None = Field(None, ge=0, lt=1, description="a number from 0 to 1; None: the weights' own")
    layer_norm_eps: float | None = Field(None, gt=0, description="a number above 0; None: the weights' own")
    hidden_size: int = Field(128, ge=8)
    num_hidden_layers: int = Field(4, ge=2)
    num_attention_heads: int = Field(4, ge=1)
    num_value_bins: int = Field(64, ge=4)
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained, or random for a backbone of the same size that knows nothing"
    )
    tuning: Literal["frozen", "full", "lora"] = Field(
        "frozen", description="what of it is trained along: frozen (nothing), full (all) or lora (adapters)"
    )
    lora_rank: int = Field(8, ge=1)
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
        """What shall be other than the weights say; arguments of `CellFMModel.from_pretrained`."""
        return self.model_dump(include=set(PUBLISHED_CONSTANTS))


class ModelConfig(_Section):
    """The denoiser; see hinge.models.HingeModel."""

    head: Literal[
        "point",
        "gaussian",
        "censored_gaussian",
        "rounded_gaussian",
        "rounded_mixture",
        "negative_binomial",
        "zero_inflated_negative_binomial",
    ] = "rounded_gaussian"
    library_size: bool | None = Field(
        None,
        description="whether the spot's library size is drawn first and conditions the genes; None: where the head needs it",
    )
    injection: Literal["soft_adaln", "adaln_zero", "concatenation", "cross_attention"] = "soft_adaln"
    modulation_rank: int | None = Field(None, ge=1)
    gate: Literal["sigmoid", "linear"] = "sigmoid"
    norm: Literal["soft", "layer", "none"] = "soft"
    start: Literal["identity", "random"] = "identity"
    condition_on_visible: Literal["current", "next"] | None = "current"
    gene_factors: bool = True
    num_factors: int = Field(8, ge=1)
    num_slide_factors: int = Field(4, ge=1)
    masked_decoding: float = Field(
        0.0, ge=0, le=1, description="how much of what the backbone decodes counts where no gene is visible"
    )
    standardise_features: bool = True
    feature_dropout: float = Field(0.0, ge=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class DiffusionConfig(_Section):
    """See hinge.diffusion.MaskedDiffusionScheduler."""

    num_train_timesteps: int = Field(50, ge=1)
    schedule: Literal["power", "linear", "cosine", "sqrt", "exp", "poly_auto"] = "poly_auto"
    exponent: float = Field(1.0, gt=0)
    beta: float = Field(3.0, gt=0)
    tail: int = Field(1, ge=1)
    reveal: Literal["budget", "bernoulli"] = "budget"
    fill: Literal["zero", "noise", "mask_token"] = "mask_token"


class SamplingConfig(_Section):
    """How slides are sampled."""

    draws: int = Field(20, ge=1)
    steps: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)
    batch_size: int = Field(256, ge=1)
    spatially_correlated: bool = Field(True, description="whether the spots of a draw agree with their neighbours")
    order: Literal["random", "dependence", "confidence"] = "random"
    remasking: int = Field(0, ge=0, description="passes that mask and draw a tenth of the genes again")
    temperature: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16"] = "no"


class EvaluationConfig(_Section):
    """What draws are scored beside, and how."""

    baselines: list[Literal[*BASELINES, *GENERATIVE_BASELINES]] = Field(  # type: ignore[valid-type]
        list(DEFAULT_BASELINES), description=f"a list of {', '.join((*BASELINES, *GENERATIVE_BASELINES))}"
    )
    gene_sets: AbsolutePath | None = Field(
        None, description="a GMT or JSON file of gene sets; None: well-known markers of breast tumours"
    )
    bootstrap: int = Field(300, ge=0, description="resamples of the spots for intervals")


class RunConfig(_Section):
    """Everything one run needs."""

    output: AbsolutePath = Field(description="the folder of the run")
    seed: int = Field(0, ge=0)
    transform: Literal["log2p1", "log1p_cp10k"] = "log2p1"
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


_MOST_YAML_BYTES, _MOST_YAML_VALUES = 1 << 18, 100_000

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


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML file and apply overrides.

    Parameters
    ----------
    path
        YAML file. Relative paths in it are relative to the file's own folder.
    overrides
        `key=value` with dots for sections, e.g. `training.epochs=10`; values are YAML. Relative paths in them
        are relative to the working directory.

    Raises
    ------
    ConfigError
        One sentence that names the key and what it takes.
    """
    return check_config(read_settings(path, overrides, PATHS), str(path))


def read_settings(
    path: str | Path, overrides: list[str] | None = None, paths: Sequence[tuple[str, ...]] = ()
) -> dict[str, Any]:
    """Read a YAML file of keys and values and apply overrides, as `load_config`; `paths` are keys that hold paths."""
    path = Path(path)
    try:
        content = parse_yaml(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, such as output: runs/mine")
    for keys in paths:
        section = content
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(keys[-1]), str):
            section[keys[-1]] = str(path.absolute().parent / os.path.expanduser(section[keys[-1]]))
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override; write key=value, e.g. training.epochs=10")
        try:
            value = parse_yaml(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"the value of {key} is not YAML: {text!r}") from error
        keys = key.split(".")
        section = content
        for part in keys[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key} cannot be set: {part} is not a section")
        section[keys[-1]] = value
    return content


def parse_yaml(text: bytes | str) -> Any:
    """What a YAML text says, of plain values alone.

    Raises
    ------
    ValueError, RecursionError, yaml.YAMLError
        It is not YAML, or far too large; also by aliases, of which nine levels of nine make a thousand million values.
    """
    if len(text) > _MOST_YAML_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, and no settings have more than {_MOST_YAML_BYTES:,}")
    content = yaml.safe_load(text)
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = None
            parts = [*node.keys(), *node.values()] if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
        known = sizes[id(node)]
        if known is None or known > _MOST_YAML_VALUES:
            raise ValueError("its aliases make it contain itself, or too many values")
        return known

    size(content)
    return content


def check_config(content: dict[str, Any], name: str) -> RunConfig:
    """Validate a run's keys and values; a ConfigError names the first key that is wrong and what it takes.

    Relative paths are relative to the working directory.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, RunConfig)}") from error


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
