"""Weights in a folder or a file: what model they are of, and the model built of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from hinge.backbones.base import ExpressionBackbone, torch_dtype
from hinge.backbones.state_files import StateFile, fill_parameters, open_state
from hinge.utils import checksums, hub
from hinge.utils.errors import WeightsError, one_line

MODEL_TYPES = ("cellfm", "scgpt", "tahoe")

Model = TypeVar("Model", bound=ExpressionBackbone)


@dataclass(frozen=True)
class Weights:
    """Weights that were recognised; none of them is in memory.

    Attributes
    ----------
    state
        The file.
    config
        Of the model that they are of.
    sources
        For each of the model's parameters the names in the file that form it, concatenated along the first axis; empty
        if the file has none and it becomes zeros.
    """

    state: StateFile
    config: Any
    sources: dict[str, tuple[str, ...]]


def find_weights(path: str | Path) -> str | Path:
    """Return a path as it is, and the local folder of `owner/name` on the Hugging Face Hub."""
    return hub.find(path, "backbone") if hub.is_repository(path) else path


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a backbone folder (existing or not) rather than a published file."""
    return Path(path).is_dir() or not (Path(path).exists() or Path(path).suffix)


def holds_our_config(path: str | Path) -> bool:
    """Return whether a path is a folder with a `config.json`, as `save_pretrained` writes it.

    One that cannot be read counts, and one of another program does not.
    """
    try:
        content = json.loads((Path(path) / "config.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(content, dict) or content.get("model_type") in MODEL_TYPES


def read_our_config(folder: str | Path, *model_types: str) -> dict[str, Any]:
    """Return the content of `config.json` in the folder of a backbone.

    Raises
    ------
    WeightsError
        It is missing, damaged, or describes no model of these types.
    """
    try:
        content = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{folder} holds no backbone: config.json is missing") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"the backbone in {folder} cannot be read: config.json: {one_line(error)}") from None
    if not isinstance(content, dict) or content.get("model_type") not in model_types:
        raise WeightsError(
            f"the backbone in {folder} cannot be read: its config.json is not that of a {' or '.join(model_types)}"
        )
    return content


def read_own(folder: str | Path, config_class: type[PretrainedConfig], **options: Any) -> Weights:
    """Return the weights in a folder that `save_pretrained` or `hinge convert` wrote; an option None does not count.

    Raises
    ------
    WeightsError
        A file is missing or damaged, or the config is of another model.
    DataError
        A file has a checksum, and was changed since it was written.
    """
    checksums.verified(folder)
    given = {name: value for name, value in options.items() if value is not None}
    with built_from(folder):
        config = config_class.from_dict({**read_our_config(folder, config_class.model_type), **given})
    try:
        state = open_state(folder)
    except WeightsError as error:
        raise WeightsError(f"the backbone in {folder} cannot be read: {error}") from error
    return Weights(state, config, {name: (name,) for name in state.shapes})


@contextmanager
def built_from(path: str | Path) -> Iterator[None]:
    """Turn the errors of a damaged config into a WeightsError that names the path."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        ZeroDivisionError,
        OverflowError,
    ) as error:
        raise WeightsError(f"the backbone in {path} cannot be built: {one_line(error)}") from error


def build(cls: type[Model], weights: Weights, path: str | Path, dtype: torch.dtype | str | None) -> Model:
    """Return a model in eval mode with its weights, which are read one by one.

    Parameters
    ----------
    cls
        Class of the model.
    weights
        Its config and where its parameters are.
    path
        For errors.
    dtype
        Type of the parameters; None: the stored type.
    """
    dtype = torch_dtype(dtype)
    with built_from(path):
        if not 0 < weights.config.num_hidden_layers <= len(weights.state.shapes):
            raise ValueError(
                f"{len(weights.state.shapes)} tensors cannot hold {weights.config.num_hidden_layers:,} layers"
            )
        with torch.device("meta"):
            model = cls(weights.config)
    fill_parameters(model, weights.state, weights.sources, dtype)
    return model.eval()
