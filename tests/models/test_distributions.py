"""The distributions that heads return: mean, deviation, likelihood and quantiles are those of one distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hinge.models.distributions import (
    CensoredGaussian,
    ClampedGaussian,
    CountGrid,
    NegativeBinomial,
    PointMass,
    RoundedGaussian,
    RoundedMixture,
)

SPOTS, GENES, SAMPLES = 3, 8, 20_000
# locations from far below zero up to where counts lie densely
LOCATION = torch.linspace(-3, 9, GENES).expand(SPOTS, GENES) + torch.tensor([0.0, 0.3, 0.7])[:, None]
SCALE = torch.tensor([0.2, 0.7, 1.5])[:, None].expand(SPOTS, GENES)
GRIDS = {"log2p1": CountGrid("log2p1"), "log1p_cp10k": CountGrid("log1p_cp10k", torch.tensor([300.0, 2e3, 1e4]))}


def negative_binomial(grid: CountGrid, zero_probability: float | None = None) -> NegativeBinomial:
    mean = grid.mean_count(LOCATION.clamp_min(0.05))
    extra = None if zero_probability is None else torch.full_like(mean, zero_probability)
    return NegativeBinomial(LOCATION, mean, 1 / torch.expm1((SCALE * grid.log_unit) ** 2), extra, grid)


def mixture(grid: CountGrid) -> RoundedMixture:
    offsets = SCALE.unsqueeze(-1) * torch.tensor([-1.0, 0.0, 2.0])
    weights = torch.tensor([0.5, 0.25, 0.25]).log().expand(SPOTS, GENES, 3)
    scales = SCALE.unsqueeze(-1) * torch.tensor([0.5, 1.0, 0.3])
    return RoundedMixture(LOCATION, weights, LOCATION.unsqueeze(-1) + offsets, scales, grid)


DISTRIBUTIONS = {
    "point": PointMass(LOCATION),
    "gaussian": ClampedGaussian(LOCATION, SCALE),
    "censored_gaussian": CensoredGaussian(LOCATION, SCALE),
}
for _name, _grid in GRIDS.items():
    DISTRIBUTIONS |= {
        f"rounded_gaussian, {_name}": RoundedGaussian(LOCATION, SCALE, _grid),
        f"rounded_mixture, {_name}": mixture(_grid),
        f"negative_binomial, {_name}": negative_binomial(_grid),
        f"zero_inflated_negative_binomial, {_name}": negative_binomial(_grid, 0.2),
    }


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request):
    return DISTRIBUTIONS[request.param]


def quantiles(distribution, number: int = SAMPLES) -> torch.Tensor:
    """Evenly spaced quantiles (number, B, G)."""
    levels = ((torch.arange(number, dtype=torch.float64) + 0.5) / number).view(-1, 1, 1)
    return distribution.icdf(levels.expand(-1, SPOTS, GENES)).double()


@pytest.mark.full
def test_mean_and_deviation_are_those_of_the_quantiles(distribution):
    drawn = quantiles(distribution, 2000 if isinstance(distribution, NegativeBinomial) else SAMPLES)
    assert (drawn >= 0).all() or isinstance(distribution, PointMass)
    mean, stddev = drawn.mean(dim=0), drawn.std(dim=0)
    # above 32 counts the moments are those of a Gaussian that is not rounded, or of 32 quantiles
    slack = 0.02 if isinstance(distribution, NegativeBinomial) else 0.006
    np.testing.assert_allclose(distribution.mean, mean, atol=slack)
    np.testing.assert_allclose(distribution.stddev, stddev, atol=slack, rtol=slack)
    np.testing.assert_allclose(distribution.variance, distribution.stddev**2, rtol=1e-5, atol=1e-12)


def test_likelihood_is_that_of_the_quantiles(distribution):
    """The share of quantiles up to a level is the mass that `log_prob` gives to values up to it."""
    drawn = quantiles(distribution, 2000 if isinstance(distribution, NegativeBinomial) else SAMPLES)
    if isinstance(distribution, PointMass):
        assert (distribution.log_prob(distribution.location) == 0).all()
        assert (distribution.log_prob(distribution.location + 1e-3) == -math.inf).all()
        return
    zeros = (drawn == 0).double().mean(dim=0)
    np.testing.assert_allclose(distribution.log_prob(torch.zeros(SPOTS, GENES)).exp(), zeros, atol=2e-3)
    grid = getattr(distribution, "grid", None)
    top = 4.0
    if grid is None:  # the density integrates to the rest
        values = torch.linspace(0, top, 4001)[1:] - top / 8000
        density = torch.stack([distribution.log_prob(torch.full((SPOTS, GENES), float(v))).exp() for v in values])
        mass = density.sum(dim=0) * top / 4000
    else:
        counts = grid.counts(torch.full((SPOTS, GENES), top))
        top = grid.values(counts + 0.5)
        numbers = torch.arange(1, int(counts.max()) + 1).float()
        each = torch.stack([distribution.log_prob(grid.values(torch.full((SPOTS, GENES), float(k)))) for k in numbers])
        mass = (each.exp() * (numbers[:, None, None] <= counts)).sum(dim=0)
    share = ((drawn > 0) & (drawn <= top)).double().mean(dim=0)
    np.testing.assert_allclose(mass, share, atol=5e-3)


def test_samples_are_from_the_distribution(distribution):
    torch.manual_seed(0)
    drawn = distribution.sample((4000,) if not isinstance(distribution, NegativeBinomial) else (500,))
    assert drawn.shape[1:] == distribution.batch_shape == (SPOTS, GENES)
    error = distribution.stddev / len(drawn) ** 0.5
    assert ((drawn.mean(dim=0) - distribution.mean).abs() <= 5 * error + 0.05).all()
    assert distribution.sample().shape == (SPOTS, GENES)


def test_a_clamped_gaussian_has_the_mean_of_its_draws():
    """N(0, 1) clamped at zero has mean 1/√(2π), not 0; only the loss is that of the Gaussian."""
    clamped, values = ClampedGaussian(torch.zeros(1, 1), torch.ones(1, 1)), torch.tensor([[0.0], [1.5]])
    assert clamped.mean.item() == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert clamped.stddev.item() == pytest.approx(math.sqrt(0.5 - 0.5 / math.pi))
    expected = -stats.norm.logpdf(values.numpy())
    np.testing.assert_allclose(clamped.loss(values), expected, rtol=1e-6)
    censored = CensoredGaussian(clamped.location, clamped.scale)
    assert torch.equal(clamped.log_prob(values), censored.log_prob(values))


def test_log_probabilities_against_scipy():
    location, scale = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 0.7, 0.3]])
    values = torch.tensor([[0.0, 0.0, 1.5]])
    zero = stats.norm.logcdf(0, location.numpy(), scale.numpy())
    density = stats.norm.logpdf(values.numpy(), location.numpy(), scale.numpy())
    got = CensoredGaussian(location, scale).log_prob(values).numpy()
    np.testing.assert_allclose(got, np.where(values > 0, density, zero), rtol=1e-5)


def test_the_loss_of_a_point_is_the_squared_error():
    point = PointMass(torch.tensor([[1.5]]))
    assert point.loss(torch.tensor([[3.5]])).item() == 4
    assert torch.equal(point.icdf(torch.full((5, 1, 1), 0.1)), point.location.expand(5, 1, 1))


@pytest.mark.parametrize("kind", [ClampedGaussian, CensoredGaussian])
def test_extreme_values_stay_finite(kind):
    output = kind(torch.tensor([[-40.0, 40.0]]), torch.tensor([[0.02, 0.02]]))
    assert torch.isfinite(output.loss(torch.tensor([[0.0, 20.0]]))).all()
    assert torch.isfinite(output.icdf(torch.tensor([[1e-12, 1 - 1e-12]], dtype=torch.float64))).all()
    assert torch.isfinite(output.stddev).all()


def test_count_distributions_against_scipy():
    grid = CountGrid("log2p1")
    counts = torch.tensor([[0.0, 1.0, 7.0, 90.0, 1000.0, 60000.0]])
    values = grid.values(counts)
    location = torch.tensor([[0.3, 1.5, 2.0, 6.0, 10.0, 16.0]])
    scale = torch.full_like(location, 0.7)
    whole = counts.numpy().astype(np.float64)
    low, high = np.log2(whole + 0.5), np.log2(whole + 1.5)
    low[counts.numpy() == 0] = -np.inf
    frozen = stats.norm(location.numpy().astype(np.float64), 0.7)
    expected = np.log(frozen.cdf(high) - frozen.cdf(low))
    got = RoundedGaussian(location, scale, grid).log_prob(values)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)
    mean, shape = torch.tensor([[2.0, 2.0, 5.0, 50.0, 900.0, 5e4]]), torch.full((1, 6), 3.0)
    expected = stats.nbinom(3.0, (3.0 / (3.0 + mean)).numpy()).logpmf(counts.numpy())
    output = NegativeBinomial(location, mean, shape, None, grid)
    np.testing.assert_allclose(output.log_prob(values).numpy(), expected, rtol=1e-3)
    inflated = NegativeBinomial(location, mean, shape, torch.full((1, 6), 0.25), grid)
    zero = 0.25 + 0.75 * np.exp(expected[0, 0])
    np.testing.assert_allclose(inflated.log_prob(values)[0, 0].exp().item(), zero, rtol=1e-3)
