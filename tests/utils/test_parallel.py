"""Many slides from a table: read, shared between processes, failures reported at the end."""

import multiprocessing
import os
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from hinge.config import check_config, load_config, save_config
from hinge.data import list_samples, read_slide, recognise_format
from hinge.data.readers.table import images_alone, read_table, split_table
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.parallel import each_slide, work_alone

HEAD = "slide,image,counts,sample,um_per_px,patient,split,condition\n"


@pytest.fixture
def cohort(write_slide, tmp_path) -> Path:
    """A table of four slides in several places, the last without counts."""
    for seed, name in enumerate(("one", "two", "three")):
        write_slide(name, seed=seed)
    (tmp_path / "scans").mkdir()
    (tmp_path / "slides" / "three.png").rename(tmp_path / "scans" / "other.png")
    table = tmp_path / "cohort.csv"
    rows = [
        "P1_A,slides/one.png,slides/one.h5ad,,,P1,train,tumour",
        "P1_B,,slides,two,,P1,Train,normal",
        "P2_A,scans/other.png,slides/three.h5ad,,2.0,P2,test,",
        "P3_A,scans/other.png,,,2.5,P3,test,tumour",
        ",,,,,,,",
    ]
    table.write_text("\ufeff" + HEAD + "\r\n".join(rows) + "\n", encoding="utf-8")
    return table


def test_slides_are_read_from_where_the_table_says(cohort):
    assert recognise_format(cohort) == "table"
    assert list_samples(cohort) == ["P1_A", "P1_B", "P2_A", "P3_A"]
    slide = read_slide(cohort, "P1_A")
    facts = slide.uns["hinge"]
    assert (facts["name"], facts["patient"], facts["condition"]) == ("P1_A", "P1", "tumour")
    assert list(slide.uns["spatial"]) == ["P1_A"]
    np.testing.assert_array_equal(slide.X.toarray(), ad.read_h5ad(cohort.parent / "slides" / "one.h5ad").X.toarray())
    assert read_slide(cohort, "P1_B").uns["hinge"]["image_path"].endswith("two.png")
    third = read_slide(cohort, "P2_A").uns["hinge"]
    assert third["um_per_px"] == 2.0 and third["image_path"].endswith("other.png") and "condition" not in third
    assert images_alone(cohort) == {"P3_A"}


def test_a_slide_without_counts_gets_spots(cohort):
    with pytest.raises(DataError, match="image without counts"):
        read_slide(cohort, "P3_A")
    slide = read_slide(cohort, "P3_A", require_counts=False, spot_pitch_um=80.0, spot_diameter_um=40.0)
    assert slide.n_vars == 0 and slide.n_obs > 4
    assert slide.uns["hinge"]["name"] == "P3_A" and slide.uns["hinge"]["spot_pitch_um"] == 80.0


