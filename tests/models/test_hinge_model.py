"""HingeModel: identity at initialisation, what trains and what does not, heads."""

import math

import pytest
import torch

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.models import HingeModel
from hinge.models.options import COUNT_HEADS, HEADS
from hinge.utils.errors import WeightsError

GENES, FEATURES = 10, 6


def backbone(width=16, layers=4, seed=0) -> CellFMModel:
    torch.manual_seed(seed)
    return CellFMModel(
        CellFMConfig(num_genes=20, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_value_bins=8)
    ).eval()


def inputs(batch=5):
    torch.manual_seed(1)
    return {
        "values": torch.rand(batch, GENES) * 4,
        "visible": (torch.rand(batch, GENES) > 0.5).float(),
        "timestep": torch.randint(1, 51, (batch,)),
        "features": torch.randn(batch, FEATURES),
        "gene_ids": torch.arange(3, 3 + GENES),
    }


@pytest.mark.parametrize("width,layers", [(16, 2), (16, 4), (32, 7), (64, 40)])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_backbone_at_initialisation(width, layers, rank, head):
    frozen = backbone(width, layers)
    batch = inputs()
    with torch.no_grad():
        expected = frozen.decode(frozen(batch["values"], batch["visible"], batch["gene_ids"]))
        linear = HingeModel.from_backbone(
            frozen, FEATURES, GENES, head=head, transform="log2p1", gate="linear", modulation_rank=rank
        )
        # what separates them is the norm's share of σ(−12) = 6e-6
        torch.testing.assert_close(linear(**batch).location, expected, atol=2e-3, rtol=1e-3)
        linear.modulation.norm_mix.fill_(-math.inf)
        linear.modulation.norm_mix_decoder.fill_(-math.inf)
        torch.testing.assert_close(linear(**batch).location, expected, atol=1e-5, rtol=1e-5)


def test_the_sigmoid_gate_starts_within_its_own_opening():
    frozen, batch = backbone(16, 4), inputs()
    with torch.no_grad():
        expected = frozen.decode(frozen(batch["values"], batch["visible"], batch["gene_ids"]))
        got = HingeModel.from_backbone(frozen, FEATURES, GENES, gate="sigmoid")(**batch).location
    assert 0 < (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert HingeModel.from_backbone(frozen, FEATURES, GENES).modulation.bias.max() == 6


def test_the_condition_matters_after_one_step_and_the_backbone_stays_bit_identical():
    frozen, batch = backbone(), inputs()
    before = frozen.digest()
    model = HingeModel.from_backbone(frozen, FEATURES, GENES)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("backbone" in name for name in names)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.rand(5, GENES) * 4
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).loss(target).mean().backward()
        optimizer.step()
    assert frozen.digest() == before
    with torch.no_grad():
        one = model(**batch).location
        other = model(**{**batch, "features": batch["features"] + 1}).location
        later = model(**{**batch, "timestep": batch["timestep"] // 2}).location
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, later)


def test_every_trained_parameter_gets_a_gradient():
    model = HingeModel.from_backbone(backbone(), FEATURES, GENES, modulation_rank=2)
    torch.manual_seed(0)
    with torch.no_grad():  # away from zero, where products hide gradients
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model(**inputs()).loss(torch.rand(5, GENES)).mean().backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert missing == []


def test_saved_weights_are_the_trained_ones_only(tmp_path):
    frozen = backbone()
    model = HingeModel.from_backbone(frozen, FEATURES, GENES, head="censored_gaussian", modulation_rank=3)
    with torch.no_grad():
        model.gene_factor_model.mean.weight.normal_()
    model.set_feature_statistics(torch.randn(50, FEATURES) * 3 + 1)
    model.save_pretrained(tmp_path / "model")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert not set(stored) & set(frozen.state_dict())
    again = HingeModel.from_pretrained(tmp_path / "model", frozen)
    assert again.digest() == model.digest()
    with torch.no_grad():
        assert torch.equal(again(**inputs()).location, model(**inputs()).location)
    with pytest.raises(WeightsError, match="not the backbone weights"):
        HingeModel.from_pretrained(tmp_path / "model", backbone(seed=1))
    with pytest.raises(WeightsError, match="wide"):
        HingeModel.from_pretrained(tmp_path / "model", backbone(layers=2))
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        HingeModel.from_pretrained(tmp_path / "model", frozen)


def test_low_rank_is_small():
    frozen = backbone(64, 4)
    full = HingeModel.from_backbone(frozen, FEATURES, GENES).modulation
    low = HingeModel.from_backbone(frozen, FEATURES, GENES, modulation_rank=4).modulation
    count = [sum(parameter.numel() for parameter in module.parameters()) for module in (full, low)]
    assert count[1] < 0.25 * count[0]


def test_constant_features_do_not_divide_by_zero():
    model = HingeModel.from_backbone(backbone(), FEATURES, GENES)
    features = torch.randn(20, FEATURES)
    features[:, 2] = 5.0
    model.set_feature_statistics(features)
    assert torch.isfinite(model.standardise(features)).all()


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="gate must be one of"):
        HingeModel.from_backbone(backbone(), FEATURES, GENES, gate="open")


def count_model(head, transform="log2p1"):
    library_size = transform == "log1p_cp10k"
    model = HingeModel.from_backbone(
        backbone(), FEATURES, GENES, head=head, transform=transform, library_size=library_size, gene_factors=False
    ).eval()
    return model, ({"library_size": torch.tensor([500.0, 2000.0, 9000.0, 80.0, 3000.0])} if library_size else {})


@pytest.mark.parametrize("head", COUNT_HEADS)
@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_count_heads_are_distributions_over_counts(head, transform):
    model, extra = count_model(head, transform)
    with torch.no_grad():
        output = model(**inputs(), **extra)
        grid = output.grid
        counts = torch.arange(0, 4000).float()
        mass = torch.stack(
            [output.log_prob(grid.values(torch.full((5, GENES), float(k)))).exp() for k in counts[:1200].tolist()]
        )
        # the mass of all counts is one, and the quantile function is that of the mass
        total = mass.sum(0)
        heavy = total > 0.995
        assert heavy.float().mean() > 0.8
        torch.testing.assert_close(total[heavy], torch.ones_like(total[heavy]), atol=6e-3, rtol=0)
        below = mass.cumsum(0)
        for level in (0.1, 0.5, 0.9):
            drawn = grid.counts(output.icdf(torch.full((5, GENES), level, dtype=torch.float64)))
            assert (drawn == drawn.round()).all() and (drawn >= 0).all()
            at = below.gather(0, drawn.long().clamp(max=1199)[None])[0]
            before = torch.where(drawn > 0, below.gather(0, (drawn.long() - 1).clamp(0, 1199)[None])[0], 0)
            assert (at[heavy] >= level - 2e-3).all() and (before[heavy] <= level + 2e-3).all()


@pytest.mark.parametrize("head", COUNT_HEADS)
def test_count_heads_stay_finite_up_to_a_million_counts(head):
    model, _ = count_model(head)
    values = torch.tensor([[0.0, 1.0, 20.0]]).repeat(5, 4)[:, :GENES]
    batch = inputs()
    loss = model(**batch).loss(values)
    loss.mean().backward()
    assert torch.isfinite(loss).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_count_heads_need_the_transform_and_the_library_size():
    with pytest.raises(ValueError, match="transform"):
        HingeModel.from_backbone(backbone(), FEATURES, GENES, transform=None)
    with pytest.raises(ValueError, match="library size"):
        HingeModel.from_backbone(backbone(), FEATURES, GENES, head="negative_binomial", transform="log1p_cp10k")
