"""Which parts of a model stay in float32 when the model is cast to half precision, and what needs float64."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)
FLOAT64_DEVICES = ("cpu", "cuda")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def keep_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a version of `function`, which moves or casts tensors, that only moves those it would cast to half."""

    def kept(tensor: Tensor) -> Tensor:
        moved = function(tensor)
        if moved.dtype in HALF_PRECISION and tensor.dtype not in HALF_PRECISION:
            return tensor.to(moved.device)
        return moved

    return kept


def with_float64(given: Any) -> Any:
    """Return a tensor, or a distribution with its parameters, on a device that has float64: its own, or the CPU."""
    if isinstance(given, Tensor):
        return given if given.device.type in FLOAT64_DEVICES else given.cpu()
    moved = copy.copy(given)
    for name, value in vars(given).items():
        if isinstance(value, Tensor) or hasattr(value, "__dataclass_fields__"):
            setattr(moved, name, with_float64(value))
    return moved
