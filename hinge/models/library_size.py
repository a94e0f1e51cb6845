"""The library size of a spot, its count over all genes, given its features."""

import math

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
        # standard deviation of the logarithm within a slide, and between slides in models without a `SlidePrior`
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("slide_scale", torch.zeros(()))
        # share of the variance within a slide that neighbouring spots have in common
        self.register_buffer("spatial_share", torch.zeros(()))

    def _location(self, features: Tensor) -> Tensor:
        return at_least_float32(self.mean(features)).squeeze(-1)

    def forward(
        self, features: Tensor, normal: Tensor, slide_shift: Tensor | float = 0.0, slide_stretch: float = 1.0
    ) -> Tensor:
        """Return library sizes (B,), whole numbers of at least 1.

        Parameters
        ----------
        features
            (B, d) standardised.
        normal
            (B,) standard normal numbers of the spots.
        slide_shift
            (B,) by how much the logarithm is larger on the slides that the spots are on.
        slide_stretch
            Factor of the logarithm, before the shift, with which the sizes of a slide spread more or less.
        """
        log_size = slide_stretch * (self._location(features) + self.scale * normal) + slide_shift
        return log_size.exp().round().clamp_min(1)

    def typical(self, features: Tensor, slide_shift: Tensor | float = 0.0, slide_stretch: float = 1.0) -> Tensor:
        """Return the median library size (B,) of spots with features (B, d)."""
        return self(features, features.new_zeros(len(features)), slide_shift, slide_stretch)

    def of_slide(self, library_size: Tensor, slide_shift: Tensor | float, slide_stretch: float) -> Tensor:
        """Return library sizes (B,) without the shift and the stretch of their slide."""
        return ((at_least_float32(library_size).clamp_min(1).log() - slide_shift) / slide_stretch).exp()

    def log_mean(self, features: Tensor, slide_stretch: float = 1.0) -> float:
        """Return the logarithm of the mean library size of spots with features (n, d), without a slide shift."""
        location = slide_stretch * self._location(features)
        mean = torch.logsumexp(location, dim=0) - math.log(len(features))
        return float(mean + 0.5 * (slide_stretch * self.scale) ** 2)

    def log_spread(self, features: Tensor) -> float:
        """Return the standard deviation of the logarithm of the library sizes of spots with features (n, d)."""
        return float((self._location(features).var(unbiased=False) + self.scale**2).sqrt())

    def slide_shift(self, features: Tensor, library_size: Tensor) -> float:
        """Return by how much logarithms of library sizes (n,) of a slide are larger than features (n, d) predict."""
        return float((at_least_float32(library_size).clamp_min(1).log() - self._location(features)).mean())

    def standardise(self, features: Tensor, library_size: Tensor) -> Tensor:
        """Return by how many standard deviations (B,) library sizes (B,) differ from what features (B, d) predict."""
        scale = (self.scale**2 + self.slide_scale**2).sqrt()
        unusual = (at_least_float32(library_size).clamp_min(1).log() - self._location(features)) / scale
        return unusual.clamp(-self.LARGEST, self.LARGEST)
