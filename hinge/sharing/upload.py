"""A run as a model repository: what `hinge push` uploads and `hinge download run` brings back."""

import logging
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from hinge import __version__
from hinge.config import load_config, save_config
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.utils import hub
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import read_json

logger = logging.getLogger(__name__)

# of the scores in scores.json, those a reader of the card wants first
CARD_SCORES = ("pcc_50", "pcc_mean", "mse", "crps", "energy", "coverage_90", "coexpression_r")

_UPLOADED = (".json", ".safetensors")

_CARD = """\
---
library_name: hinge
license: {licence}
pipeline_tag: other
tags:
- spatial-transcriptomics
- histology
- gene-expression
- diffusion
---

# {title}

Draws the expression of {genes} genes in every spot of an H&E slide: a masked-diffusion model over genes whose frozen
expression backbone is conditioned on histology features (HINGE, Fang et al., CVPR 2026, arXiv 2603.19766), trained with
hinge {version}.

## Use

```sh
hinge download run {repository} --output {folder}
hinge sample {folder} --slide slide.svs
```

```python
from hinge import CellFMModel, HingeModel

{load}
```

The result is an h5ad with the mean, the standard deviation and every draw, in units of {transform}.

## Data

| | |
| --- | --- |
| training slides | {train} |
| slides for pre-training the backbone | {pretrain} |
| panel | {genes} genes, chosen by {panel} from the training slides |
| values | {transform} |
| spots | {pitch} |
| histology encoder | {encoder} |
| backbone | {backbone} |
| trainable parameters | {parameters} |

## Scores

{scores}

## Intended use and limits

For research on tissue like that of the training slides: same organ, species, stain and spot size. It is not a medical
device, and no diagnosis or treatment may rest on it. Draws show what the model holds possible, not what was measured;
their spread is honest only as far as the test slides above resemble yours. A gene outside the panel is not predicted;
for slides of another laboratory, compare with measured slides of that laboratory first.

## Licence

{licence}. {backbone_licence}

Config digest of the model: `{digest}`.
"""


_PART_CARD = """\
---
library_name: {library}
license: {licence}
tags:
- {tag}
---

# {title}

{what}

```python
{use}
```

For research use; it is not a medical device. Licence: {licence}.
"""


def push(
    path: Path,
    repository: str,
    licence: str,
    encoder: str | None = None,
    private: bool = True,
    title: str | None = None,
) -> str:
    """Upload the folder of a run, of an encoder or of a backbone, with a model card.

    Parameters
    ----------
    path
        The folder; what it is of, its files tell.
    repository, licence, encoder, private, title
        As for `push_run`.

    Raises
    ------
    DataError
        The folder is none of the three.
    """
    if (path / "config.yaml").is_file():
        return push_run(Run.open(path), repository, licence, encoder, private, title)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    card = {"licence": _licence(licence), "title": _plain(title or repository.rpartition("/")[2])}
    if config.get("model_type") == "cellfm":
        card |= {"library": "hinge", "tag": "gene-expression"}
        card["what"] = "An expression backbone (CellFM's architecture) for hinge."
        card["use"] = f'from hinge import CellFMModel\n\nbackbone = CellFMModel.from_pretrained("{repository}")'
    elif "architecture" in config:
        card |= {"library": "timm", "tag": "histology"}
        card["what"] = f"A histology encoder, {_plain(config['architecture'])}, for timm and hinge."
        card["use"] = f'from hinge import load_encoder\n\nencoder = load_encoder("hf-hub:{repository}")'
    else:
        raise DataError(f"{path} is the folder of no run, no encoder and no backbone")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(path, folder, ignore=lambda _, names: [n for n in names if not n.endswith(_UPLOADED)])
        (folder / "README.md").write_text(_PART_CARD.format(**card), encoding="utf-8")
        return hub.upload(folder, repository, private)


