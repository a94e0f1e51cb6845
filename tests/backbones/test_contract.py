"""What every backbone has to do for a HingeModel: one body of tests for all of them."""

import numpy as np
import pytest
import torch
from helpers.backbones import SMALL, small_backbone
from helpers.draws import draw_features
from helpers.training import FEATURES, GENES, killed_at, make_model, table, train

from hinge.backbones import load_backbone
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.models.subset import GeneSubset
from hinge.models.value_bins import ValueBins
from hinge.utils.errors import ConfigError

IDS = torch.arange(1, GENES + 1)
FAST = ("scgpt", "tahoe-3b")  # both attention patterns, post-norm and pre-norm; the others run in CI
every_backbone = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.full) for name in SMALL]
)


def inputs(batch=6, seed=1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "values": 4 * torch.rand(batch, GENES, generator=generator),
        "visible": (torch.rand(batch, GENES, generator=generator) > 0.5).float(),
        "timestep": torch.randint(1, 11, (batch,), generator=generator),
        "features": torch.randn(batch, FEATURES, generator=generator),
        "gene_ids": IDS,
    }


def moved(model: HingeModel) -> HingeModel:
    """Return the model with trained weights away from their start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def alone(model: HingeModel, given: dict) -> torch.Tensor:
    """Return what the backbone predicts without modulation, in units of values."""
    values = given["values"] if model.value_bins is None else model.value_bins.encode(given["values"])
    return model.decode(model.backbone(values, given["visible"], IDS), given["values"], given["visible"], IDS)


@every_backbone
@pytest.mark.parametrize("injection", ["soft_adaln", "cross_attention"])
@torch.no_grad()
def test_identity_at_start(name, injection):
    model = make_model(
        small_backbone(name), injection=injection, gate="linear", norm="none", gene_factors=False, head="point"
    ).eval()
    given = inputs()
    expected, found = alone(model, given), model(**given).location
    assert expected.std() > 0
    if name.startswith("cellfm") and injection == "soft_adaln":
        # λh + update is one operation here and two in the published code
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(found, expected)
    # with the gate of the paper, as far as it is open
    paper = make_model(small_backbone(name), injection=injection, gene_factors=True).eval()
    assert (paper(**given).location - expected).abs().max() < 0.05 * (expected.abs().max() + 1)


@every_backbone
@pytest.mark.parametrize("injection", ["soft_adaln", "adaln_zero", "concatenation", "cross_attention"])
def test_condition_and_gradients_reach_every_layer(name, injection):
    model = moved(make_model(small_backbone(name), injection=injection, gene_factors=False)).train()
    given = inputs()
    model(**given).loss(torch.rand(6, GENES)).mean().backward()
    missing = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert missing == []
    with torch.no_grad():
        other = model(**{**given, "features": given["features"] + 1}).location
        assert not torch.allclose(model(**given).location, other)


@every_backbone
def test_training_leaves_frozen_weights_and_resumes(name, tmp_path, monkeypatch):
    backbone = small_backbone(name)
    before = backbone.digest()
    options = {"steps": 8, "checkpoint_every": 4, "evaluate_every": 4}
    whole, _ = train(tmp_path / "whole", make_model(backbone, feature_dropout=0.2), **options)
    assert backbone.digest() == before
    with killed_at(monkeypatch, 4):
        train(tmp_path / "parts", make_model(small_backbone(name), feature_dropout=0.2), **options)
    parts, _ = train(tmp_path / "parts", make_model(small_backbone(name), feature_dropout=0.2), **options)
    assert parts.digest() == whole.digest()
    # what is saved is what draws, whatever the batch size, and draws are expression
    whole.save_pretrained(tmp_path / "model")
    whole.backbone.save_pretrained(tmp_path / "backbone")
    again = HingeModel.from_pretrained(tmp_path / "model", load_backbone(tmp_path / "backbone"))
    arguments = (MaskedDiffusionScheduler(10, "linear"), table().features[:5, 0], IDS, list("abcde"))
    draws = [
        draw_features(model, *arguments, num_draws=3, num_inference_steps=4, batch_size=size).values
        for model, size in ((whole, 15), (again, 4))
    ]
    np.testing.assert_allclose(draws[0], draws[1], atol=1e-4, rtol=1e-4)
    assert draws[0].std(axis=0).mean() > 0.05 and draws[0].min() >= 0 and draws[0].max() < 20


@every_backbone
@pytest.mark.parametrize("gene_factors", [True, False])
@torch.no_grad()
def test_absent_tokens_equal_hidden_ones(name, gene_factors):
    model = moved(make_model(small_backbone(name), gene_factors=gene_factors))
    given = inputs()
    order = torch.rand(6, GENES, generator=torch.Generator().manual_seed(3)).argsort(1).argsort(1)
    given["visible"] = (order < torch.arange(6)[:, None]).float()
    present = (order < torch.arange(6)[:, None] + 2).float()
    hidden = model(**given, present=present)
    subset = GeneSubset.of(present)
    features = model.standardise(given["features"])
    arguments = (given["values"], given["visible"], given["timestep"], features, IDS)
    h = model.tokens(*arguments, subset=subset)
    assert h.shape[1] == model.backbone.num_prefix_tokens + subset.index.shape[1] < h.shape[0] + GENES
    output, _ = model.read_out(h, given["values"], given["visible"], features, IDS, subset=subset)
    there = present > 0
    torch.testing.assert_close(output.mean[there], hidden.mean[there], atol=2e-5, rtol=1e-5)
    # in the generative pattern that is what a pass with all tokens predicts, too
    everything = model(**given)
    same = torch.allclose(everything.mean[there], hidden.mean[there], atol=2e-5, rtol=1e-5)
    assert same == model.backbone.masked_give_no_keys
    assert model.drops_masked == (gene_factors or model.backbone.masked_give_no_keys)


@every_backbone
def test_values_and_back(name):
    """Counts survive the value space of a backbone up to the width of a bin, and the vocabulary can be replaced."""
    backbone = small_backbone(name)
    counts = torch.randint(1, 60, (2, 3, 7), generator=torch.Generator().manual_seed(0)).float()
    counts[..., 0] = 0
    counts[1, 1] = 0
    sizes, ids = counts.sum(dim=-1) + 9, IDS[:7]
    values = backbone.encode_values(counts, sizes, ids)
    back = backbone.decode_values(values, sizes, spots=counts, gene_ids=ids)
    assert values.dtype == back.dtype == torch.float32 and values.shape == back.shape == counts.shape
    assert (back[counts == 0] == 0).all()
    if backbone.value_space == "transform":
        torch.testing.assert_close(back, counts)
    else:
        low, high = (backbone.decode_values(values + step, sizes, counts, ids) for step in (-1, 1))
        there = counts > 0
        assert (low <= counts * (1 + 1e-6))[there].all() and (counts <= high * (1 + 1e-6))[there].all()
        assert (low < high)[there].all() and values.max() == backbone.config.num_bins - 1
        with pytest.raises(ConfigError, match="needs the counts of the spots"):
            backbone.decode_values(values, sizes)
    config = type(backbone.config)(**backbone.config.to_diff_dict())
    config.set_genes(["B", "A"])
    assert config.read_vocabulary().ids(["A", "B"]).tolist() == [2, 1] and config.num_embeddings >= 3


@every_backbone
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_tuning_trains_what_is_used(name, tuning, tmp_path):
    model = make_model(small_backbone(name), tuning=tuning, lora_rank=2)
    with torch.no_grad():
        for key, parameter in model.backbone.named_parameters():
            if parameter.requires_grad and "lora" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model(**inputs()).loss(torch.rand(6, GENES)).mean().backward()
    for key, value in model.backbone.named_parameters():
        assert value.requires_grad == (value.grad is not None and bool(value.grad.any())), key
    model.save_pretrained(tmp_path / "model")
    again = HingeModel.from_pretrained(tmp_path / "model", small_backbone(name))
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs()).location, model.eval()(**inputs()).location)


@every_backbone
def test_new_genes(name):
    backbone = small_backbone(name)
    table = backbone.gene_embedding.weight.clone()
    vocabulary = backbone.config.read_vocabulary()
    first = 9 if vocabulary is None else vocabulary.match(["NEW"], "new").ids[0]
    backbone.add_genes({"NEW": int(first), "NEWER": int(first) + 1}, seed=0)
    grown = backbone.gene_embedding.weight
    assert torch.equal(grown[: min(first, len(table))], table[:first]) and grown[first : first + 2].any(dim=1).all()
    if vocabulary is not None:
        again = backbone.config.read_vocabulary()
        assert again.ids(["NEW", "NEWER"]).tolist() == [first, first + 1]
        assert not set(again.id_of) & {"<pad>", "<cls>", "<drug>"}


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_map_between_values_and_bins(transform, scaled):
    """Both maps increase, follow the bins of the spots, and lose little of a value that goes there and back."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1.0, 4.0, size=(200, GENES)) * np.arange(1, GENES + 1)).astype(np.float32)
    scale = np.arange(1, GENES + 1) / 3 if scaled else np.ones(GENES)
    values = np.log2(counts + 1) if transform == "log2p1" else np.log1p(1e4 * counts / 2000)
    bins = np.stack([np.searchsorted(np.sort(row), row, side="right") for row in counts / scale]) * (counts > 0)
    mapping = ValueBins(GENES, transform, 51)
    mapping.fit(values, bins, scale)
    found = mapping.encode(torch.from_numpy(values).float())
    assert mapping.fitted and (found[torch.from_numpy(counts) == 0] == 0).all()
    expressed, back = counts > 0, mapping.decode(found).numpy()
    assert np.corrcoef(back[expressed], values[expressed])[0, 1] > 0.9
    assert abs(back[expressed].mean() - values[expressed].mean()) < 0.2 * values[expressed].mean()
    index = torch.tensor([[2, 0, 5]]).expand(200, 3)
    torch.testing.assert_close(mapping.decode(found.gather(1, index), index), mapping.decode(found).gather(1, index))
    assert np.corrcoef(found.numpy()[expressed], bins[expressed])[0, 1] > (0.8 if scaled else 0.7)
    grid = torch.linspace(0, float(values.max()), 300).unsqueeze(1).expand(300, GENES)
    assert (mapping.encode(grid).diff(dim=0) >= 0).all()
    predicted = mapping.decode(torch.linspace(-5, 60, 300).unsqueeze(1).expand(300, GENES))
    assert (predicted.diff(dim=0) >= 0).all() and predicted.min() < 0 < 20 > predicted.max()


def test_the_map_without_any_count_stays_as_it_is():
    mapping = ValueBins(GENES, "log2p1", 51)
    mapping.fit(np.zeros((3, GENES)), np.zeros((3, GENES)), np.ones(GENES))
    assert torch.isfinite(mapping.decode(mapping.encode(torch.ones(2, GENES)))).all()
