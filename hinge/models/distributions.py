"""Distributions over the expression of every gene, which the heads of `hinge.models.heads` return.

Each is a `torch.distributions.Distribution` with `batch_shape` (B, G). Its `mean`, `variance`, `stddev`, `log_prob` and
`icdf` describe the same distribution, in the units of the transform. A draw is `icdf` of given uniform numbers, so it
is a deterministic function of these numbers. `loss` is the objective that training minimises.

Measured expression is a whole number of molecules. The distributions of counts (`RoundedGaussian`, `RoundedMixture`,
`NegativeBinomial`) put their mass on the values that counts take under the transform (`CountGrid`).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Distribution

from hinge.data.transforms import get_transform

# counts above this lie so densely that density times width is the mass between two of them
_DENSE_COUNT = 200
# counts up to which moments in the transform's units are summed one by one
_SUMMED_COUNTS = 32
# quantiles that represent the upper tail of a negative binomial
_NUM_QUANTILES = 32
# standardised bounds of a count are clipped here, far beyond where float32 has any mass left
_FARTHEST = 1e3


def _normal_quantile(uniform: Tensor) -> Tensor:
    # float64: float32 has too few numbers near 1 to reach the upper tail
    return torch.special.ndtri(uniform.double()).to(uniform.dtype if uniform.is_floating_point() else None)


def _normal_density(standard: Tensor) -> Tensor:
    return torch.exp(-0.5 * standard**2) / math.sqrt(2 * math.pi)


def _normal_log_density(values: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    standard = (values - location) / scale
    return -0.5 * standard**2 - scale.log() - 0.5 * math.log(2 * math.pi)


class ExpressionDistribution(Distribution):
    """Independent distributions over the values of all genes.

    Parameters
    ----------
    location
        (B, G) predicted location, of which the backbone's prediction is a part.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, location: Tensor):
        super().__init__(location.shape, validate_args=False)
        self.location = location

    def loss(self, values: Tensor) -> Tensor:
        """Return the training loss (B, G) of values (B, G): the negative log-likelihood."""
        return -self.log_prob(values)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return random values (*sample_shape, B, G)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=torch.float64, device=self.location.device).clamp(1e-12, 1 - 1e-12)
        return self.icdf(uniform).to(self.location.dtype)


