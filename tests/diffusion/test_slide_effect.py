"""The slide effect of draws: levels that are asked for are those that are drawn, and evidence moves them."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from scipy.special import ndtri

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.bulk import read_bulk
from hinge.data.slide_levels import NUM_RATIOS, SlideLevels, composition_of_shares, shares_of_composition
from hinge.data.transforms import get_transform
from hinge.diffusion import MaskedDiffusionScheduler, SamplingSettings, SlideInputs, draw_spots
from hinge.diffusion.evidence import log_evidence, slide_evidence
from hinge.diffusion.slide_effect import LibrarySpread, SlideEvidence
from hinge.diffusion.slide_frame import SlideFrame
from hinge.models import HingeModel
from hinge.models.expected_values import counting_variance, moments
from hinge.training.slide_prior import fit_slide_prior
from hinge.utils.errors import ConfigError, DataError

GENES, FEATURES, SPOTS = 40, 4, 60
NAMES = [f"G{number}" for number in range(GENES)]
PATIENTS = 8
DEPTH = {f"p{number}": depth for number, depth in enumerate(np.geomspace(900, 9000, PATIENTS))}


def counts_of(rng, composition, depth):
    """Counts of a slide: 40 genes of a panel, and as many counts again of other genes."""
    sizes = depth * rng.lognormal(-0.08, 0.4, SPOTS)
    shares = composition / 2
    rate = sizes[:, None] * shares * rng.lognormal(-0.125, 0.5, (SPOTS, GENES))
    return rng.poisson(rate).astype(np.float32), sizes.round().astype(np.float32)


@pytest.fixture(scope="module", params=["log2p1", "log1p_cp10k"])
def cohort(request):
    """A model whose prior is fitted on two slides of each of seven patients; slides of an eighth."""
    transform, rng = request.param, np.random.default_rng(0)
    population = rng.normal(size=GENES)
    tables, truth = [], {}
    for patient, depth in DEPTH.items():
        composition = np.exp(population + 0.7 * rng.normal(size=GENES))
        composition /= composition.sum()
        for section in range(2):
            name = f"{patient}_{section}"
            truth[name] = (composition, *counts_of(rng, composition, depth))
            tables.append((name, patient, *truth[name][1:]))
    held = [each for each in tables if each[1] == "p7"]
    known = [each for each in tables if each[1] != "p7"]
    spots = lambda number: np.concatenate([np.full(SPOTS, each[number]) for each in known])  # noqa: E731
    levels = SlideLevels.of_spots(
        np.concatenate([each[2] for each in known]),
        np.concatenate([each[3] for each in known]),
        spots(0),
        spots(1),
        transform,
    )
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 4}
    backbone = CellFMModel(CellFMConfig(num_genes=GENES, transform=transform, **size))
    options = {"head": "rounded_gaussian", "transform": transform, "library_size": transform != "log2p1"}
    model = HingeModel.from_backbone(backbone, FEATURES, GENES, num_factors=2, **options).eval()
    with torch.no_grad():
        factors = model.gene_factor_model
        factors.masked_decoding.zero_()
        factors.mix[0] = -1  # nothing of what an untrained backbone decodes
        factors.loadings.normal_(std=0.3)
        factors.readout.copy_(factors.loadings)
        factors.offset.copy_(torch.from_numpy(levels.values[:2].mean(axis=0)))
        factors.log_noise.fill_(-1.0)
        if model.library_size_model is not None:
            model.library_size_model.mean.bias.fill_(float(np.log(levels.library_size[:2].mean())))
            model.library_size_model.scale.fill_(0.4)
    prior = model.add_slide_prior(sorted(set(levels.patient.tolist())))
    fit_slide_prior(prior, levels, np.arange(len(levels)) < 2, transform)
    features = np.random.default_rng(1).normal(size=(SPOTS, FEATURES)).astype(np.float32)
    values = get_transform(transform).forward(held[0][2], held[0][3])
    return model, features, values, held


def effect_of(cohort, evidence=None, observed=None, library_size=None):
    model, features, _, _ = cohort
    names = [f"b{number}" for number in range(SPOTS)]
    inputs = SlideInputs("x", names, features, None, observed, library_size, evidence or SlideEvidence())
    scheduler = MaskedDiffusionScheduler(10, "linear")
    return inputs.with_slide_effect(model, scheduler, torch.arange(1, GENES + 1)).slide_effect


def error(cohort, effect) -> float:
    return float(((effect.typical.level - cohort[2].mean(axis=0)) ** 2).mean())


def test_the_shift_gives_the_level(cohort):
    effect = effect_of(cohort)
    for shift in (effect.typical, effect.draw(0, "x", 3)):
        with torch.inference_mode():
            mean = effect.slide.mean(shift.values, shift.library_size)
        inside = np.abs(shift.values - effect.typical.values) < 3.9
        np.testing.assert_allclose(mean[inside], shift.level[inside], atol=0.01)
    again = effect_of(cohort).draw(0, "x", 3)
    np.testing.assert_array_equal(again.values, effect.draw(0, "x", 3).values)
    assert not np.allclose(effect.draw(0, "x", 4).level, again.level)


def test_what_is_known_of_a_slide_brings_its_level_nearer(cohort):
    _, _, values, held = cohort
    size = float(held[0][3].mean())
    nothing = effect_of(cohort, SlideEvidence(library_size=size))
    neighbour = held[1][2].sum(axis=0) / held[1][3].sum()
    bulk = effect_of(cohort, SlideEvidence(bulk=composition_of_shares(neighbour), bulk_sd=0.2, library_size=size))
    observed = np.full_like(values, np.nan)
    observed[::6] = values[::6]
    sizes = np.where(np.isfinite(observed[:, 0]), held[0][3], np.nan)
    spots = effect_of(cohort, observed=observed, library_size=sizes)
    half = np.full_like(values, np.nan)
    half[:, ::2] = values[:, ::2]
    panel = effect_of(cohort, SlideEvidence(library_size=size), observed=half)
    errors = [error(cohort, each) for each in (nothing, bulk, spots)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[0]
    measured = ((panel.typical.level - values.mean(axis=0)) ** 2)[::2].mean()
    assert measured < 0.1 * errors[0]

    def spread(effect):
        return np.std([effect.draw(0, "x", number).level for number in range(20)], axis=0).mean()

    assert spread(bulk) < 0.6 * spread(nothing) and spread(spots) < 0.6 * spread(nothing)


def test_levels_of_a_patient_never_seen_cover_the_truth(cohort):
    _, _, values, held = cohort
    for size in (float(held[0][3].mean()), "unknown"):
        effect = effect_of(cohort, SlideEvidence(library_size=size))
        drawn = np.stack([effect.draw(0, "x", number).level for number in range(100)])
        low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
        truth = values.mean(axis=0)
        assert 0.75 < ((truth >= low) & (truth <= high)).mean() <= 1


def test_a_known_patient_has_the_level_of_his_slides_and_less_spread(cohort):
    model = cohort[0]
    known, new = effect_of(cohort, SlideEvidence(patient="p0")), effect_of(cohort)
    own = model.slide_prior.array("patient_values")[model.slide_prior.patients.index("p0")]
    np.testing.assert_allclose(known.typical.level, own, atol=0.02)
    assert known.level.noise.sum() < 0.3 * new.level.noise.sum()


def test_the_level_follows_features_that_differ_from_those_of_the_training_spots(cohort):
    model, features, values, held = cohort
    weight = model.gene_factor_model.mean.weight
    known, moved = SlideEvidence(patient="p0"), features - features.mean(axis=0) + np.float32(0.5)
    before = effect_of(cohort, known).typical.level
    try:
        with torch.no_grad():
            weight[:, :FEATURES] = torch.linspace(0, 0.4, GENES)[:, None]
        # as one whole slide of spots of training has them: the level is that of the patient's slides
        whole = effect_of((model, features - features.mean(axis=0), values, held), known).typical.level
        other = effect_of((model, moved, values, held), known).typical.level
    finally:
        with torch.no_grad():
            weight.zero_()
    np.testing.assert_allclose(whole, before, atol=0.01)
    difference = 0.5 * FEATURES * np.linspace(0, 0.4, GENES)
    np.testing.assert_allclose(other - before, difference, atol=0.02)


def slide_with(counts, sizes) -> AnnData:
    rest = sizes - counts.sum(axis=1)
    slide = AnnData(csr_matrix(np.column_stack([counts, rest])))
    slide.var_names = [*NAMES, "REST"]
    slide.uns["hinge"] = {"name": "x"}
    return slide


def test_what_is_told_of_the_library_size(cohort, caplog):
    model, _, _, held = cohort
    slide = slide_with(*held[0][2:])
    evidence, about = slide_evidence(model, slide, NAMES)
    assert about["library_size"] == pytest.approx(held[0][3].mean()) and about["patient"] == "new"
    assert evidence.library_spread is not None
    assert slide_evidence(model, slide, NAMES, patient="p1")[1]["library_size"] == "patient"
    alone = AnnData(np.zeros((3, 0)), uns={"hinge": {"name": "x"}})
    about = slide_evidence(model, alone, NAMES)[1]
    assert about["library_size"] == "training"
    log_evidence(model, alone, about)
    assert ("without its library size" in caplog.text) == (model.config.transform == "log2p1")
    for wrong, message in (("median", "takes a number or one of"), (0.5, "from 1 on")):
        with pytest.raises(ConfigError, match=message):
            slide_evidence(model, slide, NAMES, library_size=wrong)
    with pytest.raises(ConfigError, match="has no counts; give --library-size a number"):
        slide_evidence(model, alone, NAMES, library_size="slide")


def test_bulk_profiles_in_every_form_and_wrong_ones(tmp_path):
    values = np.arange(1.0, 5.0)
    genes = ["A", "B", "C", "D"]
    expected = composition_of_shares(np.array([0.2, 0.4, np.nan]))
    (tmp_path / "b.csv").write_text("gene,tpm\n" + "".join(f"{g},{v}\n" for g, v in zip(genes, values, strict=True)))
    (tmp_path / "b.tsv").write_text(
        "gene\tname\tcount\n" + "".join(f"{g}\tx\t{v:.0f}\n" for g, v in zip(genes, values, strict=True))
    )
    table = AnnData(np.stack([values, values]))
    table.var_names = genes
    table.write_h5ad(tmp_path / "b.h5ad")
    for bulk in (pd.Series(values, genes), tmp_path / "b.csv", str(tmp_path / "b.tsv"), tmp_path / "b.h5ad", table):
        np.testing.assert_allclose(read_bulk(bulk, ["B", "D", "Z"]), expected)
    for text, message in (
        ("gene,tpm\nA,1\nA,2\n", "gene A more than once"),
        ("gene,tpm\nA,-1\nB,2\n", "finite counts or TPM"),
        ("gene,tpm\nQ,1\n", "no gene of the panel"),
        ("gene,tpm\nA,x\n", "no column of numbers"),
        ("", "cannot be read as a table"),
    ):
        (tmp_path / "wrong.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_bulk(tmp_path / "wrong.csv", ["A", "B"])


def test_visible_values_are_taken_as_on_a_training_slide(cohort):
    """Values far below those of training looked like strong residuals, and draws rose step by step."""
    model, features, _, _ = cohort
    effect = effect_of(cohort, SlideEvidence(library_size=500.0))
    condition = effect.slide.whole
    sizes = same_sizes = None
    if (library_size := model.library_size_model) is not None:
        size = library_size.typical(condition[:, :FEATURES], library_shift := effect.typical.library_size)
        sizes, same_sizes = (size, library_size.of_slide(size, library_shift, 1.0)), (size, size)
    shift = torch.from_numpy(effect.typical.values).float().expand(SPOTS, GENES)
    scale = torch.from_numpy(effect.log_scale).float()
    with torch.inference_mode():
        frame = SlideFrame(model, condition, shift, scale, None, sizes)
        everything = torch.ones(SPOTS, GENES)
        # the mean on the slide is the mean there, and a deviation keeps its size in standard deviations
        torch.testing.assert_close(frame.visible(frame.mean_here, everything), frame.mean_there)
        above = frame.visible(frame.mean_here + frame.deviation_here, everything)
        torch.testing.assert_close(above, frame.mean_there + frame.deviation_there)
        # a single count of a gene that the slide hardly has is not a hundred standard deviations
        far = frame.visible(frame.mean_here + 100, everything)
        torch.testing.assert_close(far, frame.mean_there + 4 * frame.deviation_there)
        assert torch.equal(frame.visible(frame.mean_here, 0 * everything), frame.mean_here)
        # where nothing was predicted beyond the regression, the location is shifted and nothing else
        torch.testing.assert_close(frame.location(frame.masked), frame.masked + shift)
        same = SlideFrame(model, condition, 0 * shift, 0 * scale, None, same_sizes)
    torch.testing.assert_close(same.visible(same.mean_here + 0.5, everything), same.mean_here + 0.5)
    if sizes is None:
        # what the draws of a spot have in common is computed once
        rows = np.arange(SPOTS) // 3
        with torch.inference_mode():
            apart, shared = (
                SlideFrame(model, condition[rows], shift, scale, None, None, *spots) for spots in ((), (rows,))
            )
        for name in ("masked", "mean_there", "deviation_there", "mean_here", "deviation_here"):
            torch.testing.assert_close(getattr(shared, name), getattr(apart, name))
    names = [f"b{number}" for number in range(SPOTS)]
    inputs = SlideInputs("x", names, features, slide_effect=effect)
    settings = SamplingSettings(num_draws=60, num_inference_steps=8, spatially_correlated=False)
    draws = draw_spots(model, MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1), inputs, settings)
    assert abs(draws.values.mean() / draws.expected.mean() - 1) < 0.1


def test_what_is_expected_is_a_mean_over_the_library_sizes(cohort):
    """That at the median library size is not the slide's level where library sizes spread widely."""
    model, features, _, _ = cohort
    if model.library_size_model is None:
        pytest.skip("the library size is part of the values")
    spread = LibrarySpread(np.ones(NUM_RATIOS), 0.8)
    effect = effect_of(cohort, SlideEvidence(library_size=500.0, library_spread=spread))
    scheduler, names = MaskedDiffusionScheduler(10, "linear"), [f"b{number}" for number in range(SPOTS)]

    def expected(normal: float | None) -> np.ndarray:
        sizes, size = model.library_size_model, None
        if normal is not None:
            x = model.standardise(torch.from_numpy(features))
            shift, stretch = effect.typical.library_size, effect.stretch
            size = sizes(x, torch.full((SPOTS,), normal), shift, stretch).detach().numpy()
        inputs = SlideInputs("x", names, features, library_size=size, slide_effect=effect)
        settings = SamplingSettings(num_draws=1, num_inference_steps=1, spatially_correlated=False)
        return draw_spots(model, scheduler, torch.arange(1, GENES + 1), inputs, settings).expected

    wanted = np.mean([expected(float(normal)) for normal in ndtri((np.arange(15) + 0.5) / 15)], axis=0)
    errors = [np.sqrt(np.mean((each - wanted) ** 2)) for each in (expected(None), expected(0.0))]
    assert errors[0] < 0.2 * errors[1]


