"""The library size of a spot, its count over all genes, given its features."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from hinge.models.precision import at_least_float32

NORMAL_SCORES = np.linspace(-6.0, 6.0, 49)
LOG_SIZES = np.linspace(0.0, 16.0, 65)

LARGEST_DEVIATION = 5.0
"""Standard deviations in the condition, at most, of a model without a curve."""


class LibrarySizeModel(nn.Module):
    """The logarithm of the library size: a linear regression on the features, and residuals of any distribution.

    It is fitted in closed form (`hinge.training.initialisation`) and not trained further.

    Parameters
    ----------
    feature_dim
        d.
    """

    scale: Tensor
    slide_scale: Tensor
    spatial_share: Tensor
    quantile_excess: Tensor
    curve: Tensor
    deviation_weight: Tensor

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
        # quantiles of the residuals at `NORMAL_SCORES`, in units of the scale, less those of a normal distribution
        self.register_buffer("quantile_excess", torch.zeros(len(NORMAL_SCORES)))
        # what is expected of a spot's mean value at `LOG_SIZES`, standardised over the training spots
        self.register_buffer("curve", torch.zeros(len(LOG_SIZES)))
        # of the deviation from the regression in the condition: 1 in models of before there was a curve, which is 0
        self.register_buffer("deviation_weight", torch.ones(()))

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
        """Return what the condition has of library sizes (B,), in standard deviations, for features (B, d).

        It is the mean value that is expected at this library size: transformed counts follow it by a curve, with which
        the logarithm of a small count falls short. Models without a curve have the deviation of the logarithm from what
        the features predict.
        """
        log_size = at_least_float32(library_size).clamp_min(1).log()
        scale = (self.scale**2 + self.slide_scale**2).sqrt()
        unusual = ((log_size - self._location(features)) / scale).clamp(-LARGEST_DEVIATION, LARGEST_DEVIATION)
        return self.deviation_weight * unusual + _interpolate(LOG_SIZES, self.curve, log_size)


def _interpolate(knots: np.ndarray, values: Tensor, at: Tensor) -> Tensor:
    """Return the values (B,) of a piecewise linear function, given at evenly spaced knots (K,) and constant outside."""
    place = ((at_least_float32(at) - knots[0]) / (knots[1] - knots[0])).clamp(0, len(knots) - 1)
    left = place.long().clamp_max(len(knots) - 2)
    share = place - left
    return (1 - share) * values[left] + share * values[left + 1]
