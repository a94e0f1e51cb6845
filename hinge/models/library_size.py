"""The library size of a spot, its count over all genes, given its features."""

import torch
from torch import Tensor, nn

from hinge.models.precision import at_least_float32


class LibrarySizeModel(nn.Module):
    """A log-normal library size around a linear regression on the features.

    It is fitted in closed form (`hinge.training.initialisation`) and not trained further.

    Parameters
    ----------
    feature_dim
        d.
    """

    LARGEST = 5.0

    scale: Tensor
    slide_scale: Tensor
    spatial_share: Tensor

    def __init__(self, feature_dim: int):
        super().__init__()
        self.mean = nn.Linear(feature_dim, 1).requires_grad_(False)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        # standard deviations of the logarithm within a slide and between slides
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("slide_scale", torch.zeros(()))
        # share of the variance within a slide that neighbouring spots have in common
        self.register_buffer("spatial_share", torch.zeros(()))

    def _location(self, features: Tensor) -> Tensor:
        return at_least_float32(self.mean(features)).squeeze(-1)

    def forward(self, features: Tensor, normal: Tensor, slide_normal: Tensor) -> Tensor:
        """Return library sizes (B,), whole numbers of at least 1.

        Parameters
        ----------
        features
            (B, d) standardised.
        normal, slide_normal
            (B,) standard normal numbers of the spots, and of the slides they are on.
        """
        log_size = self._location(features) + self.scale * normal + self.slide_scale * slide_normal
        return log_size.exp().round().clamp_min(1)

    def typical(self, features: Tensor) -> Tensor:
        """Return the median library size (B,) of spots with features (B, d)."""
        middle = features.new_zeros(len(features))
        return self(features, middle, middle)

    def standardise(self, features: Tensor, library_size: Tensor) -> Tensor:
        """Return by how many standard deviations (B,) library sizes (B,) differ from what features (B, d) predict."""
        scale = (self.scale**2 + self.slide_scale**2).sqrt()
        unusual = (at_least_float32(library_size).clamp_min(1).log() - self._location(features)) / scale
        return unusual.clamp(-self.LARGEST, self.LARGEST)
