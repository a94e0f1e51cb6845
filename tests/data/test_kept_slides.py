"""Slides that fit the memory are read once."""

import numpy as np
import scipy.sparse
from anndata import AnnData

from hinge.data.kept_slides import KeptSlides, slide_bytes


def test_the_last_slides_that_fit_are_kept():
    asked = []

    def read(name):
        asked.append(name)
        slide = AnnData(scipy.sparse.csr_matrix(np.ones((4, 5), np.float32)))
        slide.uns["spatial"] = {name: {"images": {"hires": np.zeros((10, 10, 3), np.uint8)}}}
        return slide

    size = slide_bytes(read("a"))
    assert size == 4 * 20 + 4 * 20 + 4 * 5 + 300
    asked.clear()
    kept = KeptSlides(read, 2 * size)
    assert kept("a") is kept("a") and kept("b") is kept("b")
    kept("a")
    kept("c")  # in place of b, which was asked for before a
    kept("a")
    assert asked == ["a", "b", "c"]
    kept("b")
    assert asked == ["a", "b", "c", "b"]
    none_fits = KeptSlides(read, 1)
    assert none_fits("a") is none_fits("a")
