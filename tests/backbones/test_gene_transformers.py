"""scGPT, scGPT-spatial and Tahoe-x1: parity with the published implementations, number for number."""

import json

import numpy as np
import pytest
import torch
from helpers.backbones import published_folder, read_recording
from helpers.parity import float32_sensitivity

from hinge.backbones import load_backbone
from hinge.backbones.binning import scgpt_bins, tahoe_bins

# units of the measured sensitivity of float32, and of the float64 recording
FACTOR, EXACT = 4.0, 1e-10


def assert_parity(model, compute, recorded, prefix, valid):
    """Compare every recorded output under a prefix, in float64 and in float32, where `valid` says which rows count."""
    exact, deviation = float32_sensitivity(model, compute)
    names = {
        key.removeprefix(f"out.{prefix}")
        for key in recorded
        if key.startswith(f"out.{prefix}") and "." not in key.removeprefix(f"out.{prefix}")
    }
    assert names == exact.keys(), (names ^ exact.keys(), "not every recorded output is compared")
    for name in names:
        single, double = recorded[f"out.{prefix}{name}"], recorded[f"out64.{prefix}{name}"]
        there = valid(name, single)
        scale = max(1.0, double.abs().max().item())
        assert (exact[name] - double)[there].abs().max().item() <= EXACT * scale, name
        error = (single.double() - exact[name])[there].abs().max().item()
        # a few units in the last place of a number of this size are rounding of the sum, whatever the weights
        assert error <= FACTOR * deviation[name] + 4e-7 * scale, (name, error, deviation[name])


def rows_without(padding):
    """Return which entries of an output (B, N, …) count."""
    return lambda name, output: ~padding if output.shape[:2] == padding.shape else torch.ones_like(output).bool()


def encoder_outputs(model, recorded, prefix="in."):
    ids, padding = recorded[f"{prefix}gene_ids"], recorded[f"{prefix}padding"]
    masked = recorded[f"{prefix}masked"]
    h = model.embed_sequence(ids, recorded[f"{prefix}values"], masked)
    hidden = model.run_sequence(h, masked, padding)
    return h, hidden, ids


@pytest.mark.parametrize("name", ["scgpt_encoder", "scgpt_spatial"])
def test_scgpt_with_full_attention(backbones, tmp_path, name):
    meta, recorded = read_recording(backbones / f"{name}.safetensors")
    model = load_backbone(published_folder(backbones / f"{name}.safetensors", tmp_path), attention="full")
    spatial = "moe_experts" in meta

    def compute(model):
        h, hidden, ids = encoder_outputs(model, recorded)
        outputs = {
            "input_embedding": h,
            "hidden": hidden,
            "mlm_output": model.value_decoder(hidden),
            "cell_emb": hidden[:, 0],
            "mvc_output": model.decode_cell(hidden, ids),
        }
        if spatial:
            places = recorded["in.coordinates"].to(hidden.dtype)
            outputs["moe_gate"] = model.value_decoder.gates(hidden)
            outputs["impute_pred"] = model.decode_neighbours(hidden, ids, places, meta["impute_knn"])
        return outputs

    valid = rows_without(recorded["in.padding"])
    assert_parity(model, compute, recorded, "encoder." if spatial else "", valid)


@pytest.mark.parametrize("name", ["scgpt_generative", "scgpt_spatial"])
def test_scgpt_with_generative_attention(backbones, tmp_path, name):
    meta, recorded = read_recording(backbones / f"{name}.safetensors")
    model = load_backbone(published_folder(backbones / f"{name}.safetensors", tmp_path))
    assert model.config.attention == "generative"
    prefix = "generative." if "moe_experts" in meta else ""
    ids = torch.cat([recorded["in.pcpt_genes"], recorded["in.gen_genes"]], dim=1)
    padding = torch.cat([recorded["in.pcpt_padding"], recorded["in.gen_padding"]], dim=1)
    seen = recorded["in.pcpt_genes"].shape[1]
    masked = torch.zeros_like(padding)
    masked[:, seen:] = True
    values = torch.cat([recorded["in.pcpt_values"], torch.full(recorded["in.gen_genes"].shape, 7.0)], dim=1)

    def run(model, cell=None, observed_only=False):
        end = seen if observed_only else ids.shape[1]
        h = model.embed_sequence(ids[:, :end], values[:, :end], masked[:, :end])
        if cell is not None:
            h = torch.cat([cell.unsqueeze(1), h[:, 1:]], dim=1)
        hidden = model.run_sequence(h, masked[:, :end], padding[:, :end])
        decoded = model.value_decoder(hidden)
        return {
            "pcpt_hidden": hidden[:, :seen],
            "gen_hidden": hidden[:, seen:],
            "pcpt_preds": decoded[:, :seen],
            "gen_preds": decoded[:, seen:],
            "cell_emb": hidden[:, 0],
            "mvc_output": model.decode_cell(hidden, ids[:, :end]),
        }

    def valid(name, output):
        parts = {"pcpt": padding[:, :seen], "gen": padding[:, seen:], "mvc": padding}
        part = parts.get(name.split("_")[0])
        return torch.ones_like(output).bool() if part is None else ~part

    assert_parity(model, run, recorded, prefix, valid)

    def conditioned(model):
        outputs = run(model, run(model)["cell_emb"])
        return {key: outputs[key] for key in ("pcpt_preds", "gen_preds", "cell_emb")}

    def observed(model):
        outputs = run(model, observed_only=True)
        return {key: outputs[key] for key in ("pcpt_preds", "cell_emb")}

    assert_parity(model, conditioned, recorded, f"{prefix}conditioned.", valid)
    assert_parity(model, observed, recorded, f"{prefix}observed_only.", valid)


