"""Value heads: from the decoded tokens to a distribution over each gene's value.

Every head is a small module whose parameters start at zero, so that its location is the backbone's own
prediction at initialisation. What it returns knows its `mean`, its `spread` (how uncertain each gene is, in units of
its own), `log_prob`, training `loss` and how to `sample` from uniform numbers in (0, 1): a draw is then a
deterministic function of those numbers.

Measured expression is a whole number of molecules, whatever logarithm is taken of it. The count heads
(`rounded_gaussian`, `rounded_mixture`, `negative_binomial`, `zero_inflated_negative_binomial`) put their mass on
the values that counts can take, given the spot's library size where the transform divides by it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinge.data.transforms import get_transform

# log-scales outside this range are useless for expression in log units and make the likelihood unstable
MIN_LOG_SCALE, MAX_LOG_SCALE = math.log(0.02), math.log(20.0)


def _standard_normal_quantile(uniform: Tensor) -> Tensor:
    # float64: float32 has too few numbers near 1 to reach the upper tail
    return torch.special.ndtri(uniform.double()).to(uniform.dtype if uniform.is_floating_point() else None)


@dataclass
class PointOutput:
    """All mass on one value, as in the paper.

    Attributes
    ----------
    location
        (B, G) predicted value.
    """

    location: Tensor

    @property
    def mean(self) -> Tensor:
        return self.location

    @property
    def spread(self) -> Tensor:
        return torch.zeros_like(self.location)

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-density of a Gaussian of unit variance around the prediction, (B, G)."""
        return -0.5 * (values - self.location) ** 2 - 0.5 * math.log(2 * math.pi)

    def loss(self, values: Tensor) -> Tensor:
        """Squared error, (B, G)."""
        return (values - self.location) ** 2

    def sample(self, uniform: Tensor) -> Tensor:
        """The prediction itself, (B, G)."""
        return self.location


@dataclass
class GaussianOutput:
    """A Gaussian per gene.

    Attributes
    ----------
    location, scale
        (B, G) mean and standard deviation.
    """

    location: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        return self.location

    @property
    def spread(self) -> Tensor:
        return self.scale

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-density, (B, G)."""
        standard = (values - self.location) / self.scale
        return -0.5 * standard**2 - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def loss(self, values: Tensor) -> Tensor:
        """Negative log-likelihood, (B, G)."""
        return -self.log_prob(values)

    def sample(self, uniform: Tensor) -> Tensor:
        """Quantile at `uniform` (B, G) in (0, 1); expression is not negative, so neither are draws."""
        return (self.location + self.scale * _standard_normal_quantile(uniform)).clamp_min(0)


@dataclass
class CensoredGaussianOutput:
    """A Gaussian censored at zero: all mass below zero is a measured zero (a Tobit model).

    Attributes
    ----------
    location, scale
        (B, G) mean and standard deviation before censoring.

    References
    ----------
    J. Tobin, Estimation of relationships for limited dependent variables, Econometrica 26 (1958).
    """

    location: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        """E max(0, X) = μ Φ(μ/σ) + σ φ(μ/σ), (B, G)."""
        ratio = self.location / self.scale
        density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
        return self.location * torch.special.ndtr(ratio) + self.scale * density

    @property
    def spread(self) -> Tensor:
        return self.scale

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-probability of zeros, log-density of positive values, (B, G)."""
        standard = (values - self.location) / self.scale
        density = -0.5 * standard**2 - self.scale.log() - 0.5 * math.log(2 * math.pi)
        zero = torch.special.log_ndtr(-self.location / self.scale)
        return torch.where(values > 0, density, zero)

    def loss(self, values: Tensor) -> Tensor:
        """Negative log-likelihood, (B, G)."""
        return -self.log_prob(values)

    def sample(self, uniform: Tensor) -> Tensor:
        """Quantile at `uniform` (B, G) in (0, 1)."""
        return (self.location + self.scale * _standard_normal_quantile(uniform)).clamp_min(0)


