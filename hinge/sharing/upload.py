"""Upload runs, encoders and backbones to the Hugging Face Hub, and download runs from it."""

import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from hinge.config import load_config
from hinge.diffusion import HingePipeline
from hinge.diffusion.pipeline_settings import BACKBONE_FOLDER
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.sharing.card import part_card, run_card
from hinge.sharing.licences import backbone_licence, run_backbone_licence
from hinge.utils import checksums, hub
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, read_json, remove_left_behind, write_json
from hinge.utils.licences import BACKBONE_LICENCES, check_licence
from hinge.utils.yaml import read_settings

logger = logging.getLogger(__name__)

MODEL_INDEX = HingePipeline.config_name

_UPLOADED = (".json", ".safetensors")


def push(
    path: Path,
    repository: str,
    licence: str,
    *,
    encoder: str | None = None,
    private: bool = True,
    title: str | None = None,
    allow_licence: bool = False,
) -> str:
    """Upload the folder of a run, of an encoder or of a backbone, with a model card.

    Parameters
    ----------
    path
        The folder; its kind is recognised by its files.
    repository, licence, encoder, private, title, allow_licence
        As for `push_run`.

    Raises
    ------
    DataError
        The folder is none of the three.
    ConfigError
        The weights derive from weights whose licence forbids sharing.
    """
    if (path / "config.yaml").is_file():
        return push_run(
            Run.open(path),
            repository,
            licence,
            encoder=encoder,
            private=private,
            title=title,
            allow_licence=allow_licence,
        )
    _check_identifier(licence)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    inherited = backbone_licence(path) if config.get("model_type") in BACKBONE_LICENCES else config.get("licence")
    card = part_card(config, repository, licence, inherited, title)
    if card is None:
        raise DataError(f"{path} is not the folder of a run, an encoder or a backbone")
    check_licence(str(path), inherited, allow_licence)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(path, folder, ignore=lambda _, names: [n for n in names if not n.endswith(_UPLOADED)])
        (folder / "README.md").write_text(card, encoding="utf-8")
        return hub.upload(folder, repository, private)


def push_run(
    run: Run,
    repository: str,
    licence: str,
    *,
    encoder: str | None = None,
    private: bool = True,
    title: str | None = None,
    allow_licence: bool = False,
) -> str:
    """Upload a trained run: model, panel, configuration, scores, model card, and the backbone it pre-trained.

    Slides, features, draws, local paths and a backbone outside the run are not uploaded.

    Parameters
    ----------
    run
        A trained run.
    repository
        `owner/name`.
    licence
        Identifier of the licence on the hub, e.g. `cc-by-4.0`.
    encoder
        Name under which others load the histology encoder; needed if the run's encoder is a local file.
    private
        Whether a new repository is private.
    title
        Heading of the card; None for the repository's name.
    allow_licence
        States that the user has permission to share weights whose licence forbids it.

    Returns
    -------
    str
        The address of the repository.

    Raises
    ------
    DataError
        The run has not been trained.
    ConfigError
        The encoder is a local file and no other name was given, the licence of the backbone forbids sharing the
        adapted weights in the model, or the hub rejects the upload.
    """
    if run.config.backbone.tuning != "frozen":
        check_licence(f"the model of {run.folder}", run_backbone_licence(run), allow_licence)
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(run, Path(temporary) / "run", repository, licence, encoder, title)
        address = hub.upload(folder, repository, private, f"hinge run {run.folder.name}")
    logger.info("uploaded %s", repository)
    return address


