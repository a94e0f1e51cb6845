"""Closed-form initialisation: regression, slide shifts, factors, spatial correlation, library size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.draws import draw_features
from helpers.training import FEATURES, GENES, SETTINGS, make_model, table

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.spots import SpotTable, concatenate_spots, spot_groups
from hinge.data.transforms import get_transform
from hinge.diffusion import MaskedDiffusionScheduler, SlideInputs
from hinge.evaluation.ridge import RidgeFolds, fit_ridge_by_component
from hinge.models import HingeModel
from hinge.models.library_size import NORMAL_SCORES
from hinge.training import TrainingConfig, train_hinge
from hinge.training.hinge import fit_slide_levels
from hinge.training.initialisation import initialise_gene_factors, initialise_library_size
from hinge.training.masked_mean import fit_masked_mean

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


@pytest.mark.parametrize("slides", [1, 2])
def test_where_no_gene_is_visible_the_initialised_model_is_the_regression(slides):
    spots, model, scheduler = table(90, slides=slides), make_model(), MaskedDiffusionScheduler(10, "linear")
    features = torch.from_numpy(spots.features[:, 0])
    model.set_feature_statistics(features)
    before = model.modulation.bias.clone()
    ids, nothing = torch.arange(1, GENES + 1), torch.zeros(90, GENES)
    initialise_gene_factors(model, scheduler, ids, spots, seed=0)
    with torch.no_grad():
        predicted = model(nothing, nothing, torch.full((90,), 10), features, ids).location
    groups = spot_groups(spots.slide, spots.coords, "fold")
    regression, _ = fit_ridge_by_component(RidgeFolds(spots.features[:, 0], groups), spots.values)
    # the modulation's opening gate adds what a features-free backbone predicts: a constant that ridge absorbs
    np.testing.assert_allclose(predicted.numpy(), regression.predict(spots.features[:, 0]), atol=0.02)
    assert torch.equal(model.modulation.bias, before)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_where_no_gene_is_visible_the_modulation_counts_as_far_as_it_is_told_to(share):
    spots, model = table(90), make_model(masked_decoding=share)
    features, ids = torch.from_numpy(spots.features[:, 0]), torch.arange(1, GENES + 1)
    model.set_feature_statistics(features)
    initialise_gene_factors(model, MaskedDiffusionScheduler(10, "linear"), ids, spots, seed=0)
    values, nothing, half = torch.from_numpy(spots.values), torch.zeros(90, GENES), torch.zeros(90, GENES)
    half[:, ::2] = 1

    def located(visible, timestep):
        with torch.no_grad():
            return model(values * visible, visible, torch.full((90,), timestep), features, ids).location

    before, before_half = located(nothing, 10), located(half, 5)
    with torch.no_grad():
        for parameter in model.modulation.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved, moved_half = (located(nothing, 10) - before).abs().mean(), (located(half, 5) - before_half).abs().mean()
    assert moved_half > 0
    if share == 0:
        assert moved == 0
        return
    full = make_model(masked_decoding=1.0)
    full.load_state_dict(model.state_dict())
    full.gene_factor_model.masked_decoding.fill_(1.0)
    with torch.no_grad():
        whole = full(nothing, nothing, torch.full((90,), 10), features, ids).location - before
    torch.testing.assert_close(located(nothing, 10) - before, share * whole, atol=1e-4, rtol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_the_mean_of_what_a_trained_model_predicts_follows_its_regression(tmp_path, transform):
    """Few counts: a Gaussian that is rounded and has nothing below zero has another mean than its location."""
    rng = np.random.default_rng(0)
    spots, library_size = table(200), np.full(200, 3000.0, np.float32)
    counts = rng.poisson(np.exp(0.7 * spots.features[:, 0] @ rng.normal(size=(FEATURES, GENES)) / 2 - 1))
    values = np.log2(counts + 1) if transform == "log2p1" else np.log1p(counts / 3000 * 1e4)
    spots = replace(
        spots,
        counts=counts.astype(np.float32),
        values=values.astype(np.float32),
        library_size=library_size,
        transform=transform,
    )
    model = make_model(head="rounded_gaussian", transform=transform, library_size=transform != "log2p1")
    scheduler, ids = MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1)
    train_hinge(model, scheduler, ids, spots, TrainingConfig(**{**SETTINGS, "steps": 20}), tmp_path, seed=0)
    features = spots.features[:, 0]
    model.slide_prior = None  # the level of a slide would move the mean

    def error() -> float:
        names = [f"{name}/{code}" for name, code in zip(spots.slide, spots.barcodes, strict=True)]
        draws = draw_features(model, scheduler, features, ids, names, num_draws=1, num_inference_steps=1)
        condition = model.standardise(torch.from_numpy(features))
        if model.library_size_model is not None:
            condition = model.with_library_size(condition, model.library_size_model.typical(condition))
        with torch.no_grad():
            regression = (model.gene_factor_model.offset + model.gene_factor_model.mean(condition)).clamp_min(0).numpy()
        return float(((draws.expected - regression) ** 2).mean())

    with_correction = error()
    model.gene_factor_model.masked_bias.zero_()
    model.gene_factor_model.masked_slope.zero_()
    assert with_correction < 0.7 * error()


@pytest.mark.parametrize("dropped", [False, True])
def test_residuals_in_training_are_out_of_fold_whatever_features_are_dropped(dropped):
    """40 features without any meaning: in-sample residuals are too small, those of dropped features too large."""
    rng = np.random.default_rng(0)
    tables = []
    for number in range(4):
        counts = rng.poisson(8, (40, GENES)).astype(np.float32)
        coords = np.stack(np.divmod(np.arange(40), 8), axis=1) * 200.0
        tables.append(
            SpotTable(
                slide=np.full(40, f"s{number}"),
                barcodes=np.array([f"{number}-{i}" for i in range(40)]),
                coords=coords,
                features=rng.normal(size=(40, 1, 40)).astype(np.float32),
                counts=counts,
                library_size=counts.sum(axis=1),
                values=np.log2(counts + 1),
                genes=[f"G{i}" for i in range(GENES)],
                transform="log2p1",
            )
        )
    spots = concatenate_spots(tables)
    torch.manual_seed(0)
    backbone = CellFMModel(CellFMConfig(GENES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    model = HingeModel.from_backbone(backbone, 40, GENES)
    features = torch.from_numpy(spots.features[:, 0])
    model.set_feature_statistics(features)
    ids = torch.arange(1, GENES + 1)
    shifts, *_ = initialise_gene_factors(model, MaskedDiffusionScheduler(10, "linear"), ids, spots, seed=0)
    hidden = torch.zeros(160, GENES)
    mask = torch.zeros_like(features) if dropped else None
    with torch.no_grad():
        located = model(
            hidden, hidden, torch.full((160,), 10), features, ids, feature_mask=mask, slide_shift=shifts
        ).location
    residual = (torch.from_numpy(spots.values) - located).numpy()
    within = np.stack([residual[40 * number : 40 * (number + 1)].std(axis=0) for number in range(4)])
    # nothing can be predicted: what is left is all there was
    everything = np.stack([spots.values[40 * number : 40 * (number + 1)].std(axis=0) for number in range(4)])
    assert abs(within.mean() / everything.mean() - 1) < 0.04


def slides_with_shifts() -> SpotTable:
    """Six slides of 12 × 12 spots: values = features + slide shift + one smooth factor + noise of each gene."""
    rng = np.random.default_rng(0)
    y, x = (grid.ravel() for grid in np.mgrid[:12, :12])
    coords, tables = np.stack([x, y], axis=1) * 200.0, []
    distance = np.linalg.norm(coords[:, None] - coords[None], axis=2) / 200
    smooth = np.linalg.cholesky(np.exp(-distance / 2) + 1e-9 * np.eye(144))
    weight, loadings = rng.normal(size=(FEATURES, GENES)), np.linspace(0.4, 1.2, GENES)
    for number in range(6):
        features = rng.normal(size=(144, 1, FEATURES)).astype(np.float32)
        shift = (number - 2.5) / 1.5 * np.linspace(-1, 1, GENES)
        factor = smooth @ rng.normal(size=144)
        factor -= factor.mean()  # what a smooth factor has in common over a slide is a slide shift too
        values = 6 + 0.5 * features[:, 0] @ weight + shift + np.outer(factor, loadings)
        values = (values + 0.3 * rng.normal(size=values.shape)).astype(np.float32)
        counts = np.maximum(np.round(np.exp2(values) - 1), 0).astype(np.float32)
        tables.append((np.full(144, f"s{number}"), coords, features, counts, factor))
    slide, place, features, counts, factor = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    total = 1000 * np.exp(0.4 * features[:, 0, 0] + 0.5 * rng.normal(size=len(slide)))
    return SpotTable(
        slide=slide,
        barcodes=np.array([f"b{i}" for i in range(len(slide))]),
        coords=place,
        features=features,
        counts=counts,
        library_size=np.round(total).astype(np.float32),
        values=np.log2(counts + 1).astype(np.float32),
        genes=[f"G{i}" for i in range(GENES)],
        transform="log2p1",
    )


@pytest.mark.full
def test_the_closed_form_start_tells_slide_shifts_from_factors_and_finds_what_is_smooth():
    spots = slides_with_shifts()
    model = make_model(head="rounded_gaussian", transform="log2p1", num_factors=2)
    model.set_feature_statistics(torch.from_numpy(spots.features[:, 0]))
    scheduler, ids = MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1)
    shifts, *_ = initialise_gene_factors(model, scheduler, ids, spots, seed=0)
    path = model.gene_factor_model
    expected = np.stack([(number - 2.5) / 1.5 * np.linspace(-1, 1, GENES) for number in range(6)])
    for number in range(6):
        own = shifts[144 * number : 144 * (number + 1)]
        np.testing.assert_allclose(own.mean(dim=0).numpy(), expected[number], atol=0.3)
    # no direction of slide shifts in the factors
    strongest = path.loadings[:, path.loadings.norm(dim=0).argmax()].detach().numpy()
    assert np.corrcoef(np.abs(strongest), np.linspace(0.4, 1.2, GENES))[0, 1] > 0.95
    assert path.factor_spatial_share.max() > 0.7
    assert path.spatial_share.mean() < 0.25
    assert 1 <= float(path.spatial_range) <= 4

    # a slide drawn from it: smooth maps where spots of a draw agree, rough ones where they do not
    test = spots.subset(spots.slide == "s1")
    arguments = (model.eval(), scheduler, test.features[:, 0], ids, test.barcodes, "s1")
    place, settings = test.coords / 200, {"num_draws": 6, "num_inference_steps": 3}
    agree = draw_features(*arguments, positions=place, **settings).values
    alone = draw_features(*arguments, **settings).values
    near = np.linalg.norm(place[:, None] - place[None], axis=2)
    pairs = np.nonzero((near > 0) & (near < 1.1))

    def neighbours_correlate(values):
        own = values - values.mean(axis=0)
        return np.mean([np.corrcoef(own[pairs[0], g], own[pairs[1], g])[0, 1] for g in range(GENES)])

    measured = neighbours_correlate(test.values)
    drawn = np.mean([neighbours_correlate(draw) for draw in agree])
    assert abs(drawn - measured) < 0.15
    assert np.mean([neighbours_correlate(draw) for draw in alone]) < drawn - 0.15


def test_measured_genes_tell_the_shift_of_their_slide():
    spots = slides_with_shifts()
    last = spots.slide == "s5"
    model = make_model(head="rounded_gaussian", transform="log2p1", num_factors=2)
    known = spots.subset(~last)
    model.set_feature_statistics(torch.from_numpy(known.features[:, 0]))
    scheduler, ids = MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1)
    initialise_gene_factors(model, scheduler, ids, known, seed=0)
    fit_slide_levels(model, known)
    test, model = spots.subset(last), model.eval()
    features, names = test.features[:, 0], list(test.barcodes)
    arguments = {"num_draws": 8, "num_inference_steps": 2, "slide": "s5", "positions": test.coords / 200}
    half = test.values.copy()
    half[:, ::2] = np.nan
    alone = draw_features(model, scheduler, features, ids, names, **arguments)
    given = draw_features(model, scheduler, features, ids, names, observed=half, **arguments)
    np.testing.assert_array_equal(given.values[:, :, 1::2], np.broadcast_to(half[:, 1::2], (8, 144, GENES // 2)))

    def missed(draws):
        """By how much slide means of the other genes are off."""
        return np.abs(draws.expected[:, ::2].mean(axis=0) - test.values[:, ::2].mean(axis=0)).mean()

    # the slide's shift is the largest of all: 1.67 times a direction that other slides have too
    assert missed(given) < 0.5 * missed(alone)
    # what is known of the shift no longer varies between draws
    spread = [draws.values[:, :, ::2].mean(axis=1).std(axis=0).mean() for draws in (given, alone)]
    assert spread[0] < 0.7 * spread[1]
    # a part of the spots, given the measurements of the whole slide, has the draws of the whole slide
    part = slice(40, 60)
    whole = SlideInputs("s5", names, features, observed=half)
    effect = whole.with_slide_effect(model, scheduler, ids).slide_effect
    arguments |= {"positions": arguments["positions"][part], "observed": half[part], "slide_effect": effect}
    some = draw_features(model, scheduler, features[part], ids, names[part], **arguments)
    np.testing.assert_allclose(some.values, given.values[:, part], atol=1e-4)


def make_count_model(spots):
    model = make_model(head="rounded_gaussian", transform="log1p_cp10k", library_size=True, num_factors=2)
    model.set_feature_statistics(torch.from_numpy(spots.features[:, 0]))
    return model


def poisson_spots(shares, rng, log_size, deviation):
    """Spots with Poisson counts of genes with these shares (G,) of a log-normal library size."""
    spots = slides_with_shifts()
    sizes = np.exp(rng.normal(log_size, deviation, len(spots))).round().astype(np.float32)
    counts = rng.poisson(sizes[:, None] * shares).astype(np.float32)
    values = get_transform("log1p_cp10k").forward(counts, sizes)
    return replace(spots, library_size=sizes, counts=counts, values=values, transform="log1p_cp10k")


@pytest.mark.full
def test_the_depth_is_regressed_on_the_features_and_drawn_first():
    spots = slides_with_shifts()
    model = make_count_model(spots)
    initialise_gene_factors(model, MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1), spots, seed=0)
    features = model.standardise(torch.from_numpy(spots.features[:, 0]))
    predicted = model.library_size_model.mean(features).squeeze(-1).detach().numpy()
    assert np.corrcoef(predicted, spots.features[:, 0, 0])[0, 1] > 0.95
    assert abs(float(model.library_size_model.scale) - 0.5) < 0.1
    normal = torch.randn(len(features), generator=torch.Generator().manual_seed(0))
    library_size = model.library_size_model(features, normal, torch.zeros_like(normal))
    assert abs(np.log(library_size.numpy()).std() - np.log(spots.library_size).std()) < 0.1
    drawn = np.quantile(np.log(library_size), SHARES) - np.quantile(np.log(spots.library_size), SHARES)
    assert np.abs(drawn).max() < 0.15
    found = model.library_size_model.standardise(features, library_size)
    assert torch.corrcoef(torch.stack([found, normal]))[0, 1] > 0.99
    torch.testing.assert_close(
        found,
        normal + torch.from_numpy(np.interp(normal, NORMAL_SCORES, model.library_size_model.quantile_excess)).float(),
        atol=0.05 + float(model.library_size_model.slide_scale),
        rtol=0.1,
    )


@pytest.mark.full
def test_library_sizes_are_drawn_from_the_distribution_of_the_training_spots():
    """A few spots with hardly a count make the standard deviation of the logarithm that of no other spot."""
    spots, rng = slides_with_shifts(), np.random.default_rng(0)
    normal = rng.standard_normal(len(spots))
    log_size = 8 + 0.3 * normal - 4 * (rng.random(len(spots)) < 0.03)
    spots = replace(spots, library_size=np.exp(log_size).round().astype(np.float32))
    model = make_count_model(spots)
    initialise_library_size(model, spots)
    sizes = model.library_size_model
    features = model.standardise(torch.from_numpy(spots.features[:, 0])).repeat(40, 1)
    draws = sizes(features, torch.randn(len(features), generator=torch.Generator().manual_seed(0)))
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(draws.log().numpy(), share) - np.quantile(log_size, share)) < (
            0.15 if share > 0.05 else 1
        )
    assert float(sizes.scale) > 0.6
    assert sizes.log_mean(features) == pytest.approx(float(draws.mean().log()), abs=0.02)
    assert sizes.log_spread(features) == pytest.approx(float(draws.log().std()), rel=0.1)


@pytest.mark.full
def test_values_change_with_the_library_size_as_those_of_poisson_counts_do():
    rng = np.random.default_rng(0)
    shares = np.array([2e-3, 5e-4, 1e-4, 2e-5, 1e-5, 5e-6])[:GENES]
    shares = np.concatenate([shares, np.full(GENES - len(shares), 1e-3)])
    spots = poisson_spots(shares, rng, 8, 0.8)
    model = make_count_model(spots)
    initialise_library_size(model, spots)
    few, many = (torch.full((1,), size) for size in (500.0, 20000.0))
    with torch.no_grad():
        found = (model.library_size_model.change(many) - model.library_size_model.change(few))[0].numpy()
    drawn = [
        get_transform("log1p_cp10k")
        .forward(rng.poisson(size * shares, (40000, GENES)), np.full(40000, size))
        .mean(axis=0)
        for size in (500.0, 20000.0)
    ]
    np.testing.assert_allclose(found, drawn[1] - drawn[0], atol=0.05)
    assert found.max() > 0.5  # of a gene with a count or two, and none of a gene with many


@pytest.mark.full
def test_the_mean_follows_the_library_size_of_a_spot_with_few_counts():
    """The mean of a Gaussian that is rounded to few counts would fall short of its location."""
    rng = np.random.default_rng(1)
    shares = np.geomspace(1e-4, 3e-3, GENES)
    spots = poisson_spots(shares, rng, 7.5, 1.0)
    model = make_count_model(spots)
    ids = torch.arange(1, GENES + 1)
    initialise_gene_factors(model, MaskedDiffusionScheduler(10, "linear"), ids, spots, seed=0)
    nothing, few = torch.zeros(len(spots), GENES), spots.library_size < 900
    features, last = torch.from_numpy(spots.features[:, 0]), torch.full((len(spots),), 10)

    @torch.no_grad()
    def missed() -> float:
        """By how much the means of spots with few counts are off, beside those of the others."""
        given = {"library_size": torch.from_numpy(spots.library_size), "next_visible": nothing}
        left = spots.values - model(nothing, nothing, last, features, ids, **given).mean.numpy()
        return float(np.abs(left[few].mean(axis=0) - left[~few].mean(axis=0)).mean())

    scheduler = MaskedDiffusionScheduler(10, "linear")
    fit_masked_mean(model, scheduler, ids, features)
    found = missed()
    model.library_size_model.location_excess.zero_()
    fit_masked_mean(model, scheduler, ids, features)
    without = missed()
    assert found < 0.5 * without
