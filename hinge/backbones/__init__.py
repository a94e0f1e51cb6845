"""Expression foundation models behind one contract."""

from hinge.backbones.cellfm import CellFMConfig, CellFMModel

__all__ = ["CellFMConfig", "CellFMModel"]
