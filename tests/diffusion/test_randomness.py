"""The randomness of draws: repeatable, standard normal, smooth with the range asked for."""

import numpy as np
import pytest
import torch

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.diffusion.randomness import SlideNoise, spot_normals
from hinge.models import HingeModel
from hinge.utils.errors import DataError

GENES, FEATURES = 12, 4


def test_fields_have_the_covariance_they_should():
    positions = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [8.0, 8.0]])
    fields = np.concatenate([SlideNoise(0, "s", draw, 40, 2.0).field(positions) for draw in range(200)], axis=1)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.testing.assert_allclose(np.cov(fields), np.exp(-distance / 2.0), atol=0.08)


def test_fields_are_those_of_seed_slide_and_draw():
    positions = np.random.default_rng(0).random((5, 2))
    first = SlideNoise(0, "s", 1, 3, 2.0)
    np.testing.assert_allclose(
        first.field(positions)[2:], SlideNoise(0, "s", 1, 3, 2.0).field(positions[2:]), rtol=1e-12, atol=1e-12
    )
    for other in (SlideNoise(1, "s", 1, 3, 2.0), SlideNoise(0, "t", 1, 3, 2.0), SlideNoise(0, "s", 2, 3, 2.0)):
        assert not np.allclose(first.field(positions), other.field(positions))
        assert not np.allclose(first.order, other.order)
    assert not np.allclose(spot_normals(0, "a", 0, 4), spot_normals(0, "b", 0, 4))


def pipeline(fill="mask_token", library_size=False):
    torch.manual_seed(0)
    backbone = CellFMModel(
        CellFMConfig(num_genes=GENES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8)
    )
    transform = "log1p_cp10k" if library_size else "log2p1"
    model = HingeModel.from_backbone(
        backbone,
        FEATURES,
        GENES,
        head="rounded_gaussian",
        transform=transform,
        library_size=library_size,
        num_factors=3,
    ).eval()
    with torch.no_grad():
        model.gene_factor_model.mean.weight.normal_()
        model.gene_factor_model.readout.copy_(model.gene_factor_model.loadings)
        model.gene_factor_model.loadings.normal_()
        model.gene_factor_model.slide_loadings.normal_()
        model.gene_factor_model.spatial_share.fill_(0.5)
        model.gene_factor_model.factor_spatial_share.fill_(0.8)
        model.value_head.gene_log_scale.fill_(0.0)
        if library_size:
            model.library_size_model.mean.bias.fill_(8.0)
    return HingePipeline(model, MaskedDiffusionScheduler(10, "linear", fill=fill))


def draw(pipe, rows=slice(None), **options):
    rng = np.random.default_rng(0)
    features, positions = rng.normal(size=(9, FEATURES)).astype(np.float32), rng.random((9, 2)) * 5
    names = np.array([f"s/b{i}" for i in range(9)])
    settings = {"num_draws": 3, "num_inference_steps": 4, "seed": 5, "slide": "s", "positions": positions[rows]}
    if "observed" in options:
        options["observed"] = options["observed"][rows]
    arguments = {**settings, **options, "progress": False}
    return pipe(features[rows], torch.arange(1, GENES + 1), list(names[rows]), **arguments)


@pytest.mark.parametrize("fill", ["mask_token", "noise"])
@pytest.mark.parametrize("library_size", [False, True])
@pytest.mark.parametrize("order", ["random", "dependence", "confidence"])
def test_slides_are_drawn_the_same_in_any_batch(fill, library_size, order):
    pipe = pipeline(fill, library_size)
    whole = draw(pipe, order=order, remasking=2)
    for batch in (1, 7, 64):
        again = draw(pipe, order=order, remasking=2, batch_size=batch)
        np.testing.assert_allclose(again.values, whole.values, atol=1e-4)
        np.testing.assert_allclose(again.expected, whole.expected, atol=1e-4)
    alone = draw(pipe, rows=slice(4, 5), order=order, remasking=2)
    np.testing.assert_allclose(alone.values[:, 0], whole.values[:, 4], atol=1e-4)
    assert whole.values.std(axis=0).max() > 0


def test_measured_genes_pass_through_to_the_bit_and_inform_the_rest():
    pipe = pipeline()
    observed = np.full((9, GENES), np.nan, dtype=np.float32)
    observed[:6, :5] = np.random.default_rng(1).random((6, 5)).astype(np.float32) * 4
    drawn = draw(pipe, observed=observed)
    known = ~np.isnan(observed)
    for values in drawn.values:
        np.testing.assert_array_equal(values[known], observed[known])
    np.testing.assert_allclose(drawn.expected[known], observed[known], atol=1e-6)
    free = draw(pipe)
    assert not np.allclose(drawn.values[:, :6, 5:], free.values[:, :6, 5:])
    # spots without a measurement learn the shift of their slide from the others, and nothing else
    assert not np.allclose(drawn.values[:, 6:], free.values[:, 6:])
    rank = pipe.model.gene_factor_model.slide_loadings.shape[1]
    untold = draw(pipe, observed=observed, slide_effect=(np.zeros(rank), np.eye(rank)))
    np.testing.assert_allclose(untold.values[:, 6:], free.values[:, 6:], atol=1e-4)
    everything = draw(pipe, observed=np.ones((9, GENES), dtype=np.float32))
    assert (everything.values == 1).all()


def test_observed_values_of_another_shape_are_refused():
    with pytest.raises(DataError, match="observed values must be"):
        draw(pipeline(), observed=np.zeros((9, GENES + 1), dtype=np.float32))
    with pytest.raises(ValueError, match="order must be"):
        draw(pipeline(), order="alphabetical")
    with pytest.raises(ValueError, match="come together"):
        draw(pipeline(), slide=None)
