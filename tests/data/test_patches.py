"""Patches: the right squares, all of them, in bounded memory, and their eight views."""

import threading
import time

import numpy as np
import pytest

from hinge.data import SlideImage, read_slide
from hinge.data.patches import PatchReader, dihedral_views
from hinge.utils.errors import ConfigError, DataError


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_spot_once_and_centred(tiny_slide, batch_size):
    slide = read_slide(tiny_slide)
    reader = PatchReader(slide, patch_um=50.0, patch_px=20, batch_size=batch_size)
    batches = list(reader)
    assert len(batches) == len(reader) and all(len(i) == len(p) <= batch_size for i, p in batches)
    assert sorted(np.concatenate([i for i, _ in batches])) == list(range(slide.n_obs))
    with SlideImage(slide.uns["hinge"]["image_path"]) as image:
        for indices, patches in batches:
            assert patches.dtype == np.uint8 and patches.shape[1:] == (20, 20, 3)
            for index, patch in zip(indices, patches, strict=True):
                np.testing.assert_array_equal(patch, image.read_region(slide.obsm["spatial"][index], 50.0, 20, 2.5))


def test_a_patch_over_the_edge_is_white_there(tiny_slide):
    slide = read_slide(tiny_slide)[:1].copy()  # 30 px from the left and upper edge, patch 100 px wide
    [(indices, patches)] = PatchReader(slide, patch_um=250.0, patch_px=100)
    assert list(indices) == [0]
    assert (patches[0, :19] == 255).all() and (patches[0, :, :19] == 255).all()
    assert (patches[0, 21:, 21:] < 255).any(axis=-1).all()


def test_neighbours_come_together(write_slide):
    slide = read_slide(write_slide(rows=8, columns=8))
    shuffled = slide[np.random.default_rng(0).permutation(64)].copy()
    order = np.concatenate([i for i, _ in PatchReader(shuffled, 100.0, 8, batch_size=8)])
    path = shuffled.obsm["spatial"][order]
    assert (np.diff(path[:, 1]) >= 0).all()  # row by row
    assert np.abs(np.diff(path, axis=0)).sum() < np.abs(np.diff(shuffled.obsm["spatial"], axis=0)).sum() / 2


def test_reading_runs_ahead_only_so_far(write_slide, monkeypatch):
    slide = read_slide(write_slide(rows=10, columns=10))
    started, lock = [], threading.Lock()
    read = PatchReader._read

    def counted(self, image, indices):
        with lock:
            started.append(len(indices))
        return read(self, image, indices)

    monkeypatch.setattr(PatchReader, "_read", counted)
    batches = iter(PatchReader(slide, 20.0, 4, batch_size=5, workers=3))
    for done in range(1, 6):
        next(batches)
        time.sleep(0.05)
        assert done < len(started) <= done + 3
    batches.close()
    time.sleep(0.05)
    assert len(started) <= 5 + 3


def test_a_damaged_image_is_named(tiny_slide):
    slide = read_slide(tiny_slide)
    path = tiny_slide.with_suffix(".png")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"tiny\.png is damaged"):
        list(PatchReader(slide, 50.0, 20))


def test_a_slide_without_image(tiny_slide):
    slide = read_slide(tiny_slide)
    del slide.uns["hinge"]["image_path"]
    with pytest.raises(DataError, match="slide tiny has no image"):
        PatchReader(slide, 50.0, 20)
    slide = read_slide(tiny_slide)
    slide.uns["hinge"]["um_per_px"] = float("nan")
    with pytest.raises(DataError, match="slide tiny has nan µm per pixel"):
        PatchReader(slide, 50.0, 20)


@pytest.mark.parametrize(
    "sizes", [{"patch_um": 0}, {"patch_um": np.inf}, {"patch_px": 0}, {"batch_size": 0}, {"workers": 0}]
)
def test_sizes_must_be_positive(tiny_slide, sizes):
    with pytest.raises(ConfigError, match="above 0"):
        PatchReader(read_slide(tiny_slide), **{"patch_um": 50.0, "patch_px": 20, **sizes})


def test_views_are_the_symmetries_of_the_square():
    batch = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    views = list(dihedral_views(batch, 8))
    np.testing.assert_array_equal(views[0], batch)
    assert len({view.tobytes() for view in views}) == 8
    # closed: the views of a view are the same eight
    for view in views:
        assert {again.tobytes() for again in dihedral_views(view, 8)} == {v.tobytes() for v in views}
    np.testing.assert_array_equal(views[1][0, :, 0], batch[0, 0, ::-1])  # counter-clockwise
    np.testing.assert_array_equal(views[4], batch[:, :, ::-1])
    assert [view.tobytes() for view in dihedral_views(batch, 1)] == [batch.tobytes()]
    with pytest.raises(ConfigError, match="1 or 8 views, not 4"):
        list(dihedral_views(batch, 4))
