import json
import logging
import shutil

import httpx
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import tifffile
from helpers import ROOT
from huggingface_hub import errors
from PIL import Image

from hinge.config import load_config
from hinge.data import list_samples, read_slide, recognise_format
from hinge.data.hest_download import TABLE, download_sample_table, download_samples, read_sample_table, select_samples
from hinge.data.slide import patient_of_slide
from hinge.utils.errors import ConfigError, DataError

TABLE_ROWS = [
    ("TENX1", "Breast", "IDC", "Visium", "Homo sapiens"),
    ("TENX2", "Breast", "IDC", "Xenium", "Homo sapiens"),
    ("NCBI3", "Bowel", "COAD", "Visium", "Homo sapiens"),
    ("NCBI4", "Bowel", None, "Visium", "Mus musculus"),
]


@pytest.fixture
def table(tmp_path):
    columns = ["id", "organ", "oncotree_code", "st_technology", "species"]
    path = tmp_path / "hub" / TABLE
    path.parent.mkdir()
    pd.DataFrame(TABLE_ROWS, columns=columns).to_csv(path, index=False, encoding="utf-8-sig")
    return path


@pytest.fixture
def copy_of_hest(tmp_path, write_slide):
    """One sample in HEST-1k's layout, at 2.5 µm/px."""

    def write(metadata=None, edit=lambda slide: None):
        def as_hest(slide):
            slide.uns.pop("hinge")
            edit(slide)

        file = write_slide(name="TENX1", edit=as_hest)
        root = tmp_path / "hest"
        for part in ("st", "wsis", "metadata"):
            (root / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "st" / "TENX1.h5ad")
        pixels = np.asarray(Image.open(file.with_suffix(".png")))
        tifffile.imwrite(root / "wsis" / "TENX1.tif", pixels, tile=(64, 64), photometric="rgb")
        facts = {"pixel_size_um_estimated": 2.5, "inter_spot_dist": 100.0, "spot_diameter": 55.0}
        (root / "metadata" / "TENX1.json").write_text(json.dumps(facts if metadata is None else metadata))
        return root

    return write


# --- reading a copy -------------------------------------------------------------------------------------


def test_a_local_copy(copy_of_hest, tmp_path):
    root = copy_of_hest()
    assert recognise_format(root) == "hest" and list_samples(root) == ["TENX1"]
    slide = read_slide(root, "TENX1")
    facts = slide.uns["hinge"]
    assert slide.shape == (30, 30) and facts["image_path"] == str(root / "wsis" / "TENX1.tif")
    assert (facts["um_per_px"], facts["spot_pitch_um"], facts["spot_diameter_um"]) == (2.5, 100, 55)
    expected = read_slide(tmp_path / "slides", "TENX1", um_per_px=2.5)
    np.testing.assert_array_equal(slide.X.toarray(), expected.X.toarray())
    np.testing.assert_array_equal(slide.obsm["spatial"], expected.obsm["spatial"])


@pytest.mark.parametrize(
    "told, expected",
    [
        ({"patient": "patient 2", "dataset_title": "A study"}, "A study: patient 2"),
        ({"patient": float("nan"), "dataset_title": "A study"}, None),
        ({"patient": " "}, None),
    ],
)
def test_a_patient_is_one_of_its_study(copy_of_hest, told, expected):
    slide = read_slide(copy_of_hest({"pixel_size_um_estimated": 2.5, **told}))
    assert patient_of_slide(slide) == expected


def test_the_configuration_of_all_samples_splits_patients(hest):
    data = load_config(ROOT / "configs" / "hest" / "all.yaml").data
    table = pd.read_csv(next(hest.glob("*.csv")), encoding="utf-8-sig").set_index("id")
    patients = (table["dataset_title"] + ": " + table["patient"]).fillna(pd.Series(table.index, table.index))
    assert {patients[name] for name in data.train}.isdisjoint(patients[name] for name in data.test)
    named = table.loc[[*data.train, *data.test]]
    assert set(named["species"]) == {"Homo sapiens"} and "TENX128" not in named.index and "TENX155" not in named.index


def test_pooled_xenium_tells_no_spot_distance(copy_of_hest):
    slide = read_slide(copy_of_hest({"pixel_size_um_estimated": 2.0, "inter_spot_dist": None}))
    assert slide.uns["hinge"]["spot_pitch_um"] == 80 and np.isnan(slide.uns["hinge"]["spot_diameter_um"])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_symbols_get_a_suffix(copy_of_hest):
    def repeat(slide):
        slide.var_names = ["A", "A", *slide.var_names[2:]]

    assert list(read_slide(copy_of_hest(edit=repeat)).var_names[:2]) == ["A", "A-1"]


