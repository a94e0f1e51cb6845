"""The regression on all spots of a store is that in memory, and does not depend on the spots in memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.stores import write_store
from helpers.training import FEATURES, GENES, SETTINGS, make_model, table

from hinge.data.gene_parts import gene_parts
from hinge.data.spot_store import SpotStore
from hinge.data.transforms import get_transform
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.evaluation import ridge
from hinge.evaluation.ridge import fit_ridge_of_parts
from hinge.training import TrainingConfig, stored_regression, train_hinge
from hinge.training.initialisation import initialise_library_size
from hinge.training.stored_regression import StoredRegression


def store_of(folder, slides=6, n=300, lacking=True):
    """Write slides, of which one alone has a gene and two lack two others; return the store and its spots."""
    spots, rng = table(n, slides=slides), np.random.default_rng(1)
    sizes = rng.integers(80, 120, n).astype(np.float32)
    there = {}
    if lacking:
        every = np.arange(GENES)
        there = {f"s{number}": every != 5 for number in range(1, slides)}
        there |= {f"s{number}": (every != 5) & (every > 1) for number in (2, 3)}
    counts = spots.counts.copy()
    for name, genes in there.items():
        counts[np.ix_(spots.slide == name, ~genes)] = 0
    values = get_transform(spots.transform).forward(counts, sizes)
    return write_store(folder, replace(spots, counts=counts, library_size=sizes, values=values, measured=there))


@pytest.mark.parametrize(("slides", "lacking"), [(1, False), (6, False), (6, True)])
def test_sums_give_the_regression_in_memory(tmp_path, monkeypatch, slides, lacking):
    monkeypatch.setattr(stored_regression, "_READ_SPOTS", 13)
    monkeypatch.setattr(ridge, "PENALTIES", np.array([1.0, 10.0, 100.0]))  # fewer take less time
    store, spots = store_of(tmp_path / "store", slides, lacking=lacking)
    left_out = np.arange(4, len(spots), 9)
    numbers = np.setdiff1d(np.arange(len(spots)), left_out)
    training = spots.subset(numbers)
    model = make_model(library_size=True)
    model.set_feature_statistics(torch.from_numpy(training.features[:, 0]))
    shift = initialise_library_size(model, training)
    relative = torch.from_numpy(training.library_size) * (-shift).exp()
    x = model.with_library_size(model.standardise(torch.from_numpy(training.features[:, 0])), relative)
    x, offset = x.numpy().astype(np.float64), np.linspace(0, 1, GENES)
    with torch.no_grad():  # what the library size changes is no part of the regression
        change = model.library_size_model.change(torch.from_numpy(training.library_size)).numpy()
    wanted = fit_ridge_of_parts(x, training.values - offset - change, gene_parts(training))
    found = StoredRegression(store, left_out, numbers).fit(model, x, offset, shift)
    assert found.penalty == wanted.penalty
    for name in ("weight", "bias", "held_out"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.full
def test_the_regression_is_of_all_spots_however_few_are_in_memory(tmp_path):
    store, _ = store_of(tmp_path / "store", slides=12, n=900)

    def weight(part):
        model = make_model(num_factors=2)
        config = TrainingConfig(**{**SETTINGS, "steps": 2, "validation_share": 0.0, "spots_in_memory": part})
        ids = torch.arange(1, GENES + 1)
        train_hinge(model, MaskedDiffusionScheduler(10, "linear"), ids, store, config, tmp_path / str(part), seed=3)
        return model.gene_factor_model.mean.weight.detach()

    # whether it is the regression in memory is tested above
    torch.testing.assert_close(weight(400), weight(450), rtol=0, atol=1e-4)


def test_folds_keep_slides_together(tmp_path):
    store, _ = store_of(tmp_path / "store")
    assert isinstance(store, SpotStore) and store.feature_dim == FEATURES
    rows, folds = StoredRegression(store, np.array([0, 7]), np.array([1]))._folds(np.arange(6) < 5)
    assert not np.isin([0, 7], rows).any() and len(rows) == store.offsets[5] - 2
    assert all(len(np.unique(folds[store.slide_of(rows) == slide])) == 1 for slide in range(5))
    assert len(np.unique(folds)) == 5
