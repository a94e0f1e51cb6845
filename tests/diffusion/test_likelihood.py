"""Log-likelihoods: of a chain that reveals genes one by one, of the marginal distribution, of the oracle."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from hinge.data import load_spots, read_slide, simulate_slides
from hinge.data.panel import Panel
from hinge.data.simulate.cell_types import LIBRARY_SIZE_SD
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.diffusion.likelihood import chain_log_likelihood
from hinge.evaluation.metrics.likelihood import marginal_log_likelihood, oracle_log_likelihood
from hinge.utils.errors import DataError

GENES = 7


# --- the chain -----------------------------------------------------------------------------------


@dataclass
class Normal:
    location: torch.Tensor
    scale: torch.Tensor

    def log_prob(self, values):
        return torch.distributions.Normal(self.location, self.scale).log_prob(values)


class Equicorrelated:
    """The exact conditionals of a Gaussian with correlation r between all genes, mean = first feature."""

    feature_mean = torch.zeros(2)
    r = 0.6

    def __init__(self):
        self.seen = []

    def __call__(self, values, visible, timestep, features, gene_ids, next_visible, library_size):
        self.seen.append((visible, timestep, next_visible))
        count = visible.sum(1, keepdim=True)
        weight = self.r / (1 + (count - 1) * self.r)
        mean = features[:, :1]
        location = mean + weight * ((values - mean) * visible).sum(1, keepdim=True)
        scale = (1 - weight * count * self.r).clamp_min(0).sqrt()
        return Normal(location.expand_as(values), scale.expand_as(values))


def test_exact_conditionals_give_the_joint_likelihood():
    rng = np.random.default_rng(0)
    covariance = np.full((GENES, GENES), 0.6) + 0.4 * np.eye(GENES)
    features = rng.normal(size=(20, 2))
    values = features[:, :1] + rng.multivariate_normal(np.zeros(GENES), covariance, size=20)
    expected = stats.multivariate_normal(np.zeros(GENES), covariance).logpdf(values - features[:, :1])
    model, scheduler = Equicorrelated(), MaskedDiffusionScheduler(50, "cosine")
    arguments = (features, torch.arange(GENES), values, [f"s{i}" for i in range(20)])
    found = chain_log_likelihood(model, scheduler, *arguments, num_passes=700, seed=1)
    np.testing.assert_allclose(found.mean(), np.mean(expected), atol=0.05)
    np.testing.assert_allclose(found, expected, atol=0.4)
    # the parts of a pass: every number of visible genes alike, the timestep that has as many masked
    visible, timestep, coming = (torch.cat(parts) for parts in zip(*model.seen, strict=True))
    counts = np.bincount(visible.sum(1).long().numpy(), minlength=GENES)
    assert counts[GENES:].sum() == 0 and counts.min() > 0.9 * 2000 and counts.max() < 1.1 * 2000
    masked = scheduler.num_masked(timestep.numpy(), GENES)
    assert (masked >= GENES - visible.sum(1).numpy()).all()
    assert (scheduler.num_masked(timestep.numpy() - 1, GENES) < GENES - visible.sum(1).numpy()).all()
    assert (coming >= visible).all()
    # nothing but seed and spot decides
    again = chain_log_likelihood(Equicorrelated(), scheduler, *arguments, num_passes=20, seed=1, batch_size=3)
    np.testing.assert_allclose(
        again, chain_log_likelihood(Equicorrelated(), scheduler, *arguments, num_passes=20, seed=1), rtol=1e-6
    )
    assert not np.allclose(again, chain_log_likelihood(Equicorrelated(), scheduler, *arguments, num_passes=20, seed=2))


# --- the marginal --------------------------------------------------------------------------------


def test_the_marginal_is_a_distribution_of_each_gene():
    rng = np.random.default_rng(0)
    train = rng.poisson([2.0], size=(80, 1))
    log_mass = marginal_log_likelihood(train, np.arange(300)[:, None])
    assert np.exp(log_mass).sum() == pytest.approx(1, abs=1e-6)
    poisson = stats.poisson(2.0).logpmf(np.arange(6))
    np.testing.assert_allclose(log_mass[:6], poisson, atol=0.6)
    # genes are independent, and more spots come closer to the truth
    both = np.hstack([train, 3 * train])
    alone = marginal_log_likelihood(3 * train, 3 * train)
    np.testing.assert_allclose(marginal_log_likelihood(both, both), marginal_log_likelihood(train, train) + alone)
    test = rng.poisson([2.0], size=(4000, 1))
    many = marginal_log_likelihood(rng.poisson([2.0], size=(3000, 1)), test).mean()
    few = marginal_log_likelihood(train[:10], test).mean()
    best = stats.poisson(2.0).logpmf(test).mean()
    assert few < many < best + 1e-6 and many > best - 0.01


def test_a_count_never_seen_is_unlikely_but_not_impossible():
    assert np.isfinite(marginal_log_likelihood([[0], [0], [1]], [[1_000_000]])).all()
    with pytest.raises(DataError, match="two training spots"):
        marginal_log_likelihood([[1]], [[1]])


# --- the oracle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=2, grid=(6, 6), n_genes=60, with_image=False)
    return [read_slide(folder, name, require_image=False) for name in ("sim0", "sim1")]


def spots_of(slide, genes):
    return load_spots(slide, Panel.from_list(list(genes)), "log2p1")


def test_the_oracle_against_brute_force(simulated):
    slide = simulated[0]
    spots = spots_of(slide, slide.var_names[:3])
    found = oracle_log_likelihood(slide, spots)
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((100_000, 4))
    part = slide[spots.barcodes, spots.genes]
    loadings = np.asarray(part.varm["loadings"]).reshape(3, -1, 3)
    programs = np.exp(np.einsum("sp,gkp->sgk", hidden[:, :3], loadings) - 0.5 * (loadings**2).sum(-1))
    library_size = np.exp(LIBRARY_SIZE_SD * hidden[:, 3] - 0.5 * LIBRARY_SIZE_SD**2)[:, None]
    shape = part.var["dispersion"].to_numpy()
    for spot in range(0, len(spots), 7):
        rate = library_size * (
            part.var["ambient"].to_numpy()
            + np.einsum("k,gk,sgk->sg", part.obsm["cells"][spot], part.varm["profile"], programs)
        )
        mass = stats.nbinom(shape, shape / (shape + rate)).pmf(spots.counts[spot]).prod(axis=1).mean()
        assert found[spot] == pytest.approx(np.log(mass), abs=0.05)


@pytest.mark.full
def test_the_oracle_beats_the_marginal_and_depends_little_on_its_samples(simulated):
    train, test = (spots_of(slide, simulated[0].var_names[:40]) for slide in simulated)
    oracle = oracle_log_likelihood(simulated[1], test)
    assert oracle.mean() > marginal_log_likelihood(train.counts, test.counts).mean() + 5
    assert np.abs(oracle_log_likelihood(simulated[1], test, seed=1) - oracle).max() < 0.2
    assert np.array_equal(oracle_log_likelihood(simulated[1], test), oracle)


def test_the_oracle_knows_simulated_tissue_only(simulated):
    slide = simulated[0].copy()
    spots = spots_of(slide, slide.var_names[:3])
    del slide.obsm["cells"]
    with pytest.raises(DataError, match="needs a slide of simulate_slides"):
        oracle_log_likelihood(slide, spots)
    with pytest.raises(DataError, match="needs a slide of simulate_slides"):
        oracle_log_likelihood(without_truth(simulated[0]), spots)


def without_truth(slide):
    slide = slide.copy()
    del slide.uns["hinge_truth"]
    return slide