def tahoe_outputs(model, recorded, prefix="in."):
    ids, masked = recorded[f"{prefix}gene_ids"], recorded[f"{prefix}masked"]
    h = model.embed_sequence(ids, recorded[f"{prefix}values"], masked)
    if f"{prefix}drug_ids" in recorded:
        h = model.with_drugs(h, recorded[f"{prefix}drug_ids"])
    hidden = model.run_sequence(h, masked, recorded[f"{prefix}padding"])
    return {
        "hidden": hidden,
        "expr_preds": model.value_decoder(hidden),
        "cell_emb": hidden[:, 0],
        "mvc_output": model.decode_cell(hidden, ids),
    }


TAHOE = [
    ("tahoe_full", "full", "in.", ""),
    ("tahoe_full", "full", "in.chem.", "chem."),
    ("tahoe_generative", "generative", "in.", "generative."),
    ("tahoe_generative", "full", "in.", "full."),
]


@pytest.mark.parametrize(("name", "attention", "given", "prefix"), TAHOE)
def test_tahoe(backbones, tmp_path, name, attention, given, prefix):
    _, recorded = read_recording(backbones / f"{name}.safetensors")
    folder = published_folder(backbones / f"{name}.safetensors", tmp_path)
    assert load_backbone(folder).config.attention == ("full" if name == "tahoe_full" else "generative")
    model = load_backbone(folder, attention=attention)
    valid = rows_without(recorded[f"{given}padding"])
    assert_parity(model, lambda model: tahoe_outputs(model, recorded, given), recorded, prefix, valid)


@pytest.fixture(scope="module")
def preprocessing(backbones):
    return json.loads((backbones / "preprocessing.json").read_text())


def test_bins(preprocessing):
    published = {"scgpt": scgpt_bins, "scgpt_dev_temp": scgpt_bins, "tahoe": tahoe_bins}
    compared = set()
    for row in preprocessing["binning"]:
        for name, bins in published.items():
            # null where the published code draws one of several bins at random: ties, and a single value
            if row[name] is not None:
                assert bins(np.array(row["input"]), row["n_bins"]).tolist() == row[name], (name, row["name"])
                compared.add(name)
    assert compared == published.keys()


SEQUENCES = {
    "scgpt": "scgpt_checkpoint",
    "scgpt_spatial": "scgpt_spatial_checkpoint",
    "tahoe_70m": "tahoe_70m_checkpoint",
    "tahoe_3b_with_chem": "tahoe_3b_checkpoint",
    "tahoe_3b_without_chem": "tahoe_3b_checkpoint",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_cells_as_sequences(backbones, preprocessing, name):
    """What reaches the model, from published files: ids by the vocabulary, bins, padding."""
    recorded = preprocessing["sequences"][name]
    model = load_backbone(backbones / SEQUENCES[name])
    ids = model.config.read_vocabulary().ids(recorded["genes"])
    counts = np.array(recorded["counts"])
    drugs = "drug_ids" in recorded
    found = model.sequences(counts, ids, *(["<drug>"] if drugs else []))
    expected_ids = torch.tensor(recorded["gene_ids"])
    width = found.gene_ids.shape[1]
    assert torch.equal(found.gene_ids, expected_ids[:, :width])
    assert torch.equal(found.values, torch.tensor(recorded["values"])[:, :width])
    assert (expected_ids[:, width:] == recorded["pad_id"]).all()
    assert torch.equal(found.padding, found.gene_ids == recorded["pad_id"])
    if not drugs:
        # the same bins as a matrix over the genes
        matrix = model.encode_values(torch.from_numpy(counts), torch.from_numpy(counts.sum(1)), torch.from_numpy(ids))
        genes = ~found.padding & (found.gene_ids != model.config.token_id("<cls>"))
        assert torch.equal(matrix[torch.from_numpy(counts) > 0], found.values[genes])
        assert not matrix[torch.from_numpy(counts) == 0].any()


def test_a_defect_of_the_published_code_is_not_copied(backbones, preprocessing):
    """Without a chemical token, from_hf leaves the first gene's count as it is, and out of the edges."""
    recorded = preprocessing["sequences"]["tahoe_3b_from_hf_leftover"]
    model = load_backbone(backbones / "tahoe_3b_checkpoint")
    counts = np.array(recorded["counts"])
    found = model.sequences(counts, model.config.read_vocabulary().ids(recorded["genes"]))
    theirs = torch.tensor(recorded["values"])
    first = torch.tensor([row[row > 0][0] for row in counts]).float()
    assert torch.equal(theirs[:, 1], first)
    assert found.values[:, 1:].max() == model.config.num_bins - 1
    assert not torch.equal(found.values, theirs[:, : found.values.shape[1]])
