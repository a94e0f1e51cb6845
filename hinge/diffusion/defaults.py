"""Defaults of sampling, in one place: the configuration, the command line and the pipeline take them from here."""

from hinge.evaluation.names import DEFAULT_DRAWS

__all__ = ["DEFAULT_BATCH_SIZE", "DEFAULT_DRAWS", "DEFAULT_STEPS"]

DEFAULT_STEPS = 4
"""Scores of heads of counts hardly change from 4 steps on (docs/results/components.md)."""
DEFAULT_GAUSSIAN_STEPS = 25
"""Steps of Gaussian diffusion and flow matching, which need more of them."""
DEFAULT_BATCH_SIZE = 256
"""Spot-draws in one forward pass."""
