"""Gaussian diffusion and flow matching: schedules, draws of a known distribution, training, a run."""

import json

import numpy as np
import pytest
import torch
from helpers.runs import tiny_settings

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.config import check_config
from hinge.data.spots import SpotTable
from hinge.diffusion.gaussian import NOISE_SCHEDULES, NUM_TIMES, Denoiser, NoiseSchedule, draw_gaussian
from hinge.evaluation.names import GENERATIVE_BASELINES
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.training import TrainingConfig, train_denoiser
from hinge.utils.errors import DataError, HingeError

GENES, FEATURES = 6, 4


# --- schedules -----------------------------------------------------------------------------------


def test_the_baselines_are_the_noise_schedules():
    assert NOISE_SCHEDULES == GENERATIVE_BASELINES
    with pytest.raises(ValueError, match="gaussian-diffusion, flow-matching"):
        NoiseSchedule("masked")


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_a_schedule_leads_from_expression_to_noise(name):
    schedule = NoiseSchedule(name)
    assert (schedule.a[0], schedule.b[0]) == (1, 0)
    assert schedule.a[-1] < 0.01 and schedule.b[-1] > 0.999
    assert (schedule.a.diff() < 0).all() and (schedule.b.diff() > 0).all()
    x0, noise = torch.randn(3, GENES), torch.randn(3, GENES)
    times = torch.tensor([0, 400, NUM_TIMES])
    xt = schedule.add_noise(x0, noise, times)
    assert torch.equal(xt[0], x0[0])
    torch.testing.assert_close(xt[1], schedule.a[400].float() * x0[1] + schedule.b[400].float() * noise[1])
    # a step with the true x0 is exact
    torch.testing.assert_close(
        schedule.step(x0[1:2], 400, 100, xt[1:2]),
        schedule.add_noise(x0, noise, torch.full((3,), 100))[1:2],
        atol=1e-5,
        rtol=1e-5,
    )


def test_gaussian_diffusion_keeps_the_variance_and_weighs_by_signal_to_noise():
    schedule = NoiseSchedule("gaussian-diffusion")
    torch.testing.assert_close(schedule.a**2 + schedule.b**2, torch.ones(NUM_TIMES + 1, dtype=torch.float64))
    # by hand: the product of 1 − β over the first two of 1,000 steps
    beta = np.linspace(1e-4, 0.02, 1000)
    assert float(schedule.a[2] ** 2) == pytest.approx((1 - beta[0]) * (1 - beta[1]), rel=1e-12)
    weights = schedule.weights(torch.arange(1, NUM_TIMES + 1))
    assert weights.max() == 5 and weights.min() == 1 and (weights.diff() <= 0).all() and len(weights.unique()) > 50
    assert torch.equal(NoiseSchedule("flow-matching").weights(torch.tensor([1, 900])), torch.ones(2))


# --- draws ---------------------------------------------------------------------------------------


