"""The randomness of draws: repeatable, standard normal, smooth with the range asked for."""

import numpy as np

from hinge.diffusion.randomness import SlideNoise, Stream, random_generator, spot_normals, spot_uniforms

RECORDED = [
    0.4990018018889809,
    0.4786407501683658,
    0.12762021683998193,
    0.4029722194815576,
    0.501816597649498,
    0.7325068241871152,
]


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


def test_uniform_numbers_depend_on_every_argument():
    base = spot_uniforms(0, "a", 0, 8)
    assert base.shape == (3, 8) and (base > 0).all() and (base < 1).all()
    assert np.array_equal(base, spot_uniforms(0, "a", 0, 8))
    for other in (spot_uniforms(1, "a", 0, 8), spot_uniforms(0, "b", 0, 8), spot_uniforms(0, "a", 1, 8)):
        assert not np.array_equal(base, other)


def test_the_streams_are_those_of_earlier_versions():
    """Draws can be repeated with another version: the first numbers of each stream, as they always were."""
    numbers = [random_generator(stream, 3, "s/b", 2).random() for stream in Stream]
    np.testing.assert_allclose(numbers, RECORDED, rtol=1e-12)
    assert random_generator(Stream.SLIDE, 3, "s/b", 2, remasking=1).random() != numbers[2]