class PointMass(ExpressionDistribution):
    """All mass on the location, as in the paper. The loss is the squared error.

    Parameters
    ----------
    location
        (B, G) predicted value.
    """

    @property
    def mean(self) -> Tensor:
        return self.location

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.location)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-mass (B, G) of values (B, G): 0 at the location and −∞ elsewhere."""
        return torch.where(value == self.location, 0.0, -math.inf)

    def loss(self, values: Tensor) -> Tensor:
        """Return the squared error (B, G) of values (B, G)."""
        return (values - self.location) ** 2

    def icdf(self, value: Tensor) -> Tensor:
        """Return the location at every uniform number (…, B, G)."""
        return self.location.expand(torch.broadcast_shapes(value.shape, self.location.shape))


class CensoredGaussian(ExpressionDistribution):
    """A Gaussian censored at zero: all mass below zero is a measured zero (a Tobit model).

    Parameters
    ----------
    location, scale
        (B, G) mean and standard deviation before censoring.

    References
    ----------
    J. Tobin, Estimation of relationships for limited dependent variables, Econometrica 26 (1958).
    """

    def __init__(self, location: Tensor, scale: Tensor):
        super().__init__(location)
        self.scale = scale

    @property
    def mean(self) -> Tensor:
        """E max(0, X) = μ Φ(μ/σ) + σ φ(μ/σ), (B, G)."""
        ratio = self.location / self.scale
        return self.location * torch.special.ndtr(ratio) + self.scale * _normal_density(ratio)

    @property
    def variance(self) -> Tensor:
        """E max(0, X)² = (μ² + σ²) Φ(μ/σ) + μ σ φ(μ/σ), less the squared mean; (B, G)."""
        # in units of the scale, and float64 where the two terms nearly cancel
        dtype = torch.float32 if self.location.device.type == "mps" else torch.float64
        ratio = (self.location / self.scale).to(dtype)
        below, density = torch.special.ndtr(ratio), _normal_density(ratio)
        mean = ratio * below + density
        variance = ((1 + ratio**2) * below + ratio * density - mean**2).clamp_min(0)
        return self.scale**2 * variance.to(self.scale.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of zeros and the log-density of positive values, (B, G)."""
        density = _normal_log_density(value, self.location, self.scale)
        zero = torch.special.log_ndtr(-self.location / self.scale)
        return torch.where(value > 0, density, zero)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantiles at uniform numbers (…, B, G) in (0, 1)."""
        return (self.location + self.scale * _normal_quantile(value)).clamp_min(0)


class ClampedGaussian(CensoredGaussian):
    """A Gaussian whose negative values are set to zero, fitted as if it were not.

    Expression is not negative, so draws of a Gaussian are clamped at zero. The distribution of these draws is the
    censored Gaussian; only the loss is another one: the negative log-density of the Gaussian before clamping, also
    where the value is zero.

    Parameters
    ----------
    location, scale
        (B, G) mean and standard deviation before clamping.
    """

    def loss(self, values: Tensor) -> Tensor:
        """Return the negative log-density (B, G) of the Gaussian before clamping."""
        return -_normal_log_density(values, self.location, self.scale)


@dataclass
class CountGrid:
    """The values that counts take under a transform.

    Attributes
    ----------
    transform
        Name of the transform.
    library_size
        (B,) counts over all genes of each spot; None where the transform does not need it.
    """

    transform: str
    library_size: Tensor | None = None

    def mean_count(self, values: Tensor) -> Tensor:
        """Return the counts (…, B, G), not rounded, of values (…, B, G)."""
        return get_transform(self.transform).inverse(values, self._library_size(values))

    def counts(self, values: Tensor) -> Tensor:
        """Return the nearest whole counts (…, B, G) of values (…, B, G), at least 0."""
        return self.mean_count(values).round().clamp_min(0)

    def values(self, counts: Tensor) -> Tensor:
        """Return the values (…, B, G) of counts (…, B, G), whole or not."""
        return get_transform(self.transform).forward(counts, self._library_size(counts))

    def slope(self, counts: Tensor) -> Tensor:
        """Return d value / d count (B, G) at counts (B, G)."""
        if self.transform == "log2p1":
            return 1 / ((counts + 1) * math.log(2))
        rate = 1e4 / self._library_size(counts).unsqueeze(-1)
        return rate / (1 + counts * rate)

    @property
    def log_unit(self) -> float:
        """Natural logarithms in one unit of value."""
        return math.log(2) if self.transform == "log2p1" else 1.0

    def _library_size(self, like: Tensor) -> Tensor:
        return like.new_ones(like.shape[-2]) if self.library_size is None else self.library_size.clamp_min(1)


def _log_mass(standard_low: Tensor, standard_high: Tensor) -> Tensor:
    """Return log(Φ(high) − Φ(low)), low < high, without cancellation in either tail."""
    flip = standard_low + standard_high > 0
    low = torch.where(flip, -standard_high, standard_low)
    high = torch.where(flip, -standard_low, standard_high)
    log_high = torch.special.log_ndtr(high)
    ratio = (torch.special.log_ndtr(low) - log_high).clamp_max(-1e-6)
    return log_high + torch.log(-torch.expm1(ratio))


def _rounded_log_prob(grid: CountGrid, values: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Return the log-mass of the counts at values (B, G) when a Gaussian is rounded to the nearest count."""
    counts = grid.counts(values)
    low = (grid.values((counts - 0.5).clamp_min(0)) - location) / scale
    low = torch.where(counts > 0, low, torch.full_like(low, -_FARTHEST)).clamp(-_FARTHEST, _FARTHEST)
    high = ((grid.values(counts + 0.5) - location) / scale).clamp(-_FARTHEST, _FARTHEST)
    mass = _log_mass(low, torch.maximum(high, low + 1e-6))
    density = _normal_log_density(values, location, scale) + grid.slope(counts).log()
    return torch.where(counts > _DENSE_COUNT, density, mass)


