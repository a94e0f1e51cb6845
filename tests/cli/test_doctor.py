"""hinge doctor; that every command has an example; the tutorial."""

import json
import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import typer
import yaml
from helpers import ROOT

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.cli import app as cli
from hinge.cli import configuration, doctor
from hinge.encoders.recipes import RECIPES


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)


def test_what_is_told(tmp_path, monkeypatch):
    torch.manual_seed(0)
    size = CellFMConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8, num_genes=10)
    CellFMModel(size).save_pretrained(tmp_path / "mine" / "backbone")
    weights = tmp_path / "pytorch_model.bin"
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(weights) if repo == "MahmoodLab/UNI" else None
    )
    found = {section: dict(facts) for section, facts in doctor.diagnose(tmp_path).items()}
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["encoders"]["uni"] == "available, in the hub cache" and "hf download" in found["encoders"]["virchow2"]
    assert found["encoders"].keys() == {"stain-texture", *RECIPES}
    assert found["backbones"] == {str(tmp_path / "mine" / "backbone"): "16 wide, 2 layers, 10 genes"}
    assert "cannot be reached" in found["network"]["Hugging Face Hub"]
    assert "GiB" in found["devices"]["free memory"] and len(found["batch sizes"]) == 3


def test_offline_by_choice(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in dict(doctor.diagnose()["network"])["Hugging Face Hub"]


def test_batch_sizes_follow_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def sizes(gigabytes: float) -> list[str]:
        monkeypatch.setattr(doctor, "free_memory", lambda: int(gigabytes * 2**30))
        return [found for _, found in doctor.diagnose(tmp_path)["batch sizes"]]

    small, large = sizes(4), sizes(64)
    assert "does not fit" in small[2] and int(large[2]) >= 8
    assert int(small[1]) <= int(large[1]) and int(small[0]) < int(large[0])


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    configuration.doctor(tmp_path)
    printed = capsys.readouterr().out
    assert "stain-texture" in printed and "spots in training" in printed


def commands(group: typer.Typer, names: tuple[str, ...] = ("hinge",)):
    for command in group.registered_commands:
        yield (*names, command.name or command.callback.__name__), command.callback
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*names, inner.name or inner.typer_instance.info.name))


@pytest.mark.parametrize("names, function", [pytest.param(*each, id=" ".join(each[0])) for each in commands(cli.app)])
def test_every_command_of_every_group_has_an_example(names, function):
    assert f"Example: {' '.join(names)}" in " ".join(function.__doc__.split())


def test_the_documentation_names_pages_that_are_there():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # a SafeLoader

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    listed = pages(config["nav"])
    assert listed and all((ROOT / "docs" / page).is_file() for page in listed), listed


@pytest.mark.full
def test_the_tutorial_runs(tmp_path):
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    (tmp_path / "tutorial.py").write_text("\n\n".join(code))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tutorial.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "PCC-50" in done.stdout and "noise-ceiling" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "samples" / "sim2.h5ad").is_file()
    assert (tmp_path / "site" / "index.html").is_file()
