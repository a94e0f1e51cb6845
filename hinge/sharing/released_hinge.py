"""Read and write checkpoints of the authors' HINGE code, `{"model": state dict}`.

Such a file contains the frozen backbone and the trained conditioning layers. This package stores the backbone apart
(`hinge.backbones`), and the rest as a HingeModel. The conversion changes no value, in either direction.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hinge.backbones.cellfm import CellFMModel
from hinge.backbones.published_cellfm import PublishedCellFM, export_cellfm, read_published
from hinge.models.hinge import HingeModel
from hinge.utils.errors import ConfigError, WeightsError
from hinge.utils.files import atomic_path
from hinge.utils.weights import check_weights

logger = logging.getLogger(__name__)

# settings of the released code
RELEASED_MODEL = {
    "head": "point",
    "modulation_rank": None,
    "condition_on_visible": "next",
    "gene_factors": False,
    "standardise_features": False,
    "dropout": 0.1,
}
# fixed in the released code
_RELEASED_ELSE = {"injection": "soft_adaln", "norm": "soft", "library_size": False}
_GENE_IDS = "gg"


@dataclass(frozen=True)
class ImportedHinge:
    """The content of a checkpoint of the authors' code.

    Attributes
    ----------
    model
        With its backbone attached, in eval mode.
    gene_ids
        int64 (G,), the panel's ids in the vocabulary.
    """

    model: HingeModel
    gene_ids: Tensor


def conditioning_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Return, for each trained tensor, the tensors of the authors' code that are concatenated along its first axis."""
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in (("time", "time"), ("features", "label"), ("visible", "mask")):
        for k in "02":
            for kind in ("weight", "bias"):
                names[f"condition.{ours}.{k}.{kind}"] = (f"cond_embed.{theirs}.{k}.{kind}",)
    layers = [f"retentionblocks.{k}" for k in range(num_layers)]
    for kind in ("weight", "bias"):
        names[f"modulation.{kind}"] = (*(f"{layer}.adaln.proj.{kind}" for layer in layers), f"final_layer.proj.{kind}")
    names["modulation.norm_mix"] = tuple(f"{layer}.pre_norm{n}._lambda_bias" for layer in layers for n in "12")
    names["modulation.norm_mix_decoder"] = ("final_layer.pre_norm._lambda_bias",)
    return names


def import_hinge(
    path: str | Path,
    gate: str | None = None,
    num_attention_heads: int | None = None,
    backbone: CellFMModel | None = None,
) -> ImportedHinge:
    """Read a checkpoint of the authors' HINGE code.

    Parameters
    ----------
    path
        The `.pth` file, read with `weights_only=True`; or safetensors with the same names.
    gate
        `"sigmoid"` or `"linear"`; None to infer it from the biases of the gates, which are initialised to 6 and to 1
        and change little in training.
    num_attention_heads
        Needed unless the width is 1536.
    backbone
        The backbone of the same file, if it is loaded already.

    Raises
    ------
    WeightsError
        The file is not such a checkpoint, or is incomplete.
    ConfigError
        `num_attention_heads` or `gate` is needed.
    """
    published = read_hinge(path, num_attention_heads)
    state = {name.removeprefix(published.prefix): name for name in published.state.shapes}
    size = published.config["num_hidden_layers"], published.config["hidden_size"]
    names = conditioning_names(size[0])
    if "cond_embed.mask.0.weight" not in state:  # conditioned on time and features alone
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("condition.visible.")}
    missing = [name for theirs in [*names.values(), (_GENE_IDS,)] for name in theirs if name not in state]
    if missing:
        raise WeightsError(
            f"{path} is an incomplete checkpoint of the HINGE code: {len(missing):,} tensors are missing, e.g. "
            f"{missing[0]}"
        )
    used = {name for theirs in names.values() for name in theirs} | {_GENE_IDS}
    used |= {name.removeprefix(published.prefix) for theirs in published.sources.values() for name in theirs}
    unused = sorted(state.keys() - used)
    if unused:
        logger.info("%s: %d tensors are not used, e.g. %s", path, len(unused), unused[0])

    def read(name: str) -> Tensor:
        return published.state.read(state[name]).clone()

    gene_ids = read(_GENE_IDS).long()
    biases = torch.stack([read(name) for name in names["modulation.bias"][:-1]]).view(size[0], 6, size[1])
    model = HingeModel.from_backbone(
        backbone or CellFMModel.from_pretrained(path, num_attention_heads=num_attention_heads),
        feature_dim=published.state.shapes[state["cond_embed.label.0.weight"]][1],
        num_genes=len(gene_ids),
        gate=gate or _infer_gate(biases[:, 2::3], path),
        transform=None,
        **{**RELEASED_MODEL, "condition_on_visible": "next" if "cond_embed.mask.0.weight" in state else None},
    )
    own = model.state_dict()
    for ours, theirs in names.items():
        parts = [read(name) for name in theirs]
        check_weights(dict(zip(theirs, parts, strict=True)), path)
        joined = parts[0] if len(parts) == 1 else torch.stack(parts) if parts[0].ndim == 0 else torch.cat(parts)
        if joined.numel() != own[ours].numel():
            raise WeightsError(
                f"{path}: {theirs[0]} does not fit a model of width {size[1]:,} and {len(gene_ids):,} genes"
            )
        own[ours] = joined.view(own[ours].shape)
    model.load_state_dict(own)
    return ImportedHinge(model.eval(), gene_ids)