class Gaussian:
    """The best denoiser of x₀ ~ N(mean + features, diag(sd²))."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule
        self.mean, self.sd = torch.linspace(-1, 2, GENES), torch.linspace(0.2, 1.5, GENES)

    def __call__(self, xt, times, features):
        a, b = self.schedule.a[times].float()[:, None], self.schedule.b[times].float()[:, None]
        mean = self.mean + features
        return mean + a * self.sd**2 / (a**2 * self.sd**2 + b**2) * (xt - a * mean)


def draw(name, features, **options):
    schedule = NoiseSchedule(name)
    spots = [f"s{number}" for number in range(len(features))]
    return draw_gaussian(Gaussian(schedule), schedule, features, spots, GENES, **options)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_draws_of_a_known_gaussian_have_its_mean_and_deviation(name):
    features = torch.tensor([[0.0], [5.0]])
    draws = draw(name, features, num_draws=4000, batch_size=4000)
    truth = Gaussian(NoiseSchedule(name))
    assert draws.shape == (4000, 2, GENES) and draws.dtype == np.float32
    for spot in (0, 1):
        sd = truth.sd.numpy()
        np.testing.assert_allclose(draws[:, spot].mean(0), truth.mean + features[spot], atol=0.07)
        np.testing.assert_allclose(draws[:, spot].std(0), sd, rtol=0.06)
    # genes are independent, and so are spots
    both = np.corrcoef(draws.reshape(4000, -1).T)
    assert np.abs(both - np.eye(2 * GENES)).max() < 0.08


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_draws_depend_on_seed_spot_and_draw_alone(name):
    features = torch.randn(7, 1)
    draws = draw(name, features, num_draws=3, seed=4)
    np.testing.assert_allclose(draw(name, features, num_draws=3, seed=4, batch_size=5), draws, atol=1e-5)
    np.testing.assert_allclose(draw(name, features[:2], num_draws=2, seed=4), draws[:2, :2], atol=1e-5)
    assert np.array_equal(draw(name, features, num_draws=3, seed=4), draws)
    assert np.abs(draw(name, features, num_draws=3, seed=5) - draws).min() > 0


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_times_go_from_noise_to_none(name):
    for count in (1, 2, 25, 500):
        times = NoiseSchedule(name).times(count)
        assert (times[0], times[-1]) == (NUM_TIMES, 0) and times == sorted(set(times), reverse=True)
        assert len(times) == count + 1 or count == 500  # where they lie closer than the grid of training


def test_impossible_steps_are_refused():
    for steps in (0, 501):
        with pytest.raises(ValueError, match="between 1 and 500"):
            draw("flow-matching", torch.zeros(1, 1), num_inference_steps=steps)


# --- training ------------------------------------------------------------------------------------


def table(n=300, noise=(0.2, 1.0), seed=0) -> SpotTable:
    """Values that are linear in the features plus Gaussian noise: a low deviation for odd genes, a high for even."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 1, FEATURES)).astype(np.float32)
    weights = np.random.default_rng(9).normal(size=(FEATURES, GENES))
    sd = np.resize(noise, GENES)
    values = (features[:, 0] @ weights + 8 + rng.normal(size=(n, GENES)) * sd).astype(np.float32)
    return SpotTable(
        slide=np.array([f"s{i % 3}" for i in range(n)]),
        barcodes=np.array([f"b{i}" for i in range(n)]),
        coords=np.stack(np.divmod(np.arange(n), 20), axis=1) * 100.0,
        features=features,
        counts=np.round(values),
        library_size=np.full(n, 100, np.float32),
        values=values,
        genes=[f"G{i}" for i in range(GENES)],
        transform="log2p1",
    )


def make(name: str, spots: SpotTable, **options) -> Denoiser:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}
    backbone = CellFMModel(CellFMConfig(num_genes=GENES, **size))
    model = HingeModel.from_backbone(backbone, FEATURES, GENES, head="point", **options)
    return Denoiser(model, NoiseSchedule(name), torch.arange(1, GENES + 1), torch.from_numpy(spots.values))


SETTINGS = {"epochs": None, "steps": 20, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.9}
SETTINGS |= {"checkpoint_every": 5, "evaluate_every": 10}


def train(folder, name="gaussian-diffusion", spots=None, options=None, **settings):
    spots = spots or table()
    denoiser = make(name, spots, **(options or {}))
    result = train_denoiser(denoiser, spots, TrainingConfig(**{**SETTINGS, **settings}), folder, 3)
    return denoiser, result


@pytest.mark.full
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_a_trained_denoiser_draws_what_was_measured(name, tmp_path):
    spots = table()
    denoiser, _ = train(tmp_path, name, spots, steps=250, ema_decay=0.98, validation_share=0.0)
    test = table(n=100, seed=1)
    features = torch.from_numpy(test.features[:, 0])
    x0 = draw_gaussian(denoiser, denoiser.schedule, features, [str(i) for i in range(100)], GENES, num_draws=20)
    draws = denoiser.expression(torch.from_numpy(x0)).numpy()
    error = draws.mean(0) - test.values
    # the mean is the regression's and the spread the noise's, for quiet genes and for loud ones
    np.testing.assert_allclose(np.sqrt((error**2).mean(0)), np.resize((0.2, 1.0), GENES), rtol=0.35, atol=0.08)
    spread = draws.std(0).mean(0)
    assert (spread[1::2] > 0.6).all() and (spread[1::2] < 1.3).all()
    assert (spread[::2] < 0.45).all()


