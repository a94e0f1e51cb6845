"""Tasks one after the other: failures are reported at the end, and what cannot be shared is refused."""

import hashlib
from pathlib import Path

import pytest
from helpers import ray_tasks
from helpers.commands import call_hinge
from helpers.ray_tasks import open_nothing, open_unreliable

from hinge.cli.app import _with_address
from hinge.utils.catalogue import Catalogue, Entry
from hinge.utils.errors import ConfigError, DataError, Interrupted
from hinge.utils.parallel import each_slide, require_all, require_one_process, task_runner
from hinge.utils.ray_workers import Cluster, _share


def test_a_slide_that_fails_stops_no_other():
    done = []
    with pytest.raises(DataError) as raised:
        for name, paths in each_slide(["a", "damaged", "bug", "b"], open_unreliable, Path("never")):
            done.append((name, paths))
    assert done == [(name, [Path(ray_tasks.__file__)]) for name in ("a", "b")]
    assert str(raised.value) == (
        "2 of 4 slides failed, the others are done: damaged (the slide is damaged); bug (ZeroDivisionError: a bug)"
    )


def test_one_slide_alone_fails_as_it_is():
    with pytest.raises(DataError, match=r"^the slide is damaged$"):
        list(each_slide(["damaged"], open_unreliable, Path("never")))
    with pytest.raises(ZeroDivisionError):
        list(each_slide(["bug"], open_unreliable, Path("never")))


def test_a_worker_that_cannot_open_and_an_interruption_end_the_work():
    with pytest.raises(DataError, match="there is no model"):
        list(each_slide(["a", "b"], open_nothing, Path("never")))
    tried = []

    def stop(name):
        tried.append(name)
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        list(each_slide(["a", "b"], lambda: stop, Path("never")))
    assert tried == ["a"]


def test_many_failures_are_one_sentence():
    names = {f"damaged {number}": "damaged" for number in range(50)}
    with task_runner(None) as run, pytest.raises(DataError) as raised:
        require_all(run("folds", names, open_unreliable), "folds")
    text = str(raised.value)
    assert text.startswith("50 of 50 folds failed, none is done: damaged 0 (") and text.endswith("; and 30 more")


def test_processes_that_were_launched_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # one that went on would wait for the other at another slide
    with pytest.raises(DataError, match=r"^the slide is damaged$"):
        list(each_slide(["damaged", "a"], open_unreliable, Path("never")))
    with pytest.raises(ConfigError, match="hinge features is one process"):
        require_one_process("hinge features")
    with pytest.raises(ConfigError, match="without accelerate launch"), task_runner(Cluster()):
        pass


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (["sample", "RUN", "--ray"], "local"),
        (["sample", "--ray", "RUN"], "local"),
        (["sample", "RUN", "--ray", "--slide", "A"], "local"),
        (["sample", "RUN", "--ray", "auto"], "auto"),
        (["sample", "RUN", "--ray", "head-0.svc:6379", "--slide", "A"], "head-0.svc:6379"),
    ],
)
def test_an_address_may_follow(given, address):
    arguments = _with_address(given)
    assert arguments[arguments.index("--ray") + 1] == address
    assert [each for each in arguments if each != address] == [each for each in given if each != address]


def test_workers_without_ray(tmp_path):
    (tmp_path / "grid.yaml").write_text("{}")
    result = call_hinge("ablate", tmp_path / "grid.yaml", tmp_path / "out", "--workers", "2")
    assert result.code == 2 and "--workers is the number of workers of --ray" in result.err


def machine(cpus: float, gpus: float = 0, gigabytes: float = 1000, alive: bool = True) -> dict:
    resources = {"CPU": cpus, "memory": gigabytes * 2**30} | ({"GPU": gpus} if gpus else {})
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("machines", "workers", "expected"),
    [
        ([machine(16, gigabytes=10)], None, (2, 8, 0)),  # memory for two
        ([machine(1, gigabytes=1)], None, (1, 1, 0)),
        ([machine(8), machine(8), machine(8, alive=False)], None, (16, 1, 0)),
        ([machine(8), machine(8)], 1, (1, 8, 0)),
        ([machine(8), machine(8)], 3, (3, 4, 0)),
        ([machine(4, 1), machine(64)], None, (1, 4, 1)),  # a machine without a GPU is not used
        ([machine(32, 4), machine(16, 2)], None, (6, 8, 1)),
        ([machine(32, 4)], 16, (16, 8, 1)),  # three more machines may come
    ],
)
def test_workers_share_the_machines_of_a_cluster(machines, workers, expected):
    share = _share(machines, workers, local=False)
    assert (share.workers, share.cpus, share.gpus) == expected


@pytest.mark.parametrize(
    ("here", "workers", "expected"),
    [
        (machine(2), None, (2, 1, 0)),
        (machine(2), 2, (2, 1, 0)),
        (machine(32, 4), None, (4, 8, 1)),
        (machine(32, 4), 8, (8, 4, 0.5)),
        (machine(32, 2), 3, (3, 10, 0.5)),
    ],
)
def test_workers_share_this_machine(here, workers, expected):
    share = _share([here], workers, local=True)
    assert (share.workers, share.cpus, share.gpus) == expected


def test_a_head_that_does_not_work_is_no_machine():
    assert _share([machine(0), machine(8, alive=False)], None, local=False) is None


def test_a_catalogue_reads_a_file_again_only_if_it_has_changed(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "inside").write_text("1")
    (tmp_path.parent / "outside").write_text("2")
    files = {"one": [tmp_path / "inside"], "two": [tmp_path.parent / "outside"]}

    def note() -> Catalogue:
        catalogue = Catalogue(tmp_path)
        work = catalogue.noting(lambda: files.get)()
        assert [catalogue.add(work(name)) for name in ("two", "one")] == [files["two"], files["one"]]
        catalogue.write()
        return Catalogue(tmp_path)

    first = note().entries
    assert list(first) == ["inside", str(tmp_path.parent / "outside")]
    assert [entry.slide for entry in first.values()] == ["one", "two"]
    (tmp_path / "inside").write_text("other")
    monkeypatch.setattr("hinge.utils.catalogue.content_digest", lambda path: f"again {path.name}")
    second = note().entries
    assert [entry.sha256 for entry in second.values()] == [
        "again inside",
        first[str(tmp_path.parent / "outside")].sha256,
    ]
    (tmp_path / "catalogue.parquet").write_text("damaged")
    with pytest.raises(DataError, match=r"catalogue\.parquet is not a readable catalogue"):
        Catalogue(tmp_path)


def test_a_catalogue_has_one_row_for_a_folder(tmp_path):
    pytest.importorskip("pyarrow")
    store = tmp_path / "a.draws.zarr"
    (store / "inner").mkdir(parents=True)
    (store / "zarr.json").write_text("12")
    (store / "inner" / "chunk").write_text("345")

    def note() -> Entry:
        catalogue = Catalogue(tmp_path)
        catalogue.add(catalogue.noting(lambda: lambda name: [store])()("a"))
        catalogue.write()
        (entry,) = Catalogue(tmp_path).entries.values()
        return entry

    first = note()
    lines = [
        f"{name}|{hashlib.sha256(content).hexdigest()}\n"
        for name, content in (("inner/chunk", b"345"), ("zarr.json", b"12"))
    ]
    assert (first.slide, first.path, first.bytes) == ("a", "a.draws.zarr", 5)
    assert first.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert note() == first
    (store / "inner" / "chunk").write_text("3456")
    assert note().sha256 != first.sha256
