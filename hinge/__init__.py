"""hinge: spatial gene expression from histology, in draws.

The public API. Everything is imported on first use, so that `import hinge` stays cheap.
"""

from importlib import import_module
from typing import Any

from hinge.utils.packages import VERSION as __version__

_HOME = {
    "read_slide": "hinge.data",
    "list_samples": "hinge.data",
    "validate_slide": "hinge.data",
    "Panel": "hinge.data",
    "select_panel": "hinge.data",
    "get_transform": "hinge.data",
    "read_features": "hinge.data",
    "simulate_tissue": "hinge.data",
    "load_encoder": "hinge.encoders",
    "extract_features": "hinge.encoders",
    "CellFMConfig": "hinge.backbones",
    "CellFMModel": "hinge.backbones",
    "pretrain_expression": "hinge.training",
    "HingeModel": "hinge.models",
    "HingePipeline": "hinge.diffusion",
    "MaskedDiffusionScheduler": "hinge.diffusion",
    "train_hinge": "hinge.training",
    "evaluate_slide": "hinge.evaluation",
    "write_report": "hinge.report",
    "Run": "hinge.run.run",
    "load_config": "hinge.config",
    "HingeError": "hinge.utils.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hinge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
