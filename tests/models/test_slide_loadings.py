"""The posterior of the slide effect against the joint Gaussian distribution of all spots and genes."""

import numpy as np
import pytest
import torch

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.models import HingeModel
from hinge.models.slide_loadings import slide_effect_posterior

GENES, FEATURES, SPOTS = 6, 4, 5


def make(library_size=False) -> HingeModel:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 4}
    backbone = CellFMModel(CellFMConfig(num_genes=GENES, **size))
    options = {"num_factors": 2, "num_slide_factors": 3, "library_size": library_size}
    model = HingeModel.from_backbone(backbone, FEATURES, GENES, **options)
    with torch.no_grad():
        factors = model.gene_factor_model
        for tensor in (factors.mean.weight, factors.offset, factors.loadings, factors.log_noise):
            tensor.normal_()
        factors.slide_loadings.normal_()
        if library_size:
            model.library_size_model.mean.bias.fill_(7.0)
    return model.eval()


@pytest.mark.parametrize("missing", ["nothing", "genes", "spots"])
def test_posterior_is_that_of_the_joint_gaussian(missing):
    model, rng = make(), np.random.default_rng(0)
    features, observed = rng.normal(size=(SPOTS, FEATURES)), rng.normal(size=(SPOTS, GENES))
    if missing == "genes":
        observed[:, ::2] = np.nan
    elif missing == "spots":
        observed[1:3] = np.nan
    mean, root = slide_effect_posterior(model, features, observed)

    factors = model.gene_factor_model
    with torch.no_grad():
        expected = factors.offset + factors.mean(torch.tensor(features).float())
    loadings, noise, slide = (
        tensor.detach().double().numpy()
        for tensor in (factors.loadings, factors.log_noise.exp(), factors.slide_loadings)
    )
    # all values of the slide are one Gaussian vector: the slide effect is shared by all spots, factors within a spot
    known = ~np.isnan(observed).ravel()
    design = np.tile(slide, (SPOTS, 1))[known]
    within = np.kron(np.eye(SPOTS), loadings @ loadings.T + np.diag(noise))[np.ix_(known, known)]
    residual = (observed - expected.numpy()).ravel()[known]
    precision = np.eye(slide.shape[1]) + design.T @ np.linalg.solve(within, design)
    np.testing.assert_allclose(root @ root.T, np.linalg.inv(precision), atol=1e-6)
    np.testing.assert_allclose(
        mean, np.linalg.solve(precision, design.T @ np.linalg.solve(within, residual)), atol=1e-5
    )


def test_a_missing_library_size_counts_as_the_typical_one():
    model, rng = make(library_size=True), np.random.default_rng(0)
    features, observed = rng.normal(size=(SPOTS, FEATURES)).astype(np.float32), rng.normal(size=(SPOTS, GENES))
    typical = model.library_size_model.typical(model.standardise(torch.tensor(features))).detach().numpy()
    part = typical.copy()
    part[::2] = np.nan
    results = [slide_effect_posterior(model, features, observed, each)[0] for each in (None, part, typical)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_nothing_measured_has_no_posterior():
    model = make()
    assert slide_effect_posterior(model, np.zeros((SPOTS, FEATURES)), np.full((SPOTS, GENES), np.nan)) is None
