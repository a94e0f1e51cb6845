"""Condition tokens: categories of slides, such as organ and technology."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.condition_tokens import MOST_INTERACTIONS, ConditionTokens
from hinge.data.slide_levels import SlideLevels
from hinge.data.spots import SpotTable, concatenate_spots
from hinge.data.transforms import get_transform
from hinge.diffusion import MaskedDiffusionScheduler, SamplingSettings, SlideInputs, draw_spots
from hinge.diffusion.slide_effect import SlideEvidence
from hinge.evaluation.metrics.calibration import crps_of_spots
from hinge.models import HingeModel
from hinge.models.slide_effects import SlidePrior
from hinge.training import TrainingConfig, train_hinge
from hinge.training.slide_prior import fit_slide_prior, token_effects
from hinge.utils.errors import ConfigError, DataError

TOKENS = ConditionTokens({"organ": {"breast": 0.5, "lung": 0.5}, "technology": {"ST": 0.25, "Visium": 0.75}})


def test_a_category_has_a_column_and_changes_what_features_mean():
    features = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    found = TOKENS.append(features, {"organ": "lung", "technology": "Visium"})
    centred = np.array([-0.5, 0.5, -0.25, 0.25])
    assert found.shape == (2, 2, 3 + 4 + 12) and np.array_equal(found[..., :3], features)
    assert np.array_equal(found[1, 0, 3:7], centred)
    np.testing.assert_allclose(found[1, 0, 7:].reshape(4, 3), centred[:, None] * features[1, 0])
    unknown = TOKENS.append(features, {"organ": "lung", "technology": None})
    assert (unknown[..., 5:7] == 0).all() and (unknown[..., 7 + 6 :] == 0).all() and (unknown[..., 3:5] != 0).all()
    assert np.array_equal(TOKENS.append(features, {}), TOKENS.append(features, {"organ": "skin"}))
    columns = TOKENS.columns(found.shape[-1])
    assert sorted(np.concatenate(columns)) == list(range(3, 19))
    assert np.array_equal(np.flatnonzero((unknown == 0).all(axis=(0, 1))), np.sort(columns[1]))
    assert ConditionTokens({}).append(features, {}) is features


def test_many_features_are_summed_in_groups():
    many = ConditionTokens({"organ": {f"organ{number}": 0.01 for number in range(100)}})
    width = MOST_INTERACTIONS // 100
    features = np.random.default_rng(0).normal(size=(3, 1, 500)).astype(np.float32)
    found = many.append(features, {"organ": "organ7"})
    assert found.shape[-1] == 500 + 100 * (1 + width)
    (columns,) = many.columns(found.shape[-1])
    assert len(columns) == 100 * (1 + width) and columns.min() == 500


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"stain": "HE"}, "the model has no token stain, but organ, technology"),
        ({"organ": "skin"}, "the training slides have breast, lung; give one of them, or unknown"),
    ],
)
def test_a_category_that_training_did_not_have_is_refused(given, error):
    with pytest.raises(ConfigError, match=error):
        TOKENS.checked(given)


def test_categories_are_read_from_the_command_line():
    assert TOKENS.checked_list(["organ=lung", "technology=unknown"]) == {"organ": "lung", "technology": "unknown"}
    for wrong in (["organ"], ["organ="], ["=lung"], ["organ=lung", "organ=breast"]):
        with pytest.raises(ConfigError, match="--condition"):
            TOKENS.checked_list(wrong)
    with pytest.raises(DataError, match=r"names stain, and no training slide has one"):
        ConditionTokens.of_slides(["stain"], [{"stain": None}])
    shares = ConditionTokens.of_slides(
        ["organ"], [{"organ": "b"}, {"organ": "a"}, {"organ": "a"}, {"organ": None}]
    ).shares
    assert shares == {"organ": {"a": 2 / 3, "b": 1 / 3}}


def levels_of(composition, tokens, patients):
    count = len(composition)
    names = np.array([f"s{number}" for number in range(count)])
    library = np.full(count, 1000.0)
    ratios, spots = np.ones((count, 7)), np.full(count, 30)
    return SlideLevels(names, patients, composition, 0.5 * composition, library, ratios, spots, tokens)


def test_the_prior_of_slide_levels_has_the_level_of_each_category():
    rng, genes, count = np.random.default_rng(0), 40, 12
    organ = np.arange(count) % 2
    effect = rng.normal(size=(2, genes)) * 1.5
    composition = 5 + effect[organ] + 0.2 * rng.normal(size=(count, genes))
    tokens = np.eye(2)[organ].astype(float)
    tokens[-1] = np.nan  # a slide whose organ is not known
    patients = np.array([f"p{number}" for number in range(count)])
    levels = levels_of(composition, tokens, patients)
    found, shares = token_effects(levels, np.arange(count))
    np.testing.assert_allclose(shares, [6 / 11, 5 / 11])
    difference = (found[0] - found[1])[:-1]
    assert np.corrcoef(difference, effect[0] - effect[1])[0, 1] > 0.95
    assert np.polyfit(effect[0] - effect[1], difference, 1)[0] > 0.85
    prior = SlidePrior(genes, patients.tolist(), 3, 2)
    fit_slide_prior(prior, levels, np.ones(count, bool), "log2p1")
    known = [prior.of_new_patient(np.eye(2)[number]) for number in range(2)]
    unknown = prior.of_new_patient()
    for number, level in enumerate(known):
        assert np.abs(level.mean[:-1] - 5 - effect[number]).mean() < 0.25
    variance = [(each.loadings**2).sum(axis=1)[:-1] + each.noise[:-1] for each in (known[0], unknown)]
    assert variance[1].mean() > 3 * variance[0].mean()
    deviation = np.sqrt(variance[1])
    for number in range(2):
        assert (np.abs(unknown.mean[:-1] - 5 - effect[number]) < 2.5 * deviation).mean() > 0.9
    # a known patient's slides say of which organ they are
    own = prior.of_patient("p0")
    assert np.abs(own.mean[:-1] - composition[0]).mean() < np.abs(unknown.mean[:-1] - composition[0]).mean() / 2


GENES, FEATURES, SPOTS = 24, 6, 49
ORGANS = {"breast": 1, "lung": 2}
ORGAN = ConditionTokens({"organ": {"breast": 0.5, "lung": 0.5}})
IDS = torch.arange(1, GENES + 1)


def slide_of(organ, number) -> SpotTable:
    """Spots whose features have one distribution in both organs, and whose genes mean something else in each."""
    of_organ, rng = np.random.default_rng(ORGANS[organ]), np.random.default_rng(100 * ORGANS[organ] + number)
    weight, level = 0.5 * of_organ.normal(size=(FEATURES, GENES)), of_organ.normal(size=GENES)
    features = rng.normal(size=(SPOTS, FEATURES)).astype(np.float32)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    rate = np.exp(
        1.2 + level + features @ weight + 0.1 * rng.normal(size=GENES) + 0.2 * rng.normal(size=(SPOTS, GENES))
    )
    counts = rng.poisson(np.minimum(rate, 300)).astype(np.float32)
    side = int(np.sqrt(SPOTS))
    sizes = counts.sum(axis=1)
    return SpotTable(
        slide=np.full(SPOTS, f"{organ}{number}"),
        barcodes=np.array([f"b{spot}" for spot in range(SPOTS)]),
        coords=np.stack([np.arange(SPOTS) % side, np.arange(SPOTS) // side], axis=1) * 100.0,
        features=features[:, None],
        counts=counts,
        library_size=sizes,
        values=get_transform("log2p1").forward(counts, sizes),
        genes=[f"G{gene}" for gene in range(GENES)],
        transform="log2p1",
    )


def with_token(spots, organ) -> SpotTable:
    features = ORGAN.append(spots.features, {"organ": organ})
    return replace(spots, features=features, token_columns=tuple(ORGAN.columns(features.shape[2])))


def trained(folder, tables, tokens=None) -> HingeModel:
    spots = concatenate_spots(tables)
    if tokens:
        spots = replace(spots, token_columns=tables[0].token_columns)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}
    backbone = CellFMModel(CellFMConfig(num_genes=GENES, transform="log2p1", **size))
    options = {"head": "rounded_gaussian", "transform": "log2p1", "num_factors": 2}
    model = HingeModel.from_backbone(backbone, spots.features.shape[2], GENES, **options)
    known = (spots.counts, spots.library_size, spots.slide, spots.slide, "log2p1")
    settings = TrainingConfig(epochs=None, steps=30, batch_size=32, validation_share=0.0)
    levels = SlideLevels.of_spots(*known, tokens)
    train_hinge(model, MaskedDiffusionScheduler(10, "linear"), IDS, spots, settings, folder, levels=levels)
    return model


def drawn(model, spots, tokens=None) -> np.ndarray:
    """Return draws (K, n, G) of a slide at its own library size."""
    evidence = SlideEvidence(library_size=float(spots.library_size.mean()), tokens=tokens)
    positions = spots.coords / 100
    inputs = SlideInputs(spots.slide[0], list(spots.barcodes), spots.features[:, 0], positions, evidence=evidence)
    settings = SamplingSettings(num_draws=20, num_inference_steps=4)
    return draw_spots(model, MaskedDiffusionScheduler(10, "linear"), IDS, inputs, settings).values


@pytest.mark.full
def test_a_token_closes_the_gap_to_a_model_of_each_organ(tmp_path):
    train = {organ: [slide_of(organ, number) for number in range(3)] for organ in ORGANS}
    test = {organ: slide_of(organ, 9) for organ in ORGANS}
    plain = trained(tmp_path / "plain", [*train["breast"], *train["lung"]])
    tables = [with_token(spots, organ) for organ, several in train.items() for spots in several]
    tokens = {spots.slide[0]: ORGAN.known({"organ": organ}) for organ, several in train.items() for spots in several}
    token = trained(tmp_path / "token", tables, tokens)
    error = {"plain": 0.0, "token": 0.0, "separate": 0.0}
    for organ, spots in test.items():
        separate = trained(tmp_path / organ, train[organ])
        given = with_token(spots, organ)
        found = {
            "plain": drawn(plain, spots),
            "token": drawn(token, given, ORGAN.known({"organ": organ})),
            "separate": drawn(separate, spots),
        }
        for name, draws in found.items():
            error[name] += crps_of_spots(spots.values, draws).mean() / 2
    assert error["plain"] - error["token"] > 0.8 * (error["plain"] - error["separate"]) > 0.05, error
    # without the token, the draws cover both organs
    for spots in test.values():
        means = drawn(token, with_token(spots, None)).mean(axis=1)
        measured = spots.values.mean(axis=0)
        inside = (measured > means.min(axis=0) - 0.1) & (measured < means.max(axis=0) + 0.1)
        assert inside.mean() > 0.9
    wide = drawn(token, with_token(test["lung"], None)).mean(axis=1).std(axis=0)
    narrow = drawn(token, with_token(test["lung"], "lung"), ORGAN.known({"organ": "lung"})).mean(axis=1).std(axis=0)
    assert wide.mean() > 1.5 * narrow.mean()