def test_the_variance_of_counting_is_that_of_the_slide(cohort):
    """What images explain of deep slides is no part of the variance of counting on a shallow one."""
    model = cohort[0]
    prior, transform = model.slide_prior, model.config.transform
    effect = effect_of(cohort, SlideEvidence(library_size=400.0))
    shares, size = shares_of_composition(effect.level.mean[:-1]), 2.0 ** effect.level.mean[-1]
    assert size == pytest.approx(400)
    with torch.inference_mode():
        found = effect.slide.variance(effect.typical.values, effect.typical.library_size)
        effect.slide.set_scale(np.zeros(GENES), np.ones(GENES))
        of_training = effect.slide.variance(np.zeros(GENES), 0.0)
    arguments = shares, size, effect.ratios, effect.dispersion, transform
    counting, there = counting_variance(*arguments), prior.array("training_counting")
    expression = (moments(*arguments)[1] - counting) / (prior.array("training_variance") - there)
    wanted = counting + np.maximum(of_training - there, 0.1 * of_training) * expression
    assert abs(np.median(found / wanted) - 1) < 0.05


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_the_variance_of_counting_is_that_of_poisson_counts(transform):
    rng, forward = np.random.default_rng(0), get_transform(transform).forward
    shares, ratios, dispersion = np.array([1e-4, 1e-3, 5e-3]), np.array([0.5, 1.0, 1.5]), np.array([0.3, 0.6, 1.0])
    sizes = 2000 * np.tile(ratios, 1000)
    rates = sizes[:, None] * shares * rng.lognormal(-0.5 * dispersion**2, dispersion, (len(sizes), 3))
    counts = rng.poisson(rates, (60, *rates.shape))
    values = np.stack([forward(each.astype(float), sizes) for each in counts])
    arguments = shares, 2000.0, ratios, dispersion, transform
    np.testing.assert_allclose(counting_variance(*arguments), values.var(axis=0, ddof=1).mean(axis=0), rtol=0.05)
    np.testing.assert_allclose(moments(*arguments)[1], values.reshape(-1, 3).var(axis=0), rtol=0.05)


