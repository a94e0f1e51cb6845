"""`training.compile`: the compiled step trains the same model, and leaves no trace in what is written."""

import pytest
import torch
from helpers.training import killed_at, log_of, make_model, train
from safetensors import safe_open

import hinge.training.loop as loop
from hinge.utils.errors import ConfigError


@pytest.fixture
def compiler():
    try:
        loop.check_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))


def losses(folder) -> list[float]:
    return [record["loss"] for record in log_of(folder)]


@pytest.mark.full
def test_a_compiled_step_trains_as_the_plain_one_does(tmp_path, compiler, monkeypatch):
    """Names in its checkpoint are those of the plain model, whose loop continues it."""
    options = {"steps": 6, "checkpoint_every": 3}
    train(tmp_path / "plain", make_model(), **options)
    with killed_at(monkeypatch, 3):
        train(tmp_path / "compiled", make_model(), compile=True, **options)
    train(tmp_path / "compiled", make_model(), **options)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    names = []
    for which in ("plain", "compiled"):
        with safe_open(tmp_path / which / "latest.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    assert not any("_orig_mod" in name for name in names[1])


@pytest.mark.full
def test_a_compiled_step_may_compute_layers_again(tmp_path, compiler):
    options = {"steps": 3, "gradient_checkpointing": True}
    plain, _ = train(tmp_path / "plain", make_model(), **options)
    compiled, _ = train(tmp_path / "compiled", make_model(), compile=True, **options)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_without_a_compiler_it_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"training\.compile needs a compiler.*set training\.compile to false"):
        train(tmp_path, make_model(), compile=True, steps=2)
    assert not (tmp_path / "latest.safetensors").exists()
