"""A store of the spots of many slides: what was written is read, all or in part, and damage is found."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers.stores import by_slide, write_store
from helpers.training import GENES, table

from hinge.data import spot_store
from hinge.data.slide_levels import SlideLevels
from hinge.data.spot_store import SpotStore, damaged_slides, digest_of_slide, write_slide
from hinge.data.transforms import get_transform
from hinge.training import split_spots
from hinge.utils.errors import DataError


def spots_of(n=300, slides=3, views=2, lacking=True):
    """Spots with values that follow from their counts, on slides of which one lacks two genes."""
    spots = table(n, views=views, slides=slides)
    there = np.arange(GENES) > 1
    counts = spots.counts.copy()
    if lacking:
        counts[spots.slide == "s1"] *= there
    values = get_transform(spots.transform).forward(counts, spots.library_size)
    barcodes = np.array([f"é{number}" for number in range(n)])
    measured = {"s1": there} if lacking else {}
    return replace(spots, counts=counts, values=values, barcodes=barcodes, measured=measured)


def assert_equal(one, other):
    for each in fields(one):
        a, b = getattr(one, each.name), getattr(other, each.name)
        if isinstance(a, np.ndarray):
            assert a.dtype.kind == b.dtype.kind
            np.testing.assert_array_equal(a, b, err_msg=each.name)
    assert list(one.measured) == list(other.measured)


def test_a_store_returns_the_spots_that_were_written(tmp_path):
    store, spots = write_store(tmp_path / "store", spots_of())
    assert len(store) == len(spots) and (store.num_views, store.feature_dim) == spots.features.shape[1:]
    for number, written in enumerate(by_slide(spots)):
        assert_equal(store.slide(number), written)
    features, values, sizes = store.read(100, 164)
    np.testing.assert_array_equal(features, spots.features[100:164])
    np.testing.assert_array_equal(values, spots.values[100:164])
    np.testing.assert_array_equal(sizes, spots.library_size[100:164])
    np.testing.assert_array_equal(store.of_slides, spots.measured_slides()[0])
    everything, numbers = store.some_spots(len(spots), seed=0)
    assert_equal(everything, spots)
    np.testing.assert_array_equal(numbers, np.arange(len(spots)))


@pytest.mark.parametrize("size", [1, 64, 65])
def test_slides_of_any_size_are_stored(tmp_path, size):
    store, spots = write_store(tmp_path / "store", spots_of(n=size, slides=1, lacking=False))
    assert_equal(store.slide(0), spots)
    assert store.of_slides is None


def test_statistics_of_a_store_are_those_of_its_spots(tmp_path):
    store, spots = write_store(tmp_path / "store", spots_of())
    mean, deviation = store.moments()
    flat = spots.features.astype(np.float64).reshape(-1, spots.features.shape[2])
    np.testing.assert_allclose(mean, flat.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(deviation, flat.std(axis=0), rtol=1e-12)
    known = (spots.known_counts(), spots.library_size, spots.slide, spots.slide, spots.transform)
    levels = SlideLevels.of_spots(*known)
    for each in fields(levels):
        np.testing.assert_array_equal(getattr(store.levels(), each.name), getattr(levels, each.name))


def test_a_part_of_a_store_has_neighbouring_spots_of_every_slide(tmp_path):
    store, spots = write_store(tmp_path / "store", spots_of(n=600))
    some, numbers = store.some_spots(150, seed=1)
    assert_equal(some, spots.subset(numbers))
    assert np.bincount(store.slide_of(numbers)).tolist() == [50, 50, 50]
    for name in store.names:
        own = some.coords[some.slide == name]
        nearest = np.sort(np.linalg.norm(own[:, None] - own[None], axis=2), axis=1)[:, 1]
        assert (nearest == 100).all()  # the pitch
    again, same = SpotStore(store.folder, store.names, store.genes, store.transform).some_spots(150, seed=1)
    np.testing.assert_array_equal(numbers, same)
    assert_equal(again, some)


def test_a_part_that_is_too_small_for_all_slides_is_of_some(tmp_path):
    store, _ = write_store(tmp_path / "store", spots_of(n=600, slides=6))
    _, numbers = store.some_spots(100, seed=1)
    chosen, counts = np.unique(store.slide_of(numbers), return_counts=True)
    assert chosen.tolist() == [0, 2, 5] and set(counts) == {33}


def test_a_part_has_a_slide_with_every_gene(tmp_path):
    spots = spots_of(n=600, slides=6, lacking=False)
    lacking = {f"s{number}": np.arange(GENES) > 0 for number in (0, 1, 2, 3, 5)}
    store, spots = write_store(tmp_path / "store", replace(spots, measured=lacking))
    _, numbers = store.some_spots(100, seed=1)
    assert np.unique(store.slide_of(numbers)).tolist() == [0, 2, 4, 5] and len(numbers) == 100
    held = split_spots(spots, 0.99, "slide", seed=3)[1]
    assert len(held) and "s4" not in spots.slide[held]


def test_a_slide_is_written_again_as_a_whole(tmp_path):
    store, spots = write_store(tmp_path / "store", spots_of())
    first = by_slide(spots)[0]
    write_slide(store.folder, first.subset(slice(0, 10)), made_from="others")
    assert [digest_of_slide(store.folder, name) for name in ("s0", "s1", "s9")] == ["others", "inputs", None]
    assert len(SpotStore(store.folder, store.names, store.genes, store.transform)) == len(spots) - 90


def test_features_beyond_half_precision_are_refused(tmp_path):
    first = by_slide(spots_of())[0]
    with pytest.raises(DataError, match=r"slide s0 has features above 65504.*training\.store: memory"):
        write_slide(tmp_path / "store", replace(first, features=first.features * 1e6), made_from="inputs")
    assert not (tmp_path / "store").exists()


def damage_all(path):
    """Yield the name of each file below a folder, after changing a byte, cutting it off or removing it."""
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0x10
        for changed in (bytes(flipped), content[: len(content) // 2], None):
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            yield file.relative_to(path).as_posix(), changed
            file.write_bytes(content)


def test_damage_is_found_and_never_read(tmp_path):
    store, spots = write_store(tmp_path / "store", spots_of(n=150))
    written = by_slide(spots)
    found = 0
    for name, changed in damage_all(store.folder / "s1"):
        try:
            opened = SpotStore(store.folder, store.names, store.genes, store.transform)
            assert_equal(opened.slide(1), written[1])
        except DataError as error:
            assert "s1" in str(error) and "run hinge train again" in str(error), name
            found += 1
        else:  # a change of a description that means the same
            assert name.endswith("zarr.json"), (name, changed)
    assert found > 20
    faults, right = damaged_slides(store.folder)
    assert (faults, right) == ([], 3)
    next((store.folder / "s2" / "counts" / "c").rglob("*")).joinpath("0").unlink()
    faults, right = damaged_slides(store.folder)
    assert right == 2 and len(faults) == 1 and str(store.folder / "s2") in faults[0]


def test_a_changed_shape_is_found(tmp_path):
    """One changed digit in a shape cuts off barcodes or genes, and the chunks still agree with their checksums."""
    store, _ = write_store(tmp_path / "store", spots_of(n=150))
    for name in ("barcodes", "coords", "features", "measured"):
        path = store.folder / "s1" / name / "zarr.json"
        content = path.read_text()
        shape = json.loads(content)["shape"]
        path.write_text(content.replace(f"{shape[-1]}\n  ]", f"{shape[-1] - 1}\n  ]", 1))
        assert json.loads(path.read_text())["shape"] == [*shape[:-1], shape[-1] - 1]
        with pytest.raises(DataError, match=r"s1 is missing, damaged.*the description of an array was changed"):
            SpotStore(store.folder, store.names, store.genes, store.transform)
        path.write_text(content)


def test_large_slides_have_several_files_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(spot_store, "SHARD_BYTES", 1)
    store, spots = write_store(tmp_path / "store", spots_of(n=450))
    assert len([each for each in (store.folder / "s0" / "features").rglob("*") if each.is_file()]) == 4
    assert_equal(store.slide(2), by_slide(spots)[2])
