"""Runs that train from a store on disk: written slide by slide, continued after a kill, and checked."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.runs import tiny_settings

from hinge.config import check_config
from hinge.data import spot_store
from hinge.data.spot_store import SpotStore
from hinge.run import preparation, training_spots
from hinge.run.integrity import verify_run
from hinge.run.preparation import Preparation
from hinge.run.run import Run
from hinge.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def slides(tiny_slides, tmp_path_factory):
    """Slides that this module may write to."""
    return shutil.copytree(tiny_slides, tmp_path_factory.mktemp("disk") / "slides")


def settings_of(slides, output, store="disk", **changes):
    settings = tiny_settings(slides, output, **changes)
    settings["training"] |= {"store": store, "checkpoint_every": 2}
    settings["evaluation"] = {"baselines": ["mean"], "bootstrap": 5}
    return settings


def run_of(slides, output, **changes):
    return Run(check_config(settings_of(slides, output, **changes), "config"))


def weights_of(run):
    return run.pipeline().model.trained_state()


class Killed(BaseException):
    """Stands for a kill."""


def test_a_run_trains_from_disk_continues_and_is_checked(slides, tmp_path, monkeypatch):
    whole = run_of(slides, tmp_path / "whole")
    whole.train()
    store = whole.paths.training / "spots.zarr"
    assert sorted(each.name for each in store.iterdir()) == ["sim0", "sim1"]
    held = json.loads(whole.paths.split.read_text())["validation_spots"]
    assert held and {name.split("/")[0] for name in held} <= {"sim0", "sim1"}

    run, write, written = run_of(slides, tmp_path / "killed"), training_spots.write_slide, []

    def killed(folder, spots, digest):
        if written:
            raise Killed
        written.append(str(spots.slide[0]))
        write(folder, spots, digest)

    monkeypatch.setattr(training_spots, "write_slide", killed)
    with pytest.raises(Killed):
        run.train()
    monkeypatch.setattr(
        training_spots, "write_slide", lambda *args: written.append(str(args[1].slide[0])) or write(*args)
    )
    run_of(slides, tmp_path / "killed").train()
    assert written == ["sim0", "sim1"]  # the first one is not written again
    found, wanted = weights_of(run), weights_of(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    right = verify_run(whole.folder)
    assert not right.faults and not right.unknown
    file = next(each for each in (store / "sim1" / "features" / "c").rglob("*") if each.is_file())
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    faults = verify_run(whole.folder).faults
    assert len(faults) == 1 and f"{store / 'sim1'} is missing, damaged or was changed" in faults[0]
    assert "delete it and run hinge train again" in faults[0]


def test_input_that_changed_is_written_again_or_refused(slides, tmp_path):
    inputs = Preparation(check_config(settings_of(slides, tmp_path / "run"), "config"))
    first = training_spots.training_spots(inputs)
    assert isinstance(first, SpotStore)
    import anndata as ad

    changed = shutil.copytree(slides, tmp_path / "slides")
    slide = ad.read_h5ad(changed / "sim1.h5ad")
    slide.X[0, int(np.flatnonzero(slide.var_names == first.genes[0])[0])] += 5
    slide.write_h5ad(changed / "sim1.h5ad")
    others = Preparation(check_config(settings_of(changed, tmp_path / "run"), "config"))
    second = training_spots.training_spots(others)
    assert second.slide(1).counts[0, 0] == first.slide(1).counts[0, 0] == 5 + inputs.spots(["sim1"]).counts[0, 0]
    (inputs.paths.training / "latest.safetensors").touch()
    with pytest.raises(DataError, match=r"slide sim1, or its features, changed after training .* had begun"):
        training_spots.training_spots(Preparation(inputs.config))


def test_large_runs_train_from_disk_by_themselves(slides, tmp_path, monkeypatch):
    def kind(**changes):
        config = check_config(settings_of(slides, tmp_path / "run", **changes), "config")
        return type(training_spots.training_spots(Preparation(config))).__name__

    assert kind(store="auto") == "SpotTable"
    monkeypatch.setattr(preparation, "IN_MEMORY_BYTES", 1000)
    assert kind(store="auto") == "SpotStore"
    assert kind(store="memory") == "SpotTable"
    assert kind(store="auto", data__train_spots=20) == "SpotTable"
    with pytest.raises(ConfigError, match=r"data\.train_spots is for training\.store memory"):
        kind(data__train_spots=20)


def test_counts_to_pretrain_on_are_bounded_beside_a_store(slides, tmp_path, monkeypatch):
    def spots(**changes):
        config = check_config(settings_of(slides, tmp_path / "run", **changes), "config")
        inputs = Preparation(config)
        return len(inputs.pretraining_counts()), inputs.paths.features("sim0").exists()

    monkeypatch.setattr(preparation, "_PRETRAINING_BYTES", 0)
    monkeypatch.setattr(preparation, "_MOST_PRETRAINING_SPOTS", 10)
    every = spots(store="memory")
    assert every[0] > 10 and spots(store="auto") == every
    assert spots(store="disk") == (10, False)
    monkeypatch.setattr(preparation, "IN_MEMORY_BYTES", 1000)
    # pre-training decides as training will, and without the features that are not extracted yet
    assert spots(store="auto") == (10, False)
    assert spots(store="auto", data__train_spots=20) == every


@pytest.mark.full
def test_a_store_holds_what_training_in_memory_has(slides, tmp_path):
    panel = {"method": "union", "genes": None}
    for name in ("memory", "disk"):
        run_of(slides, tmp_path / name, store=name, panel=panel).train()
    inputs = Preparation(check_config(settings_of(slides, tmp_path / "disk", panel=panel), "config"))
    store, spots = training_spots.training_spots(inputs), inputs.spots(["sim0", "sim1"])
    for number, name in enumerate(store.names):
        stored, own = store.slide(number), spots.subset(spots.slide == name)
        np.testing.assert_array_equal(stored.barcodes, own.barcodes)
        np.testing.assert_array_equal(stored.values, own.values)
        np.testing.assert_allclose(stored.features, own.features, rtol=1e-3, atol=1e-6)
    levels = [training_spots.slide_levels(inputs, each) for each in (store, spots)]
    np.testing.assert_array_equal(levels[0].values, levels[1].values)
    # orders differ, initialisations do not: six steps do not lead far away
    one, other = (weights_of(run_of(slides, tmp_path / name, store=name, panel=panel)) for name in ("memory", "disk"))
    name = "gene_factor_model.mean.weight"
    torch.testing.assert_close(one[name], other[name], rtol=0.05, atol=0.01)


@pytest.mark.full
def test_baselines_are_fitted_to_a_part_of_a_store(slides, tmp_path, monkeypatch, call_cli):
    monkeypatch.setattr(spot_store, "PART_SPOTS", 10)
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings_of(slides, tmp_path / "run")))
    done = call_cli("run", "--config", config, "training.spots_in_memory=40")
    assert done.code == 0, done.err
    assert "baselines are fitted to 40 of 72 training spots" in done.err
    assert {row["method"] for row in json.loads((tmp_path / "run" / "scores.json").read_text())["rows"]} >= {"mean"}
