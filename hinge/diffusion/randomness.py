"""The randomness of draws: a function of seed, slide, spot and draw alone, and smooth over a slide where wanted.

A spot's draw consumes one uniform number a gene for the order of revealing, one for the value and one for the fill.
If every spot had its own, maps of drawn genes would be rougher than tissue. Numbers for the values may therefore
share a part between neighbours: ε = √a·(random field) + √(1 − a)·(the spot's own), each a standard normal, so that
the distribution of every single spot stays what it was (a Gaussian copula between spots). The field is a random
Fourier expansion (Rahimi and Recht, NeurIPS 2007) of a Gaussian process with covariance exp(−distance/range), which
can be evaluated at any place without its neighbours: a single spot can be drawn again.
"""

import hashlib
from functools import cached_property

import numpy as np

NUM_FREQUENCIES = 128


def _generator(*parts: object) -> np.random.Generator:
    key = hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))


def _open_interval(uniform: np.ndarray) -> np.ndarray:
    # a quantile at 0 or 1 would be infinite
    return np.clip(uniform, 1e-12, 1 - 1e-12)


def spot_uniforms(seed: int | str, spot: str, draw: int, num_genes: int) -> np.ndarray:
    """The random numbers of one draw of one spot: order, value and fill, (3, G) in (0, 1), float64.

    They depend on nothing but the arguments, so a draw is the same in any batch, on any device count.
    """
    return _open_interval(_generator(seed, spot, draw).random((3, num_genes)))


class SlideNoise:
    """What the spots of one slide share in one draw.

    Parameters
    ----------
    seed, slide, draw
        Of these, and of nothing else, it is a function.
    num_columns
        C, independent fields.
    spatial_range
        Distance at which the fields' correlation has fallen to 1/e, in the unit of positions.

    Attributes
    ----------
    order
        (C,) uniform numbers: one order of revealing for all spots. With an order of its own for every spot, what is
        revealed first here is revealed last next door, and neighbours could not agree.
    normal
        (C,) standard normal numbers of the slide as a whole.
    """

    def __init__(self, seed: int | str, slide: str, draw: int, num_columns: int, spatial_range: float):
        generator = _generator("slide", seed, slide, draw)
        self.order = _open_interval(generator.random(num_columns))
        self.normal = generator.standard_normal(num_columns)
        self._generator, self._range = generator, spatial_range

    @cached_property
    def _waves(self) -> tuple[np.ndarray, np.ndarray]:
        """Frequencies (F, 2) and weights (2F, C), by far the most numbers of all: not before a field is asked for."""
        generator, shape = self._generator, (2 * NUM_FREQUENCIES, len(self.normal))
        # the spectrum of exp(−r/ℓ) in the plane is a Cauchy distribution of scale 1/ℓ
        frequencies = generator.standard_normal((NUM_FREQUENCIES, 2))
        frequencies = frequencies / (self._range * np.abs(generator.standard_normal((NUM_FREQUENCIES, 1))))
        return frequencies, generator.standard_normal(shape) / np.sqrt(NUM_FREQUENCIES)

    def field(self, positions: np.ndarray) -> np.ndarray:
        """The fields at positions (n, 2) → standard normal numbers (n, C)."""
        frequencies, weights = self._waves
        phase = np.asarray(positions, dtype=np.float64) @ frequencies.T
        return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) @ weights


def spot_normals(seed: int | str, spot: str, draw: int, count: int) -> np.ndarray:
    """Further standard normal numbers (count,) of one draw of one spot: for its library size and its factors."""
    return _generator("normal", seed, spot, draw).standard_normal(count)
