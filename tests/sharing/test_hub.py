"""Models on the hub, on a hub that is a folder here, and the denoiser as a program."""

import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import ROOT
from safetensors.torch import save_file

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.backbones.published_cellfm import export_cellfm
from hinge.config import check_config, save_config
from hinge.data import Panel
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.diffusion.pipeline import write_model_index
from hinge.encoders import load_encoder
from hinge.encoders.encoder import Encoder
from hinge.encoders.recipes import RECIPES
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.sharing.convert import convert_cellfm
from hinge.sharing.export import DenoiserStep, export_denoiser
from hinge.sharing.licences import backbone_licence, encoder_licence
from hinge.sharing.upload import fetch_run, push, push_run
from hinge.utils.errors import ConfigError, DataError, HingeError, WeightsError
from hinge.utils.files import read_json, write_json
from hinge.utils.hub import is_repository
from hinge.utils.licences import BACKBONE_LICENCES, forbids_sharing

GENES = [f"G{i}" for i in range(10)]
ENCODER = Encoder("e", 8, 112.0, 224, "1" * 64, torch.nn.Identity(), torch.nn.Identity())


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub in a folder: repositories are its subfolders."""
    root = tmp_path / "hub"

    def create_repo(self, repository, private, repo_type, exist_ok):
        (root / repository).mkdir(parents=True, exist_ok=exist_ok)
        (root / f"{repository}.private").write_text(str(private))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, repo_id, folder_path, repo_type, commit_message):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot_download(repository, revision=None, local_dir=None, allow_patterns=None):
        if not (root / repository).is_dir():
            raise OSError("404: there is no such repository\nand more")
        if local_dir is None:
            return str(root / repository)
        shutil.copytree(root / repository, local_dir, dirs_exist_ok=True)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


@pytest.fixture
def run(tmp_path) -> Run:
    """A run's folder as training leaves it, with random weights."""
    folder = tmp_path / "runs" / "small"
    config = {
        "output": str(folder),
        "data": {"path": str(tmp_path / "secret-slides"), "train": ["a", "b"], "test": ["c"], "pretrain": ["d"]},
        "evaluation": {"gene_sets": str(tmp_path / "secret.gmt")},
    }
    save_config(check_config(config, "test"), folder / "config.yaml")
    Panel.from_list(GENES).save(folder / "panel.json")
    torch.manual_seed(0)
    size = CellFMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8, num_genes=10, gene_names=GENES
    )
    backbone = CellFMModel(size).eval()
    backbone.save_pretrained(folder / "backbone")
    model = HingeModel.from_backbone(backbone, 6, 10, head="rounded_gaussian", transform="log2p1", start="random")
    model.save_pretrained(folder / "model")
    write_json(folder / "model" / "scheduler_config.json", {"num_train_timesteps": 50})
    rows = [
        {"slide": "c", "method": method, "transform": "log2p1", "pcc_50": pcc, "crps": crps}
        for method, pcc, crps in (("hinge", 0.5, 0.4), ("a|<b>", 0.25, None))
    ]
    write_json(folder / "scores.json", {"definitions": {"pcc_50": {"label": "PCC-50"}}, "rows": rows})
    (folder / "samples").mkdir()
    (folder / "samples" / "c.h5ad").write_bytes(b"draws of a patient")
    return Run.open(folder)


def test_names_of_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repository("owner/name-1.0")
    for other in ("name", "/owner/name", "./owner/name", "a/b/c", "../name", "owner/", Path("owner/name"), "a b/c"):
        assert not is_repository(other)
    (tmp_path / "owner" / "name-1.0").mkdir(parents=True)
    assert not is_repository("owner/name-1.0")


