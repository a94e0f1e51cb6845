"""Commands that describe the settings and the installation."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hinge.cli.options import Overrides

if TYPE_CHECKING:
    from pydantic import BaseModel


def config(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of a run, whose values are printed.")
    ] = None,
) -> None:
    """Print every key of a run as a YAML file: its value or default, and its description.

    Example: hinge config > run.yaml, or the values of a run: hinge config --config configs/her2st.yaml
    """
    from hinge.config import RunConfig, load_config
    from hinge.utils.errors import ConfigError

    if config is None and overrides:
        raise ConfigError(f"{overrides[0]} changes a setting of a file; name the file with --config")
    values = None if config is None else load_config(config, overrides).model_dump(mode="json")
    print("\n".join(_lines(RunConfig, values)))


def _lines(section: "type[BaseModel]", values: dict[str, Any] | None, indent: str = "") -> Iterator[str]:
    """Yield lines of YAML: the keys of a section, each with its value (the default without `values`) and a comment."""
    import json

    for name, field in section.model_fields.items():
        annotation, description = field.annotation, field.description
        if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
            yield f"{indent}{name}:"
            yield from _lines(annotation, None if values is None else values[name], indent + "  ")
            continue
        if values is None and field.is_required():
            yield f"{indent}{name}:  # required: {description}"
            continue
        value = field.get_default(call_default_factory=True) if values is None else values[name]
        # JSON is YAML
        yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}  # {description}"


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Folder of a run, or of backbones.  [default: this folder]", show_default=False
        ),
    ] = None,
) -> None:
    """Show versions, devices, memory, network, available encoders and backbones, and batch sizes that fit.

    Example: hinge doctor runs/her2st
    """
    from rich.console import Console
    from rich.table import Table

    from hinge.cli.doctor import diagnose

    console = Console()
    for section, facts in diagnose(folder).items():
        table = Table(title=section, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, value in facts:
            table.add_row(name, value)
        console.print(table)
        console.print()
