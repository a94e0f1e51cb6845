"""Halves of a batch, which two threads compute, give what the whole batch gives, whatever the number of threads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hinge.diffusion import MaskedDiffusionScheduler
from hinge.training import TrainingConfig, loop, train_hinge
from hinge.training import hinge as objective
from tests.helpers.training import GENES, SETTINGS, make_model, table


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def trained(folder, spots=None, **options):
    model = make_model(feature_dropout=0.2)
    config = TrainingConfig(**{**SETTINGS, "steps": 8, **options})
    spots = table() if spots is None else spots
    train_hinge(
        model, MaskedDiffusionScheduler(10, "linear"), torch.arange(1, GENES + 1), spots, config, folder, seed=3
    )
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_do_not_depend_on_the_number_of_threads(tmp_path, set_threads, precision):
    weights = []
    for number in (1, 2):
        set_threads(number)
        weights.append(trained(tmp_path / str(number), precision=precision, validation_share=0.2))
        assert torch.get_num_threads() == number
    assert weights[0]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def first_gradients(monkeypatch, folder, **options):
    found = []

    def note(self, step, loss, rate):
        found.append((loss.item(), {name: each.grad for name, each in self.trained.parameters.items()}))

    with monkeypatch.context() as patched:
        patched.setattr(loop._Updates, "apply", note)
        trained(folder, steps=1, **options)
    return found[0]


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("options", [{"weighting": "gene"}, {"genes_per_step": 5}, {"gradient_checkpointing": True}])
def test_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch, lacking, options):
    # one half may have spots without any gene in the loss
    measured = {"s1": np.arange(GENES) % 3 > 0} if lacking else {}
    spots = replace(table(), measured=measured)
    loss, gradients = first_gradients(monkeypatch, tmp_path / "halves", spots=spots, **options)
    asked = []
    monkeypatch.setattr(objective, "halves", lambda positions, *_: asked.append(1) or [positions])
    whole_loss, whole = first_gradients(monkeypatch, tmp_path / "whole", spots=spots, **options)
    assert asked and loss == pytest.approx(whole_loss, rel=1e-5)
    assert gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