def export_hinge(model: HingeModel, gene_ids: Tensor) -> dict[str, Tensor]:
    """Return the state dict of a model, backbone included, in the format of the authors' code.

    Raises
    ------
    ConfigError
        The authors' code does not support a setting of the model.
    """
    config = model.config
    allowed = {key: RELEASED_MODEL[key] for key in ("head", "modulation_rank", "gene_factors", "standardise_features")}
    for option, value in (allowed | _RELEASED_ELSE).items():
        if config[option] != value:
            raise ConfigError(
                f"a model with model.{option} {config[option]} cannot be exported: the authors' code supports "
                f"{value} only"
            )
    if config.tuning == "lora":
        raise ConfigError("a model with backbone.tuning lora cannot be exported: the authors' code has no adapters")
    if config.condition_on_visible == "current":
        raise ConfigError(
            "a model with model.condition_on_visible current cannot be exported: the authors' code supports next only"
        )
    state, exported = model.state_dict(), export_cellfm(model.backbone, "hinge")
    for ours, theirs in conditioning_names(config.num_layers).items():
        if ours not in state:
            continue
        if ours == "modulation.norm_mix":
            parts = state[ours].flatten().unbind()
        elif len(theirs) > 1:  # six vectors a layer, two before the decoder
            parts = state[ours].split([6 * config.hidden_size] * config.num_layers + [2 * config.hidden_size])
        else:
            parts = (state[ours],)
        for name, part in zip(theirs, parts, strict=True):
            exported[name] = part.detach().cpu().clone()
    exported[_GENE_IDS] = gene_ids.detach().cpu().long().clone()
    return exported


def write_hinge(model: HingeModel, gene_ids: Tensor, out: str | Path) -> Path:
    """Write the state dict of `export_hinge` to the file that the authors' code loads; return its path."""
    state = export_hinge(model, gene_ids)
    # a Python file object: torch's own writer aborts the process if the disk is full
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        torch.save({"model": state}, file)
    return Path(out)


def read_hinge(path: str | Path, num_attention_heads: int | None = None) -> PublishedCellFM:
    """Return the description of a checkpoint of the authors' code, without its values.

    Raises
    ------
    WeightsError
        The file holds other weights.
    """
    published = read_published(path, num_attention_heads)
    if published.dialect != "hinge":
        raise WeightsError(f"{path} contains CellFM only, not a model of the HINGE code; use hinge convert cellfm")
    return published


def _infer_gate(biases: Tensor, path: str | Path) -> str:
    median = biases.median().item()
    for gate, low, high in (("sigmoid", 3.0, 9.0), ("linear", 0.5, 1.5)):
        if low <= median <= high:
            logger.info("%s: the gates are %s, inferred from the median %.2f of their biases", path, gate, median)
            return gate
    raise ConfigError(
        f"the gate of {path} cannot be inferred: the median of its biases is {median:.2f}, sigmoid gates start at 6 "
        "and linear gates at 1; give --gate sigmoid or --gate linear (gate= in Python)"
    )
