"""Slides that measured different genes: a gene that a slide lacks is unknown and never zero."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.training import GENES, SETTINGS, make_model, table
from sklearn.decomposition import FactorAnalysis
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.gene_parts import MOST_PARTS, gene_parts
from hinge.data.slide_levels import SlideLevels
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.diffusion.likelihood import chain_log_likelihood
from hinge.evaluation.completion import complete_spots
from hinge.evaluation.ridge import fit_ridge, fit_ridge_of_parts, shrink_correlations
from hinge.models.slide_effects import SlidePrior
from hinge.training import TrainingConfig, train_hinge
from hinge.training.measured import MeasuredGenes
from hinge.training.prior_covariance import PriorCovariance, completed_covariance, fit_factors, log_likelihood
from hinge.training.slide_prior import fit_slide_prior
from hinge.training.spatial_correlation import SpatialCorrelation
from hinge.training.stacked_covariance import StackedCovariance

LACKING = {"s1": np.arange(GENES) % 2 == 0, "s2": np.arange(GENES) > 1}
IDS = torch.arange(1, GENES + 1)


def spots_of_three_slides(n=96, missing=0.0):
    """Three slides, of which one lacks every second gene and another two genes; what is missing has a given value."""
    spots = table(n, slides=3)
    lacking = ~np.stack([LACKING.get(name, np.ones(GENES, bool)) for name in spots.slide])
    values, counts = (np.where(lacking, np.float32(missing), each) for each in (spots.values, spots.counts))
    return replace(spots, values=values, counts=counts, measured=dict(LACKING))


@pytest.mark.parametrize("options", [{}, {"weighting": "gene", "loss_on": "revealed", "validation_share": 0.0}])
def test_training_does_not_depend_on_what_stands_for_a_missing_value(tmp_path, options):
    found = []
    for name, missing in (("a", 0.0), ("b", 7.0)):
        model = make_model(num_factors=3, head="rounded_gaussian")
        settings = TrainingConfig(**{**SETTINGS, "steps": 4, **options})
        spots = spots_of_three_slides(missing=missing)
        train_hinge(model, MaskedDiffusionScheduler(10, "linear"), IDS, spots, settings, tmp_path / name, seed=3)
        found.append(model.trained_state())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_a_mask_that_is_all_true_changes_nothing(tmp_path):
    found = []
    for name, measured in (("a", {}), ("b", {"s0": np.ones(GENES, bool)})):
        model, settings = make_model(num_factors=3), TrainingConfig(**{**SETTINGS, "steps": 3})
        spots = replace(table(), measured=measured)
        train_hinge(model, MaskedDiffusionScheduler(10, "linear"), IDS, spots, settings, tmp_path / name, seed=3)
        found.append(model.digest())
    assert found[0] == found[1]


def test_visible_genes_decide_on_the_timestep_of_a_spot_that_lacks_some():
    spots = spots_of_three_slides(6)
    measured, scheduler = MeasuredGenes.of(spots), MaskedDiffusionScheduler(GENES, "linear")
    timesteps, rows = torch.full((6,), 2), np.arange(6)
    visible = measured.of_spots(rows) * torch.tensor([1.0] * 6 + [0.0] * 2)
    found = measured.timesteps(scheduler, rows, timesteps, visible)
    wanted = torch.where(torch.from_numpy(spots.slide == "s0"), 2, GENES - visible.sum(dim=1).long())
    assert torch.equal(found, wanted)


def test_every_gene_is_regressed_on_the_spots_that_have_it():
    spots = spots_of_three_slides()
    fit, parts = fit_ridge_of_parts(spots.features[:, 0], spots.values, gene_parts(spots)), gene_parts(spots)
    for part in parts:
        x, y = spots.features[part.rows, 0].astype(float), spots.values[np.ix_(part.rows, part.columns)]
        scale = StandardScaler().fit(x)
        expected = Ridge(fit.penalty).fit(scale.transform(x), y).predict(scale.transform(x))
        np.testing.assert_allclose(fit.predict(x)[:, part.columns], expected.reshape(y.shape), atol=1e-9)
    whole = fit_ridge(spots.features[:, 0], spots.values, spots.slide)
    (part,) = gene_parts(table(96, slides=3))
    assert np.array_equal(fit_ridge_of_parts(spots.features[:, 0], spots.values, [part]).held_out, whole.held_out)


def test_a_gene_of_one_slide_is_cross_validated_within_it():
    spots = replace(spots_of_three_slides(), measured={"s1": np.arange(GENES) > 0, "s2": np.arange(GENES) > 0})
    alone = next(part for part in gene_parts(spots) if 0 in part.columns)
    assert set(spots.slide[alone.rows]) == {"s0"} and len(np.unique(alone.groups)) == 5


def test_many_sets_of_slides_are_merged_and_every_gene_keeps_spots_that_have_it():
    rng, names = np.random.default_rng(0), [f"s{number}" for number in range(12)]
    spots, genes = table(120, slides=12), 400
    has = {name: rng.random(genes) < 0.6 for name in names}
    has["s0"][:] = True
    values = np.zeros((120, genes), np.float32)
    spots = replace(spots, values=values, counts=values, genes=[f"G{g}" for g in range(genes)], measured=has)
    parts, known = gene_parts(spots), MeasuredGenes.of(spots).values()
    assert len(np.unique(np.stack(list(has.values())).T, axis=0)) > MOST_PARTS + 12 >= len(parts)
    assert sorted(np.concatenate([part.columns for part in parts])) == list(range(genes))
    assert all(known[np.ix_(part.rows, part.columns)].all() and len(part.rows) for part in parts)


def population(genes=30, factors=3, n=400, seed=0):
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(genes, factors))
    spots = rng.normal(size=(n, factors)) @ loadings.T + 0.7 * rng.normal(size=(n, genes))
    return loadings, spots


def masked(spots, share=0.4):
    slide_of = np.arange(len(spots)) % 4
    of_slides = np.random.default_rng(1).random((4, spots.shape[1])) > share
    of_slides[0] = True
    measured = MeasuredGenes(of_slides, slide_of)
    return np.where(measured.values(), spots, 0.0), measured, slide_of


@pytest.mark.parametrize("with_prior", [False, True])
def test_factors_of_genes_that_slides_lack_are_as_good_as_those_of_complete_ones(with_prior):
    loadings, spots = population()
    residual, measured, slide_of = masked(spots)
    prior = PriorCovariance(loadings, np.full(30, 0.49)) if with_prior else None
    found, complete = fit_factors(residual, slide_of, 3, prior, measured), fit_factors(spots, slide_of, 3, prior)
    new = np.random.default_rng(7).normal(size=(1000, 3)) @ loadings.T
    new = new + 0.7 * np.random.default_rng(8).normal(size=(1000, 30))
    zeros = FactorAnalysis(3).fit(residual)
    assert found.score(new) > complete.score(new) - 0.6 > zeros.score(new)
    expected = loadings @ loadings.T + 0.49 * np.eye(30)
    error = np.abs(found.components_.T @ found.components_ + np.diag(found.noise_variance_) - expected)
    assert error.mean() < 0.35


def test_the_likelihood_of_measured_genes_is_that_of_their_marginal_gaussian():
    from scipy.stats import multivariate_normal

    residual, measured, _ = masked(population(genes=7, factors=2, n=20)[1])
    analysis = fit_factors(residual, np.arange(20) % 4, 2, None, measured)
    covariance = analysis.components_.T @ analysis.components_ + np.diag(analysis.noise_variance_)
    expected = sum(
        multivariate_normal.logpdf(row[has], cov=covariance[np.ix_(has, has)])
        for row, has in zip(residual, measured.values(), strict=True)
    )
    assert log_likelihood(analysis, residual, measured) == pytest.approx(expected)


def test_the_completed_covariance_is_the_expected_one():
    residual, measured, _ = masked(population(genes=6, factors=2, n=12)[1])
    analysis = fit_factors(residual, np.arange(12) % 4, 2, None, measured)
    covariance = analysis.components_.T @ analysis.components_ + np.diag(analysis.noise_variance_)
    expected = np.zeros((6, 6))
    for row, has in zip(residual, measured.values(), strict=True):
        gain = covariance[:, has] @ np.linalg.inv(covariance[np.ix_(has, has)])
        filled = np.where(has, row, gain @ row[has])
        expected += np.outer(filled, filled) + covariance - gain @ covariance[has]
    np.testing.assert_allclose(completed_covariance(residual, measured, analysis).dense(), expected / 12, atol=1e-9)


def test_a_stacked_covariance_has_the_factors_of_the_matrix():
    spots = population(n=60)[1]
    covariance = spots.T @ spots / 60
    prior = PriorCovariance(np.random.default_rng(3).normal(size=(30, 5)), np.full(30, 0.5))
    matrix = shrink_correlations(covariance, prior.correlation(), 0.35)
    stacked = StackedCovariance(spots / np.sqrt(60), np.zeros(30)).shrunk(*prior, 0.35)
    np.testing.assert_allclose(stacked.dense(), matrix, atol=1e-10)
    np.testing.assert_allclose(stacked.variance, np.diag(matrix), atol=1e-10)
    found, noise = stacked.factor_analysis(3, 1000, 1e-13)
    root = np.linalg.cholesky(matrix).T * np.sqrt(30)
    expected = FactorAnalysis(3, svd_method="lapack", tol=1e-10, max_iter=5000).fit(np.concatenate([root, -root]))
    np.testing.assert_allclose(found @ found.T, expected.components_.T @ expected.components_, atol=1e-3)
    np.testing.assert_allclose(noise, expected.noise_variance_, atol=1e-3)


def test_the_spatial_correlation_of_a_gene_is_that_of_the_slides_that_have_it():
    rng, side = np.random.default_rng(0), 12
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) * 100.0
    field = np.repeat(rng.normal(size=(side * side // 4, 3)), 4, axis=0) + 0.3 * rng.normal(size=(side * side, 3))
    field -= field.mean(axis=0)
    both = SpatialCorrelation(np.concatenate([place, place]), np.repeat([0, 1], side * side))
    alone = SpatialCorrelation(place, np.zeros(side * side, int))
    y, has = np.concatenate([field, 0 * field]), np.array([[True] * 3, [False] * 3])
    np.testing.assert_allclose(both.share(y, 1.0, has), alone.share(field, 1.0), atol=1e-9)
    assert (both.share(y, 1.0, has) > 0.1).all()


def test_the_prior_of_slide_levels_knows_nothing_of_genes_that_a_patient_lacks():
    spots = spots_of_three_slides()
    levels = SlideLevels.of_spots(spots.known_counts(), spots.library_size, spots.slide, spots.slide, "log2p1")
    assert np.array_equal(np.isnan(levels.values[1]), ~LACKING["s1"])
    prior = SlidePrior(GENES, ["s0", "s1", "s2"], 5)
    fit_slide_prior(prior, levels, np.ones(3, bool), "log2p1")
    assert all(torch.isfinite(each).all() for each in prior.state_dict().values())
    np.testing.assert_allclose(prior.array("measured_share")[:4], [2 / 3, 1 / 3, 1, 2 / 3], atol=1e-6)
    new, known = prior.of_new_patient(), prior.of_patient("s1")
    variance = [(each.loadings**2).sum(axis=1) + each.noise for each in (new, known)]
    ratio = (variance[1] / variance[0])[:GENES]
    assert (ratio[LACKING["s1"]] < 0.5 * ratio[~LACKING["s1"]].min()).all()
    values = prior.values_of_patient("s1")
    assert np.array_equal(np.isnan(values), ~LACKING["s1"])
    np.testing.assert_allclose(values[LACKING["s1"]], levels.values[1][LACKING["s1"]], atol=1e-6)
    # variances of the training slides are of those that have the gene
    complete = SlidePrior(GENES, ["s0", "s1", "s2"], 5)
    whole = table(96, slides=3)
    of_all = SlideLevels.of_spots(whole.counts, whole.library_size, whole.slide, whole.slide, "log2p1")
    fit_slide_prior(complete, of_all, np.ones(3, bool), "log2p1")
    shares = prior.array("training_variance") / complete.array("training_variance")
    assert (shares[complete.array("training_variance") > 0.05] > 0.5).all()


def test_spots_are_completed_for_baselines():
    spots = spots_of_three_slides()
    complete = complete_spots(spots, 0)
    known, truth = MeasuredGenes.of(spots).values(), table(96, slides=3).values
    assert complete.measured == {} and np.array_equal(complete.values[known], spots.values[known])
    error = np.abs(complete.values - truth)[~known]
    assert error.mean() < 0.5 * np.abs(truth.mean(axis=0) - truth)[~known].mean()
    assert np.array_equal(complete.values, complete_spots(spots, 0).values)
    assert complete_spots(table(), 0).measured == {}


def test_the_likelihood_is_of_measured_genes_alone():
    model, spots = make_model(head="rounded_gaussian").eval(), table(8)
    has = np.arange(GENES) < 5
    values, other = spots.values.copy(), spots.values.copy()
    other[:, ~has] = 9.0
    arguments = (model, MaskedDiffusionScheduler(10, "linear"), spots.features[:, 0], IDS)
    names = [f"x/{barcode}" for barcode in spots.barcodes]
    found = [chain_log_likelihood(*arguments, each, names, 4, measured=has) for each in (values, other)]
    assert np.array_equal(*found)
    every = chain_log_likelihood(*arguments, values, names, 4, measured=np.ones(GENES, bool))
    assert np.array_equal(every, chain_log_likelihood(*arguments, values, names, 4))
    assert (found[0] > every).all()


def test_pretrained_weights_of_runs_before_this_open(tmp_path):
    """The prior of slide levels of an earlier version has one number of slides a patient."""
    from safetensors.torch import load_file, save_file

    from hinge.models import HingeModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}
    backbone = CellFMModel(CellFMConfig(num_genes=GENES, **size))
    model = make_model(backbone)
    model.add_slide_prior(["a", "b"])
    model.slide_prior.patient_sections[:] = torch.tensor([[2.0], [3.0]])
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["slide_prior.patient_sections"] = torch.tensor([2.0, 3.0])
    for name in ("measured_share", "token_effects", "token_shares"):
        del weights[f"slide_prior.{name}"]
    save_file(weights, file, metadata={"format": "pt"})
    loaded = HingeModel.from_pretrained(tmp_path / "model", backbone)
    for name, tensor in model.trained_state().items():
        assert torch.equal(tensor, loaded.trained_state()[name]), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["slide_patients"] == ["a", "b"]


def test_large_panels_are_fitted_without_a_matrix_of_all_genes(monkeypatch):
    """Both ways lead to the same factors, up to the sign of each."""
    from hinge.training import prior_covariance as fitted

    loadings, spots = population(n=120)
    prior, groups = PriorCovariance(loadings, np.full(30, 0.49)), np.arange(120) % 4
    residual, measured, slide_of = masked(spots)
    best = fitted._best_share(spots, groups, 3, prior, None)
    for arguments in ((spots, groups, 3, prior), (residual, slide_of, 3, None, measured)):
        small = fit_factors(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(fitted, "MOST_DENSE", 29)
            patch.setattr(fitted, "GENES_OF_SHARE", 20)
            patch.setattr(fitted, "_best_share", lambda *_: best)
            large = fit_factors(*arguments)
        for each in ("noise_variance_", "components_"):
            a, b = getattr(small, each), getattr(large, each)
            a, b = (a.T @ a, b.T @ b) if each == "components_" else (a, b)
            np.testing.assert_allclose(a, b, atol=0.02)


def test_a_step_on_some_genes_is_a_step_whose_other_genes_have_no_tokens(tmp_path):
    """Tokens of absent genes give no keys, so that leaving them out changes nothing for those that have some."""
    model, spots = make_model(num_factors=3).eval(), table(6)
    with torch.no_grad():
        for parameter in model.modulation.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    index, visible = torch.tensor([0, 2, 3, 6]), torch.isin(torch.arange(GENES), torch.tensor([0, 6])).float()
    visible = visible.expand(6, -1)
    values, present = torch.from_numpy(spots.values) * visible, torch.zeros(6, GENES)
    present[:, index] = 1
    inputs = {"values": values, "visible": visible, "timestep": torch.full((6,), 5), "gene_ids": IDS}
    inputs["features"] = torch.from_numpy(spots.features[:, 0])
    with torch.no_grad():
        some, hidden = model(index=index, **inputs).location, model(present=present, **inputs).location
    np.testing.assert_allclose(some[:, index], hidden[:, index], atol=1e-5)
    settings = TrainingConfig(**{**SETTINGS, "steps": 4, "genes_per_step": 3})
    train_hinge(model, MaskedDiffusionScheduler(10, "linear"), IDS, spots_of_three_slides(), settings, tmp_path, seed=3)
    assert all(torch.isfinite(each).all() for each in model.parameters())