@pytest.mark.parametrize(
    "content, says",
    [
        ("slide,image\n", "has no slides"),
        ("image,counts\na,b\n", "no column slide"),
        ("slide,image,image\na,b,c\n", "a column twice"),
        ("slide,image\na,x.png\na,y.png\n", "line 3: slide a occurs twice"),
        ("slide,image\na,\n", "neither image nor counts"),
        ("slide,image\n../a,x.png\n", "cannot be the name"),
        ("slide,image\n.a,x.png\n", "cannot be the name"),
        ("slide,image\na,x.png,more\n", "more fields than columns"),
        ('slide,image\na,"x.png\n', "not a readable table"),
        ("slide,image,split\na,x.png,validation\n", "'validation', not train"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path, content, says):
    table = tmp_path / "cohort.csv"
    table.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        split_table(table)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read_table(tmp_path / "none.csv")
    table = tmp_path / "cohort.csv"
    table.write_text("slide,image,counts,um_per_px\na,x.png,,\nb,,x.h5ad,\nc,,cohort.csv,\nd,,x.h5ad,wide\n")
    for name, says in {
        "a": "there is no image",
        "b": "there are no counts",
        "c": "another table of slides",
        "d": "not a number",
    }.items():
        with pytest.raises(DataError, match=says):
            read_slide(table, name, require_counts=False)


# --- configuration -----------------------------------------------------------------------------------


def test_a_table_in_a_configuration(cohort, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output: run\ndata:\n  path: cohort.csv\n  pretrain: [P9]\n")
    data = load_config(path).data
    assert (data.train, data.test, data.pretrain) == (["P1_A", "P1_B"], ["P2_A", "P3_A"], ["P9"])
    assert data.path == cohort.resolve()
    save_config(load_config(path), tmp_path / "run" / "config.yaml")
    cohort.unlink()  # what was resolved needs the table no more
    assert load_config(tmp_path / "run" / "config.yaml").data == data


def test_mistakes_in_a_configuration(cohort, tmp_path):
    def check(**data):
        return check_config({"output": str(tmp_path / "run"), "data": data}, "run.yaml")

    with pytest.raises(ConfigError, match="there is no file"):
        check(path=str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match=r"data.path: is missing"):
        check(train=["a"])


def test_the_former_key_of_a_table(cohort, tmp_path):
    def check(**data):
        with pytest.warns(DeprecationWarning, match="data.table is now data.path"):
            return check_config({"output": str(tmp_path / "run"), "data": data}, "run.yaml").data

    assert check(table=str(cohort)) == check(table=str(cohort), path=str(cohort))
    assert check(table=str(cohort)).test == ["P2_A", "P3_A"]
    with pytest.raises(ConfigError, match=r"data\.table is now path; give one of them"):
        check_config({"output": "run", "data": {"table": str(cohort), "path": str(tmp_path)}}, "run.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"path": str(tmp_path), "table": None, "train": ["a"]}
        assert check_config({"output": "run", "data": given}, "run.yaml").data.path == tmp_path


# --- many slides -------------------------------------------------------------------------------------

NAMES = [f"S{i}" for i in range(8)]


def _work(folder: Path, log: Path, started, seconds: float):
    def work(name: str) -> Path:
        if name in ("S2", "S5"):
            raise DataError(f"{name} is damaged") if name == "S2" else ZeroDivisionError("a bug")
        target = folder / name
        if not target.exists():
            with open(log, "a") as file:
                file.write(f"{name} {os.getpid()}\n")
            time.sleep(seconds)
            target.touch()
        return target

    started.wait()
    try:
        list(each_slide(NAMES, work, folder))
    except DataError as error:
        done = sum((folder / name).exists() for name in NAMES)
        (folder / f"report.{os.getpid()}").write_text(f"{done} done; {error}")


def test_processes_share_slides_and_report_failures(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Barrier(3)
    (tmp_path / "out").mkdir()
    arguments = (tmp_path / "out", tmp_path / "log", started, 0.2)
    processes = [context.Process(target=_work, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    done = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for name, _ in done) == ["S0", "S1", "S3", "S4", "S6", "S7"]  # each once
    assert len({process for _, process in done}) > 1
    reports = [path.read_text() for path in (tmp_path / "out").glob("report.*")]
    assert all(text.startswith("6 done; ") for text in reports)  # or a launcher would end those still at work
    assert reports and any("S2 (S2 is damaged)" in text and "S5 (ZeroDivisionError: a bug)" in text for text in reports)
    assert all("2 of 8 slides failed" in text or "1 of 8 slides failed" in text for text in reports)


def test_what_is_done_is_skipped_and_a_failed_slide_is_tried_again(tmp_path):
    tried = []

    def work(name: str, broken: bool) -> Path:
        tried.append(name)
        if broken and name == "b":
            raise DataError("no image")
        return tmp_path / name

    done = []
    with pytest.raises(DataError, match=r"1 of 3 slides failed, the others are done: b \(no image\)"):
        for name, _ in each_slide(["a", "b", "c"], lambda name: work(name, True), tmp_path):
            done.append(name)
    assert done == ["a", "c"] and not (tmp_path / ".claims").exists()
    assert [name for name, _ in each_slide(["a", "b", "c"], lambda name: work(name, False), tmp_path)] == [
        "a",
        "b",
        "c",
    ]
    with pytest.raises(DataError, match=r"^no image$"):  # one slide alone fails as it is
        list(each_slide(["b"], lambda name: work(name, True), tmp_path))


def test_a_dead_process_holds_no_slide(tmp_path):
    def die(name: str) -> Path:
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=lambda: list(each_slide(["a", "b"], die, tmp_path)))
    process.start()
    process.join(30)
    assert process.exitcode == 9 and (tmp_path / ".claims").exists()
    assert len(list(each_slide(["a", "b"], lambda name: tmp_path / name, tmp_path))) == 2


def test_a_process_of_accelerate_becomes_one_by_itself(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert work_alone() == 4
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    assert work_alone() == 1
