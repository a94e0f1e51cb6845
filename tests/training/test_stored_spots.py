"""Training from a store: the rows are those in memory, in an order that reads blocks, and so are the weights."""

import functools
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.stores import write_store
from helpers.training import FEATURES, GENES, SETTINGS, make_model, table

from hinge.data.spot_store import SpotStore
from hinge.data.transforms import get_transform
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.training import TrainingConfig, hinge, rows, train_hinge
from hinge.training.blocks import BlockOrder, BlockReader
from hinge.utils.errors import DataError, Interrupted

IDS = torch.arange(1, GENES + 1)
THERE = np.arange(GENES) > 1


def spots_of(n=360, slides=3, views=1):
    """Spots of slides of which one lacks two genes and another has five spots; values follow from counts."""
    spots = table(n, views=views, slides=slides)
    spots = spots.subset(np.flatnonzero((spots.slide != "s0") | (np.arange(n) < 5 * slides)))
    counts = np.where((spots.slide == "s1")[:, None] & ~THERE, 0, spots.counts).astype(np.float32)
    values = get_transform(spots.transform).forward(counts, spots.library_size)
    return replace(spots, counts=counts, values=values, measured={"s1": THERE})


def order_of(store, left_out=(), batch_size=16, seed=3, blocks=2):
    left_out = np.array(left_out, dtype=np.int64)
    return BlockOrder(store.offsets, left_out, store.num_views, batch_size, seed, blocks)


def fit(folder, spots, model=None, **options):
    model = model or make_model(num_factors=3, feature_dropout=0.2, dropout=0.1, head="rounded_gaussian")
    config = TrainingConfig(**{**SETTINGS, "steps": 30, **options})
    train_hinge(model, MaskedDiffusionScheduler(10, "linear"), IDS, spots, config, folder, seed=3)
    return model


