"""Training a HingeModel."""

from hinge.training.continuous import train_denoiser
from hinge.training.trainer import TrainingConfig, split_spots, train_hinge

__all__ = ["TrainingConfig", "split_spots", "train_denoiser", "train_hinge"]
