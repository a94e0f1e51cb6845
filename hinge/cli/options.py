"""Arguments and options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hinge.utils.errors import DataError

if TYPE_CHECKING:
    from hinge.run.run import Run

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
DataSet = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="Data set: a folder or file of slides, or a table of them.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, e.g. training.epochs=10.", metavar="KEY=VALUE", show_default=False),
]


def open_folder(folder: Path, trained: bool = False) -> "Run":
    """Return the run in a folder; one that is missing, or not trained, is reported before heavy imports."""
    from hinge.run.paths import RunPaths, read_run_config

    config = read_run_config(folder)
    if trained:
        RunPaths(config).require_model()
    from hinge.run.run import Run

    return Run(config, opened=True)


def existing(path: Path) -> Path:
    """Return a path that exists; a missing one is reported before heavy imports."""
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
