"""The classifier two-sample test."""

import contextlib
import os
import shutil

import numpy as np
import pytest
import threadpoolctl

from hinge.data.transforms import get_transform
from hinge.evaluation.metrics import two_sample
from hinge.evaluation.metrics.two_sample import round_to_counts, two_sample_auc
from hinge.utils.errors import DataError


@pytest.fixture(scope="module")
def spots():
    """Features (150, 3), and 4 samples (150, 6) of values whose mean follows the features."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(150, 3))
    values = features @ rng.normal(size=(3, 6)) * 2 + rng.normal(size=(4, 150, 6))
    return features, values


def test_draws_of_the_right_distribution_cannot_be_distinguished(spots):
    features, values = spots
    assert two_sample_auc(values[0], values[1:], n_draws=3) == pytest.approx(0.5, abs=0.06)
    assert two_sample_auc(values[0], values[1:], features, n_draws=3) == pytest.approx(0.5, abs=0.06)


def test_wrong_draws_are_told(spots):
    _, values = spots
    assert two_sample_auc(values[0], values[1:] + 3) > 0.8
    assert two_sample_auc(values[0], np.tile(values.mean(axis=(0, 1)), (1, 150, 1))) > 0.95


@pytest.mark.full
def test_right_draws_at_the_wrong_spots_are_detected_with_features_only(spots):
    features, values = spots
    moved = values[1:, np.random.default_rng(1).permutation(150)]
    assert two_sample_auc(values[0], moved) < 0.6
    assert two_sample_auc(values[0], moved, features) > 0.75
    wide = features @ np.random.default_rng(2).normal(size=(3, 200))
    assert two_sample_auc(values[0], moved, wide) > 0.7


def test_a_spot_is_never_on_both_sides(spots):
    # draws that repeat the measured values: with one version in training, the other could only be guessed wrong
    _, values = spots
    assert two_sample_auc(values[0], values[:1]) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.full
def test_the_same_seed_gives_the_same_answer(spots):
    features, values = spots
    one, same, other = (two_sample_auc(values[0], values[1:], features, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_rounded_draws_are_whole_counts(transform):
    rng = np.random.default_rng(0)
    functions = get_transform(transform)
    counts, library_size = rng.poisson(3, size=(150, 4)), rng.integers(200, 400, size=150)
    measured = functions.forward(counts, library_size)
    noisy = measured + rng.normal(0, 0.02, size=(2, 150, 4))
    if transform == "log2p1":  # every spot has the same few values; under the other each has its own
        assert two_sample_auc(measured, noisy) > 0.9
    rounded = round_to_counts(noisy, library_size, transform)
    np.testing.assert_allclose(
        functions.inverse(rounded, library_size), np.rint(functions.inverse(rounded, library_size)), atol=1e-3
    )
    assert (rounded >= 0).all() and np.abs(rounded - measured).mean() < 0.05
    assert two_sample_auc(measured, rounded) < 0.6


@pytest.mark.full
def test_large_slides_are_tested_on_a_subset(spots, monkeypatch):
    features, values = spots
    monkeypatch.setattr(two_sample, "MOST_SPOTS", 100)
    one, same, other = (two_sample_auc(values[0], values[1:] + 3, features, seed=seed) for seed in (1, 1, 2))
    assert one == same != other and one > 0.8
    # one draw is enough: the second is not looked at
    assert one == two_sample_auc(values[0], values[1:2] + 3, features, seed=1)


def test_edges(spots):
    features, values = spots
    assert np.isnan(two_sample_auc(values[0, :9], values[1:, :9]))
    assert np.isfinite(two_sample_auc(values[0, :10], values[1:, :10], features[:10]))
    assert two_sample_auc(np.zeros((20, 2)), np.zeros((1, 20, 2))) == 0.5
    assert 0.3 < two_sample_auc(values[0, :, :1], values[1:2, :, :1]) < 0.7
    with pytest.raises(DataError, match="149 spots have features, but 150"):
        two_sample_auc(values[0], values, features[1:])
    with pytest.raises(DataError, match="150 spots, 6 genes"):
        two_sample_auc(values[0], values[:0])


def threads() -> dict[str, int]:
    """Return the number of threads of each library for numbers that is loaded."""
    return {pool["filepath"]: pool["num_threads"] for pool in threadpoolctl.threadpool_info()}


@pytest.mark.parametrize("fails", [False, True])
def test_boosting_has_one_thread_and_the_process_has_its_own_again(monkeypatch, fails):
    """Also from Python, where no command has set anything; and the environment is not touched."""
    import sklearn.ensemble  # noqa: F401  # its library is loaded now and has its number of threads

    inside = []

    def noted(*arguments):
        inside.append(threads())
        if fails:
            raise DataError("no score")
        return 0.5

    monkeypatch.setattr(two_sample, "_auc", noted)
    values = np.random.default_rng(0).normal(size=(20, 3))
    with threadpoolctl.threadpool_limits(limits=2):
        before, environment = threads(), dict(os.environ)
        with pytest.raises(DataError) if fails else contextlib.nullcontext():
            two_sample_auc(values, values[None])
        assert threads() == before and dict(os.environ) == environment
    assert set(inside[0].values()) == {1} and max(before.values()) == 2


@pytest.mark.full
def test_an_evaluation_from_python_leaves_the_threads_of_the_process(copied_tiny_run):
    copied_tiny_run.evaluate()  # all libraries are loaded
    shutil.rmtree(copied_tiny_run.folder / "scores")
    with threadpoolctl.threadpool_limits(limits=2):
        before, environment = threads(), dict(os.environ)
        copied_tiny_run.evaluate()
        assert threads() == before and dict(os.environ) == environment
