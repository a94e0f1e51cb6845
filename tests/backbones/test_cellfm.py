"""The expression backbone: parity with the published implementations, masks, pre-training."""

import json

import pytest
import torch
from helpers.parity import assert_equals_recording
from safetensors.torch import load_file, safe_open

from hinge.backbones import CellFMConfig, CellFMModel


def small(**options) -> CellFMModel:
    torch.manual_seed(0)
    settings = {
        "num_genes": 30,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_value_bins": 8,
    }
    return CellFMModel(CellFMConfig(**{**settings, **options})).eval()


def test_masked_values_do_not_matter_with_the_mask_token():
    model = small()
    gene_ids = torch.arange(1, 13)
    visible = (torch.arange(12) % 3 > 0).float().expand(2, 12)
    values = torch.rand(2, 12)
    other = torch.where(visible > 0, values, torch.full_like(values, 7.0))
    with torch.no_grad():
        assert torch.equal(model(values, visible, gene_ids), model(other, visible, gene_ids))


def test_masked_genes_give_no_keys_in_the_first_half_only():
    model = small()
    visible = torch.tensor([[1.0, 0.0, 1.0]])
    early, late = model.key_masks(visible)
    assert early.tolist() == [[1, 1, 0, 1]]
    assert late is None
    padded = torch.tensor([[1.0, 1.0, 0.0]])
    assert model.key_masks(visible, padded)[1].tolist() == [[1, 1, 1, 0]]


def test_order_of_genes_does_not_matter():
    model = small()
    ids, values = torch.randperm(30)[:10] + 1, torch.rand(3, 10)
    visible = (torch.rand(3, 10) > 0.5).float()
    order = torch.randperm(10)
    with torch.no_grad():
        straight = model.decode(model(values, visible, ids))[:, order]
        shuffled = model.decode(model(values[:, order], visible[:, order], ids[order]))
    torch.testing.assert_close(straight, shuffled, atol=1e-5, rtol=1e-5)


def test_save_and_load_are_exact(tmp_path):
    model = small(gene_names=[f"G{i}" for i in range(30)])
    model.save_pretrained(tmp_path)
    again = CellFMModel.from_pretrained(tmp_path)
    assert again.digest() == model.digest()
    assert again.config.gene_names[:2] == ["G0", "G1"]
    assert model.config.num_embeddings == 32


def test_configuration_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="masked_input"):
        CellFMConfig(masked_input="nothing")
    with pytest.raises(ValueError, match="divisible"):
        CellFMConfig(hidden_size=10, num_attention_heads=4)


PARITY = [
    ("cellfm_mindspore_tiny", False),
    ("cellfm_800m_style", True),
    ("cellfm_800m_style", False),
    ("cellfm_80m_style", True),
    ("cellfm_80m_style", False),
]


@pytest.mark.parametrize(("name", "technical"), PARITY)
def test_equals_the_published_implementation(parity, name, technical):
    path = parity / f"{name}.safetensors"
    recorded = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["config"])
    mindspore = "mindspore" in name
    # the recording of the weights has the names of a checkpoint; the torch port's two constants differ
    model = CellFMModel.from_pretrained(
        path,
        num_attention_heads=meta["heads"],
        technical_tokens=technical,
        zero_input="pad" if meta["pad_zero"] else "token",
        **({} if mindspore else {"negative_slope": 0.01, "layer_norm_eps": 1e-5}),
    )
    assert (model.config.num_genes, model.config.num_hidden_layers) == (meta["n_genes"], meta["layers"])
    nonzero = recorded["in.nonzero_with_cls"][:, 1:] if mindspore else recorded["in.nonzero"]
    gene_ids, visible = recorded["in.gene_ids"].long(), recorded["in.values"][..., 0]

    def compute(model):
        tokens = model(recorded["in.values"][..., 1].to(model.dtype), visible, gene_ids, nonzero)
        return {"tokens": tokens, "genes": model.decode(tokens), "cell": model.decode_cell(tokens, gene_ids)}

    prefix = "out." if mindspore else f"out.{'with' if technical else 'without'}_st."
    hidden = recorded[f"{prefix}hidden"]
    if mindspore:
        hidden = torch.cat([recorded["out.cls"].unsqueeze(1), hidden], dim=1)
    outputs = {"tokens": hidden, "genes": recorded[f"{prefix}genewise"], "cell": recorded[f"{prefix}cellwise"]}
    assert_equals_recording(model, compute, outputs)


def test_the_ports_constants_are_not_the_models(parity):
    """With the torch port's slope the weights that MindSpore trained give other tokens, not slightly."""
    path = parity / "cellfm_mindspore_tiny.ckpt"
    recorded = load_file(parity / "cellfm_mindspore_tiny.safetensors")
    values, ids = recorded["in.values"], recorded["in.gene_ids"].long()
    nonzero = recorded["in.nonzero_with_cls"][:, 1:]

    def off(**options) -> float:
        model = CellFMModel.from_pretrained(path, num_attention_heads=4, **options)
        with torch.no_grad():
            hidden = model(values[..., 1], values[..., 0], ids, nonzero)[:, 1:]
        return (hidden - recorded["out.hidden"]).abs().max().item()

    assert off(negative_slope=0.01) > 1000 * off()
