"""Licences of the parts of a run, which uploaded weights inherit."""

from pathlib import Path

from hinge.backbones.loading import recognise
from hinge.encoders.recipes import RECIPES
from hinge.run.run import Run
from hinge.utils.files import read_json
from hinge.utils.licences import BACKBONE_LICENCES, recorded_licence

_UNKNOWN = "see its model card"


def backbone_licence(folder: Path) -> str | None:
    """Return the licence of a backbone, None if it was pre-trained with this package.

    Parameters
    ----------
    folder
        A folder with `config.json`, or published weights.
    """
    if not (folder / "config.json").is_file():
        return BACKBONE_LICENCES[recognise(folder)] if folder.exists() else None
    return recorded_licence(read_json(folder / "config.json"))


def encoder_licence(name: str) -> str | None:
    """Return the licences of an encoder and of its parts joined by `+`; None for weights without a licence.

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