@dataclass
class CountGrid:
    """The values that whole counts take under a transform.

    Attributes
    ----------
    transform
        Name of the transform.
    library_size
        (B,) counts over all genes of each spot; None where the transform does not need it.
    """

    transform: str
    library_size: Tensor | None = None

    def counts(self, values: Tensor) -> Tensor:
        """Values (B, G) → nearest whole counts, not below 0."""
        return get_transform(self.transform).inverse(values, self._depth(values)).round().clamp_min(0)

    def values(self, counts: Tensor) -> Tensor:
        """Counts (B, G), whole or not → values."""
        return get_transform(self.transform).forward(counts, self._depth(counts))

    def slope(self, counts: Tensor) -> Tensor:
        """d value / d count at counts (B, G)."""
        if self.transform == "log2p1":
            return 1 / ((counts + 1) * math.log(2))
        rate = 1e4 / self._depth(counts).unsqueeze(-1)
        return rate / (1 + counts * rate)

    @property
    def log_unit(self) -> float:
        """Natural logarithms in one unit of value."""
        return math.log(2) if self.transform == "log2p1" else 1.0

    def _depth(self, like: Tensor) -> Tensor:
        return like.new_ones(like.shape[0]) if self.library_size is None else self.library_size.clamp_min(1)


# counts above this lie so densely that density times width is the mass between two of them
_DENSE_COUNT = 200
# quantiles whose average stands for the mean of a count distribution in the transform's units
_MEAN_QUANTILES = 32
# counts up to which the mean of a rounded Gaussian is summed one by one
_MEAN_COUNTS = 32
_FAR = 1e3


def _log_mass(standard_low: Tensor, standard_high: Tensor) -> Tensor:
    """log(Φ(high) − Φ(low)), both (…), low < high, without cancellation in either tail."""
    flip = standard_low + standard_high > 0
    low = torch.where(flip, -standard_high, standard_low)
    high = torch.where(flip, -standard_low, standard_high)
    log_high = torch.special.log_ndtr(high)
    ratio = (torch.special.log_ndtr(low) - log_high).clamp_max(-1e-6)
    return log_high + torch.log(-torch.expm1(ratio))


