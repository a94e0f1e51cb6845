"""Training of a HingeModel: it learns, the split, validation, heads and precisions."""

import numpy as np
import pytest
import torch
from helpers.draws import draw_features
from helpers.training import GENES, log_of, make_model, table, train

from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.training import split_spots
from hinge.training.hinge import _Denoising


@pytest.mark.full
def test_training_learns(tmp_path):
    _, result = train(tmp_path, make_model(), steps=150, warm_start_share=0.0, initialisation=False)
    scores = [record["validation_loss"] for record in log_of(tmp_path) if "validation_loss" in record]
    assert result.best_score < 0.9 * scores[0]


def test_a_loaded_model_is_without_dropout(tmp_path):
    """It was not: draws differed from call to call, and were noisier than the model says."""
    model, _ = train(tmp_path / "run", make_model(dropout=0.5), steps=6)
    model.save_pretrained(tmp_path / "model")
    loaded = HingeModel.from_pretrained(tmp_path / "model", model.backbone)
    arguments = (table().features[:, 0], torch.arange(1, GENES + 1), [f"b{i}" for i in range(60)])
    one, two = (
        draw_features(loaded, MaskedDiffusionScheduler(10, "linear"), *arguments, num_draws=2, num_inference_steps=4)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.values, two.values)


def test_frozen_weights_stay_bit_identical(tmp_path):
    model = make_model()
    before = model.backbone.digest()
    train(tmp_path, model)
    assert model.backbone.digest() == before


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


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("head", ["point", "gaussian", "censored_gaussian"])
def test_every_head_trains_in_every_precision(tmp_path, head, precision):
    model, result = train(
        tmp_path, make_model(head=head), steps=6, precision=precision, loss_on="revealed", weighting="gene"
    )
    assert result.step == 6
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("drop_masked", [True, False])
def test_validation_hides_the_tokens_that_training_hides(tmp_path, monkeypatch, drop_masked):
    calls = {True: [], False: []}
    forward = _Denoising.forward

    def noted(self, target, **inputs):
        calls[self.training].append(inputs)
        return forward(self, target, **inputs)

    monkeypatch.setattr(_Denoising, "forward", noted)
    train(tmp_path, make_model(drop_masked=drop_masked), steps=6)
    assert calls[True] and calls[False]
    for inputs in calls[True] + calls[False]:
        assert ("present" in inputs) is drop_masked
        if drop_masked:
            # visible genes have tokens, and so have those of a step of any length; at its end all may be visible
            assert (inputs["present"] >= inputs["visible"]).all()
    if drop_masked:
        assert any((inputs["present"] < 1).any() for inputs in calls[False])


def test_validation_scores_do_not_depend_on_its_batches(tmp_path):
    """Each held-out spot has masks of its own, however the rows are split over processes."""
    scores = []
    for size in (16, 5):
        train(tmp_path / str(size), make_model(), steps=1, batch_size=size, learning_rate=1e-12, warm_start_share=0.0)
        scores.append(log_of(tmp_path / str(size))[-1]["validation_loss"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
