"""Arguments and options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hinge.run.run import Run

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, e.g. training.epochs=10.", show_default=False),
]


def open_run(config: Path, overrides: list[str] | None) -> "Run":
    """Return the run of a configuration file and settings on the command line."""
    from hinge.config import load_config
    from hinge.run.run import Run

    return Run(load_config(config, overrides))
