"""Training: resume equals uninterrupted, two processes equal one, the split, early stop."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

import hinge.training.loop as loop
from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.spots import SpotTable, concatenate_spots
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.training import TrainingConfig, split_spots, train_hinge
from hinge.training.initialisation import initialise_gene_factors
from hinge.training.loop import LoopConfig, batch_rows
from hinge.utils.errors import ConfigError, DataError, HingeError

GENES, FEATURES = 8, 5


def table(n=60, views=1, slides=2, seed=0) -> SpotTable:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, views, FEATURES)).astype(np.float32)
    values = np.maximum(features[:, 0] @ rng.normal(size=(FEATURES, GENES)) + 1, 0).astype(np.float32)
    side = int(np.ceil(np.sqrt(n / slides)))
    place = np.arange(n) // slides
    return SpotTable(
        slide=np.array([f"s{i % slides}" for i in range(n)]),
        barcodes=np.array([f"b{i}" for i in range(n)]),
        coords=np.stack([place % side, place // side], axis=1) * 100.0,
        features=features,
        counts=np.round(values * 3),
        library_size=np.full(n, 100, np.float32),
        values=values,
        genes=[f"G{i}" for i in range(GENES)],
        transform="log2p1",
    )


def make_model(**options):
    torch.manual_seed(0)
    backbone = CellFMModel(
        CellFMConfig(num_genes=GENES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8)
    )
    return HingeModel.from_backbone(backbone, FEATURES, GENES, **options)


SETTINGS = {
    "epochs": None,
    "steps": 24,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "warmup_steps": 3,
    "ema_decay": 0.9,
    "evaluate_every": 6,
    "checkpoint_every": 6,
}


def train(folder, model=None, **options):
    model = model or make_model(feature_dropout=0.2, dropout=0.1)
    result = train_hinge(
        model,
        MaskedDiffusionScheduler(10, "linear"),
        torch.arange(1, GENES + 1),
        table(views=options.pop("views", 1)),
        TrainingConfig(**{**SETTINGS, **options}),
        folder,
        seed=3,
    )
    return model, result


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_learns(tmp_path):
    _, result = train(tmp_path, make_model(), steps=150, warm_start_share=0.0, initialisation=False)
    scores = [record["validation_loss"] for record in log_of(tmp_path) if "validation_loss" in record]
    assert result.best_score < 0.9 * scores[0]


def test_the_closed_form_start_is_ridge_for_fully_masked_spots():
    from sklearn.linear_model import RidgeCV

    spots, model, scheduler = table(90), make_model(), MaskedDiffusionScheduler(10, "linear")
    features, values = torch.from_numpy(spots.features[:, 0]), torch.from_numpy(spots.values)
    model.set_feature_statistics(features)
    before = model.modulation.bias.clone()
    ids = torch.arange(1, GENES + 1)
    initialise_gene_factors(model, scheduler, ids, spots, seed=0)
    masked = {
        "values": torch.zeros(90, GENES),
        "visible": torch.zeros(90, GENES),
        "timestep": torch.full((90,), 10),
        "features": features,
        "gene_ids": ids,
    }
    with torch.no_grad():
        predicted = model(**masked).location
    x = model.standardise(features).numpy()
    # both slides are left out once
    rows = [np.flatnonzero(spots.slide == name) for name in ("s0", "s1")]
    folds = [(rows[1], rows[0]), (rows[0], rows[1])]
    expected = RidgeCV(alphas=np.logspace(-1, 6, 29), cv=folds).fit(x, values.numpy()).predict(x)
    # the modulation's opening gate adds what a features-free backbone predicts: a constant that ridge absorbs
    np.testing.assert_allclose(predicted.numpy(), expected, atol=0.02)
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

    def error() -> float:
        names = [f"{name}/{code}" for name, code in zip(spots.slide, spots.barcodes, strict=True)]
        draws = HingePipeline(model, scheduler)(features, ids, names, num_draws=1, num_inference_steps=1)
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
    shifts = initialise_gene_factors(model, MaskedDiffusionScheduler(10, "linear"), ids, spots, seed=0)
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


def test_the_closed_form_start_tells_slide_shifts_from_factors_and_finds_what_is_smooth():
    spots = slides_with_shifts()
    model = make_model(head="rounded_gaussian", transform="log2p1", num_factors=2)
    model.set_feature_statistics(torch.from_numpy(spots.features[:, 0]))
    scheduler, ids = MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1)
    shifts = initialise_gene_factors(model, scheduler, ids, spots, seed=0)
    path = model.gene_factor_model
    expected = np.stack([(number - 2.5) / 1.5 * np.linspace(-1, 1, GENES) for number in range(6)])
    for number in range(6):
        own = shifts[144 * number : 144 * (number + 1)]
        np.testing.assert_allclose(own.mean(dim=0).numpy(), expected[number], atol=0.3)
    # one direction of slide shifts, and none of it in the factors
    direction = path.slide_loadings[:, 0].numpy()
    assert abs(np.corrcoef(direction, np.linspace(-1, 1, GENES))[0, 1]) > 0.95
    strongest = path.loadings[:, path.loadings.norm(dim=0).argmax()].detach().numpy()
    assert np.corrcoef(np.abs(strongest), np.linspace(0.4, 1.2, GENES))[0, 1] > 0.95
    assert path.factor_spatial_share.max() > 0.7
    assert path.spatial_share.mean() < 0.25
    assert 1 <= float(path.spatial_range) <= 4

    # a slide drawn from it: smooth maps where spots of a draw agree, rough ones where they do not
    test = spots.subset(spots.slide == "s1")
    pipeline = HingePipeline(model.eval(), scheduler)
    arguments = {"num_draws": 6, "num_inference_steps": 3, "progress": False}
    place = test.coords / 200
    agree = pipeline(test.features[:, 0], ids, list(test.barcodes), slide="s1", positions=place, **arguments).values
    alone = pipeline(test.features[:, 0], ids, list(test.barcodes), **arguments).values
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
    test, pipeline = spots.subset(last), HingePipeline(model.eval(), scheduler)
    features, names = test.features[:, 0], list(test.barcodes)
    arguments = {"num_draws": 8, "num_inference_steps": 2, "slide": "s5", "positions": test.coords / 200}
    half = test.values.copy()
    half[:, ::2] = np.nan
    alone = pipeline(features, ids, names, **arguments)
    given = pipeline(features, ids, names, observed=half, **arguments)
    np.testing.assert_array_equal(given.values[:, :, 1::2], np.broadcast_to(half[:, 1::2], (8, 144, GENES // 2)))

    def missed(draws):
        """By how much slide means of the other genes are off."""
        return np.abs(draws.expected[:, ::2].mean(axis=0) - test.values[:, ::2].mean(axis=0)).mean()

    # the slide's shift is the largest of all: 1.67 times a direction that other slides have too
    assert missed(given) < 0.4 * missed(alone)
    # what is known of the shift no longer varies between draws
    spread = [draws.values[:, :, ::2].mean(axis=1).std(axis=0).mean() for draws in (given, alone)]
    assert spread[0] < 0.5 * spread[1]
    # a part of the spots, told of the whole slide's measurements, is drawn as within the whole
    part = slice(40, 60)
    effect = pipeline.slide_effect(features, half)
    arguments["positions"] = arguments["positions"][part]
    some = pipeline(features[part], ids, names[part], observed=half[part], slide_effect=effect, **arguments)
    np.testing.assert_allclose(some.values, given.values[:, part], atol=1e-4)
    assert pipeline.slide_effect(features, np.full_like(half, np.nan)) is None


def test_the_depth_is_regressed_on_the_features_and_drawn_first():
    spots = slides_with_shifts()
    model = make_model(head="rounded_gaussian", transform="log1p_cp10k", library_size=True, num_factors=2)
    model.set_feature_statistics(torch.from_numpy(spots.features[:, 0]))
    initialise_gene_factors(model, MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1), spots, seed=0)
    features = model.standardise(torch.from_numpy(spots.features[:, 0]))
    predicted = model.library_size_model.mean(features).squeeze(-1).detach().numpy()
    assert np.corrcoef(predicted, spots.features[:, 0, 0])[0, 1] > 0.95
    assert abs(float(model.library_size_model.scale) - 0.5) < 0.1
    normal = torch.randn(len(features), generator=torch.Generator().manual_seed(0))
    library_size = model.library_size_model(features, normal, torch.zeros_like(normal))
    assert abs(np.log(library_size.numpy()).std() - np.log(spots.library_size).std()) < 0.1
    torch.testing.assert_close(
        model.library_size_model.standardise(features, library_size),
        normal,
        atol=0.05 + float(model.library_size_model.slide_scale),
        rtol=0.1,
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [6, 12, 18])
def test_resume_equals_uninterrupted(tmp_path, monkeypatch, step):
    whole, _ = train(tmp_path / "whole")
    saved = loop._save_checkpoint

    def save_then_die(path, trainable, optimizer, ema, state, *carried):
        saved(path, trainable, optimizer, ema, state, *carried)
        if state["step"] == step:
            raise Killed

    monkeypatch.setattr(loop, "_save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train(tmp_path / "parts")
    monkeypatch.setattr(loop, "_save_checkpoint", saved)
    parts, _ = train(tmp_path / "parts")
    assert parts.digest() == whole.digest()
    strip = [{k: v for k, v in record.items() if k != "seconds"} for record in log_of(tmp_path / "parts")]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in log_of(tmp_path / "whole")]


def test_the_same_command_twice_gives_the_same_weights(tmp_path):
    assert train(tmp_path / "a", views=2)[0].digest() == train(tmp_path / "b", views=2)[0].digest()


def test_what_is_begun_again_in_another_state_of_the_generator_is_the_same(tmp_path):
    """Dropout was on in the closed-form start: each life of a run had another one."""
    digests = []
    for seed in (1, 2):
        model = make_model(dropout=0.3)
        torch.manual_seed(seed)
        digests.append(train(tmp_path / str(seed), model, steps=6)[0].digest())
    assert digests[0] == digests[1]


def test_a_loaded_model_is_without_dropout(tmp_path):
    """It was not: draws differed from call to call, and were noisier than the model says."""
    model, _ = train(tmp_path / "run", make_model(dropout=0.5), steps=6)
    model.save_pretrained(tmp_path / "model")
    loaded = HingeModel.from_pretrained(tmp_path / "model", model.backbone)
    pipeline = HingePipeline(loaded, MaskedDiffusionScheduler(10, "linear"))
    arguments = (table().features[:, 0], torch.arange(1, GENES + 1), [f"b{i}" for i in range(60)], 2, 4)
    np.testing.assert_array_equal(pipeline(*arguments).values, pipeline(*arguments).values)


def test_accumulation_changes_nothing_but_memory(tmp_path):
    one, _ = train(tmp_path / "a", make_model())
    two, _ = train(tmp_path / "b", make_model(), accumulation=3)
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.full
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            import torch
            torch.set_num_threads(1)
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            from test_train_hinge import make_model, train
            model, _ = train(Path(sys.argv[1]), make_model(feature_dropout=0.2), batch_size=15)
            from accelerate import PartialState
            if PartialState().is_main_process:
                torch.save([p.detach() for p in model.parameters()], sys.argv[1] + ".pt")
            """
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, launch in (("one", []), ("two", ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"])):
        command = [sys.executable, *launch, str(script), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-3)


def test_an_interrupted_run_saves_and_says_so(tmp_path, monkeypatch):
    saved = loop._save_checkpoint
    fired = []

    def interrupt_once(*arguments):
        saved(*arguments)
        if not fired:
            fired.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_save_checkpoint", interrupt_once)
    with pytest.raises(HingeError, match="stopped at step 7 of 24"):
        train(tmp_path / "a")
    resumed, _ = train(tmp_path / "a")
    assert resumed.digest() == train(tmp_path / "b")[0].digest()


def test_frozen_weights_stay_bit_identical(tmp_path):
    model = make_model()
    before = model.backbone.digest()
    train(tmp_path, model)
    assert model.backbone.digest() == before


def test_early_stop_keeps_the_best_weights(tmp_path):
    # a high rate on few spots overfits before long
    options = {"steps": 400, "learning_rate": 0.02, "schedule": "constant", "ema_decay": None, "warm_start_share": 0.0}
    _, result = train(tmp_path, make_model(), **options, patience=3, evaluate_every=5)
    assert result.step < 400
    assert result.best_step == result.step - 15
    scores = {record["step"]: record.get("validation_loss") for record in log_of(tmp_path)}
    assert scores[result.best_step] == result.best_score


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.gene_factor_model.mean.bias.fill_(float("nan"))
    with pytest.raises(HingeError, match="not finite for ten steps"):
        train(tmp_path, model, initialisation=False)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ConfigError, match="run of 24 steps, this one has 30"):
        train(tmp_path, steps=30)
    (tmp_path / "latest.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a checkpoint"):
        train(tmp_path)


@pytest.mark.parametrize("groups", ["spot", "tile", "slide"])
def test_validation_spots_are_whole_groups(groups):
    spots = table(200)
    training, held = split_spots(spots, 0.2, groups, seed=1)
    assert len(np.intersect1d(training, held)) == 0
    assert len(training) + len(held) == 200
    assert len(held) > 0
    again = split_spots(spots, 0.2, groups, seed=1)
    assert np.array_equal(again[1], held)
    if groups == "slide":
        assert len(set(spots.slide[training]) & set(spots.slide[held])) == 0
    assert len(split_spots(spots, 0.0, groups, seed=1)[1]) == 0


def test_every_row_comes_once_an_epoch():
    rows = np.concatenate([batch_rows(0, step, 23, 5) for step in range(5)])
    assert sorted(rows) == list(range(23))
    assert not np.array_equal(rows, np.concatenate([batch_rows(0, step, 23, 5) for step in range(5, 10)]))


def test_learning_rates():
    step = LoopConfig(steps=100, schedule="step", learning_rate=1.0, decay_at=[0.5, 0.875])
    assert [step.learning_rate_at(s, 100) for s in (0, 49, 50, 88)] == pytest.approx([1, 1, 0.2, 0.04])
    cosine = LoopConfig(steps=100, schedule="cosine", learning_rate=1.0, warmup_steps=10)
    assert cosine.learning_rate_at(4, 100) == pytest.approx(0.5)
    assert cosine.learning_rate_at(55, 100) == pytest.approx(0.5)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("head", ["point", "gaussian", "censored_gaussian"])
def test_every_head_trains_in_every_precision(tmp_path, head, precision):
    model, result = train(
        tmp_path, make_model(head=head), steps=6, precision=precision, loss_on="revealed", weighting="gene"
    )
    assert result.step == 6
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.full
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers_write_into_the_folder(tmp_path, monkeypatch, tracker):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", make_model(), steps=3, tracker=tracker)
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert any(("tfevents" if tracker == "tensorboard" else ".wandb") in name for name in written)
    assert all(name.startswith("run/") for name in written)
