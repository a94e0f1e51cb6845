"""Load an expression backbone by path, whatever model it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from hinge.backbones.base import ExpressionBackbone
from hinge.backbones.cellfm import CellFMModel
from hinge.backbones.cellfm_config import CellFMConfig
from hinge.backbones.packaged import PACKAGED
from hinge.backbones.published_cellfm import read_cellfm
from hinge.backbones.published_scgpt import is_scgpt, read_scgpt
from hinge.backbones.published_tahoe import is_tahoe, read_tahoe
from hinge.backbones.scgpt import ScGPTModel
from hinge.backbones.tahoe import TahoeModel
from hinge.backbones.transformer_config import ScGPTConfig, TahoeConfig
from hinge.backbones.weights import Weights, build, find_weights, holds_our_config, is_folder, read_our_config
from hinge.utils.errors import ConfigError, WeightsError

VALUE_BINS = 64
"""Number of soft bins of a CellFM that is pre-trained here."""

MODELS: dict[str, type[ExpressionBackbone]] = {"cellfm": CellFMModel, "scgpt": ScGPTModel, "tahoe": TahoeModel}
_READERS: dict[str, Callable[..., Weights]] = {"cellfm": read_cellfm, "scgpt": read_scgpt, "tahoe": read_tahoe}
_OPTIONS = {
    "cellfm": (
        "num_attention_heads",
        "technical_tokens",
        "zero_input",
        "masked_input",
        "negative_slope",
        "layer_norm_eps",
    ),
    "scgpt": ("attention",),
    "tahoe": ("attention",),
}


def random_backbone(config: PretrainedConfig, seed: int) -> ExpressionBackbone:
    """Return a backbone of a configuration with the random weights that pre-training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[config.model_type](config)


def load_backbone(path: str | Path, dtype: torch.dtype | str | None = None, **options: Any) -> ExpressionBackbone:
    """Load an expression backbone, frozen and in eval mode, on the CPU.

    Parameters
    ----------
    path
        `hinge-cellfm-mini` (values log1p(cp10k)) or `hinge-cellfm-mini-log2p1`, which are part of this package; a
        folder that `save_pretrained` or `hinge convert` wrote, `owner/name` on the Hugging Face Hub, or published
        weights: a file of CellFM (see `CellFMModel.from_pretrained`), a folder of scGPT or scGPT-spatial
        (`best_model.pt`, `args.json`, `vocab.json`), or a folder of Tahoe-x1 (`model.safetensors`,
        `model_config.yml`, `vocab.json`).
    dtype
        Type of the weights; None: the stored type.
    options
        For CellFM further arguments of `CellFMModel.from_pretrained`; for scGPT and Tahoe-x1 `attention`,
        `"generative"` or `"full"`. None does not count.

    Returns
    -------
    ExpressionBackbone
        A `transformers.PreTrainedModel` whose parameters take no gradient.

    Raises
    ------
    WeightsError
        The weights are missing, damaged or of another model.
    ConfigError
        An option is missing or does not fit the file.
    """
    path = PACKAGED.get(str(path)) or find_weights(path)
    kind, weights = read_weights(path, **options)
    return build(MODELS[kind], weights, path, dtype).requires_grad_(False)


def read_config(path: str | Path, **options: Any) -> Any:
    """Return size and variant of a backbone without reading its weights; arguments and errors as `load_backbone`."""
    return read_weights(path, **options)[1].config


def new_config(
    architecture: str,
    transform: str,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    attention: str | None = None,
) -> Any:
    """Return the configuration of a backbone that is to be pre-trained; its `set_genes` gives it a vocabulary.

    Parameters
    ----------
    architecture
        A name in `MODELS`.
    transform
        Transform of the values of a CellFM. The others take ranks of counts, which are the same for all transforms.
    hidden_size, num_hidden_layers, num_attention_heads
        The feed-forward networks are as wide as a token in scGPT, and four times as wide in Tahoe-x1, as published.
    attention
        `"generative"` or `"full"`, for scGPT and Tahoe-x1; None: generative.

    Raises
    ------
    ConfigError
        The architecture has no `attention`.
    """
    size: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }
    if attention is not None:
        if "attention" not in _OPTIONS[architecture]:
            raise ConfigError(f"a {architecture} has no attention to choose; leave it out (backbone.attention)")
        size["attention"] = attention
    if architecture == "cellfm":
        return CellFMConfig(transform=transform, num_value_bins=VALUE_BINS, **size)
    if architecture == "scgpt":
        # the flags of masked genes are part of the generative pattern
        return ScGPTConfig(intermediate_size=hidden_size, with_flag=attention != "full", **size)
    return TahoeConfig(intermediate_size=4 * hidden_size, **size)


def recognise(path: str | Path) -> str:
    """Return which model a folder or file holds: `cellfm`, `scgpt` or `tahoe`.

    Raises
    ------
    WeightsError
        The folder holds none.
    """
    if not holds_our_config(path):
        if is_scgpt(path):
            return "scgpt"
        if is_tahoe(path):
            return "tahoe"
        if Path(path).is_dir() and not (Path(path) / "config.json").exists():
            raise WeightsError(
                f"{path} holds no backbone: config.json is missing, as are args.json of scGPT and model_config.yml of "
                "Tahoe-x1"
            )
    return str(read_our_config(path, *MODELS)["model_type"]) if is_folder(path) else "cellfm"


def read_weights(path: str | Path, **options: Any) -> tuple[str, Weights]:
    """Return which model a folder or file holds, and its weights, of which none is read yet.

    Arguments and errors are those of `load_backbone`.
    """
    kind = recognise(path)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in _OPTIONS[kind]:
            raise ConfigError(f"{path} holds a {kind}, which has no {name}; it takes {', '.join(_OPTIONS[kind])}")
    return kind, _READERS[kind](path, **given)
