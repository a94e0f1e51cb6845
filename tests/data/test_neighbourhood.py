"""Positions, neighbourhoods and slide statistics of features."""

import numpy as np

from hinge.data.neighbourhood import slide_features, spot_pitch, spot_positions


def lattice(side=6, pitch=287.0):
    y, x = (grid.ravel() for grid in np.mgrid[:side, :side])
    return np.stack([x, y], axis=1) * pitch + 1000.0


def test_positions_are_in_spot_pitches():
    positions = spot_positions(lattice())
    assert np.isclose(np.ptp(positions, axis=0), 5).all()
    assert spot_positions(np.array([[3.0, 4.0]])).tolist() == [[0, 0]]


def test_spots_at_one_place_have_no_pitch_and_are_at_zero():
    one = np.full((5, 2), 300.0)
    assert np.isnan(spot_pitch(one)) and not spot_positions(one).any()
    features = np.random.default_rng(0).normal(size=(5, 1, 3)).astype(np.float32)
    both = slide_features(features, one, neighbours=True, standardise=True)
    assert np.isfinite(both).all()
    # each place twice, as of two sections in one table: the pitch is that of the places
    twice = np.repeat(lattice(), 2, axis=0)
    assert spot_pitch(twice) == spot_pitch(lattice()) == 287.0


def test_the_neighbourhood_is_the_mean_of_a_spot_and_those_around_it():
    coords = lattice()
    features = np.random.default_rng(0).normal(size=(36, 2, 3)).astype(np.float32)
    both = slide_features(features, coords, neighbours=True, standardise=False)
    assert both.shape == (36, 2, 6)
    np.testing.assert_array_equal(both[:, :, :3], features)
    inside, corner = 7, 0  # row 1, column 1 has eight neighbours, the corner three
    np.testing.assert_allclose(both[inside, 0, 3:], features[[0, 1, 2, 6, 7, 8, 12, 13, 14], 0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(both[corner, 1, 3:], features[[0, 1, 6, 7], 0].mean(0), rtol=1e-5)


def test_slides_are_put_on_one_scale():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(36, 1, 3)).astype(np.float32)
    stained = features * np.array([3.0, 0.1, 1.0], dtype=np.float32) + np.array([5.0, -2.0, 0.0], dtype=np.float32)
    one, other = (slide_features(each, lattice(), True, True) for each in (features, stained))
    np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(one.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(one.std(axis=0), 1, atol=1e-4)


def test_a_constant_feature_and_a_single_spot_are_zero():
    features = np.full((36, 1, 2), 0.1, dtype=np.float32)
    assert not slide_features(features, lattice(), True, True).any()
    assert not slide_features(features[:1], lattice()[:1], True, True).any()
