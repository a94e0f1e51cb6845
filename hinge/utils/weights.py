"""Checks of the numbers in files of weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hinge.utils.errors import WeightsError

_PART_ELEMENTS = 2**20


def check_weights(tensors: Mapping[str, Tensor], path: str | Path, network: Mapping[str, Tensor] | None = None) -> None:
    """Check that weights are finite floating-point numbers.

    Parameters
    ----------
    tensors
        Weights by name.
    path
        Their file, for the error.
    network
        Tensors of the network that takes them; a name with whole numbers in it may have whole numbers in `tensors`.

    Raises
    ------
    WeightsError
        A tensor has another kind of numbers, or holds a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            if network is not None and name in network and not network[name].is_floating_point():
                continue
            raise WeightsError(f"{path}: {name} holds {str(tensor.dtype)[6:]} numbers, and weights are floating-point")
        # in parts, because the test needs copies; along rows, because a transposed tensor has no flat view
        rows = max(1, _PART_ELEMENTS * max(1, len(tensor)) // max(1, tensor.numel())) if tensor.ndim else 1
        if not all(bool(part.isfinite().all()) for part in (tensor.split(rows) if tensor.ndim else (tensor,))):
            raise WeightsError(f"{path}: {name} holds numbers that are not finite; restore the file, or train again")
