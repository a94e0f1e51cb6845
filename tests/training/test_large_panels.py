"""Panels of thousands of genes are initialised without a matrix of all pairs of genes."""

import tracemalloc

import numpy as np
import pytest
import torch

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.slide_levels import SlideLevels
from hinge.data.spots import SpotTable
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.models.subset import MOST_NUMBERS, spots_at_a_time
from hinge.training.initialisation import initialise_gene_factors
from hinge.training.slide_prior import fit_slide_prior

SPOTS, FEATURES = 24, 5


def peak_of(genes: int) -> int:
    """Return the peak of memory in bytes, of what numpy allocates, in the initialisation of a panel."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1.0, 2.0, genes), (SPOTS, genes)).astype(np.float32)
    slides = np.array([f"s{number % 2}" for number in range(SPOTS)])
    spots = SpotTable(
        slide=slides,
        barcodes=np.array([f"b{number}" for number in range(SPOTS)]),
        coords=np.stack([np.arange(SPOTS) // 2 % 4, np.arange(SPOTS) // 8], axis=1) * 100.0,
        features=rng.normal(size=(SPOTS, 1, FEATURES)).astype(np.float32),
        counts=counts,
        library_size=counts.sum(axis=1),
        values=np.log2(counts + 1),
        genes=[f"G{number}" for number in range(genes)],
        transform="log2p1",
    )
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 4}
    backbone = CellFMModel(CellFMConfig(num_genes=genes, num_prior_factors=3, num_spot_factors=3, **size))
    backbone.set_expression_prior(np.ones(genes), 0.3 * rng.normal(size=(genes, 3)), np.full(genes, 0.5))
    model = HingeModel.from_backbone(backbone, FEATURES, genes, num_factors=2, transform="log2p1")
    model.set_feature_statistics(torch.from_numpy(spots.features[:, 0]))
    levels = SlideLevels.of_spots(counts, spots.library_size, slides, slides, "log2p1")
    tracemalloc.start()
    initialise_gene_factors(model, MaskedDiffusionScheduler(4, "linear"), torch.arange(1, genes + 1), spots, seed=0)
    fit_slide_prior(model.add_slide_prior(["s0", "s1"]), levels, np.ones(2, bool), "log2p1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.full
def test_memory_grows_with_the_number_of_genes_and_not_with_its_square():
    few, many = peak_of(2000), peak_of(4000)
    assert many < 2.6 * few
    assert many < 0.8 * 4000**2 * 8  # bytes of one matrix of all pairs


def test_the_tokens_of_a_forward_pass_are_bounded():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert spots_at_a_time(256, 200, 64, cpu) == spots_at_a_time(256, 200, 64, gpu) == 256
    for device, most in ((cpu, MOST_NUMBERS["cpu"]), (gpu, MOST_NUMBERS["other"])):
        spots = spots_at_a_time(256, 18000, 64, device)
        assert spots * 18000 * 64 <= most < (spots + 1) * 18000 * 64
        assert spots_at_a_time(8, 10**6, 4096, device) == 1
