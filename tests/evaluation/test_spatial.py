"""Moran's I against squidpy, and maps and spot structure against what they should see."""

import numpy as np
import pytest
from anndata import AnnData
from scipy.ndimage import gaussian_filter

from hinge.evaluation.metrics.spatial import (
    lattice_pitch,
    moran_scores,
    morans_i,
    neighbour_weights,
    spot_structure,
    ssim_of_maps,
)
from hinge.utils.errors import DataError

SQUARE = np.stack(np.meshgrid(np.arange(12), np.arange(10), indexing="ij"), axis=-1).reshape(-1, 2) * 200.0
HEXAGONAL = SQUARE * [1, np.sqrt(3) / 2] + np.where(SQUARE[:, 1:] // 200 % 2, [[100.0, 0.0]], [[0.0, 0.0]])


def smooth(seed: int, n_genes: int = 6) -> np.ndarray:
    """Maps (120, G) of smooth fields on the lattice."""
    noise = np.random.default_rng(seed).normal(size=(12, 10, n_genes))
    return gaussian_filter(noise, (1.5, 1.5, 0)).reshape(120, n_genes) * 5


@pytest.mark.parametrize(("lattice", "inner"), [(SQUARE, 4), (HEXAGONAL, 6)])
def test_neighbours_are_those_of_the_lattice(lattice, inner):
    jittered = lattice + np.random.default_rng(0).uniform(-12, 12, lattice.shape)
    for coordinates in (lattice, jittered, lattice * 0.013):
        weights = neighbour_weights(coordinates)
        centre = np.argmin(np.abs(coordinates - coordinates.mean(axis=0)).sum(axis=1))
        assert weights[centre].nnz == inner
        np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert lattice_pitch(lattice) == pytest.approx(200)
    squidpy = pytest.importorskip("squidpy")
    slide = AnnData(np.zeros((120, 1)), obsm={"spatial": lattice})
    squidpy.gr.spatial_neighbors(slide, coord_type="grid", n_neighs=inner)
    assert ((slide.obsp["spatial_connectivities"] > 0) != (neighbour_weights(lattice) > 0)).nnz == 0


def test_morans_i_is_that_of_squidpy():
    squidpy = pytest.importorskip("squidpy")
    values = np.concatenate([smooth(0), np.random.default_rng(1).normal(size=(120, 3))], axis=1)
    slide = AnnData(values, obsm={"spatial": SQUARE})
    squidpy.gr.spatial_neighbors(slide, coord_type="grid", n_neighs=4)
    squidpy.gr.spatial_autocorr(slide, mode="moran", n_perms=None, two_tailed=False)
    expected = slide.uns["moranI"]["I"].loc[slide.var_names]
    np.testing.assert_allclose(morans_i(values, neighbour_weights(SQUARE)), expected, rtol=1e-6)


def test_morans_i_is_that_of_scanpy():
    from scanpy.metrics import morans_i as expected

    coordinates = np.concatenate([HEXAGONAL, [[9000.0, 9000.0]]])  # one spot without neighbours
    values = np.random.default_rng(0).normal(size=(121, 4)) + np.arange(121)[:, None] / 40
    weights = neighbour_weights(coordinates)
    np.testing.assert_allclose(morans_i(values, weights), expected(weights, np.ascontiguousarray(values.T)), rtol=1e-6)


def test_morans_i_is_the_formula_where_spots_are_alone():
    coordinates = np.concatenate([SQUARE, [[9000.0, 9000.0]]])
    values = np.random.default_rng(0).normal(size=(121, 2))
    weights = neighbour_weights(coordinates)
    assert weights[120].nnz == 0
    dense, centred = weights.toarray(), values - values.mean(axis=0)
    expected = [121 / dense.sum() * (z @ dense @ z) / (z @ z) for z in centred.T]
    np.testing.assert_allclose(morans_i(values, weights), expected)
    board = (SQUARE.sum(axis=1) // 200 % 2)[:, None]
    assert morans_i(board, neighbour_weights(SQUARE))[0] == pytest.approx(-1)


def test_rough_draws_are_seen():
    measured = smooth(0, 20)
    rng = np.random.default_rng(1)
    alike = np.stack([smooth(seed, 20) for seed in range(2, 7)])
    scores = moran_scores(measured, alike, SQUARE)
    assert scores["ratio"] == pytest.approx(1, abs=0.1)
    assert scores["measured"] == pytest.approx(morans_i(measured, neighbour_weights(SQUARE)).mean())
    rough = moran_scores(measured, alike + rng.normal(0, 2, alike.shape), SQUARE)
    assert rough["ratio"] < 0.6 and rough["draw"] == pytest.approx(rough["ratio"] * rough["measured"])
    same = moran_scores(measured, measured[None], SQUARE)
    assert same["ratio"] == pytest.approx(1) and same["r"] == pytest.approx(1)
    # the mean of independent rough maps is smoother than a single one: each draw counts by itself
    mean = moran_scores(measured, (measured + rng.normal(0, 2, alike.shape)).mean(axis=0)[None], SQUARE)
    assert mean["ratio"] > moran_scores(measured, measured + rng.normal(0, 2, alike.shape), SQUARE)["ratio"] + 0.2


def test_spot_structure_of_degenerate_slides():
    draws = np.random.default_rng(0).normal(size=(2, 30, 12))
    alone = np.zeros((30, 12))
    alone[4] = np.arange(12)  # less the mean over spots, one spot differs from all others, which are alike
    assert np.isfinite(spot_structure(alone, draws))
    assert spot_structure(draws[0], np.stack([np.full((30, 12), 2.5)] * 2)) == 0


def test_spot_structure_is_the_correlation_of_correlations():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(30, 12)) + 3 * rng.normal(size=12)
    draws = measured + rng.normal(0, 0.5, size=(3, 30, 12))
    upper = np.triu_indices(30, k=1)

    def structure(values):
        return np.corrcoef(values - values.mean(axis=0))[upper]

    expected = np.mean([np.corrcoef(structure(measured), structure(draw))[0, 1] for draw in draws])
    assert spot_structure(measured, draws) == pytest.approx(expected)
    assert spot_structure(measured, measured[None]) == pytest.approx(1)
    assert abs(spot_structure(measured, draws[:, ::-1])) < 0.2
    # genes that are abundant everywhere carry no information on which spots are similar
    other = rng.normal(size=(1, 30, 12)) + 30 * np.arange(12)
    assert abs(spot_structure(measured + 30 * np.arange(12), other)) < 0.2


@pytest.mark.parametrize("lattice", [SQUARE, HEXAGONAL])
def test_maps_are_compared(lattice):
    measured, rng = smooth(0), np.random.default_rng(1)
    assert ssim_of_maps(measured, measured, lattice) == pytest.approx(1)
    steps = [ssim_of_maps(measured, measured + rng.normal(0, sd, measured.shape), lattice) for sd in (0.2, 1, 4)]
    assert 1 > steps[0] > steps[1] > steps[2]
    flat = np.broadcast_to(measured.mean(axis=0), measured.shape)
    assert ssim_of_maps(measured, flat, lattice) < 0.3
    several = np.stack([measured, flat])
    assert ssim_of_maps(measured, several, lattice) == pytest.approx((1 + ssim_of_maps(measured, flat, lattice)) / 2)


def test_a_square_slide_is_compared_as_the_picture_it_is():
    from skimage.metrics import structural_similarity

    lattice = np.stack(np.meshgrid(np.arange(10), np.arange(10), indexing="ij"), axis=-1).reshape(-1, 2) * 1.0
    rng = np.random.default_rng(0)
    measured, predicted = rng.normal(size=(2, 100, 1))
    shown = [np.kron(values.reshape(10, 10), np.ones((2, 2))) for values in (measured, predicted)]
    expected = structural_similarity(*shown, data_range=np.ptp(measured))
    # pixels at half way between spots may go to either of them
    assert ssim_of_maps(measured, predicted, lattice) == pytest.approx(expected, abs=0.15)


def test_edges():
    measured = smooth(0)
    draws = np.stack([measured] * 2)
    constant = np.zeros_like(measured)
    assert np.isnan(morans_i(constant, neighbour_weights(SQUARE))).all()
    assert all(np.isnan(value) for value in moran_scores(constant, draws, SQUARE).values())
    assert moran_scores(measured, np.zeros_like(draws), SQUARE)["ratio"] == 0
    assert np.isnan(ssim_of_maps(constant, draws, SQUARE))
    assert np.isnan(spot_structure(constant, draws))
    assert spot_structure(measured, np.zeros_like(draws)) == 0
    for n in (1, 2):
        assert np.isnan(ssim_of_maps(measured[:n], draws[:, :n], SQUARE[:n]))
        assert np.isnan(spot_structure(measured[:n], draws[:, :n]))
    assert np.isnan(moran_scores(measured[:1], draws[:, :1], SQUARE[:1])["ratio"])
    assert np.isnan(spot_structure(measured[:, :1], draws[:, :, :1]))
    assert np.isfinite(moran_scores(measured[:, :1], draws[:1, :, :1], SQUARE)["ratio"])
    with pytest.raises(DataError, match=r"must be of shape \(120, 2\)"):
        moran_scores(measured, draws, SQUARE[1:])
    with pytest.raises(DataError, match="at the place of another"):
        neighbour_weights(np.zeros((5, 2)))
    for score in (spot_structure, lambda y, x: moran_scores(y, x, SQUARE), lambda y, x: ssim_of_maps(y, x, SQUARE)):
        with pytest.raises(DataError, match="120 spots, 6 genes"):
            score(measured, draws[:0])
