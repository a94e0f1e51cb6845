"""Arguments and options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hinge.utils.errors import DataError

if TYPE_CHECKING:
    from hinge.run.run import Run

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, e.g. training.epochs=10.", show_default=False),
]


def open_folder(folder: Path) -> "Run":
    """Return the run in a folder; one that is not there is reported before anything heavy is imported."""
    from hinge.run.paths import read_run_config

    config = read_run_config(folder)
    from hinge.run.run import Run

    return Run(config)


def existing(path: Path) -> Path:
    """Return a path that exists; one that does not is reported before anything heavy is imported."""
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    return path


def open_run(config: Path, overrides: list[str] | None) -> "Run":
    """Return the run of a configuration file and settings on the command line."""
    from hinge.config import load_config

    loaded = load_config(config, overrides)
    if not (loaded.output / "model").exists():
        existing(loaded.data.path)
    from hinge.run.run import Run

    return Run(loaded)