def test_the_regression_tells_spots_apart_as_the_slide_varies(cohort):
    """On a slide that varies more than those of training, what the regression predicts of spots does too."""
    model = cohort[0]
    weight, before = model.gene_factor_model.mean.weight, model.gene_factor_model.mean.weight.detach().clone()
    ratios = np.array([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.85])
    try:
        with torch.no_grad():
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        wide = effect_of(cohort, SlideEvidence(library_size=4000.0, library_spread=LibrarySpread(ratios, 1.5)))
        like = effect_of(cohort, SlideEvidence(patient="p0"))
        with torch.inference_mode():
            condition, sizes = wide.slide.whole, None
            if model.library_size_model is not None:
                sizes = model.library_size_model.typical(condition[:, :-1])
            frame = wide.frame(condition, torch.zeros(SPOTS, GENES), sizes, 0.0)
            centre, slope = wide.pattern
            torch.testing.assert_close(frame.location(frame.masked) - centre, slope * (frame.masked - centre))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    scale = torch.from_numpy(wide.log_scale).exp().to(slope)
    if model.config.transform == "log2p1":
        torch.testing.assert_close(slope, scale)
        assert slope.median() > 1.1
    else:  # the scale is that of counting
        torch.testing.assert_close(slope, scale.clamp_max(1))
    assert (like.pattern[1] - 1).abs().median() < 0.15
