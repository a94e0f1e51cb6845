"""Backbones of their full size with made-up weights, from published files to scores. By hand: gigabytes and minutes."""

import json

import anndata
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hinge.backbones import CellFMConfig, CellFMModel, ScGPTConfig, ScGPTModel
from hinge.backbones.published_cellfm import published_names as cellfm_names
from hinge.backbones.published_scgpt import published_names as scgpt_names

GENES, ROWS = 60, 60697


def made_up(model_class, config) -> dict[str, torch.Tensor]:
    """Return random bfloat16 weights by our names, about as large as trained ones."""
    with torch.device("meta"):
        parameters = dict(model_class(config).named_parameters())
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in parameters.items():
        if "norm" in name:
            state[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        else:
            deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
            state[name] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, deviation, generator=generator)
    return state


def write_cellfm(folder, genes) -> dict:
    """Write a torch state dict of the 800M model with its 27,855 genes, and their table."""
    config = CellFMConfig()
    state = made_up(CellFMModel, config)
    names = cellfm_names(config.num_hidden_layers, False)
    published = {}
    for ours, theirs in names.items():
        for name, part in zip(theirs, state.pop(ours).chunk(len(theirs)), strict=True):
            published[name] = part.contiguous()
    save_file(published, folder / "cellfm.safetensors")
    table = [*genes, *[f"OTHER{number}" for number in range(config.num_genes - len(genes))]]
    (folder / "genes.csv").write_text("\n".join(["symbol", *table]))
    return {"path": str(folder / "cellfm.safetensors"), "vocabulary": str(folder / "genes.csv")}


def write_scgpt(folder, genes) -> dict:
    """Write the published folder of scGPT whole-human's size."""
    config = ScGPTConfig(vocab_size=ROWS)
    state = made_up(ScGPTModel, config)
    names = scgpt_names({}, config.to_dict()).names
    torch.save({theirs: state[ours] for ours, theirs in names.items()}, folder / "best_model.pt")
    arguments = {"embsize": 512, "nheads": 8, "d_hid": 512, "nlayers": 12, "n_bins": 51}
    (folder / "args.json").write_text(json.dumps(arguments))
    tokens = [*genes, *[f"OTHER{number}" for number in range(ROWS - len(genes) - 3)], "<pad>", "<cls>", "<eoc>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    return {"path": str(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_cellfm, write_scgpt])
def test_a_full_size_backbone_trains_draws_and_is_scored(write, write_slide, call_cli, tmp_path):
    """2 steps of training, 12 spots × 2 draws × 48 genes, scores; CellFM 800M needs about 7 GB."""
    genes = [f"GENE{number}" for number in range(GENES)]
    for name, seed in (("a", 0), ("b", 1)):
        write_slide(name, rows=3, columns=4, genes=GENES, seed=seed)
    backbone = write(tmp_path, genes)
    settings = {
        "output": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "slides"), "train": ["a"], "test": ["b"]},
        "panel": {"genes": 48},
        "features": {"encoder": "stain-texture"},
        "backbone": backbone,
        "model": {"modulation_rank": 8},
        "training": {"epochs": None, "steps": 2, "batch_size": 4, "precision": "bf16", "gradient_checkpointing": True},
        "sampling": {"draws": 2, "steps": 4, "precision": "bf16"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = call_cli("run", "--config", tmp_path / "run.yaml")
    assert done.code == 0, done.err
    draws = anndata.read_h5ad(tmp_path / "run" / "samples" / "b.h5ad")
    assert draws.shape == (12, 48) and {"draw_000", "draw_001"} <= set(draws.layers)
    assert np.isfinite(draws.layers["draw_001"]).all()
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["rows"]
