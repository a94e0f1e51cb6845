"""The network whose cost stands for Stem's has the size of Stem's release."""

import sys

import torch
from helpers import ROOT


def test_the_cost_model_has_the_published_size(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from peers import StemCost

    parameters = sum(parameter.numel() for parameter in StemCost(200).parameters())
    assert round(parameters / 1e6, 1) == 35.6

    small = StemCost(genes=5, width=12, depth=2, heads=3, features=7)
    values, time, features = torch.randn(2, 5), torch.randn(2, 256), torch.randn(2, 7)
    predicted = small(values, time, features)
    assert predicted.shape == (2, 2, 5)
    # every gene attends to every other, and the condition reaches all of them
    assert (small(values + torch.tensor([1.0, 0, 0, 0, 0]), time, features) != predicted).all()
    assert (small(values, time, features + 1) != predicted).all()