def _rounded_log_prob(grid: CountGrid, values: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log-mass of the counts at `values` (B, G) when a Gaussian is rounded to the nearest count."""
    counts = grid.counts(values)
    low = (grid.values((counts - 0.5).clamp_min(0)) - location) / scale
    low = torch.where(counts > 0, low, torch.full_like(low, -_FAR)).clamp(-_FAR, _FAR)
    high = ((grid.values(counts + 0.5) - location) / scale).clamp(-_FAR, _FAR)
    mass = _log_mass(low, torch.maximum(high, low + 1e-6))
    standard = (values - location) / scale
    density = -0.5 * standard**2 - scale.log() - 0.5 * math.log(2 * math.pi) + grid.slope(counts).log()
    return torch.where(counts > _DENSE_COUNT, density, mass)


def _rounded_mean(grid: CountGrid, location: Tensor, scale: Tensor) -> Tensor:
    """Mean in the transform's units when a Gaussian is rounded to the nearest count, (B, G).

    Σ over counts k of (value of k − value of k − 1)·P(count ≥ k); rounding is left away where counts lie densely.
    Smooth in location and scale, as an average of rounded quantiles is not.
    """
    total, below = torch.zeros_like(location), torch.zeros_like(location)
    for count in range(1, _MEAN_COUNTS + 1):
        value = grid.values(torch.full_like(location, count))
        edge = grid.values(torch.full_like(location, count - 0.5))
        total += (value - below) * torch.special.ndtr((location - edge) / scale)
        below = value
    standard = (location - grid.values(torch.full_like(location, _MEAN_COUNTS + 0.5))) / scale
    density = torch.exp(-0.5 * standard**2) / math.sqrt(2 * math.pi)
    return total + (location - below) * torch.special.ndtr(standard) + scale * density


def _mean_of_quantiles(output) -> Tensor:
    """Mean in the transform's units as the average of evenly spaced quantiles, (B, G)."""
    shape = output.location.shape
    total = torch.zeros_like(output.location)
    for number in range(_MEAN_QUANTILES):
        total += output.sample(output.location.new_full(shape, (number + 0.5) / _MEAN_QUANTILES))
    return total / _MEAN_QUANTILES


@dataclass
class RoundedGaussianOutput:
    """A Gaussian in the transform's units, rounded to the nearest whole count; what lies below is a zero.

    Attributes
    ----------
    location, scale
        (B, G) mean and standard deviation before rounding.
    grid
        The values counts can take.
    """

    location: Tensor
    scale: Tensor
    grid: CountGrid

    @property
    def mean(self) -> Tensor:
        return _rounded_mean(self.grid, self.location, self.scale)

    @property
    def spread(self) -> Tensor:
        return self.scale

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-probability of the counts at `values`, (B, G)."""
        return _rounded_log_prob(self.grid, values, self.location, self.scale)

    def loss(self, values: Tensor) -> Tensor:
        """Negative log-likelihood, (B, G)."""
        return -self.log_prob(values)

    def sample(self, uniform: Tensor) -> Tensor:
        """Quantile at `uniform` (B, G) in (0, 1)."""
        value = self.location + self.scale * _standard_normal_quantile(uniform)
        return self.grid.values(self.grid.counts(value))


@dataclass
class RoundedMixtureOutput:
    """A mixture of Gaussians in the transform's units, rounded to the nearest whole count.

    Attributes
    ----------
    location
        (B, G) mean of the mixture before rounding.
    log_weights, locations, scales
        (B, G, M) of the components.
    grid
        The values counts can take.
    """

    location: Tensor
    log_weights: Tensor
    locations: Tensor
    scales: Tensor
    grid: CountGrid

    @property
    def mean(self) -> Tensor:
        parts = [
            _rounded_mean(self.grid, location, scale)
            for location, scale in zip(self.locations.unbind(-1), self.scales.unbind(-1), strict=True)
        ]
        return (self.log_weights.exp() * torch.stack(parts, dim=-1)).sum(-1)

    @property
    def spread(self) -> Tensor:
        return (self.log_weights.exp() * self.scales).sum(-1)

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-probability of the counts at `values`, (B, G)."""
        parts = [
            _rounded_log_prob(self.grid, values, location, scale)
            for location, scale in zip(self.locations.unbind(-1), self.scales.unbind(-1), strict=True)
        ]
        return torch.logsumexp(self.log_weights + torch.stack(parts, dim=-1), dim=-1)

    def loss(self, values: Tensor) -> Tensor:
        """Negative log-likelihood, (B, G)."""
        return -self.log_prob(values)

    def sample(self, uniform: Tensor) -> Tensor:
        """Quantile at `uniform` (B, G) in (0, 1), by bisection of the mixture's distribution function."""
        weights = self.log_weights.exp()
        quantiles = self.locations + self.scales * _standard_normal_quantile(uniform).unsqueeze(-1)
        # the mixture's quantile lies between those of its components
        low, high = quantiles.amin(dim=-1), quantiles.amax(dim=-1)
        for _ in range(30):
            middle = 0.5 * (low + high)
            below = (weights * torch.special.ndtr((middle.unsqueeze(-1) - self.locations) / self.scales)).sum(-1)
            less = below < uniform
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        return self.grid.values(self.grid.counts(0.5 * (low + high)))


@dataclass
class NegativeBinomialOutput:
    """Counts from a negative binomial, with extra zeros where the head has them.

    Attributes
    ----------
    location
        (B, G) what the mean count is in the transform's units.
    mean_count, dispersion
        (B, G) mean μ and inverse dispersion θ: variance μ + μ²/θ (the parameters of scvi-tools).
    zero_probability
        (B, G) probability of an extra zero, or None.
    grid
        The values counts can take.
    """

    location: Tensor
    mean_count: Tensor
    dispersion: Tensor
    zero_probability: Tensor | None
    grid: CountGrid

    @property
    def mean(self) -> Tensor:
        return _mean_of_quantiles(self)

    @property
    def spread(self) -> Tensor:
        return (1 / self.mean_count + 1 / self.dispersion).sqrt()

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-probability of the counts at `values`, (B, G)."""
        counts = self.grid.counts(values)
        logits = self.mean_count.log() - self.dispersion.log()
        log_prob = torch.distributions.NegativeBinomial(self.dispersion, logits=logits, validate_args=False).log_prob(
            counts
        )
        if self.zero_probability is None:
            return log_prob
        log_other = torch.log1p(-self.zero_probability) + log_prob
        zero = torch.logaddexp(self.zero_probability.log(), log_other)
        return torch.where(counts > 0, log_other, zero)

    def loss(self, values: Tensor) -> Tensor:
        """Negative log-likelihood, (B, G)."""
        return -self.log_prob(values)

    def sample(self, uniform: Tensor) -> Tensor:
        """Quantile at `uniform` (B, G) in (0, 1)."""
        uniform = uniform.double()
        if self.zero_probability is not None:
            extra = self.zero_probability.double()
            uniform = ((uniform - extra) / (1 - extra)).clamp(1e-12, 1 - 1e-12)
        mean, shape = self.mean_count.double(), self.dispersion.double()
        counts = scipy.stats.nbinom.ppf(*(tensor.cpu().numpy() for tensor in (uniform, shape, shape / (shape + mean))))
        return self.grid.values(torch.from_numpy(np.asarray(counts, dtype=np.float32)).to(self.location.device))


class PointHead(nn.Module):
    """Takes the decoded value as it is."""

    def __init__(self, hidden_size: int, num_genes: int):
        super().__init__()

    def forward(
        self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid | None
    ) -> PointOutput:
        """location (B, G) → PointOutput; the rest is not needed."""
        return PointOutput(location)


class ScaledHead(nn.Module):
    """The decoded value as location; the log-scale from the tokens and a bias per gene."""

    def __init__(self, hidden_size: int, num_genes: int):
        super().__init__()
        self.log_scale = nn.Linear(hidden_size, 1)
        self.gene_log_scale = nn.Parameter(torch.zeros(num_genes))
        nn.init.zeros_(self.log_scale.weight)
        nn.init.zeros_(self.log_scale.bias)

    def scale(self, tokens: Tensor, log_scale: Tensor | None) -> Tensor:
        """tokens (B, G, D), log_scale (B, G) to add, or None → scale (B, G)."""
        own = self.log_scale(tokens.to(self.log_scale.weight.dtype)).squeeze(-1).float() + self.gene_log_scale
        total = own if log_scale is None else own + log_scale
        return total.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE).exp()


class GaussianHead(ScaledHead):
    """`output` is the distribution made of location and scale: Gaussian, censored at zero, or rounded to counts."""

    def __init__(self, hidden_size: int, num_genes: int, output: type):
        super().__init__(hidden_size, num_genes)
        self.output = output

    def forward(self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid | None):
        """location (B, G), tokens (B, G, D), log_scale (B, G) to add, or None → the output distribution."""
        scale = self.scale(tokens, log_scale)
        made: Callable[..., Any] = self.output
        return made(location, scale, grid) if self.output in COUNT_OUTPUTS else made(location, scale)


class RoundedMixtureHead(ScaledHead):
    """Components start spread around the location, with the mean and the variance of the single Gaussian."""

    STARTING_OFFSETS = (-0.7, 0.0, 0.7)
    STARTING_WEIGHTS = (0.25, 0.5, 0.25)

    def __init__(self, hidden_size: int, num_genes: int):
        super().__init__(hidden_size, num_genes)
        components = len(self.STARTING_OFFSETS)
        self.shape = nn.Linear(hidden_size, 3 * components)
        nn.init.zeros_(self.shape.weight)
        nn.init.zeros_(self.shape.bias)
        self.gene_shape = nn.Parameter(torch.zeros(num_genes, 3 * components))
        offsets, weights = torch.tensor(self.STARTING_OFFSETS), torch.tensor(self.STARTING_WEIGHTS)
        inner = (1 - (weights * offsets**2).sum()).sqrt().log().expand(components)
        self.register_buffer("start", torch.stack([weights.log(), offsets, inner]), persistent=False)

    def forward(
        self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid | None
    ) -> RoundedMixtureOutput:
        """Arguments as those of `GaussianHead` → RoundedMixtureOutput."""
        scale = self.scale(tokens, log_scale).unsqueeze(-1)
        shape = self.shape(tokens.to(self.shape.weight.dtype)).float() + self.gene_shape
        logits, offsets, log_widths = shape.unflatten(-1, (3, -1)).unbind(-2)
        log_weights = F.log_softmax(logits + self.start[0], dim=-1)
        offsets = offsets + self.start[1]
        # offsets around their own mean, so that `location` stays the mean
        offsets = offsets - (log_weights.exp() * offsets).sum(dim=-1, keepdim=True)
        widths = (log_widths + self.start[2]).clamp(-4, 2).exp()
        return RoundedMixtureOutput(
            location, log_weights, location.unsqueeze(-1) + scale * offsets, scale * widths, grid
        )


class NegativeBinomialHead(ScaledHead):
    """Mean count from the location, dispersion from the scale: a gamma-distributed rate of that log-deviation."""

    SMALLEST_MEAN = 1e-3
    STARTING_ZERO_LOGIT = -6.0

    def __init__(self, hidden_size: int, num_genes: int, zero_inflated: bool):
        super().__init__(hidden_size, num_genes)
        self.zero_logit = None
        if zero_inflated:
            self.zero_logit = nn.Parameter(torch.full((num_genes,), self.STARTING_ZERO_LOGIT))

    def forward(
        self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid
    ) -> NegativeBinomialOutput:
        """Arguments as those of `GaussianHead` → NegativeBinomialOutput."""
        scale = self.scale(tokens, log_scale)
        # the identity but for values near and below zero, which no mean count has
        positive = F.softplus(location, beta=6)
        mean = get_transform(grid.transform).inverse(positive, grid._depth(positive)).clamp(self.SMALLEST_MEAN, 1e7)
        dispersion = (1 / torch.expm1((scale * grid.log_unit) ** 2)).clamp(1e-2, 1e4)
        extra = None if self.zero_logit is None else self.zero_logit.sigmoid().expand_as(mean)
        return NegativeBinomialOutput(location, mean, dispersion, extra, grid)


COUNT_OUTPUTS = (RoundedGaussianOutput, RoundedMixtureOutput, NegativeBinomialOutput)
COUNT_HEADS = ("rounded_gaussian", "rounded_mixture", "negative_binomial", "zero_inflated_negative_binomial")


def needs_library_size(head: str, transform: str | None) -> bool:
    """Whether the values that counts can take depend on the spot's library size."""
    return head in COUNT_HEADS and transform == "log1p_cp10k"


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "point": PointHead,
    "gaussian": partial(GaussianHead, output=GaussianOutput),
    "censored_gaussian": partial(GaussianHead, output=CensoredGaussianOutput),
    "rounded_gaussian": partial(GaussianHead, output=RoundedGaussianOutput),
    "rounded_mixture": RoundedMixtureHead,
    "negative_binomial": partial(NegativeBinomialHead, zero_inflated=False),
    "zero_inflated_negative_binomial": partial(NegativeBinomialHead, zero_inflated=True),
}

HeadOutput = (
    PointOutput
    | GaussianOutput
    | CensoredGaussianOutput
    | RoundedGaussianOutput
    | RoundedMixtureOutput
    | NegativeBinomialOutput
)