def test_incomplete_copies(copy_of_hest):
    root = copy_of_hest({})
    with pytest.raises(DataError, match=r"neither .*TENX1\.json nor the image contains the resolution: give"):
        read_slide(root)
    assert read_slide(root, um_per_px=2.5).n_obs == 30
    (root / "metadata" / "TENX1.json").write_text("[]")
    with pytest.raises(DataError, match=r"TENX1\.json must hold a JSON object with the sample's metadata"):
        read_slide(root)
    (root / "metadata" / "TENX1.json").unlink()
    (root / "wsis" / "TENX1.tif").unlink()
    with pytest.raises(DataError, match=r"there is no image .*TENX1\.tif: run hinge download hest, or give --image"):
        read_slide(root)
    assert "image_path" not in read_slide(root, require_image=False).uns["hinge"]


# --- choosing samples -----------------------------------------------------------------------------------


def test_samples_are_chosen_by_what_all_columns_say(table):
    table = read_sample_table(table)

    def chosen(**asked):
        return list(select_samples(table, **asked)["id"])

    assert chosen(organ=["breast"]) == ["TENX1", "TENX2"]
    assert chosen(organ=["Breast", "Bowel"], technology=["visium"], species=["Homo sapiens"]) == ["TENX1", "NCBI3"]
    assert chosen(oncotree=["coad"]) == ["NCBI3"] and chosen(ids=["NCBI4", "TENX2"]) == ["TENX2", "NCBI4"]
    with pytest.raises(ConfigError, match="no sample of HEST-1k is selected: give --id, --organ"):
        chosen()
    with pytest.raises(ConfigError, match=r"no sample of HEST-1k has organ 'Moon'; its values are Bowel, Breast$"):
        chosen(organ=["Moon"])
    with pytest.raises(ConfigError, match=r"no sample of HEST-1k has organ Bowel and st_technology Xenium"):
        chosen(organ=["Bowel"], technology=["Xenium"])


def test_tables_that_are_none(tmp_path, table):
    with pytest.raises(DataError, match=r"none\.csv is not a readable table of samples"):
        read_sample_table(tmp_path / "none.csv")
    pd.DataFrame({"id": ["A"]}).to_csv(table)
    with pytest.raises(DataError, match="is not HEST-1k's table of samples: it has no column organ"):
        read_sample_table(table)


def test_the_published_table(hest):
    table = read_sample_table(hest / TABLE)
    assert len(table) == 1229
    breast = select_samples(table, oncotree=["IDC"], technology=["Visium"], organ=["Breast"])
    assert set(breast["st_technology"]) == {"Visium"} and "TENX39" in set(breast["id"])


# --- downloading ----------------------------------------------------------------------------------------


def test_download_fetches_three_files_a_sample_once(tmp_path, table, copy_of_hest, monkeypatch):
    hub, fetched = copy_of_hest(), []

    def fetch(repository, name, *, repo_type, local_dir):
        assert (repository, repo_type) == ("MahmoodLab/hest", "dataset")
        fetched.append(name)
        target = local_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(table if name == TABLE else hub / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    folder = tmp_path / "mine"
    assert len(read_sample_table(download_sample_table(folder))) == 4
    for _ in range(2):
        download_samples(["TENX1"], folder)
    assert fetched == [TABLE, "st/TENX1.h5ad", "wsis/TENX1.tif", "metadata/TENX1.json"]
    assert read_slide(folder, "TENX1").n_obs == 30


def refusal(kind, status=403):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            refusal(errors.GatedRepoError),
            r"HEST-1k needs access: accept its terms at .* log in with `hf auth login`",
        ),
        (refusal(errors.RepositoryNotFoundError, 401), r"accept its terms at"),
        (
            errors.LocalEntryNotFoundError("not there"),
            r"st/TENX1\.h5ad cannot be downloaded because huggingface\.co cannot",
        ),
        (
            httpx.ConnectError("no route"),
            r"st/TENX1\.h5ad of https://.* cannot be downloaded: no route",
        ),
        (refusal(errors.RemoteEntryNotFoundError, 404), r"datasets/MahmoodLab/hest has no file st/TENX1\.h5ad"),
        (refusal(errors.HfHubHTTPError, 500), r"st/TENX1\.h5ad of .* cannot be downloaded: refused"),
    ],
)
def test_what_is_said_when_nothing_comes(tmp_path, monkeypatch, error, sentence):
    def fetch(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(DataError, match=sentence) as raised:
        download_samples(["TENX1"], tmp_path / "mine")
    assert "\n" not in str(raised.value) and not (tmp_path / "mine").exists()


def test_offline_by_choice(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            DataError, match=r"HEST_v1_1_0\.csv cannot be downloaded because HF_HUB_OFFLINE is set: connect to the"
        ),
    ):
        download_sample_table(tmp_path)
