"""Value heads: from the decoded tokens to a distribution over each gene's value.

Every head is a small module whose parameters start at zero, so that its location is the backbone's own
prediction at initialisation. What it returns knows its `mean`, `log_prob`, training `loss` and how to `sample`
from uniform numbers in (0, 1): a draw is then a deterministic function of those numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


class PointHead(nn.Module):
    """Takes the decoded value as it is."""

    def __init__(self, hidden_size: int, num_genes: int):
        super().__init__()

    def forward(self, location: Tensor, tokens: Tensor, log_scale: Tensor | None) -> PointOutput:
        """location (B, G) → PointOutput; the rest is not needed."""
        return PointOutput(location)


class GaussianHead(nn.Module):
    """The decoded value as location; the log-scale from the tokens and a bias per gene.

    `output` is the distribution made of the two: `GaussianOutput` or `CensoredGaussianOutput`.
    """

    def __init__(self, hidden_size: int, num_genes: int, output: type):
        super().__init__()
        self.output = output
        self.log_scale = nn.Linear(hidden_size, 1)
        self.gene_log_scale = nn.Parameter(torch.zeros(num_genes))
        nn.init.zeros_(self.log_scale.weight)
        nn.init.zeros_(self.log_scale.bias)

    def forward(self, location: Tensor, tokens: Tensor, log_scale: Tensor | None):
        """location (B, G), tokens (B, G, D), log_scale (B, G) to add, or None → the output distribution."""
        own = self.log_scale(tokens.to(self.log_scale.weight.dtype)).squeeze(-1).float() + self.gene_log_scale
        total = own if log_scale is None else own + log_scale
        return self.output(location, total.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE).exp())


HEADS = {
    "point": PointHead,
    "gaussian": lambda width, genes: GaussianHead(width, genes, GaussianOutput),
    "censored_gaussian": lambda width, genes: GaussianHead(width, genes, CensoredGaussianOutput),
}

HeadOutput = PointOutput | GaussianOutput | CensoredGaussianOutput