def push_run(
    run: Run, repository: str, licence: str, encoder: str | None = None, private: bool = True, title: str | None = None
) -> str:
    """Upload a trained run: model, panel, configuration, scores, model card, and the backbone it pre-trained.

    Slides, features and draws stay where they are, and so do paths of this machine. A backbone from elsewhere is not
    uploaded: its licence is not the uploader's to give.

    Parameters
    ----------
    run
        A trained run.
    repository
        `owner/name`.
    licence
        Identifier as the hub knows it, e.g. `cc-by-4.0`.
    encoder
        Name under which others load the histology encoder; needed where the run's own is a local file.
    private
        Whether a repository that is made is private.
    title
        Of the card; the repository's name by default.

    Returns
    -------
    str
        The repository's address.

    Raises
    ------
    DataError
        The run has not been trained.
    ConfigError
        The encoder is a local file and no other name was given, or the hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(run, Path(temporary) / "run", repository, licence, encoder, title)
        address = hub.upload(folder, repository, private, f"hinge run {run.folder.name}")
    logger.info("uploaded %s", repository)
    return address


def prepare(
    run: Run, folder: Path, repository: str, licence: str, encoder: str | None = None, title: str | None = None
) -> Path:
    """Write into `folder` what `push_run` uploads; arguments as there."""
    if not (run.paths.model / HingeModel.config_name).exists():
        raise DataError(f"{run.folder} holds no trained model; run hinge train first")
    _licence(licence)
    encoder = encoder or run.config.features.encoder
    if any("@" in part or Path(part).expanduser().exists() for part in encoder.split("+")):
        raise ConfigError(
            f"the run's encoder {encoder} is a file of this machine: push it too, and give the name that others load "
            "it by with --encoder hf-hub:owner/name"
        )
    folder.mkdir(parents=True)
    shutil.copytree(run.paths.model, folder / "model")
    if run.config.backbone.path is None:
        shutil.copytree(run.paths.backbone, folder / "backbone")
    for name in ("panel.json", "genes.json", "split.json", "scores.json", "environment.json"):
        if (run.folder / name).exists():
            shutil.copy(run.folder / name, folder / name)
    _write_config(run, folder / "config.yaml", encoder)
    (folder / "README.md").write_text(_card(run, repository, licence, encoder, title), encoding="utf-8")
    return folder


def _licence(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,40}", name):
        raise ConfigError(f"{name!r} is no identifier of a licence, such as cc-by-4.0, apache-2.0 or other")
    return name


def fetch_run(repository: str, output: Path, backbone: Path | None = None, vocabulary: Path | None = None) -> Path:
    """Download a run that `push_run` uploaded into a folder, ready to sample slides.

    Parameters
    ----------
    repository
        `owner/name`.
    output
        Folder for the run; there must be none yet.
    backbone, vocabulary
        The pre-trained expression model, and its table of genes, where the run uses one from elsewhere.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} is there already; choose another folder")
    hub.fetch(repository, output)
    path = output / "config.yaml"
    if not path.is_file():
        raise DataError(f"{repository} holds no run of hinge: config.yaml is missing")
    if backbone is not None:
        content = yaml.safe_load(path.read_text("utf-8"))
        content["backbone"]["path"] = str(backbone.absolute())
        content["backbone"]["vocabulary"] = None if vocabulary is None else str(vocabulary.absolute())
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    save_config(load_config(path), path)  # tells what is missing, and makes paths absolute
    return output


def _write_config(run: Run, path: Path, encoder: str) -> None:
    """The run's configuration without paths of this machine."""
    content = run.config.model_dump(mode="json")
    content["output"] = "."
    content["data"] |= {"path": "slides", "table": None}
    content["features"] |= {"folder": None, "encoder": encoder}
    content["evaluation"]["gene_sets"] = None
    content["backbone"] |= {"path": None, "vocabulary": None, "gene_names": None}
    if content["panel"]["method"] == "file":
        content["panel"]["file"] = "panel.json"
    if run.config.backbone.path is not None:
        content["data"]["pretrain"] = []  # and so nobody pre-trains another one in its place
        content["backbone"]["path"] = "backbone"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _card(run: Run, repository: str, licence: str, encoder: str, title: str | None) -> str:
    config, model = run.config, read_json(run.paths.model / HingeModel.config_name)
    facts = read_json(run.folder / "split.json") if (run.folder / "split.json").exists() else {}
    own = config.backbone.path is None
    load = f'model = HingeModel.from_pretrained("{repository}")'
    if not own:
        load = (
            "backbone = CellFMModel.from_pretrained(...)  # the file whose digest is below\n"
            f'model = HingeModel.from_pretrained("{repository}", backbone)'
        )
    digest = model.get("backbone_digest") or ""
    pitch, diameter = facts.get("spot_pitch_um"), facts.get("spot_diameter_um")
    return _CARD.format(
        licence=licence,
        title=_plain(title or repository.rpartition("/")[2]),
        version=__version__,
        repository=repository,
        folder=f"runs/{repository.rpartition('/')[2]}",
        load=load,
        genes=len(run.panel().genes),
        transform=config.transform,
        train=len(config.data.train),
        pretrain=len(config.data.pretrain) or ("the training slides" if own else "none"),
        panel=config.panel.method,
        pitch=f"{pitch:g} µm apart, {diameter:g} µm wide" if pitch and diameter else "as in the training slides",
        encoder=_plain(encoder),
        backbone="pre-trained with this run, in `backbone/`" if own else f"not included; digest `{digest[:16]}`",
        parameters=f"{_count_weights(run.paths.model):,}",
        scores=_score_table(run),
        backbone_licence=""
        if own
        else "The expression backbone has a licence of its own and is not part of this repository.",
        digest=digest[:16],
    )


def _count_weights(folder: Path) -> int:
    """Numbers in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _score_table(run: Run) -> str:
    """Mean scores over the test slides, a row for each method, as a Markdown table."""
    if not run.paths.scores.exists():
        return "This run was not scored before it was uploaded."
    scores = read_json(run.paths.scores)
    definitions = scores.get("definitions", {})
    keys = [key for key in CARD_SCORES if any(row.get(key) is not None for row in scores["rows"])]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in scores["rows"]:
        rows.setdefault(row["method"], []).append(row)
    slides = len({row["slide"] for row in scores["rows"]})
    head = ["method", *(definitions.get(key, {}).get("label", key) for key in keys)]
    lines = [head, ["---"] * len(head)]
    for method, group in rows.items():
        cells = []
        for key in keys:
            known = [row[key] for row in group if row.get(key) is not None]
            cells.append(f"{sum(known) / len(known):.3f}" if known else "")
        lines.append([method, *cells])
    table = "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)
    held_out = "the held-out slide" if slides == 1 else f"{slides} held-out slides"
    return f"Means over {held_out}, beside baselines and the noise ceiling.\n\n{table}"


def _plain(text: object) -> str:
    """Text that no table, link or markup begins in."""
    return re.sub(r"[|<>\[\]`*\\\n\r]", " ", str(text)).strip()
