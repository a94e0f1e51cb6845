import h5py
import numpy as np
import pytest

from hinge.data import Panel, concatenate_spots, get_transform, load_spots, read_slide
from hinge.data.spots import spot_groups
from hinge.utils.errors import ConfigError, DataError

PANEL = Panel.from_list(["GENE20", "GENE3", "GENE11"])


def blank_spots(slide):
    """Spot 2 has nothing in the panel, spot 5 nothing at all."""
    counts = slide.X.toarray()
    counts[2, [3, 11, 20]] = 0
    counts[5] = 0
    slide.X = counts
    assert counts[2].sum() > 0


def write_features(slide, path, shift=0.0, views=2):
    """Features whose first number is the spot's place in the slide."""
    pytest.importorskip("hinge.data.features")
    with h5py.File(path, "w") as file:
        places = np.arange(slide.n_obs, dtype=np.float32)[:, None, None]
        file["features"] = np.broadcast_to(places, (slide.n_obs, views, 4))
        file["coords"] = slide.obsm["spatial"] + shift
        file["barcodes"] = list(slide.obs_names)
        file.attrs.update(encoder="colour", digest="d", patch_um=50.0, patch_px=20, hinge_version="0")
    return path


def test_arrays_belong_together(write_slide):
    slide = read_slide(write_slide(edit=blank_spots))
    table = load_spots(slide, PANEL, "log1p_cp10k")
    kept = [i for i in range(30) if i not in (2, 5)]
    assert len(table) == 28
    assert list(table.barcodes) == list(slide.obs_names[kept]) and set(table.slide) == {"tiny"}
    np.testing.assert_array_equal(table.counts, slide[kept, PANEL.genes].X.toarray())
    np.testing.assert_array_equal(table.library_size, slide.X.toarray().sum(axis=1)[kept])
    np.testing.assert_array_equal(table.coords, slide.obsm["spatial"][kept])
    expected = get_transform("log1p_cp10k").forward(table.counts, table.library_size)
    np.testing.assert_array_equal(table.values, expected)
    assert table.genes == PANEL.genes and table.transform == "log1p_cp10k" and table.features is None
    assert {table.counts.dtype, table.library_size.dtype, table.values.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_empty_spots_can_be_kept(write_slide, transform):
    slide = read_slide(write_slide(edit=blank_spots))
    table = load_spots(slide, PANEL, transform, drop_empty=False)
    assert len(table) == 30 and table.library_size[5] == 0
    assert (table.values[[2, 5]] == 0).all() and np.isfinite(table.values).all()


def test_no_spot_left(write_slide):
    def nothing(slide):
        slide.X = slide.X.toarray() * (np.arange(30) > 20)

    with pytest.raises(DataError, match=r"slide tiny has no spot with a count in the panel's 3 genes"):
        load_spots(read_slide(write_slide(edit=nothing)), PANEL, "log2p1")


def test_genes_that_the_slide_lacks(tiny_slide):
    slide = read_slide(tiny_slide)
    with pytest.raises(DataError, match=r"slide tiny lacks 1 of the panel's 2 genes: NONE$"):
        load_spots(slide, Panel.from_list(["GENE1", "NONE"]), "log2p1")
    with pytest.raises(DataError, match=r"lacks 9 of the panel's 9 genes: X0, X1, X2, X3, X4, \.\.\.$"):
        load_spots(slide, Panel.from_list([f"X{i}" for i in range(9)]), "log2p1")
    with pytest.raises(ConfigError, match="no transform 'log'"):
        load_spots(slide, PANEL, "log")


def test_subset_takes_masks_positions_and_slices(tiny_slide):
    table = load_spots(read_slide(tiny_slide), PANEL, "log2p1", drop_empty=False)
    mask = table.library_size > np.median(table.library_size)
    for index in (mask, np.flatnonzero(mask), list(np.flatnonzero(mask))):
        part = table.subset(index)
        assert len(part) == mask.sum()
        np.testing.assert_array_equal(part.library_size, table.library_size[mask])
        np.testing.assert_array_equal(part.values, table.values[mask])
        assert part.genes == table.genes and part.features is None
    assert list(table.subset([4, 2]).barcodes) == list(table.barcodes[[4, 2]])
    assert len(table.subset(slice(3, 9))) == 6
    assert len(table.subset([])) == 0


def test_concatenation(write_slide):
    one, two = (
        load_spots(read_slide(write_slide(name=name, seed=seed)), PANEL, "log2p1")
        for seed, name in enumerate(["first", "second"])
    )
    both = concatenate_spots([one, two])
    assert len(both) == len(one) + len(two)
    assert list(both.slide) == ["first"] * len(one) + ["second"] * len(two)
    np.testing.assert_array_equal(both.subset(both.slide == "second").values, two.values)
    assert len(concatenate_spots([one])) == len(one)
    assert len(concatenate_spots([one, two.subset([])])) == len(one)

    with pytest.raises(DataError, match=r"spot 0x0 of slide first occurs more than once"):
        concatenate_spots([one, two, one])
    with pytest.raises(DataError, match="no slides were given"):
        concatenate_spots([])


def test_what_cannot_be_concatenated(write_slide):
    slides = [read_slide(write_slide(name=name)) for name in ("first", "second")]
    one = load_spots(slides[0], PANEL, "log2p1")
    other_panel = load_spots(slides[1], Panel.from_list(PANEL.genes[::-1]), "log2p1")
    with pytest.raises(DataError, match=r"spots of first and second cannot be .* on different panels"):
        concatenate_spots([one, other_panel])
    with pytest.raises(DataError, match="their values are log2p1 and log1p_cp10k"):
        concatenate_spots([one, load_spots(slides[1], PANEL, "log1p_cp10k")])


def test_features_follow_the_spots(write_slide, tmp_path):
    slide = read_slide(write_slide(edit=blank_spots))
    path = write_features(slide, tmp_path / "features.h5")
    table = load_spots(slide, PANEL, "log2p1", path)
    assert table.features.shape == (28, 2, 4) and table.features.dtype == np.float32
    np.testing.assert_array_equal(table.features[:, 0, 0], [i for i in range(30) if i not in (2, 5)])
    np.testing.assert_array_equal(table.subset([3]).features[:, 1, 2], [4])

    other = read_slide(write_slide(name="other", seed=1))
    second = load_spots(other, PANEL, "log2p1", write_features(other, tmp_path / "other.h5"))
    assert concatenate_spots([table, second]).features.shape == (len(table) + len(second), 2, 4)
    with pytest.raises(DataError, match="only one of them has features"):
        concatenate_spots([table, load_spots(other, PANEL, "log2p1")])
    one_view = load_spots(other, PANEL, "log2p1", write_features(other, tmp_path / "view.h5", views=1))
    with pytest.raises(DataError, match=r"features of 2 views x 4 and 1 views x 4"):
        concatenate_spots([table, one_view])


def test_features_of_another_slide_with_the_same_barcodes(tiny_slide, tmp_path):
    slide = read_slide(tiny_slide)
    path = write_features(slide, tmp_path / "features.h5", shift=40.0)
    with pytest.raises(DataError, match=r"features.h5 belong to another slide than tiny: in them, spot 0x0 is 40 px"):
        load_spots(slide, PANEL, "log2p1", path, drop_empty=False)


def test_features_of_trident_are_matched_by_place(tiny_slide, tmp_path):
    slide = read_slide(tiny_slide)
    corners = np.array([(x, y) for x in range(-10, 220, 80) for y in range(-10, 260, 80)])
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"], file["coords"] = corners.astype(np.float32), corners
        file["coords"].attrs["patch_size_level0"] = 80
    table = load_spots(slide, PANEL, "log2p1", tmp_path / "trident.h5", drop_empty=False)
    assert table.features.shape == (30, 1, 2)
    inside = table.coords - table.features[:, 0]
    assert (inside >= 0).all() and (inside <= 80).all()
    with h5py.File(tmp_path / "trident.h5", "a") as file:
        file["coords"][:] = corners + 1000
    with pytest.raises(DataError, match=r"trident\.h5 has no patch at pixel \(30, 30\): 30 of 30 spots lie outside"):
        load_spots(slide, PANEL, "log2p1", tmp_path / "trident.h5", drop_empty=False)


@pytest.mark.real
def test_real_spots(her2st):
    panel = Panel.from_list(["FN1", "CD74", "COL1A1"])
    tables = [load_spots(read_slide(her2st, name, require_image=False), panel, "log1p_cp10k") for name in ("D5", "C1")]
    both = concatenate_spots(tables)
    # D5 has a spot without a single count
    assert len(tables[0]) < 306 and (both.library_size > 0).all() and np.isfinite(both.values).all()


def test_groups_are_slides_or_bands_of_the_one_slide():
    slides = np.array(["a", "b", "a"])
    np.testing.assert_array_equal(spot_groups(slides, np.zeros((3, 2)), "fold"), slides)
    np.testing.assert_array_equal(spot_groups(slides, np.zeros((3, 2)), "slide"), slides)
    coords = np.random.default_rng(0).uniform(size=(103, 2)) * [100, 900]
    groups = spot_groups(np.full(103, "a"), coords, "fold").astype(int)
    assert sorted(np.bincount(groups)) == [20, 20, 21, 21, 21]
    assert (np.diff(groups[np.argsort(coords[:, 1])]) >= 0).all()
    assert len(np.unique(spot_groups(np.full(103, "a"), coords, "slide"))) == 1
    assert len(np.unique(spot_groups(np.full(103, "a"), coords, "spot"))) == 103


def test_tiles_are_squares_within_a_slide():
    coords = np.stack(np.divmod(np.arange(144), 12), axis=1) * 10.0
    slides = np.repeat(["a", "b"], 144)
    groups = spot_groups(slides, np.concatenate([coords, coords]), "tile")
    for name in np.unique(groups):
        members = groups == name
        assert len(np.unique(slides[members])) == 1
        assert np.ptp(np.concatenate([coords, coords])[members], axis=0).max() <= 40
    assert len(np.unique(groups)) == 2 * len(np.unique(groups[:144])) >= 18
