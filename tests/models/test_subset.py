"""Tokens that are not needed stay away, and nothing else changes."""

import numpy as np
import pytest
import torch
from helpers.draws import draw_features

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.models.subset import GeneSubset

GENES, FEATURES = 24, 5
IDS = torch.arange(1, GENES + 1)
SIZE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_value_bins": 8}


def make(backbone=None, moved=True, **options) -> HingeModel:
    torch.manual_seed(0)
    frozen = CellFMModel(CellFMConfig(num_genes=GENES, **SIZE, **(backbone or {})))
    if frozen.expression_prior is not None:
        frozen.set_expression_prior(np.ones(GENES), torch.randn(GENES, 3).numpy(), np.full(GENES, 0.2))
    model = HingeModel.from_backbone(frozen, FEATURES, GENES, **options).eval()
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def masks(batch=6, seed=1, ragged=True) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible genes, and those that are present: more of them, of different number in every row if `ragged`."""
    uniform = torch.rand(batch, GENES, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    visible = uniform < torch.arange(batch)[:, None] * 2
    present = uniform < (torch.arange(batch)[:, None] * 3 + 4 if ragged else torch.full((batch, 1), 13))
    return visible.float(), present.float()


def inputs(visible, seed=2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(visible)
    return {
        "values": 3 * torch.rand(batch, GENES, generator=generator) * visible,
        "visible": visible,
        "timestep": torch.randint(1, 51, (batch,), generator=generator),
        "features": torch.randn(batch, FEATURES, generator=generator),
    }


VARIANTS = [
    ({}, {"head": "rounded_gaussian", "transform": "log2p1"}),
    ({"num_prior_factors": 3}, {"head": "rounded_gaussian", "transform": "log2p1"}),
    ({"technical_tokens": True, "masked_input": "value_plus_zero_token"}, {"head": "gaussian", "gene_factors": False}),
    ({}, {"head": "rounded_mixture", "transform": "log2p1", "injection": "concatenation"}),
    ({}, {"head": "point", "injection": "cross_attention"}),
]


@pytest.mark.parametrize("backbone, options", VARIANTS)
@pytest.mark.parametrize("ragged", [True, False])
@torch.no_grad()
def test_absent_tokens_equal_hidden_ones(backbone, options, ragged):
    """What is computed of some genes only is what training sees, where the others are there but hidden."""
    model = make(backbone, **options)
    visible, present = masks(ragged=ragged)
    given = inputs(visible)
    hidden = model(**given, gene_ids=IDS, present=present)
    subset = GeneSubset.of(present)
    assert subset.index.shape[1] == int(present.sum(1).max()) < GENES and (subset.present is not None) == ragged
    features = model.standardise(given.pop("features"))
    h = model.tokens(**given, features=features, gene_ids=IDS, subset=subset)
    assert h.shape[1] == model.backbone.num_prefix_tokens + subset.index.shape[1]
    output, _ = model.read_out(h, given["values"], visible, features, IDS, subset=subset)
    there = present > 0
    torch.testing.assert_close(output.mean[there], hidden.mean[there], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.stddev[there], hidden.stddev[there], atol=2e-5, rtol=1e-5)
    # and another thing than a pass that sees them all
    assert (model(**given, features=features, gene_ids=IDS).mean - hidden.mean).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("backbone", [{}, {"num_prior_factors": 3}])
def test_a_new_model_equals_its_backbone_on_any_subset(backbone):
    model = make(backbone, moved=False, head="gaussian", gate="linear")
    visible, present = masks(ragged=False)
    given = inputs(visible)
    predicted = model(**given, gene_ids=IDS, present=present).location
    for row in range(len(visible)):
        chosen = present[row].nonzero().squeeze(1)
        alone = model.backbone.predict(
            given["values"][row : row + 1, chosen], visible[row : row + 1, chosen], IDS[chosen]
        )
        torch.testing.assert_close(predicted[row : row + 1, chosen], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone, options", VARIANTS)
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_last_layer_computes_what_is_asked_for(backbone, options, ragged, everything, dtype):
    """Genes that a step reveals are predicted as if those that were visible before were computed to the end too."""
    model = make(backbone, **options)
    model.backbone.to(dtype)
    visible, present = masks(ragged=ragged)
    present = torch.ones_like(present) if everything else present
    given = inputs(visible)
    features = model.standardise(given.pop("features"))
    means = []
    for subset in (GeneSubset.of(present), GeneSubset.of(present, known=visible)):
        h = model.tokens(**given, features=features, gene_ids=IDS, subset=subset)
        means.append(model.read_out(h, given["values"], visible, features, IDS, subset=subset)[0].mean)
    asked = (present > 0) & (visible == 0)
    assert h.shape[1] == model.backbone.num_prefix_tokens + int(asked.sum(1).max())
    error = (means[1][asked] - means[0][asked]).norm() / means[0][asked].norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_all_present_is_no_subset():
    assert GeneSubset.of(torch.ones(3, GENES)) is None
    none = GeneSubset.of(torch.zeros(3, GENES))
    assert none.index.shape == (3, 1) and not none.present.any()
    ragged = GeneSubset.of(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert ragged.index is None and ragged.present.tolist() == [[1, 1], [0, 1]]


def test_hidden_tokens_get_no_gradient_through_others_in_fused_layers():
    """The fused layers' own gradients under a key mask in the second half, against the plain layers'."""
    visible, present = masks()
    gradients = {}
    for fused in (True, False):
        model = make(head="point", gene_factors=False).train()
        model.modulation.fused = fused
        model(**inputs(visible), gene_ids=IDS, present=present).mean.square().mean().backward()
        gradients[fused] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("with_observed", [False, True])
def test_sampling_uses_what_it_needs(with_observed, monkeypatch):
    counted: dict[bool, list[int]] = {}
    draws = {}
    features = np.random.default_rng(0).standard_normal((5, FEATURES)).astype(np.float32)
    observed = None
    if with_observed:
        observed = np.where(np.random.default_rng(1).random((5, GENES)) < 0.3, 1.0, np.nan).astype(np.float32)
    for drop in (True, False):
        model = make(head="gaussian", transform="log2p1", library_size=True, drop_masked=drop)
        scheduler = MaskedDiffusionScheduler(schedule="linear")
        tokens, lengths = model.tokens, counted.setdefault(drop, [])

        def count(*arguments, tokens=tokens, lengths=lengths, **named):
            h = tokens(*arguments, **named)
            lengths.append(h.shape[1] - 1)
            return h

        monkeypatch.setattr(model, "tokens", count)
        settings = {"num_draws": 4, "num_inference_steps": 6, "observed": observed}
        spots = [f"s{i}" for i in range(5)]
        drawn = draw_features(model, scheduler, features, IDS, spots, batch_size=20, **settings)
        passes = len(lengths)
        # batches of another size, whose rows need other numbers of tokens
        again = draw_features(model, scheduler, features, IDS, spots, batch_size=3, **settings)
        np.testing.assert_allclose(drawn.values, again.values, atol=1e-4)
        if observed is not None:
            measured = ~np.isnan(observed)
            assert (drawn.values[:, measured] == observed[measured]).all()
        draws[drop] = drawn
        del lengths[passes:]
    # the first pass is the same: the expectation is of all genes
    np.testing.assert_allclose(draws[True].expected, draws[False].expected, atol=1e-5)
    assert set(counted[False]) == {GENES} and len(counted[True]) == len(counted[False])
    # the first pass, then one for each step, of which the last sees all genes
    assert counted[True][0] == GENES == counted[True][-1]
    later = counted[True][1:]
    assert later == sorted(later) and np.mean(later) < (0.9 if with_observed else 0.75) * GENES


def test_tokens_stay_where_only_they_know_the_genes():
    for path in (True, False):
        assert make(gene_factors=path).drops_masked is path
        assert make(gene_factors=path, drop_masked=not path).drops_masked is not path
