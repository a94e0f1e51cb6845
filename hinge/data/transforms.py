"""Transforms from counts to the values of a model, and back."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hinge.utils.errors import ConfigError

Array = Any
"""A `numpy.ndarray` or a `torch.Tensor`; a function returns the kind it was given."""

_LN2 = math.log(2.0)
_TARGET = 1e4


@dataclass(frozen=True)
class Transform:
    """A named transform and its inverse.

    Both work on numpy arrays and torch tensors of any number type, compute in float32 and return float32.

    Attributes
    ----------
    name
        Name as in `get_transform`.
    forward
        `forward(counts (..., G), library_size (...)) -> values (..., G)`; `library_size` is each spot's count over all
        genes of the slide, not only those given.
    inverse
        `inverse(values (..., G), library_size (...)) -> counts (..., G)`, not rounded; a value below 0 gives a count
        below 0.
    contains_library_size
        Whether values rise with the library size, so that spots differ where their library sizes do.
    """

    name: str
    forward: Callable[[Array, Array], Array]
    inverse: Callable[[Array, Array], Array]
    contains_library_size: bool


def get_transform(name: str) -> Transform:
    """Return the transform of a name.

    `log2p1` is log2(count + 1), the one of HINGE and Stem. `log1p_cp10k` is log(1 + 10,000 count / library_size),
    the input of CellFM; a spot without any count has all values 0.

    Raises
    ------
    ConfigError
        If there is no transform of that name.
    """
    if name not in _TRANSFORMS:
        raise ConfigError(f"there is no transform {name!r}; choose one of {', '.join(_TRANSFORMS)}")
    return _TRANSFORMS[name]


def _float32(array: Array) -> tuple[Array, Any]:
    """Return the array in float32 and its library, without importing torch."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return array.to(torch.float32), torch
    return np.asarray(array, dtype=np.float32), np


def _log2p1(counts: Array, library_size: Array) -> Array:
    counts, library = _float32(counts)
    return library.log1p(counts) / _LN2


def _log2p1_inverse(values: Array, library_size: Array) -> Array:
    values, library = _float32(values)
    return library.expm1(values * _LN2)


def _log1p_cp10k(counts: Array, library_size: Array) -> Array:
    counts, library = _float32(counts)
    library_size = _float32(library_size)[0][..., None]
    # counts of an empty spot are 0, and 0 / 1 is the 0 wanted
    return library.log1p(counts / library.where(library_size > 0, library_size, 1.0) * _TARGET)


def _log1p_cp10k_inverse(values: Array, library_size: Array) -> Array:
    values, library = _float32(values)
    return library.expm1(values) * (_float32(library_size)[0][..., None] / _TARGET)


_TRANSFORMS = {
    "log2p1": Transform("log2p1", _log2p1, _log2p1_inverse, contains_library_size=True),
    "log1p_cp10k": Transform("log1p_cp10k", _log1p_cp10k, _log1p_cp10k_inverse, contains_library_size=False),
}
