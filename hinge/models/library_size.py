"""The library size of a spot, its count over all genes, given its features."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from hinge.models.precision import at_least_float32

NORMAL_SCORES = np.linspace(-6.0, 6.0, 49)
LOG_SIZES = np.linspace(0.0, 16.0, 65)

LARGEST_DEVIATION = 5.0
"""Standard deviations in the condition, at most."""


class LibrarySizeModel(nn.Module):
    """The library size given the features, and what is expected of transformed counts given the library size.

    The logarithm of the library size is a linear regression on the features, with residuals of any distribution. The
    model is fitted in closed form (`hinge.training.initialisation`) and not trained further.

    Parameters
    ----------
    feature_dim, num_genes
        d and G.
    """

    scale: Tensor
    slide_scale: Tensor
    spatial_share: Tensor
    quantile_excess: Tensor
    expected_change: Tensor
    location_excess: Tensor

    def __init__(self, feature_dim: int, num_genes: int):
        super().__init__()
        self.mean = nn.Linear(feature_dim, 1).requires_grad_(False)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        # standard deviation of the logarithm within a slide, and between slides in models without a `SlidePrior`
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("slide_scale", torch.zeros(()))
        # share of the variance within a slide that neighbouring spots have in common
        self.register_buffer("spatial_share", torch.zeros(()))
        # quantiles of the residuals at `NORMAL_SCORES`, in units of the scale, less those of a normal distribution
        self.register_buffer("quantile_excess", torch.zeros(len(NORMAL_SCORES)))
        # by how much the mean value of a gene at `LOG_SIZES` is expected to differ from that of the training spots
        self.register_buffer("expected_change", torch.zeros(len(LOG_SIZES), num_genes))
        # by how much a distribution's location is to change beyond that, such that its mean changes by that
        self.register_buffer("location_excess", torch.zeros(len(LOG_SIZES), num_genes))

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
        residual = self.scale * (normal + _interpolate(NORMAL_SCORES, self.quantile_excess, normal))
        log_size = slide_stretch * (self._location(features) + residual) + slide_shift
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
        scores = torch.as_tensor(NORMAL_SCORES, dtype=torch.float32, device=location.device)
        residual = self.scale * (scores + self.quantile_excess)
        of_residual = torch.logsumexp(slide_stretch * residual - 0.5 * scores**2, dim=0)
        of_residual = of_residual - torch.logsumexp(-0.5 * scores**2, dim=0)
        return float(torch.logsumexp(location, dim=0) - math.log(len(features)) + of_residual)

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
        return unusual.clamp(-LARGEST_DEVIATION, LARGEST_DEVIATION)

    def change(self, library_size: Tensor) -> Tensor:
        """Return by how much values (B, G) are expected to differ at library sizes (B,) from those at the training's.

        The logarithm of a small count falls short of that of its mean, so transformed counts depend on the library size
        although they are divided by it.
        """
        return _interpolate(LOG_SIZES, self.expected_change, at_least_float32(library_size).clamp_min(1).log())

    def excess(self, library_size: Tensor) -> Tensor:
        """Return what the location of a distribution (B, G) takes beyond `change` at library sizes (B,).

        Rounding to counts moves the mean away from the location, the more the wider apart counts are.
        """
        return _interpolate(LOG_SIZES, self.location_excess, at_least_float32(library_size).clamp_min(1).log())


def _interpolate(knots: np.ndarray, values: Tensor, at: Tensor) -> Tensor:
    """Return values (B, …) of a piecewise linear function: (K, …) at evenly spaced knots (K,), constant outside."""
    place = ((at_least_float32(at) - knots[0]) / (knots[1] - knots[0])).clamp(0, len(knots) - 1)
    left = place.long().clamp_max(len(knots) - 2)
    share = (place - left).reshape(-1, *[1] * (values.ndim - 1))
    return (1 - share) * values[left] + share * values[left + 1]
