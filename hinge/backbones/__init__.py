"""Expression foundation models behind one contract."""

from importlib import import_module
from typing import Any

# imported on first use: vocabularies need neither torch nor transformers
_HOME = {
    "CellFMConfig": "hinge.backbones.cellfm_config",
    "CellFMModel": "hinge.backbones.cellfm",
    "ExpressionBackbone": "hinge.backbones.base",
    "ScGPTConfig": "hinge.backbones.transformer_config",
    "ScGPTModel": "hinge.backbones.scgpt",
    "TahoeConfig": "hinge.backbones.transformer_config",
    "TahoeModel": "hinge.backbones.tahoe",
    "load_backbone": "hinge.backbones.loading",
    "read_config": "hinge.backbones.loading",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
