"""The backbone that is part of the package: size, vocabulary, and how runs start from it."""

import numpy as np
import pytest
import safetensors
import torch

from hinge.backbones import load_backbone
from hinge.backbones.loading import new_config
from hinge.backbones.packaged import PACKAGED, packaged_for
from hinge.config import BackboneConfig

MOST_BYTES = 20e6


@pytest.mark.parametrize("name", PACKAGED)
def test_it_loads_by_name_and_is_small(name):
    folder = PACKAGED[name]
    model = load_backbone(name, dtype="float32")
    assert model.config.transform == folder.name and model.expression_prior is not None
    genes = model.config.gene_names
    assert len(genes) == len(set(genes)) >= 5000 and {"ERBB2", "CD74", "COL1A1"} <= set(genes)
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST_BYTES
    with safetensors.safe_open(folder / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118
    values = torch.rand(3, 50) * 4
    with torch.no_grad():
        found = model.predict(values, (torch.rand(3, 50) < 0.5).float(), torch.arange(1, 51))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("transform", [folder.name for folder in PACKAGED.values()])
def test_runs_without_counts_to_pretrain_on_start_from_it(transform):
    def wanted(**settings):
        return new_config(transform=transform, **BackboneConfig(**settings).size())

    known = ["ERBB2", "CD74", "COL1A1", "ACTB", "GAPDH"]
    model = packaged_for(wanted(), [*known, "NOT-A-GENE"], seed=0)
    assert model.config.gene_names[-1] == "NOT-A-GENE" and model.dtype == torch.float32
    ids = torch.tensor([model.config.gene_names.index(gene) + 1 for gene in [*known, "NOT-A-GENE"]])
    visible = torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = model.predict(torch.full((1, 6), 3.0), visible, ids).numpy()
    assert np.isfinite(found).all()
    # a panel of another species, or another size or architecture of the network, is pre-trained on the training slides
    assert packaged_for(wanted(), ["Erbb2", "Cd74", "Actb"], seed=0) is None
    assert packaged_for(wanted(hidden_size=128), known, seed=0) is None
    assert packaged_for(wanted(architecture="scgpt"), known, seed=0) is None
