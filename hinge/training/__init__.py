"""Training a HingeModel."""

from hinge.training.trainer import TrainingConfig, split_spots, train_hinge

__all__ = ["TrainingConfig", "split_spots", "train_hinge"]
