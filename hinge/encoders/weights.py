"""Load published checkpoints into the networks of encoders.

Checkpoints name their tensors as timm, as transformers (Phikon, Hibou) or as CONCH (image and text encoder in one
file). The names are mapped to those of the network, and every tensor of the network must be found.
"""

import argparse
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from hinge.encoders.networks import AttentionPooledViT, PooledStages, PooledTokens
from hinge.utils import checksums
from hinge.utils.errors import WeightsError
from hinge.utils.safe_torch import load_torch, plain_tensors
from hinge.utils.weights import check_weights

# tensors of training only, or that can be computed, by the first part of their name
_LEFT_OUT = {"head", "fc", "classifier", "pooler", "mask_token", "masked_embed"}
_CONCH_LEFT_OUT = {"attn_pool_caption", "ln_caption", "proj_contrast"}

_FROM_TRANSFORMERS = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
_ATTENTION = re.compile(r"(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a torch file, without the prefixes of wrappers.

    Raises
    ------
    WeightsError
        The file is missing, damaged, or holds objects other than weights, or no tensors.
    DataError
        The file has a checksum, and was changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    checksums.verified(path)
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            # training scripts store their arguments as a Namespace, which holds no code
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = load_torch(path)
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        tensors = plain_tensors(content) if isinstance(content, dict) else {}
    except Exception as error:  # torch and safetensors raise many kinds of exception for other files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{path} is not a file of weights only (no other objects are loaded): {reason}") from error
    if not tensors:
        raise WeightsError(f"{path} holds no named tensors")
    return {re.sub(r"^((module|backbone|_orig_mod)\.)+", "", name): t for name, t in tensors.items()}


def load_weights(network: nn.Module, path: str | Path, name: str, in_order: bool = False) -> None:
    """Load a checkpoint into a network.

    Parameters
    ----------
    network
        Network of `build` or timm.
    path
        Checkpoint.
    name
        Name of the encoder, for errors.
    in_order
        The checkpoint names its tensors otherwise and has them in the order of the network.

    Raises
    ------
    WeightsError
        As in `read_checkpoint`, or the checkpoint belongs to another network.
    """
    state = read_checkpoint(path)
    if any(key.startswith("visual.") for key in state):
        state = {key.removeprefix("visual."): t for key, t in state.items() if key.startswith("visual.")}
        state = {key: t for key, t in state.items() if key.split(".")[0] not in _CONCH_LEFT_OUT}
    core = network
    if isinstance(network, PooledTokens | PooledStages):
        core = network.vit if isinstance(network, PooledTokens) else network.network
    if any(key.endswith("embeddings.cls_token") for key in state):
        state = _from_transformers(state)
    wanted = core.state_dict()
    if in_order:
        state = {key: t for key, t in state.items() if key.strip("_").split(".")[0] not in _LEFT_OUT}
        if len(state) == len(wanted):
            state = dict(zip(wanted, state.values(), strict=True))
    if isinstance(core, AttentionPooledViT):
        positions = state.get("trunk.pos_embed")
        if positions is not None and positions.shape != wanted["trunk.pos_embed"].shape:
            state["trunk.pos_embed"] = core.resize_positions(positions, core.trunk.patch_embed.grid_size[0])
    adapt = getattr(sys.modules[type(core).__module__], "checkpoint_filter_fn", None)
    try:
        if adapt is not None:  # timm converts older names and other image sizes
            state = adapt(state, core)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise WeightsError(f"{path} holds no weights of {name}: {error}") from error
    state = {key: t for key, t in state.items() if key in wanted or key.split(".")[0] not in _LEFT_OUT}
    for what, keys in (("lacks", wanted.keys() - state.keys()), ("also holds", state.keys() - wanted.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise WeightsError(f"{path} holds no weights of {name}: it {what} {len(keys)} tensors ({shown})")
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise WeightsError(
                f"{path} holds no weights of {name}: {key} has shape {tuple(tensor.shape)} "
                f"and should have {tuple(wanted[key].shape)}"
            )
    check_weights(state, path, wanted)
    core.load_state_dict(state)


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a ViT, DINOv2 or DINOv2 with registers from transformers to timm."""
    state = {re.sub(r"^(vit|dinov2|dinov2_with_registers)\.", "", key): t for key, t in state.items()}
    classes, positions = state.pop("embeddings.cls_token"), state.pop("embeddings.position_embeddings")
    state.pop("embeddings.mask_token", None)
    registers = state.pop("embeddings.register_tokens", None)
    if registers is not None:  # with registers timm adds position embeddings to patch tokens only
        classes, positions = classes + positions[:, :1], positions[:, 1:]
        state["reg_token"] = registers
    state["cls_token"], state["pos_embed"] = classes, positions
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        for pattern, replacement in _FROM_TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        if match := re.fullmatch(r"(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", key):
            block, part, kind = match.groups()
            parts.setdefault(f"{block}.attn.qkv.{kind}", {})[part] = tensor
        else:
            renamed[key] = tensor
    for key, found in parts.items():
        if len(found) == 3:
            renamed[key] = torch.cat([found["query"], found["key"], found["value"]])
    return renamed