def test_a_run_goes_up_and_comes_down(run, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert push_run(run, "lab/small", "cc-by-4.0") == "https://huggingface.co/lab/small"
    there = hub / "lab" / "small"
    files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert {"README.md", "config.yaml", "panel.json", "model/config.json", "backbone/config.json"} <= files
    assert not any("samples" in name for name in files) and (hub / "lab" / "small.private").read_text() == "True"
    for name in files:  # no path of this machine, no draw
        assert str(tmp_path).encode() not in (there / name).read_bytes(), name
    fetched = Run.open(fetch_run("lab/small", tmp_path / "theirs"))
    model, theirs = run.pipeline().model, fetched.pipeline().model
    assert theirs.digest() == model.digest() and fetched.panel().genes == GENES
    assert fetched.folder == (tmp_path / "theirs").resolve()
    with pytest.raises(DataError, match="exists already"):
        fetch_run("lab/small", tmp_path / "theirs")


def test_models_by_the_name_of_a_repository(run, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    push_run(run, "lab/small", "apache-2.0")
    own = HingeModel.from_pretrained(run.paths.model, run.backbone())
    assert HingeModel.from_pretrained("lab/small").digest() == own.digest()
    assert CellFMModel.from_pretrained("lab/small").digest() == own.backbone.digest()
    # alone, from Python
    own.push_to_hub("lab/alone")
    with pytest.raises(WeightsError, match="no backbone beside the model"):
        HingeModel.from_pretrained("lab/alone")
    assert HingeModel.from_pretrained("lab/alone", run.backbone()).digest() == own.digest()
    own.push_to_hub("lab/both", with_backbone=True)
    assert HingeModel.from_pretrained("lab/both").backbone.digest() == own.backbone.digest()
    own.backbone.push_to_hub("lab/backbone", private=False)
    assert CellFMModel.from_pretrained("lab/backbone").digest() == own.backbone.digest()
    assert (hub / "lab" / "backbone.private").read_text() == "False"
    # a run's folder stands for its parts
    assert HingeModel.from_pretrained(run.folder).digest() == own.digest()


def test_the_card(run, hub):
    push_run(run, "lab/small", "cc-by-nc-4.0", title="A <b>title</b> | here")
    card = (hub / "lab" / "small" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "cc-by-nc-4.0"
    assert "# A  b title /b    here" in text
    assert "| hinge | 0.500 | 0.400 |" in text and "| a  b | 0.250 |  |" in text and "PCC-50" in text
    assert "Intended use" in text and "hinge download run lab/small" in text and "| training slides | 2 |" in text


def test_the_index_of_the_pipeline_goes_along(run, hub, tmp_path):
    write_model_index(run.folder, run.pipeline().model, MaskedDiffusionScheduler(50), ENCODER)
    push_run(run, "lab/small", "mit", encoder="hf-hub:lab/encoder")
    pipe = HingePipeline.from_pretrained("lab/small")
    assert (pipe.settings.encoder, pipe.settings.encoder_digest) == ("hf-hub:lab/encoder", "1" * 64)
    assert str(tmp_path) not in (hub / "lab" / "small" / "model_index.json").read_text()
    # a backbone outside the run: its user gives the path
    external = tmp_path / "external"
    (run.folder / "backbone").rename(external)
    backbone = run.config.backbone.model_copy(update={"path": external})
    save_config(run.config.model_copy(update={"backbone": backbone}), run.paths.config)
    write_model_index(run.folder, pipe.model, pipe.scheduler, ENCODER)
    push_run(Run.open(run.folder), "lab/apart", "mit")
    assert str(tmp_path) not in (hub / "lab" / "apart" / "model_index.json").read_text()
    fetched = fetch_run("lab/apart", tmp_path / "fetched", backbone=external)
    assert HingePipeline.from_pretrained(fetched).model_digest == pipe.model_digest


def test_an_external_backbone_is_not_uploaded(run, hub, tmp_path):
    external = tmp_path / "external"
    (run.folder / "backbone").rename(external)
    config = run.config.model_copy(update={"backbone": run.config.backbone.model_copy(update={"path": external})})
    save_config(config, run.paths.config)
    run = Run.open(run.folder)
    push_run(run, "lab/small", "other")
    assert not (hub / "lab" / "small" / "backbone").exists()
    assert "backbone is not part of this repository; its licence: not recorded." in card_of(hub, "lab/small")
    fetched = Run.open(fetch_run("lab/small", tmp_path / "theirs", backbone=external))
    assert fetched.pipeline().model.digest() == run.pipeline().model.digest()


def card_of(hub, repository) -> str:
    return (hub / repository / "README.md").read_text()


def test_weights_under_a_forbidding_licence_stay_here(run, hub, tmp_path):
    """CellFM's licence forbids sharing converted or adapted weights; the user may have permission."""
    converted = tmp_path / "converted"
    torch.save(export_cellfm(run.backbone()), tmp_path / "cellfm.pth")
    convert_cellfm(tmp_path / "cellfm.pth", converted, num_attention_heads=2)
    assert read_json(converted / "config.json")["licence"] == "cc-by-nc-nd-4.0"
    with pytest.raises(
        ConfigError, match=r"may not be uploaded: .* cc-by-nc-nd-4.0, which forbids .* give --allow-licence"
    ):
        push(converted, "lab/cellfm", "mit")
    assert not (hub / "lab" / "cellfm").exists()
    push(converted, "lab/cellfm", "cc-by-nc-nd-4.0", allow_licence=True)
    assert "Made from weights under cc-by-nc-nd-4.0." in card_of(hub, "lab/cellfm")
    # the licence stays with the weights, and a backbone that was pre-trained here has none
    CellFMModel.from_pretrained(converted).save_pretrained(tmp_path / "again")
    assert (
        backbone_licence(tmp_path / "again") == "cc-by-nc-nd-4.0" and backbone_licence(run.folder / "backbone") is None
    )
    push(run.folder / "backbone", "lab/own", "mit")
    assert "Made from" not in card_of(hub, "lab/own")
    # from Python too
    backbone = CellFMModel.from_pretrained(converted)
    model = HingeModel.from_backbone(backbone, 6, 10, tuning="full")
    pipe = HingePipeline(HingeModel.from_backbone(backbone, 6, 10), MaskedDiffusionScheduler(10))
    for upload in (backbone.push_to_hub, model.push_to_hub, partial(pipe.model.push_to_hub, with_backbone=True)):
        with pytest.raises(ConfigError, match=r"may not be uploaded: .*allow_licence=True"):
            upload("lab/python")
    with pytest.raises(ConfigError, match="the pipeline may not be uploaded"):
        pipe.push_to_hub("lab/python")
    assert not (hub / "lab" / "python").exists()
    pipe.model.push_to_hub("lab/python")  # the frozen backbone stays here
    pipe.push_to_hub("lab/python", allow_licence=True)
    assert (hub / "lab" / "python" / "model_index.json").exists()
    # folders that were converted before the licence was recorded
    old = read_json(converted / "config.json") | {"hidden_size": 1536}
    write_json(converted / "config.json", {key: value for key, value in old.items() if key != "licence"})
    with pytest.raises(ConfigError, match="may not be uploaded"):
        push(converted, "lab/other", "mit")


def test_a_run_inherits_the_licences_of_its_parts(run, hub, tmp_path):
    external = tmp_path / "external"
    (run.folder / "backbone").rename(external)
    write_json(external / "config.json", read_json(external / "config.json") | {"licence": "cc-by-nc-nd-4.0"})
    features = run.config.features.model_copy(update={"encoder": "uni"})

    def with_backbone(**settings) -> Run:
        backbone = run.config.backbone.model_copy(update={"path": external, **settings})
        return Run(run.config.model_copy(update={"backbone": backbone, "features": features}))

    push_run(with_backbone(), "lab/small", "other")
    card = card_of(hub, "lab/small")
    assert "histology encoder are not part of this repository; their licence: CC BY-NC-ND 4.0." in card
    assert "backbone is not part of this repository; its licence: cc-by-nc-nd-4.0." in card
    with pytest.raises(ConfigError, match=r"the model of .* may not be uploaded"):
        push_run(with_backbone(tuning="full"), "lab/tuned", "other")
    push_run(with_backbone(tuning="full"), "lab/tuned", "other", allow_licence=True)
    assert "adapted weights of an expression backbone; its licence: cc-by-nc-nd-4.0." in card_of(hub, "lab/tuned")


@pytest.mark.parametrize("content", [b"- a\n", b"{}", b"backbone: null\n", b"\x00\xff\xfe", b"backbone: [1]\n", b""])
def test_a_downloaded_configuration_of_another_kind_is_refused(hub, tmp_path, content):
    (hub / "lab" / "odd").mkdir(parents=True)
    (hub / "lab" / "odd" / "config.yaml").write_bytes(content)
    with pytest.raises(HingeError, match=r"config\.yaml"):
        fetch_run("lab/odd", tmp_path / "run", backbone=tmp_path)


def test_licences_of_encoders(tmp_path):
    assert encoder_licence("stain-texture") is None
    assert encoder_licence("uni+virchow+conch@file.bin") == "CC BY-NC-ND 4.0, Apache 2.0"
    assert encoder_licence("hf-hub:lab/name") == "see its model card"
    write_json(tmp_path / "config.json", {"architecture": "vit", "licence": "CC BY-NC-ND 4.0"})
    assert encoder_licence(str(tmp_path)) == "CC BY-NC-ND 4.0"
    with pytest.raises(ConfigError, match="may not be uploaded"):
        push(tmp_path, "lab/encoder", "mit")
    assert [forbids_sharing(name) for name in ("CC BY-ND 4.0", "cc-by-nc-4.0", "Apache 2.0", None)] == [
        True,
        *[False] * 3,
    ]


def test_the_table_of_licences_is_complete():
    """docs/model-licences.md names the licence of every encoder that can be loaded by name."""
    lines = (ROOT / "docs" / "model-licences.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    found = {row[0]: row[1] for row in rows}
    assert found == {"stain-texture": "no weights"} | BACKBONE_LICENCES | {
        name: recipe.licence for name, recipe in RECIPES.items()
    }


def test_an_encoder_keeps_the_side_of_its_patches(hub, tmp_path, monkeypatch):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 24, "patch_um": 80.0}
    write_json(folder / "config.json", {**content, "model_args": arguments, "pretrained_cfg": pretrained})
    push(folder, "lab/encoder", "mit")
    there = hub / "lab" / "encoder"
    assert 'load_encoder("hf-hub:lab/encoder")' in (there / "README.md").read_text()

    def cached(repo_id, filename, **_):
        return str(hub / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", cached)
    monkeypatch.setattr("timm.models._hub.has_hf_hub", lambda necessary=False: True)
    own, theirs = load_encoder(str(folder)), load_encoder("hf-hub:lab/encoder")
    assert (theirs.digest, theirs.patch_um) == (own.digest, 80.0)


def test_what_is_no_model_and_other_mistakes(run, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not the folder of a run, an encoder or a backbone"):
        push(tmp_path, "lab/small", "mit")
    with pytest.raises(ConfigError, match="identifier of a licence"):
        push(run.folder, "lab/small", "MIT License: free")
    with pytest.raises(ConfigError, match="write owner/name"):
        push(run.folder, "small", "mit")
    with pytest.raises(WeightsError, match="lab/nothing is no folder"):
        HingeModel.from_pretrained("lab/nothing")
    features = run.config.features.model_copy(update={"encoder": f"uni@{tmp_path}/uni.bin"})
    local = Run(run.config.model_copy(update={"features": features}))
    with pytest.raises(ConfigError, match="--encoder hf-hub:owner/name"):
        push_run(local, "lab/small", "mit")
    push_run(local, "lab/small", "mit", encoder="hf-hub:lab/uni")
    assert (
        yaml.safe_load((hub / "lab" / "small" / "config.yaml").read_text())["features"]["encoder"] == "hf-hub:lab/uni"
    )
    shutil.rmtree(run.paths.model)
    with pytest.raises(DataError, match="no trained model"):
        push_run(run, "lab/other", "mit")
    assert not (hub / "lab" / "other").exists()


@pytest.mark.full
def test_the_denoiser_as_a_program(run, tmp_path):
    path = export_denoiser(run)
    assert path == run.folder / "exports" / "denoiser.pt2"
    about = read_json(path.with_suffix(".json"))
    assert about["genes"] == GENES and about["outputs"]["mean"] == [10] and about["transform"] == "log2p1"
    program = torch.export.load(path).module()
    model = run.pipeline().model.eval()
    step = DenoiserStep(model, run.gene_ids(model.backbone))
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3, 8):  # the batch is free
        given = {
            "values": torch.rand(batch, 10, generator=generator) * 4,
            "visible": torch.randint(0, 2, (batch, 10), generator=generator).float(),
            "timestep": torch.randint(0, 51, (batch,), generator=generator),
            "features": torch.randn(batch, 6, generator=generator),
        }
        with torch.no_grad():
            expected, found = step(**given), program(**given)
        assert found.keys() == expected.keys() >= {"mean", "location", "scale"}
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"must name a file that ends in \.pt2"):
        export_denoiser(run, tmp_path / "denoiser.onnx")