def assert_same_weights(one, other):
    found, wanted = one.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def test_an_epoch_has_every_row_once_in_another_order_each_time(tmp_path):
    store, spots = write_store(tmp_path / "store", spots_of(views=2))
    left_out = [3, 4, 10, 11]
    order = order_of(store, left_out)
    steps = -(-len(order) // 16)
    wanted = np.setdiff1d(np.arange(2 * len(spots)), [2 * spot + view for spot in left_out for view in (0, 1)])
    assert len(order) == len(wanted)
    epochs = [np.concatenate([order.rows(epoch * steps + step) for step in range(steps)]) for epoch in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), wanted)
    assert not np.array_equal(epochs[0], epochs[1])
    assert len(order.rows(steps - 1)) == len(wanted) % 16
    fresh = order_of(store, left_out)  # starts in the middle of an epoch
    for step in (2 * steps + 3, 7, steps - 1):
        np.testing.assert_array_equal(fresh.rows(step), order.rows(step))
    # neighbours in an epoch are of several blocks, and few of all blocks are in use at a time
    blocks = epochs[0][: len(wanted) // 3] // 2 // 64
    assert len(np.unique(blocks)) <= 4 and (np.diff(blocks) != 0).mean() > 0.2


@pytest.mark.parametrize("views", [1, 2])
def test_a_reader_returns_the_rows_of_any_step(tmp_path, views):
    store, spots = write_store(tmp_path / "store", spots_of(views=views))
    order = order_of(store, [0, 7])
    with BlockReader(store, order) as reader:
        for step in [*range(40), 90, 3, 4]:
            found, number = reader.read(step), order.rows(step)
            spot, view = np.divmod(number, views)
            np.testing.assert_array_equal(found.features, spots.features[spot, view])
            np.testing.assert_array_equal(found.values, spots.values[spot])
            np.testing.assert_array_equal(found.library_size, spots.library_size[spot])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation_share": 0.0, "genes_per_step": 5},
        {"initialisation": False, "validation_groups": "slide"},
    ],
)
def test_the_same_order_gives_the_same_weights_as_in_memory(tmp_path, monkeypatch, options):
    store, spots = write_store(tmp_path / "store", spots_of(views=2))
    from_disk = fit(tmp_path / "disk", store, **options)
    config = TrainingConfig(**{**SETTINGS, **options})
    training, held = rows.split_spots(spots, config.validation_share, config.validation_groups, 3)
    order = BlockOrder(store.offsets, held, 2, config.batch_size, 3)

    def of_step(step):  # the rows of training in memory are those of its training spots alone
        spot, view = np.divmod(order.rows(step), 2)
        return 2 * np.searchsorted(training, spot) + view

    monkeypatch.setattr(hinge, "run_loop", functools.partial(hinge.run_loop))
    loop = hinge.run_loop
    monkeypatch.setattr(hinge, "run_loop", lambda *args, rows_of, **named: loop(*args, rows_of=of_step, **named))
    assert_same_weights(from_disk, fit(tmp_path / "memory", spots, **options))


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"validation_groups": "slide", "validation_share": 0.4}])
def test_a_part_of_the_spots_serves_initialisation_and_validation(tmp_path, options):
    options = {**options, "spots_in_memory": 120}
    store, spots = write_store(tmp_path / "store", spots_of())
    data = rows.TrainingRows(make_model(), store, TrainingConfig(**{**SETTINGS, **options}), seed=3)
    assert len(data.spots) == 5 + 2 * 57 and len(data.spots) == len(data.training) + len(data.held)
    trained = set(np.concatenate([data.stored.order.rows(step) for step in range(-(-len(data) // 16))]).tolist())
    held = set(data.numbers[data.held].tolist())
    if "validation_groups" in options:
        of_slides = set(spots.slide[list(held)])
        held = set(np.flatnonzero(np.isin(spots.slide, list(of_slides))).tolist())
    assert trained == set(range(len(spots))) - held and len(data) == len(trained)
    torch.testing.assert_close(data.model.feature_mean.numpy(), spots.features[:, 0].mean(axis=0), rtol=0, atol=1e-6)
    model = fit(tmp_path / "run", store, **options)
    whole = fit(tmp_path / "whole", spots, **options)
    # fitted to a third of the spots, the regression is close to that of all
    near, far = model.gene_factor_model.mean.weight, whole.gene_factor_model.mean.weight
    assert torch.corrcoef(torch.stack([near.flatten(), far.flatten()]))[0, 1] > 0.9


def test_slides_that_initialisation_does_not_see_have_a_shift(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    spots = table(480, slides=8)
    level = dict(zip(np.unique(spots.slide), rng.normal(size=8), strict=True))
    shifted = spots.values + np.array([level[name] for name in spots.slide], dtype=np.float32)[:, None]
    counts = np.round(2 ** np.maximum(shifted + 3, 0) - 1).astype(np.float32)
    values = get_transform(spots.transform).forward(counts, spots.library_size)
    store, spots = write_store(tmp_path / "store", replace(spots, counts=counts, values=values))
    monkeypatch.setattr(hinge, "run_loop", lambda *args, **named: None)
    seen = []
    monkeypatch.setattr(hinge, "_MaskedExpression", lambda data, *rest: seen.append(data) or pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        fit(tmp_path / "run", store, spots_in_memory=200)
    data = seen[0]
    with data.stored.reader:
        batches = [data.stored.batch(step) for step in range(-(-len(data) // 16))]
    order = np.concatenate([data.stored.order.rows(step) for step in range(len(batches))])
    shift = torch.cat([batch.slide_shift for batch in batches]).mean(dim=1).numpy()
    unseen = ~np.isin(spots.slide[order], data.spots.slide)
    assert unseen.any()
    of_level = np.array([level[name] for name in spots.slide[order]])
    assert np.corrcoef(shift[unseen], of_level[unseen])[0, 1] > 0.95
    assert np.corrcoef(shift, of_level)[0, 1] > 0.9


def test_stopped_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    store, _ = write_store(tmp_path / "store", spots_of(views=2))
    whole = fit(tmp_path / "whole", store, spots_in_memory=120)
    read, steps = BlockReader.read, []

    def interrupted(reader, step):
        steps.append(step)
        if step == 20:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return read(reader, step)

    monkeypatch.setattr(BlockReader, "read", interrupted)
    with pytest.raises(Interrupted):
        fit(tmp_path / "stopped", store, spots_in_memory=120)
    monkeypatch.setattr(BlockReader, "read", read)
    again = SpotStore(store.folder, store.names, store.genes, store.transform)
    assert_same_weights(fit(tmp_path / "stopped", again, spots_in_memory=120), whole)
    assert max(steps) == 20


def test_no_thread_is_left_when_a_store_is_damaged(tmp_path):
    store, _ = write_store(tmp_path / "store", spots_of())
    model = make_model(gene_factors=False)
    file = next(each for each in (store.folder / "s2" / "counts" / "c").rglob("*") if each.is_file())
    content = bytearray(file.read_bytes())
    read = store.some_spots(TrainingConfig().spots_in_memory, 3)  # before the damage
    assert len(read[0]) == len(store)
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"store/s2 is missing, damaged or was changed .* run hinge train again"):
        fit(tmp_path / "run", store, model=model)
    assert not [each.name for each in threading.enumerate() if each.name.startswith("reading of spots")]


def test_memory_holds_a_few_blocks(tmp_path):
    store, _ = write_store(tmp_path / "store", table(4000, slides=2))
    order = order_of(store, blocks=4)
    with BlockReader(store, order) as reader:
        for step in range(200):
            reader.read(step)
            loaded = [future.result() for future in reader._groups.values()]
            assert sum(len(each.spots) for each in loaded) <= 3 * 4 * 64 < len(store) / 5
    assert store.feature_dim == FEATURES
