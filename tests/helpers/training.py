"""A small model and its training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import hinge.training.loop as loop
from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.spots import SpotTable
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.training import TrainingConfig, train_hinge

GENES, FEATURES = 8, 5


def table(n=60, views=1, slides=2, seed=0) -> SpotTable:
    """Return spots on a square lattice whose expression depends on their features."""
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


def make_model(backbone=None, **options) -> HingeModel:
    """Return a model with a random backbone, or a given one."""
    torch.manual_seed(0)
    backbone = backbone or CellFMModel(
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
    """Train a model on `table()`; return it and the result of the loop."""
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


def log_of(folder) -> list[dict]:
    """Return the records of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Killed(Exception):
    """Stands for the end of a process."""


@contextmanager
def killed_at(monkeypatch, step: int) -> Iterator[None]:
    """End the training in the block when it has written the checkpoint of a step."""
    saved = loop.save_checkpoint

    def save_then_die(path, trained, progress):
        saved(path, trained, progress)
        if progress.step == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "save_checkpoint", save_then_die)
        yield
