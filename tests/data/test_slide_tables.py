"""Slides of a table: read from where it says, and named in a configuration."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from hinge.config import check_config, load_config, save_config
from hinge.data import list_samples, read_slide, recognise_format
from hinge.data.readers.table import images_alone, read_table, split_table
from hinge.utils.errors import ConfigError, DataError

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
