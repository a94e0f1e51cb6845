"""Which parts of a model stay in float32 when the model is cast to half precision."""

from collections.abc import Callable

import torch
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)


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
