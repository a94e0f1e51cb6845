"""Pre-training of an expression backbone: it learns, resumes, and validates with masks of each spot's own."""

import json

import numpy as np
import pytest
import torch

import hinge.training.cellfm as cellfm
import hinge.training.loop as loop
from hinge.backbones import CellFMConfig, CellFMModel
from hinge.training import PretrainConfig, pretrain_expression
from hinge.utils.errors import ConfigError, DataError


def expression(n=120, genes=12, seed=0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(n, 3)) @ rng.normal(size=(3, genes)) + 1.5, 0).astype(np.float32)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}


@pytest.mark.full
def test_pretraining_learns_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    values, genes = expression(), [f"G{i}" for i in range(12)]
    config = PretrainConfig(steps=100, batch_size=32, learning_rate=3e-3, evaluate_every=10, checkpoint_every=10)
    whole = pretrain_expression(values, genes, CellFMConfig(**TINY), config, tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole-training" / "log.jsonl").read_text().splitlines()]
    scores = [record["validation_loss"] for record in log if "validation_loss" in record]
    assert min(scores) < 0.8 * scores[0]

    class Stop(Exception):
        pass

    saved = loop.save_checkpoint

    def save_then_stop(path, trained, progress):
        saved(path, trained, progress)
        if progress.step == 20:
            raise Stop

    monkeypatch.setattr(loop, "save_checkpoint", save_then_stop)
    with pytest.raises(Stop):
        pretrain_expression(values, genes, CellFMConfig(**TINY), config, tmp_path / "parts")
    monkeypatch.undo()
    parts = pretrain_expression(values, genes, CellFMConfig(**TINY), config, tmp_path / "parts")
    assert parts.digest() == whole.digest()
    # a finished folder is loaded, not trained again
    assert (
        pretrain_expression(values, genes, CellFMConfig(**TINY), config, tmp_path / "whole").digest() == whole.digest()
    )


def test_genes_a_file_lacks_are_never_targets(tmp_path):
    values = expression()
    values[:60, 3] = np.nan
    model = pretrain_expression(
        values,
        [f"G{i}" for i in range(12)],
        CellFMConfig(**TINY),
        PretrainConfig(steps=3, batch_size=16),
        tmp_path / "b",
    )
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_pretraining_refuses_what_it_cannot_use(tmp_path):
    genes = [f"G{i}" for i in range(12)]
    with pytest.raises(DataError, match="at least 10 spots"):
        pretrain_expression(expression(5), genes, CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")
    with pytest.raises(DataError, match="do not fit 11 genes"):
        pretrain_expression(expression(), genes[:11], CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")
    pretrain_expression(expression(), genes, CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")
    with pytest.raises(ConfigError, match="other genes"):
        pretrain_expression(expression(), genes[::-1], CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")


@pytest.mark.parametrize("genes_per_step", [2048, 5])
def test_validation_does_not_depend_on_how_rows_are_split(monkeypatch, genes_per_step):
    """Several processes and other batches score the same masks."""
    monkeypatch.setattr(cellfm, "GENES_PER_STEP", genes_per_step)
    torch.manual_seed(0)
    model = CellFMModel(CellFMConfig(num_genes=12, **TINY)).eval()
    task, rows = cellfm._MaskedReconstruction(model), np.arange(12)
    totals = []
    for batch_size, parts in ((16, 1), (16, 2), (5, 1)):
        data = cellfm._MaskedRows(expression(), batch_size, 3, torch.device("cpu"))
        with torch.no_grad():
            totals.append(sum(data.evaluate(task, part) for part in np.array_split(rows, parts)))
    assert totals[0][1] == len(rows) == len(data.held)
    torch.testing.assert_close(totals[1], totals[0])
    torch.testing.assert_close(totals[2], totals[0])


def test_a_section_shows_only_what_a_user_sets():
    keys = {"steps", "batch_size", "learning_rate", "precision", "evaluate_every", "checkpoint_every"}
    assert set(PretrainConfig.model_fields) == keys
    assert all(field.description for field in PretrainConfig.model_fields.values())
    loop_config = PretrainConfig(steps=7, precision="bf16").loop()
    assert (loop_config.steps, loop_config.precision, loop_config.warmup_steps) == (7, "bf16", 100)
    with pytest.raises(ValueError, match="fp16 is not offered"):
        PretrainConfig(precision="fp16")
