"""Levels of slides: the posterior against the joint Gaussian, and expected values against simulated counts."""

import numpy as np
import pytest

from hinge.data.slide_levels import SlideLevels, composition_of_shares, library_ratios, shares_of_composition
from hinge.data.transforms import get_transform
from hinge.models.expected_values import composition_of_values, expected_values, fit_dispersion
from hinge.models.slide_effects import Level, SlidePrior
from hinge.training.slide_prior import fit_slide_prior

GENES = 6


def some_level(rng, degrees=np.inf) -> Level:
    loadings = rng.normal(size=(GENES + 1, 3))
    return Level(rng.normal(size=GENES + 1), loadings, np.append(rng.random(GENES) + 0.1, 0.0), degrees)


@pytest.mark.parametrize("depth_unknown", [False, True])
def test_observing_gives_the_conditional_of_the_joint_gaussian(depth_unknown):
    rng = np.random.default_rng(0)
    level, shared, noise = some_level(rng), rng.normal(size=(GENES + 1, 2)), rng.random(GENES + 1) + 0.2
    values = rng.normal(size=GENES + 1)
    values[[1, 6]] = np.nan
    posterior = level.observe(values, noise, shared, depth_unknown)

    seen = np.isfinite(values)
    prior = level.loadings @ level.loadings.T + np.diag(level.noise)
    design = np.eye(GENES + 1)
    if depth_unknown:  # the observation of a gene rises with the library size
        design[:-1, -1] = 1
    design = design[seen]
    error = shared[seen] @ shared[seen].T + np.diag(noise[seen])
    gain = prior @ design.T @ np.linalg.inv(design @ prior @ design.T + error)
    expected = level.mean + gain @ (values[seen] - level.mean[seen])
    np.testing.assert_allclose(posterior.mean, expected, atol=1e-8)
    covariance = posterior.loadings @ posterior.loadings.T + np.diag(posterior.noise)
    np.testing.assert_allclose(covariance, prior - gain @ design @ prior, atol=1e-8)


def test_evidence_far_from_the_prior_widens_what_is_left():
    level = some_level(np.random.default_rng(0), degrees=4.0)
    near, far = (level.observe(np.append(level.mean[:-1] + step, np.nan), 0.1) for step in (0.0, 20.0))
    assert far.noise.sum() > 2 * near.noise.sum()
    assert far.degrees == near.degrees == 4.0 + GENES


def test_draws_of_a_level_have_its_moments_and_tails():
    level, rng = some_level(np.random.default_rng(0), degrees=5.0), np.random.default_rng(1)
    draws = np.stack([level.draw(rng) for _ in range(20000)])
    covariance = level.loadings @ level.loadings.T + np.diag(level.noise)
    np.testing.assert_allclose(draws.mean(axis=0), level.mean, atol=0.1)
    np.testing.assert_allclose(draws.var(axis=0), 5 / 3 * np.diag(covariance), rtol=0.15)


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
@pytest.mark.parametrize("library_size", [300.0, 8000.0])
def test_expected_values_are_those_of_simulated_counts_and_can_be_inverted(transform, library_size):
    rng = np.random.default_rng(0)
    shares, dispersion = np.array([1e-5, 3e-4, 4e-3, 5e-2]), np.array([0.3, 0.8, 1.2, 0.5])
    sizes = library_size * rng.lognormal(-0.125, 0.5, 100_000)
    rate = np.exp(rng.normal(size=(len(sizes), 4)) * dispersion - dispersion**2 / 2)
    counts = rng.poisson(shares * sizes[:, None] * rate)
    measured = get_transform(transform).forward(counts, sizes).mean(axis=0)
    ratios = library_ratios(sizes)
    expected = expected_values(shares, sizes.mean(), ratios, dispersion, transform)
    np.testing.assert_allclose(expected, measured, rtol=0.03, atol=0.01)
    found, slope = composition_of_values(expected[1:], sizes.mean(), ratios, dispersion[1:], np.zeros(3), transform)
    np.testing.assert_allclose(found, composition_of_shares(shares[1:]), atol=0.05)
    assert (slope > 0).all()
    fitted = fit_dispersion(shares[None], np.array([sizes.mean()]), ratios[None], measured[None], np.ones(1), transform)
    # a rare gene tells nothing of its dispersion
    np.testing.assert_allclose(fitted[2:], dispersion[2:], atol=0.15)


def test_shares_and_compositions_are_inverse():
    shares = np.array([0.0, 1e-5, 0.3])
    np.testing.assert_allclose(shares_of_composition(composition_of_shares(shares)), shares, atol=1e-12)


def levels_of_patients(num_patients: int, num_sections: int, between: float, within: float, genes: int = 300):
    """Levels with known standard deviations between patients and between sections of one."""
    rng = np.random.default_rng(3)
    patients = np.repeat([f"p{number}" for number in range(num_patients)], num_sections)
    population = rng.uniform(2, 6, genes)
    effects = np.repeat(between * rng.normal(size=(num_patients, genes)), num_sections, axis=0)
    composition = population + effects + within * rng.normal(size=effects.shape)
    count = len(patients)
    return SlideLevels(
        np.array([f"{patient}_{number}" for number, patient in enumerate(patients)]),
        patients,
        composition,
        composition / 2,
        np.full(count, 5000.0),
        np.ones((count, 7)),
        np.full(count, 100),
        np.zeros((count, 0)),
    )


def fitted_prior(levels: SlideLevels) -> SlidePrior:
    prior = SlidePrior(levels.composition.shape[1], sorted(set(levels.patient.tolist())), 4)
    fit_slide_prior(prior, levels, np.arange(len(levels)) < 2, "log2p1")
    return prior


def test_the_prior_finds_the_variances_between_patients_and_between_sections():
    prior = fitted_prior(levels_of_patients(12, 3, between=1.5, within=0.4))
    new, known = prior.of_patient(None), prior.of_patient("p3")

    def deviation(level):
        return np.sqrt((level.loadings**2).sum(axis=1) + level.noise)[:-1].mean()

    assert abs(deviation(new) - 1.5) < 0.15
    assert abs(deviation(prior.with_section(new)) - np.hypot(1.5, 0.4)) < 0.15
    assert deviation(known) < 0.3
    assert abs(deviation(prior.with_section(known)) - np.hypot(0.4, 0.4 / np.sqrt(3))) < 0.1


def test_one_patient_does_not_make_the_prior_of_another_one_narrow():
    prior = fitted_prior(levels_of_patients(1, 3, between=1.0, within=0.05))
    level = prior.of_new_patient()
    assert np.sqrt((level.loadings**2).sum(axis=1) + level.noise)[:-1].min() > 0.8
    assert level.degrees < 10


def test_a_gene_that_a_patient_lacks_is_not_taken_as_zero():
    levels = levels_of_patients(5, 2, between=1.0, within=0.2)
    levels.composition[2:4, 7] = levels.values[2:4, 7] = np.nan
    prior = fitted_prior(levels)
    assert np.isfinite(prior.of_new_patient().mean).all()
    others = np.delete(levels.composition[:, 7], [2, 3])
    assert abs(float(prior.population[7]) - others.mean()) < 1e-5
