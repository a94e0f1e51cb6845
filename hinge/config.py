"""A run as a configuration: YAML file plus `key=value` overrides, checked before anything starts."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hinge.errors import ConfigError
from hinge.files import atomic_path


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataConfig(_Section):
    """Slides: which folder, and which samples in it do what."""

    path: Path
    format: str | None = None
    train: list[str] = Field(min_length=1)
    test: list[str] = []
    pretrain: list[str] = Field([], description="counts without images, for the expression backbone")

    @model_validator(mode="after")
    def _apart(self):
        for one, other in (("train", "test"), ("pretrain", "train"), ("pretrain", "test")):
            both = sorted(set(getattr(self, one)) & set(getattr(self, other)))
            if both:
                raise ValueError(f"{', '.join(both)} stand in both {one} and {other}; a slide can serve one of them")
        return self


class PanelConfig(_Section):
    """The genes that are predicted."""

    method: Literal["hmhvg", "hvg", "file"] = "hmhvg"
    genes: int = Field(200, ge=1)
    file: Path | None = Field(None, description="panel.json, or a text file with one symbol a line (method file)")


class FeaturesConfig(_Section):
    """Histology features."""

    encoder: str = "stain-texture"
    patch_um: float | None = Field(None, gt=0, description="side of a patch in µm; None: the encoder's own")
    views: Literal[1, 8] = 1
    batch_size: int = Field(64, ge=1)
    folder: Path | None = Field(None, description="where feature files lie; None: in the run's folder")


class BackboneConfig(_Section):
    """The expression model: pre-trained weights, or the size of one that is pre-trained here."""

    path: Path | None = Field(None, description="a pre-trained CellFM; None: pre-train one on data.pretrain")
    hidden_size: int = Field(128, ge=8)
    num_hidden_layers: int = Field(4, ge=2)
    num_attention_heads: int = Field(4, ge=1)
    num_value_bins: int = Field(64, ge=4)
    pretrain: dict[str, Any] = Field({}, description="see hinge.backbones.PretrainConfig")


class ModelConfig(_Section):
    """The denoiser; see hinge.models.HingeModel."""

    head: Literal["point", "gaussian", "censored_gaussian"] = "gaussian"
    modulation_rank: int | None = Field(None, ge=1)
    gate: Literal["sigmoid", "linear"] = "sigmoid"
    condition_on_visible: Literal["current", "next"] | None = "current"
    gene_path: bool = True
    num_factors: int = Field(8, ge=1)
    feature_dropout: float = Field(0.0, ge=0, lt=1)
    feature_noise: float = Field(0.0, ge=0)
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
    steps: int = Field(20, ge=1)
    seed: int = Field(0, ge=0)
    batch_size: int = Field(256, ge=1)


class RunConfig(_Section):
    """Everything one run needs."""

    output: Path
    seed: int = Field(0, ge=0)
    transform: Literal["log2p1", "log1p_cp10k"] = "log2p1"
    data: DataConfig
    panel: PanelConfig = PanelConfig()
    features: FeaturesConfig = FeaturesConfig()
    backbone: BackboneConfig = BackboneConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: dict[str, Any] = Field({}, description="see hinge.training.TrainingConfig")
    sampling: SamplingConfig = SamplingConfig()

    @field_validator("training")
    @classmethod
    def _training_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        from hinge.training import TrainingConfig

        return TrainingConfig(**value).model_dump(mode="json")

    @model_validator(mode="after")
    def _consistent(self):
        from hinge.backbones import PretrainConfig

        if self.backbone.path is None:
            if not self.data.pretrain:
                raise ValueError("give backbone.path, or samples to pre-train on as data.pretrain")
            self.backbone.pretrain = PretrainConfig(**self.backbone.pretrain).model_dump(mode="json")
        if self.panel.method == "file" and self.panel.file is None:
            raise ValueError("panel.method file needs panel.file")
        if self.sampling.steps > self.diffusion.num_train_timesteps:
            raise ValueError("sampling.steps cannot exceed diffusion.num_train_timesteps")
        return self


# where a path may stand in a configuration file
_PATHS = (("output",), ("data", "path"), ("panel", "file"), ("features", "folder"), ("backbone", "path"))


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
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, such as output: runs/mine")
    for keys in _PATHS:
        section = content
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(keys[-1]), str):
            section[keys[-1]] = str((path.parent / Path(section[keys[-1]]).expanduser()).resolve())
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override; write key=value, e.g. training.epochs=10")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key} is not YAML: {text!r}") from error
        keys = tuple(key.split("."))
        if keys in _PATHS and isinstance(value, str):
            value = str(Path(value).expanduser().resolve())
        section = content
        for part in keys[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key} cannot be set: {part} is not a section")
        section[keys[-1]] = value
    return check_config(content, str(path))


def check_config(content: dict[str, Any], name: str) -> RunConfig:
    """Validate a run's keys and values; a ConfigError names the first key that is wrong and what it takes."""
    try:
        return RunConfig(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the configuration"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"there is no such key; {_allowed_keys(first['loc'])}"
        elif first["type"] != "value_error" and not isinstance(first["input"], dict):
            message = f"{message[0].lower()}{message[1:]}, not {first['input']!r}"
        raise ConfigError(f"{name}: {where}: {message}") from error


def _allowed_keys(location: tuple) -> str:
    model: Any = RunConfig
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field is not None else None
    if not hasattr(model, "model_fields"):
        return "see the class named in the documentation of its section"
    return f"it takes {', '.join(model.model_fields)}"


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
