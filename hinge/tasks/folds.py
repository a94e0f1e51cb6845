"""Cross-validation folds over slides, patients or groups from a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anndata import AnnData

from hinge.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class Fold:
    """Training slides and held-out slides."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(groups: Mapping[str, str], hold_out: list[str] | None = None) -> list[Fold]:
    """Return one fold per group of slides, whose slides are held out together.

    Parameters
    ----------
    groups
        Group of each slide.
    hold_out
        Groups whose folds are returned; None for all.

    Raises
    ------
    ConfigError
        There is only one group, or `hold_out` names an unknown one.
    """
    names = sorted(set(groups.values()))
    if len(names) < 2:
        raise ConfigError(f"all slides ({', '.join(groups)}) are in one group, {names[0]}, and --folds needs two")
    unknown = [name for name in hold_out or [] if name not in names]
    if unknown:
        raise ConfigError(f"there is no group {unknown[0]!r} to hold out; choose from {', '.join(names)}")
    sides = {name: [slide for slide, group in groups.items() if group == name] for name in names}
    return [
        Fold(name, tuple(slide for slide in groups if slide not in sides[name]), tuple(sides[name]))
        for name in names
        if not hold_out or name in hold_out
    ]


def slide_groups(slides: Mapping[str, AnnData], folds: str) -> dict[str, str]:
    """Return the group of each slide: itself, its patient, or an entry of a table.

    Parameters
    ----------
    slides
        By name.
    folds
        `slide`; `patient`, from obs["patient"] or, in HER2ST, the first letter of the section; or a CSV or TSV file
        with slides in its first column and their groups in the second.
    """
    if folds == "slide":
        return {name: name for name in slides}
    if folds == "patient":
        return {name: _patient(name, slide) for name, slide in slides.items()}
    path = Path(folds)
    if path.suffix not in (".csv", ".tsv"):
        raise ConfigError(f"--folds must be slide, patient, or a .csv or .tsv file, not {folds!r}")
    try:
        table = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", index_col=0, dtype=str)
        groups = table.iloc[:, 0].to_dict()
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not a table of slides and their groups: {error}") from error
    missing = [name for name in slides if not isinstance(groups.get(name), str)]
    if missing:
        raise DataError(f"{path} has no group for slide {missing[0]}")
    return {name: groups[name] for name in slides}


def _patient(name: str, slide: AnnData) -> str:
    if "patient" in slide.obs:
        patients = slide.obs["patient"].astype(str).unique()
        if len(patients) > 1:
            raise DataError(f"slide {name} has spots of {len(patients)} patients; a fold needs one patient per slide")
        return str(patients[0])
    if slide.uns["hinge"]["source_format"] == "her2st":
        return name[0]
    raise DataError(f"slide {name} has no obs['patient']: give --folds a table of slides and patients")