def prepare(
    run: Run, folder: Path, repository: str, licence: str, encoder: str | None = None, title: str | None = None
) -> Path:
    """Write the files that `push_run` uploads into `folder`; parameters as there."""
    if not (run.paths.model / HingeModel.config_name).exists():
        raise DataError(f"{run.folder} holds no trained model; run hinge train first")
    _check_identifier(licence)
    encoder = encoder or run.config.features.encoder_name
    if any("@" in part or Path(part).expanduser().exists() for part in encoder.split("+")):
        raise ConfigError(
            f"the run's encoder {encoder} is a local file: upload it with hinge push and give its name with "
            "--encoder hf-hub:owner/name"
        )
    folder.mkdir(parents=True)
    shutil.copytree(checksums.verified(run.paths.model), folder / "model")
    if run.config.backbone.path is None:
        shutil.copytree(checksums.verified(run.paths.backbone), folder / "backbone")
    for name in ("panel.json", "genes.json", "split.json", "scores.json", "environment.json"):
        if (run.folder / name).exists():
            shutil.copy(checksums.verified(run.folder / name), folder / name)
    _write_config(run, folder / "config.yaml", encoder)
    if (run.folder / MODEL_INDEX).exists():
        _write_index(folder, read_json(run.folder / MODEL_INDEX), encoder=encoder, backbone=BACKBONE_FOLDER)
    (folder / "README.md").write_text(run_card(run, repository, licence, encoder, title), encoding="utf-8")
    checksums.accept(folder)
    return folder


def _check_identifier(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,40}", name):
        raise ConfigError(f"{name!r} is not the identifier of a licence, such as cc-by-4.0, apache-2.0 or other")


def fetch_run(repository: str, output: Path, backbone: Path | None = None, vocabulary: Path | None = None) -> Path:
    """Download a run that `push_run` uploaded into a folder, ready to sample slides; return the folder.

    Parameters
    ----------
    repository
        `owner/name`.
    output
        A new folder for the run.
    backbone, vocabulary
        The expression backbone and its table of genes, for a run whose backbone is not part of the repository.

    Raises
    ------
    DataError
        The folder exists already, or the repository holds no run.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        remove_left_behind(output)  # by a process that was killed after it had written it
        raise DataError(f"{output} exists already; choose another folder with --output")
    with atomic_path(output) as folder:
        hub.fetch(repository, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # of the hub's client
        _complete(repository, folder, backbone, vocabulary)
    return output


def _complete(repository: str, folder: Path, backbone: Path | None, vocabulary: Path | None) -> None:
    """Check what was downloaded, and name a backbone that is not part of it."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{repository} holds no run of hinge: config.yaml is missing")
    if backbone is not None:
        content = read_settings(path)
        section = content.get("backbone")
        if not isinstance(section, dict):
            raise DataError(f"{repository} holds no run of hinge: config.yaml has no section backbone")
        section["path"] = str(backbone.absolute())
        section["vocabulary"] = None if vocabulary is None else str(vocabulary.absolute())
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        if (folder / MODEL_INDEX).is_file():
            _write_index(folder, read_json(folder / MODEL_INDEX), backbone=str(backbone.absolute()))
    load_config(path)  # its relative paths are relative to the folder, wherever it lies


def _write_index(folder: Path, content: dict[str, Any], backbone: str, encoder: str | None = None) -> None:
    """Write `model_index.json` with another path of the backbone, and another name of the encoder."""
    settings = content["settings"]
    settings["backbone"] = {**settings["backbone"], "path": backbone}
    settings["encoder"] = encoder or settings["encoder"]
    write_json(folder / MODEL_INDEX, content)


def _write_config(run: Run, path: Path, encoder: str) -> None:
    """Write the run's configuration without paths of this machine."""
    content = run.config.model_dump(mode="json")
    content["output"] = "."
    content["data"] |= {"path": "slides"}
    content["features"] |= {"folder": None, "encoder": encoder}
    content["evaluation"]["gene_sets"] = None
    content["backbone"] |= {"path": None, "vocabulary": None, "gene_names": None}
    if content["panel"]["method"] == "file":
        content["panel"]["file"] = "panel.json"
    if run.config.backbone.path is not None:
        content["data"]["pretrain"] = []  # the backbone must not be replaced by one that is pre-trained here
        content["backbone"]["path"] = "backbone"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
