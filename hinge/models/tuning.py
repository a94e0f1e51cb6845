"""The backbone of a model: whether it fits, and which of its weights are trained."""

from typing import Any

import torch
from torch import nn

from hinge.backbones.cellfm import CellFMModel
from hinge.utils.errors import WeightsError
from hinge.utils.packages import require

LORA_TARGETS = ("qkvu", "uv", "out")  # every product of a layer


def check_backbone(backbone: CellFMModel, config: Any, with_digest: bool) -> None:
    """Check that a backbone has the size in the config of a model, and the digest too if `with_digest`.

    Raises
    ------
    WeightsError
        Another size, or other weights than the model was trained on.
    """
    size = (backbone.config.hidden_size, backbone.config.num_hidden_layers)
    if size != (config.hidden_size, config.num_layers):
        raise WeightsError(
            f"the backbone is {size[0]} wide and {size[1]} layers deep, the model was made for "
            f"{config.hidden_size} and {config.num_layers}"
        )
    if with_digest and config.backbone_digest and backbone.digest() != config.backbone_digest:
        raise WeightsError(
            "these are not the backbone weights the model was trained on: expected digest "
            f"{config.backbone_digest[:12]}…, got {backbone.digest()[:12]}…"
        )


def prepare_backbone(backbone: CellFMModel, tuning: str, lora_rank: int) -> CellFMModel:
    """Return the backbone in eval mode with the weights that `tuning` trains; these are in float32.

    Parameters
    ----------
    backbone
        It is changed in place.
    tuning
        `"frozen"`, no weight is trained; `"full"`, all that a gradient reaches; `"lora"`, low-rank adapters on every
        product of its layers, which are added (peft).
    lora_rank
        Rank of the adapters.
    """
    backbone.requires_grad_(False).eval()
    if tuning == "lora":
        require("peft", "lora", "backbone.tuning=lora")  # takes seconds to import
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(LORA_TARGETS))
        backbone = inject_adapter_in_model(settings, backbone)
    elif tuning == "full":
        # no gradient reaches the cell-wise decoder and the tokens that this input lacks
        unused = "zero_token" if backbone.config.masked_input == "mask_token" else "mask_token"
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(not name.startswith((unused, "cell_decoder", "technical_encoder")))
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return backbone


def cast_frozen(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights to `dtype`, and the trained ones to float32."""
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
