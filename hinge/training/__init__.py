"""Training of everything that is trained: one loop, one file per objective."""

from hinge.training.cellfm import PretrainConfig, pretrain_expression
from hinge.training.gaussian import train_denoiser
from hinge.training.hinge import TrainingConfig, split_spots, train_hinge

__all__ = ["PretrainConfig", "TrainingConfig", "pretrain_expression", "split_spots", "train_denoiser", "train_hinge"]
