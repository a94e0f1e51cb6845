"""Where histology and expression meet: the modulated backbone, value heads and their distributions.

Names are imported on first use: `hinge.models.options` needs no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "HEADS": "hinge.models.heads",
    "CensoredGaussian": "hinge.models.distributions",
    "ClampedGaussian": "hinge.models.distributions",
    "CountGrid": "hinge.models.distributions",
    "ExpressionDistribution": "hinge.models.distributions",
    "HingeModel": "hinge.models.hinge",
    "NegativeBinomial": "hinge.models.distributions",
    "PointMass": "hinge.models.distributions",
    "RoundedGaussian": "hinge.models.distributions",
    "RoundedMixture": "hinge.models.distributions",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hinge.models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
