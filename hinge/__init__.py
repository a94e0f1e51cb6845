"""hinge: draws of spatial gene expression from histology.

The public names are imported on first use, so that `import hinge` stays cheap.
"""

import warnings
from importlib import import_module
from typing import Any

from hinge.utils.packages import VERSION as __version__

_HOME = {
    "HingeError": "hinge.utils.errors",
    "HingeModel": "hinge.models.hinge",
    "HingePipeline": "hinge.diffusion.pipeline",
    "MaskedDiffusionScheduler": "hinge.diffusion.scheduler",
    "Run": "hinge.run.run",
    "check_slide": "hinge.data.checks",
    "evaluate": "hinge.run.run",
    "extract_features": "hinge.encoders.extract",
    "list_samples": "hinge.data.readers",
    "load_backbone": "hinge.backbones.loading",
    "load_encoder": "hinge.encoders.registry",
    "read_slide": "hinge.data.readers",
    "select_panel": "hinge.data.panel",
    "simulate_slides": "hinge.data.simulate",
    "train": "hinge.run.run",
}
# names of version 0.1, for one version more → where they are now
_DEPRECATED = {
    "CellFMConfig": "hinge.backbones.CellFMConfig",
    "CellFMModel": "hinge.backbones.CellFMModel",
    "Panel": "hinge.data.Panel",
    "evaluate_slide": "hinge.evaluation.evaluate_slide",
    "get_transform": "hinge.data.get_transform",
    "load_config": "hinge.config.load_config",
    "pretrain_expression": "hinge.training.pretrain_expression",
    "read_features": "hinge.data.read_features",
    "simulate_tissue": "hinge.simulate_slides",
    "train_hinge": "hinge.training.train_hinge",
    "validate_slide": "hinge.check_slide",
    "write_report": "hinge.report.write_report",
}

__all__ = ["__version__", "pl", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "pl":
        return import_module("hinge.pl")
    if name in _DEPRECATED:
        now = _DEPRECATED[name]
        warnings.warn(f"hinge.{name} is deprecated; use {now}", DeprecationWarning, stacklevel=2)
        module, _, new = now.rpartition(".")
        return getattr(import_module(module), new)
    raise AttributeError(f"module 'hinge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