def test_training_starts_from_ridge(tmp_path):
    spots = table()
    denoiser, _ = train(tmp_path / "ridge", spots=spots, steps=1, learning_rate=1e-9)
    features = torch.from_numpy(spots.features[:, 0])
    with torch.no_grad():
        predicted = denoiser(torch.randn(len(features), GENES), torch.full((len(features),), NUM_TIMES), features)
    error = denoiser.expression(predicted).numpy() - spots.values
    # but for what the untrained backbone makes of the noise
    assert (np.sqrt((error**2).mean(0)) < np.resize((0.4, 1.2), GENES)).all()
    plain, _ = train(tmp_path / "plain", spots=spots, steps=1, learning_rate=1e-9, initialisation=False)
    assert plain.model.gene_factor_model.mean.weight.abs().max() < 1e-8 and plain.log_spread.abs().max() < 1e-8


@pytest.mark.full
def test_training_is_seeded_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = {"feature_dropout": 0.3, "dropout": 0.1}
    whole, _ = train(tmp_path / "whole", options=options)
    assert whole.model.digest() == train(tmp_path / "again", options=options)[0].model.digest()

    import hinge.training.loop

    save, saved = hinge.training.loop.save_checkpoint, []

    def stop_after_ten(path, *arguments):
        save(path, *arguments)
        saved.append(path)
        if len(saved) == 2:
            raise HingeError("stopped")

    monkeypatch.setattr(hinge.training.loop, "save_checkpoint", stop_after_ten)
    with pytest.raises(HingeError, match="stopped"):
        train(tmp_path / "cut", options=options)
    monkeypatch.undo()
    resumed, result = train(tmp_path / "cut", options=options)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21)) and result.step == 20
    assert resumed.model.digest() == whole.model.digest()


def test_a_constant_gene_does_not_divide_by_zero(tmp_path):
    spots = table()
    spots.values[:, 2] = 3.0
    denoiser, result = train(tmp_path, spots=spots)
    assert np.isfinite(result.best_score) and denoiser.deviation[2] == 1


def test_training_without_features_is_refused(tmp_path):
    from dataclasses import replace

    with pytest.raises(DataError, match="spots with features"):
        train(tmp_path, spots=replace(table(), features=None))


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_slides, tmp_path_factory) -> Run:
    settings = tiny_settings(
        tiny_slides,
        tmp_path_factory.mktemp("generative") / "run",
        sampling__draws=20,
        evaluation={"baselines": ["mean", *GENERATIVE_BASELINES], "bootstrap": 0},
    )
    run = Run(check_config(settings, "test"))
    run.train()
    run.sample("sim2")
    run.evaluate()
    return run


def test_baselines_stand_beside_the_model(run):
    rows = {row["method"]: row for row in json.loads(run.paths.scores.read_text())["rows"]}
    assert {"hinge", "mean", "oracle", *GENERATIVE_BASELINES} <= rows.keys()
    for method in GENERATIVE_BASELINES:
        assert rows[method]["n_draws"] == 20
        assert np.isfinite([rows[method][key] for key in ("pcc_mean", "crps", "coexpression_r")]).all()
        assert (run.folder / "baselines" / method / "model" / "config.json").exists()
        # ridge is where they start, so that six steps leave them better than the mean
        assert rows[method]["mse"] < rows["mean"]["mse"]
    assert rows["flow-matching"]["crps"] != rows["gaussian-diffusion"]["crps"]


def test_scores_come_out_the_same_again_without_training(run):
    before = run.paths.scores.read_bytes()
    trained = [path.stat().st_mtime_ns for path in sorted((run.folder / "baselines").rglob("*.safetensors"))]
    Run.open(run.folder).evaluate()
    assert run.paths.scores.read_bytes() == before
    assert trained == [path.stat().st_mtime_ns for path in sorted((run.folder / "baselines").rglob("*.safetensors"))]


def test_log_likelihoods_of_a_simulated_slide(run):
    found = run.log_likelihoods("sim2")
    assert found["oracle"] > max(found["model"], found["marginal"])
    way = found["oracle"] - found["marginal"]
    assert found["share"] == pytest.approx((found["model"] - found["marginal"]) / way)
    assert found == run.log_likelihoods("sim2")
