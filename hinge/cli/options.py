"""Arguments and options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hinge.utils.errors import ConfigError, DataError
from hinge.utils.ray_workers import Cluster

if TYPE_CHECKING:
    from hinge.run.run import Run

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
DataSet = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="Data set: a folder or file of slides, or a table of them.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", min=0, max=2**32 - 1)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of a run.", show_default=False)]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="Go on despite this finding of hinge check, by its code; repeat for several.", show_default=False
    ),
]
SpotSide = Annotated[
    float | None, typer.Option("--spot-um", help="Side of the pseudo-spots that cells are pooled in, µm.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Share the work among workers of a Ray cluster: auto or HOST:PORT; without an address, of one on this "
        "machine.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Workers of --ray.  [default: one for each GPU; without GPUs, for each core]", min=1),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, e.g. training.epochs=10.", metavar="KEY=VALUE", show_default=False),
]


def _by_sample(given: list[str] | None, option: str) -> dict[str, str]:
    """Return the values of SAMPLE=VALUE by sample."""
    pairs = [text.partition("=") for text in given or []]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ConfigError(f"{option} takes SAMPLE=VALUE with the name of a sample, not {name + equals + value!r}")
    return {name: value for name, _, value in pairs}


def as_cluster(ray: str | None, workers: int | None) -> Cluster | None:
    """Return the cluster of `--ray` and `--workers`, None without."""
    if ray is None:
        if workers is not None:
            raise ConfigError("--workers is the number of workers of --ray, which is missing")
        return None
    return Cluster(ray, workers)


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


Images = Annotated[
    list[str] | None,
    typer.Option("--image", help="SAMPLE=FILE: the image of a sample that has none; repeat for several."),
]
Resolutions = Annotated[
    list[str] | None, typer.Option("--um-per-px", help="SAMPLE=NUMBER: its resolution; repeat for several.")
]


def open_run(
    config: Path, overrides: list[str] | None, images: list[str] | None = None, um_per_px: list[str] | None = None
) -> "Run":
    """Return the run of a configuration file and settings on the command line."""
    from hinge.config import DataConfig, load_config

    loaded = load_config(config, overrides)
    if images or um_per_px:
        given = {"images": _by_sample(images, "--image"), "um_per_px": _by_sample(um_per_px, "--um-per-px")}
        data = loaded.data.model_dump()
        for key, values in given.items():
            data[key] = {**data[key], **values}
        try:
            loaded = loaded.model_copy(update={"data": DataConfig.model_validate(data)})
        except ValueError as error:
            raise ConfigError("--um-per-px takes SAMPLE=NUMBER with a number above 0, such as C5=0.5") from error
    if not (loaded.output / "model").exists():
        existing(loaded.data.path)
    from hinge.run.run import Run

    return Run(loaded)
