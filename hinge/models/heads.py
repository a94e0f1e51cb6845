"""Value heads: small modules that turn decoded tokens into a distribution over each gene's value.

The learned parameters of every head start at zero, so that the location is the backbone's own prediction at
initialisation. `HEADS` maps the names of `model.head` to the modules; the distributions are those of
`hinge.models.distributions`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinge.models.distributions import (
    CensoredGaussian,
    ClampedGaussian,
    CountGrid,
    ExpressionDistribution,
    NegativeBinomial,
    PointMass,
    RoundedGaussian,
    RoundedMixture,
)
from hinge.models.options import COUNT_HEADS, needs_library_size

__all__ = ["COUNT_HEADS", "HEADS", "needs_library_size"]

# log-scales outside this range are useless for expression in log units and make the likelihood unstable
MIN_LOG_SCALE, MAX_LOG_SCALE = math.log(0.02), math.log(20.0)


class PointHead(nn.Module):
    """The decoded value as it is."""

    def __init__(self, hidden_size: int, num_genes: int):
        super().__init__()

    def forward(self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid | None) -> PointMass:
        """location (B, G) → distribution; the other arguments are not needed."""
        return PointMass(location)


class ScaledHead(nn.Module):
    """Base of heads with the decoded value as location; the log-scale is linear in the token, with a bias per gene.

    Parameters
    ----------
    hidden_size, num_genes
        D and G.
    """

    def __init__(self, hidden_size: int, num_genes: int):
        super().__init__()
        self.log_scale = nn.Linear(hidden_size, 1)
        self.gene_log_scale = nn.Parameter(torch.zeros(num_genes))
        nn.init.zeros_(self.log_scale.weight)
        nn.init.zeros_(self.log_scale.bias)

    def scale(self, tokens: Tensor, log_scale: Tensor | None) -> Tensor:
        """Return the scale (B, G) of tokens (B, G, D); log_scale (B, G) is added to the head's own logarithm."""
        own = self.log_scale(tokens.to(self.log_scale.weight.dtype)).squeeze(-1).float() + self.gene_log_scale
        total = own if log_scale is None else own + log_scale
        return total.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE).exp()


class GaussianHead(ScaledHead):
    """A distribution with a location and a scale.

    Parameters
    ----------
    hidden_size, num_genes
        D and G.
    distribution
        `ClampedGaussian`, `CensoredGaussian` or `RoundedGaussian`.
    """

    def __init__(self, hidden_size: int, num_genes: int, distribution: Callable[..., ExpressionDistribution]):
        super().__init__(hidden_size, num_genes)
        self.distribution = distribution

    def forward(
        self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid | None
    ) -> ExpressionDistribution:
        """Return the distribution of every gene.

        Parameters
        ----------
        location
            (B, G).
        tokens
            (B, G, D), decoded tokens before the decoder.
        log_scale
            (B, G) to add to the head's own log-scale; None for nothing.
        grid
            The values counts take; None for a head whose values are no counts.
        """
        scale = self.scale(tokens, log_scale)
        if self.distribution is RoundedGaussian:
            assert grid is not None
            return self.distribution(location, scale, grid)
        return self.distribution(location, scale)


class RoundedMixtureHead(ScaledHead):
    """A rounded mixture, whose components start around the location with the mean and variance of one Gaussian."""

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

    def forward(self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid) -> RoundedMixture:
        """Return the distribution of every gene; arguments as those of `GaussianHead`."""
        scale = self.scale(tokens, log_scale).unsqueeze(-1)
        shape = self.shape(tokens.to(self.shape.weight.dtype)).float() + self.gene_shape
        logits, offsets, log_widths = shape.unflatten(-1, (3, -1)).unbind(-2)
        log_weights = F.log_softmax(logits + self.start[0], dim=-1)
        offsets = offsets + self.start[1]
        # offsets around their own mean, so that `location` stays the mean
        offsets = offsets - (log_weights.exp() * offsets).sum(dim=-1, keepdim=True)
        widths = (log_widths + self.start[2]).clamp(-4, 2).exp()
        return RoundedMixture(location, log_weights, location.unsqueeze(-1) + scale * offsets, scale * widths, grid)


class NegativeBinomialHead(ScaledHead):
    """A negative binomial: mean count from the location, dispersion from the scale.

    The scale is the standard deviation of the logarithm of the gamma-distributed rate.
    """

    SMALLEST_MEAN = 1e-3
    STARTING_ZERO_LOGIT = -6.0

    def __init__(self, hidden_size: int, num_genes: int, zero_inflated: bool):
        super().__init__(hidden_size, num_genes)
        self.zero_logit = None
        if zero_inflated:
            self.zero_logit = nn.Parameter(torch.full((num_genes,), self.STARTING_ZERO_LOGIT))

    def forward(self, location: Tensor, tokens: Tensor, log_scale: Tensor | None, grid: CountGrid) -> NegativeBinomial:
        """Return the distribution of every gene; arguments as those of `GaussianHead`."""
        scale = self.scale(tokens, log_scale)
        # the identity but for values near and below zero, which no mean count has
        positive = F.softplus(location, beta=6)
        mean = grid.mean_count(positive).clamp(self.SMALLEST_MEAN, 1e7)
        dispersion = (1 / torch.expm1((scale * grid.log_unit) ** 2)).clamp(1e-2, 1e4)
        extra = None if self.zero_logit is None else self.zero_logit.sigmoid().expand_as(mean)
        return NegativeBinomial(location, mean, dispersion, extra, grid)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "point": PointHead,
    "gaussian": partial(GaussianHead, distribution=ClampedGaussian),
    "censored_gaussian": partial(GaussianHead, distribution=CensoredGaussian),
    "rounded_gaussian": partial(GaussianHead, distribution=RoundedGaussian),
    "rounded_mixture": RoundedMixtureHead,
    "negative_binomial": partial(NegativeBinomialHead, zero_inflated=False),
    "zero_inflated_negative_binomial": partial(NegativeBinomialHead, zero_inflated=True),
}
