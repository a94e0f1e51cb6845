"""The licences that uploaded weights inherit from the weights they were made of."""

import re
from pathlib import Path

from hinge.backbones.loading import recognise
from hinge.encoders.recipes import RECIPES
from hinge.run.run import Run
from hinge.utils.errors import ConfigError
from hinge.utils.files import read_json

BACKBONE_LICENCES = {"cellfm": "cc-by-nc-nd-4.0", "scgpt": "mit", "tahoe": "apache-2.0"}
"""Licences of the published weights of each model, as their model cards state them."""

_CELLFM_WIDTH = 1536  # of both published sizes

_UNKNOWN = "see its model card"


def forbids_sharing(licence: str | None) -> bool:
    """Return whether a licence, e.g. "CC BY-NC-ND 4.0", forbids sharing adapted or converted weights."""
    return licence is not None and "nd" in re.split(r"[\s-]+", licence.lower())


def backbone_licence(folder: Path) -> str | None:
    """Return the licence of a backbone, None if it was pre-trained with this package.

    Parameters
    ----------
    folder
        A folder with `config.json`, or published weights. Folders of CellFM that were converted before the licence was
        recorded are recognised by the width of the published models.
    """
    if not (folder / "config.json").is_file():
        return BACKBONE_LICENCES[recognise(folder)] if folder.exists() else None
    config = read_json(folder / "config.json")
    old = config.get("model_type") == "cellfm" and config.get("hidden_size") == _CELLFM_WIDTH
    return config.get("licence") or (BACKBONE_LICENCES["cellfm"] if old else None)


def encoder_licence(name: str) -> str | None:
    """Return the licence of an encoder, or of those that are joined by `+`; None for weights without a licence.

    Parameters
    ----------
    name
        Name for `load_encoder`.
    """
    licences = []
    for part in name.replace("stages:", "").split("+"):
        plain, folder = part.partition("@")[0], Path(part).expanduser()
        if plain in RECIPES:
            licences.append(RECIPES[plain].licence)
        elif (folder / "config.json").is_file():
            licences.append(read_json(folder / "config.json").get("licence"))
        elif part != "stain-texture":
            licences.append(_UNKNOWN)
    return ", ".join(dict.fromkeys(licence for licence in licences if licence)) or None


def run_backbone_licence(run: Run) -> str | None:
    """Return the licence of a run's backbone, None if its weights were trained in the run or are random."""
    settings = run.config.backbone
    return None if settings.path is None or settings.weights == "random" else backbone_licence(run.paths.backbone)


def check_licence(what: str, licence: str | None, allowed: bool) -> None:
    """Raise an error if a licence forbids the upload of weights, unless the user states to have permission.

    Raises
    ------
    ConfigError
        The licence forbids it.
    """
    if forbids_sharing(licence) and not allowed:
        raise ConfigError(
            f"{what} may not be uploaded: it is made from weights under {licence}, which forbids sharing adapted or "
            "converted weights; give --allow-licence if their authors gave permission"
        )
