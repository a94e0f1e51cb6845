"""Expression foundation models and their pre-training."""

from hinge.backbones.cellfm import CellFMConfig, CellFMModel
from hinge.training.cellfm import PretrainConfig, pretrain_expression

__all__ = ["CellFMConfig", "CellFMModel", "PretrainConfig", "pretrain_expression"]
