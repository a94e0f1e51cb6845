"""The backbone of a model: whether it fits, which of its weights are trained, and how its layers are run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hinge.backbones.base import ExpressionBackbone
from hinge.utils.errors import WeightsError
from hinge.utils.packages import require


def check_backbone(backbone: ExpressionBackbone, config: Any, with_digest: bool) -> None:
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
    if (config.num_bins is not None) != (backbone.value_space == "bins"):
        raise WeightsError(f"the backbone is a {backbone.config.model_type}, the model was made for another kind")
    if with_digest and config.backbone_digest and backbone.digest() != config.backbone_digest:
        raise WeightsError(
            "these are not the backbone weights the model was trained on: expected digest "
            f"{config.backbone_digest[:12]}…, got {backbone.digest()[:12]}…"
        )


def prepare_backbone(backbone: ExpressionBackbone, tuning: str, lora_rank: int) -> ExpressionBackbone:
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

        settings = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(backbone.lora_targets))
        backbone = inject_adapter_in_model(settings, backbone)
    elif tuning == "full":
        # no gradient reaches the others
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(not name.startswith(backbone.unused_parameters()))
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return backbone


def frozen_names(model: Any) -> set[str]:
    """Return the names, in the state dict of a `HingeModel`, of frozen weights of a backbone that has adapters."""
    if model.tuned_backbone is None:
        return set()
    named = model.tuned_backbone.named_parameters()
    return {f"tuned_backbone.{name}" for name, parameter in named if not parameter.requires_grad}


def run_layer(model: Any, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return function(*arguments); with gradient checkpointing of the model its inner results are computed again."""
    if not model.gradient_checkpointing or not torch.is_grad_enabled():
        return function(*arguments)
    if model._gradient_checkpointing_func is None:
        return checkpoint(function, *arguments, use_reentrant=False)
    return model._gradient_checkpointing_func(function, *arguments)


def cast_frozen(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights to `dtype`, and the trained ones to float32."""
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
