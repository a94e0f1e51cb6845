"""Model cards of runs, encoders and backbones."""

import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hinge.evaluation.tables import read_scores
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.sharing.licences import encoder_licence, run_backbone_licence
from hinge.utils.files import read_json
from hinge.utils.packages import VERSION

CARD_SCORES = ("pcc_50", "pcc_mean", "mse", "crps", "energy", "coverage_90", "coexpression_r")
"""Scores in the table of a card, a selection of those in `scores.json`."""

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
from hinge import HingeModel, load_backbone

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
device, and no diagnosis or treatment may rest on it. Draws are samples of the model, not measurements; their spread is
calibrated only as far as your slides resemble the test slides above. A gene outside the panel is not predicted; for
slides of another laboratory, compare with measured slides of that laboratory first.

## Licence

{licence}.{inherited}

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

For research use; it is not a medical device. Licence: {licence}. {inherited}
"""


_ARCHITECTURES = {"cellfm": "CellFM", "scgpt": "scGPT", "tahoe": "Tahoe-x1"}


def part_card(
    config: dict[str, Any], repository: str, licence: str, inherited: str | None, title: str | None
) -> str | None:
    """Return the card of a backbone or an encoder, None for anything else.

    Parameters
    ----------
    config
        Content of its `config.json`.
    repository, licence
        `owner/name` and the identifier of the licence on the hub.
    inherited
        Licence of the weights that it was made from, if any.
    title
        Heading; None for the repository's name.
    """
    if config.get("model_type") in _ARCHITECTURES:
        library, tag = "hinge", "gene-expression"
        what = f"An expression backbone ({_ARCHITECTURES[config['model_type']]}'s architecture) for hinge."
        use = f'from hinge import load_backbone\n\nbackbone = load_backbone("{repository}")'
    elif "architecture" in config:
        library, tag = "timm", "histology"
        what = f"A histology encoder, {_plain(config['architecture'])}, for timm and hinge."
        use = f'from hinge import load_encoder\n\nencoder = load_encoder("hf-hub:{repository}")'
    else:
        return None
    return _PART_CARD.format(
        library=library,
        tag=tag,
        what=what,
        use=use,
        licence=licence,
        inherited="" if inherited is None else f"Made from weights under {_plain(inherited)}.",
        title=_plain(title or repository.rpartition("/")[2]),
    )


def run_card(run: Run, repository: str, licence: str, encoder: str, title: str | None) -> str:
    """Return the card of a run.

    Parameters
    ----------
    run
        A trained run.
    repository, licence
        `owner/name` and the identifier of the licence on the hub.
    encoder
        Name under which others load the run's histology encoder.
    title
        Heading; None for the repository's name.
    """
    config, model = run.config, read_json(run.paths.model / HingeModel.config_name)
    facts = read_json(run.folder / "split.json") if (run.folder / "split.json").exists() else {}
    own = config.backbone.path is None
    load = f'model = HingeModel.from_pretrained("{repository}")'
    if not own:
        load = (
            "backbone = load_backbone(...)  # the file whose digest is below\n"
            f'model = HingeModel.from_pretrained("{repository}", backbone)'
        )
    digest = model.get("backbone_digest") or ""
    pitch, diameter = facts.get("spot_pitch_um"), facts.get("spot_diameter_um")
    return _CARD.format(
        licence=licence,
        title=_plain(title or repository.rpartition("/")[2]),
        version=VERSION,
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
        inherited=_inherited(run),
        digest=digest[:16],
    )


def _inherited(run: Run) -> str:
    """Return sentences on the licences of the encoder and of a backbone from elsewhere."""
    sentences = []
    encoder = encoder_licence(run.config.features.encoder_name)
    if encoder is not None:
        sentences.append(
            f"The weights of the histology encoder are not part of this repository; their licence: {_plain(encoder)}."
        )
    if run.config.backbone.path is not None:
        backbone = _plain(run_backbone_licence(run) or "not recorded")
        if run.config.backbone.tuning == "frozen":
            sentences.append(f"The expression backbone is not part of this repository; its licence: {backbone}.")
        else:
            sentences.append(f"The model holds adapted weights of an expression backbone; its licence: {backbone}.")
    return "".join(f" {sentence}" for sentence in sentences)


def _count_weights(folder: Path) -> int:
    """Return the number of values in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _score_table(run: Run) -> str:
    """Return the mean scores over the test slides, one row for each method, as a Markdown table."""
    if not run.paths.scores.exists():
        return "This run was not scored before it was uploaded."
    scores = read_scores(run.paths.scores)
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
    """Return text without the characters that begin tables, links and markup."""
    return re.sub(r"[|<>\[\]`*\\\n\r]", " ", str(text)).strip()
