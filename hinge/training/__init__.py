"""Training a HingeModel."""

from hinge.training.gaussian import train_denoiser
from hinge.training.hinge import TrainingConfig, split_spots, train_hinge

__all__ = ["TrainingConfig", "split_spots", "train_denoiser", "train_hinge"]