def _rounded_mean(grid: CountGrid, location: Tensor, scale: Tensor) -> Tensor:
    """Return the mean (B, G) in the transform's units when a Gaussian is rounded to the nearest count.

    Σ over counts k of (value of k − value of k − 1)·P(count ≥ k); rounding is left away where counts lie densely.
    Smooth in location and scale, as an average of rounded quantiles is not.
    """
    total, below = torch.zeros_like(location), 0.0
    for count in range(1, _SUMMED_COUNTS + 1):
        value = _value_of(grid, location, count)
        total += (value - below) * torch.special.ndtr((location - _value_of(grid, location, count - 0.5)) / scale)
        below = value
    standard = (location - _value_of(grid, location, _SUMMED_COUNTS + 0.5)) / scale
    return total + (location - below) * torch.special.ndtr(standard) + scale * _normal_density(standard)


def _rounded_variance(grid: CountGrid, location: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """Return the variance (B, G) around a mean (B, G): Σ over counts k of (value of k − mean)²·P(count = k).

    Beyond the counts that are summed the Gaussian is not rounded: with Φ and φ at (μ − e)/σ,
    E[(X − m)²; X > e] = ((μ − m)² + σ²)Φ + σ(μ + e − 2m)φ.
    """
    total, value, reached = torch.zeros_like(location), 0.0, torch.ones_like(location)
    for count in range(_SUMMED_COUNTS + 1):
        edge = _value_of(grid, location, count + 0.5)
        beyond = torch.special.ndtr((location - edge) / scale)
        total += (value - mean) ** 2 * (reached - beyond)
        value, reached = _value_of(grid, location, count + 1), beyond
    total += ((location - mean) ** 2 + scale**2) * reached
    total += scale * (location + edge - 2 * mean) * _normal_density((location - edge) / scale)
    return total.clamp_min(0)


def _value_of(grid: CountGrid, location: Tensor, count: float) -> Tensor:
    """Return the value of a count, the same for all genes of a spot: (B, 1) for location (B, G)."""
    return grid.values(location.new_full((*location.shape[:-1], 1), count))


class RoundedGaussian(ExpressionDistribution):
    """A Gaussian in the transform's units, rounded to the nearest count; negative values become 0.

    Parameters
    ----------
    location, scale
        (B, G) mean and standard deviation before rounding.
    grid
        The values counts take.
    """

    def __init__(self, location: Tensor, scale: Tensor, grid: CountGrid):
        super().__init__(location)
        self.scale, self.grid = scale, grid

    @cached_property  # the variance takes it too
    def mean(self) -> Tensor:
        return _rounded_mean(self.grid, self.location, self.scale)

    @property
    def variance(self) -> Tensor:
        return _rounded_variance(self.grid, self.location, self.scale, self.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability (B, G) of the counts at values (B, G)."""
        return _rounded_log_prob(self.grid, value, self.location, self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantiles at uniform numbers (…, B, G) in (0, 1)."""
        return self.grid.values(self.grid.counts(self.location + self.scale * _normal_quantile(value)))


class RoundedMixture(ExpressionDistribution):
    """A mixture of Gaussians in the transform's units, rounded to the nearest count.

    Parameters
    ----------
    location
        (B, G) mean of the mixture before rounding.
    log_weights, locations, scales
        (B, G, M) of the components.
    grid
        The values counts take.
    """

    def __init__(self, location: Tensor, log_weights: Tensor, locations: Tensor, scales: Tensor, grid: CountGrid):
        super().__init__(location)
        self.log_weights, self.locations, self.scales, self.grid = log_weights, locations, scales, grid

    def _components(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.locations.unbind(-1), self.scales.unbind(-1), strict=True))

    @property
    def mean(self) -> Tensor:
        parts = [_rounded_mean(self.grid, location, scale) for location, scale in self._components()]
        return (self.log_weights.exp() * torch.stack(parts, dim=-1)).sum(-1)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        # of each component around the mean of all
        parts = [_rounded_variance(self.grid, location, scale, mean) for location, scale in self._components()]
        return (self.log_weights.exp() * torch.stack(parts, dim=-1)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability (B, G) of the counts at values (B, G)."""
        parts = [_rounded_log_prob(self.grid, value, location, scale) for location, scale in self._components()]
        return torch.logsumexp(self.log_weights + torch.stack(parts, dim=-1), dim=-1)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantiles at uniform numbers (…, B, G) in (0, 1), by bisection of the distribution function."""
        weights = self.log_weights.exp()
        quantiles = self.locations + self.scales * _normal_quantile(value).unsqueeze(-1)
        # the mixture's quantile lies between those of its components
        low, high = quantiles.amin(dim=-1), quantiles.amax(dim=-1)
        for _ in range(30):
            middle = 0.5 * (low + high)
            below = (weights * torch.special.ndtr((middle.unsqueeze(-1) - self.locations) / self.scales)).sum(-1)
            less = below < value
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        return self.grid.values(self.grid.counts(0.5 * (low + high)))


class NegativeBinomial(ExpressionDistribution):
    """Counts from a negative binomial, with extra zeros where the head has them.

    Parameters
    ----------
    location
        (B, G) the mean count in the transform's units.
    mean_count, dispersion
        (B, G) mean μ and inverse dispersion θ: variance μ + μ²/θ (the parameters of scvi-tools).
    zero_probability
        (B, G) probability of an extra zero, or None.
    grid
        The values counts take.
    """

    def __init__(
        self,
        location: Tensor,
        mean_count: Tensor,
        dispersion: Tensor,
        zero_probability: Tensor | None,
        grid: CountGrid,
    ):
        super().__init__(location)
        self.mean_count, self.dispersion, self.zero_probability = mean_count, dispersion, zero_probability
        self.grid = grid

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance (B, G) without extra zeros.

        Low counts are summed one by one; the upper tail is represented by evenly spaced quantiles.
        """
        counts = (
            torch.arange(_SUMMED_COUNTS + 1, device=self.location.device).view(-1, 1, 1).expand(-1, *self.batch_shape)
        )
        mass = self._log_prob_of_counts(counts.to(self.location.dtype)).exp()  # (C, B, G)
        rest = (1 - mass.sum(dim=0)).clamp_min(0)
        levels = (torch.arange(_NUM_QUANTILES, device=self.location.device) + 0.5).view(-1, 1, 1) / _NUM_QUANTILES
        far = self._quantile((1 - rest.double() * levels).clamp(1e-12, 1 - 1e-12))  # (Q, B, G)
        values = torch.cat([self.grid.values(counts), far])
        weights = torch.cat([mass, (rest / _NUM_QUANTILES).expand_as(far)])
        mean = (weights * values).sum(dim=0)
        return mean, (weights * (values - mean) ** 2).sum(dim=0)

    @property
    def mean(self) -> Tensor:
        mean, _ = self._moments()
        return mean if self.zero_probability is None else (1 - self.zero_probability) * mean

    @property
    def variance(self) -> Tensor:
        mean, variance = self._moments()
        extra = self.zero_probability
        return variance if extra is None else (1 - extra) * (variance + extra * mean**2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability (B, G) of the counts at values (B, G)."""
        counts = self.grid.counts(value)
        log_prob = self._log_prob_of_counts(counts)
        if self.zero_probability is None:
            return log_prob
        log_other = torch.log1p(-self.zero_probability) + log_prob
        zero = torch.logaddexp(self.zero_probability.log(), log_other)
        return torch.where(counts > 0, log_other, zero)

    def _log_prob_of_counts(self, counts: Tensor) -> Tensor:
        """Return the log-probability (…, B, G) of whole counts (…, B, G) without extra zeros."""
        logits = self.mean_count.log() - self.dispersion.log()
        return torch.distributions.NegativeBinomial(self.dispersion, logits=logits, validate_args=False).log_prob(
            counts
        )

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantiles at uniform numbers (…, B, G) in (0, 1)."""
        uniform = value.double()
        if self.zero_probability is None:
            return self._quantile(uniform)
        extra = self.zero_probability.double()
        quantile = self._quantile(((uniform - extra) / (1 - extra)).clamp(1e-12, 1 - 1e-12))
        return torch.where(uniform <= extra, torch.zeros_like(quantile), quantile)

    def _quantile(self, uniform: Tensor) -> Tensor:
        """Return the quantiles (…, B, G) without extra zeros."""
        mean, shape = self.mean_count.double(), self.dispersion.double()
        parameters = (uniform, shape, shape / (shape + mean))
        counts = scipy.stats.nbinom.ppf(*(tensor.detach().cpu().numpy() for tensor in parameters))
        return self.grid.values(torch.from_numpy(np.asarray(counts, dtype=np.float32)).to(self.location.device))
