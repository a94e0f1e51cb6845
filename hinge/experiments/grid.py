"""The schema of a grid of runs, and the runs (cells) that it consists of."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from hinge.config import PATHS, RunConfig, check_config, explain
from hinge.data.simulate import simulate_slides
from hinge.run.preparation import Preparation
from hinge.utils.errors import ConfigError
from hinge.utils.files import read_json, write_json
from hinge.utils.settings import LARGEST_SEED, Settings
from hinge.utils.yaml import read_settings

_SIMULATED_PRETRAIN_FROM = 100  # number of the first simulated slide without an image


def _name(value: str) -> str:
    if not value or value.startswith(".") or set(value) & set("/\\:"):
        raise ValueError(f"{value!r} cannot be the name of a folder")
    return value


class SimulatedTissue(Settings):
    """Slides that are simulated for the grid: sim0, sim1, … with images; sim100, … with counts alone."""

    slides: int = Field(4, ge=2, description="a number of slides with images; the last is the test slide")
    pretrain: int = Field(8, ge=1, le=200)
    grid: tuple[int, int] = (15, 15)
    pretrain_grid: tuple[int, int] = (20, 20)
    genes: int = Field(300, ge=2)
    seed: int = Field(0, ge=0, le=LARGEST_SEED)

    def data(self, folder: Path) -> dict[str, Any]:
        """The section `data` of a run on these slides."""
        names = [f"sim{number}" for number in range(self.slides)]
        pretrain = [f"sim{_SIMULATED_PRETRAIN_FROM + number}" for number in range(self.pretrain)]
        return {"path": str(folder), "format": "h5ad", "train": names[:-1], "test": names[-1:], "pretrain": pretrain}

    def write(self, folder: Path) -> None:
        """Simulate the slides that are missing in a folder."""
        common: dict[str, Any] = {"n_genes": self.genes, "seed": self.seed}
        parts: tuple[tuple[int, int, dict[str, Any]], ...] = (
            (0, self.slides, {"grid": self.grid}),
            (_SIMULATED_PRETRAIN_FROM, self.pretrain, {"grid": self.pretrain_grid, "with_image": False}),
        )
        wanted, claim = self.model_dump(mode="json"), folder / "simulated.json"
        if claim.exists() and read_json(claim) != wanted:
            raise ConfigError(f"{folder} holds other simulated tissue; choose another output folder")
        write_json(claim, wanted)
        for first, count, options in parts:
            if not all((folder / f"sim{first + number}.h5ad").exists() for number in range(count)):
                simulate_slides(folder, n_slides=count, first=first, **common, **options)


class Grid(Settings):
    """The variants, held-out slides and seeds that `hinge ablate` runs."""

    base: Path = Field(description="the YAML file of a run")
    settings: dict[str, Any] = Field({}, description="key: value, for every cell")
    held_out: list[str | list[str]] | Literal["patients"] | None = Field(
        None,
        description="a list of slides, or of lists of slides: each is the test set once, and the other slides of "
        "data.train and data.test are the training set; patients: the slides of each patient are the test set once, "
        "and data.pretrain does not have that patient either; None: as in the base",
    )
    seeds: list[Annotated[int, Field(ge=0, le=LARGEST_SEED)]] = Field([0], min_length=1, description="a list of seeds")
    simulate: SimulatedTissue | None = None
    variants: dict[Annotated[str, AfterValidator(_name)], dict[str, Any]] = Field(
        min_length=1, description="name: {key: value, …} for each variant"
    )


@dataclass(frozen=True)
class Cell:
    """One run of a grid: a variant, its test slides and a seed.

    `foundation` is the configuration of the run that makes the panel and the backbone, if several cells share them.
    """

    variant: str
    held_out: str
    seed: int
    config: RunConfig
    foundation: RunConfig | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.held_out}/seed{self.seed}"

    @property
    def result_path(self) -> Path:
        return self.config.output / "cell.json"

    @property
    def error_path(self) -> Path:
        return self.config.output / "error.txt"

    def digest(self) -> str:
        """Return the digest of all settings that decide the scores."""
        return _digest(self.config.model_dump(mode="json", exclude={"output"}))

    def training_digest(self) -> str:
        """Return the digest of all settings that decide the trained model."""
        return _digest(self.config.model_dump(mode="json", exclude={"output", "sampling", "evaluation"}))

    def is_finished(self) -> bool:
        return self.result_path.exists() and read_json(self.result_path)["config"] == self.digest()


def load_grid(path: str | Path) -> Grid:
    """Read the YAML file of a grid. Relative paths in it are relative to its own folder.

    Raises
    ------
    ConfigError
        One sentence that names the key and what it takes.
    """
    path = Path(path)
    content = read_settings(path, paths=[("base",)])
    try:
        grid = Grid.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Grid)}") from error
    dotted = {".".join(keys) for keys in PATHS}
    for settings in (grid.settings, *grid.variants.values()):
        for key, value in settings.items():
            if key in dotted and isinstance(value, str):
                settings[key] = str(path.absolute().parent / os.path.expanduser(value))
    return grid


def make_cells(grid: Grid, output: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Return the runs of a grid with checked settings.

    Baselines are scored in the first variant alone, because they do not depend on the model.

    Parameters
    ----------
    grid
        Variants, held-out slides and seeds.
    output
        Folder for all results.
    overrides
        `key=value` settings for every cell.

    Raises
    ------
    ConfigError
        A setting is wrong; the message names the variant.
    """
    output = Path(os.path.realpath(output))
    common = _as_overrides(grid.settings)
    if grid.simulate is not None:
        common.append(f"data={json.dumps(grid.simulate.data(output / 'slides'))}")
    common += overrides
    cells = []
    for number, (variant, own) in enumerate(grid.variants.items()):
        alone = [] if number == 0 or "evaluation.baselines" in own else ["evaluation.baselines=[]"]

        def config(*more: str, variant=variant, own=own, alone=alone) -> RunConfig:
            settings = [*common, *alone, *_as_overrides(own), *more]
            return check_config(read_settings(grid.base, settings, PATHS), f"variant {variant} of {grid.base}")

        plain = config(f"output={json.dumps(str(output))}")
        slides = [*plain.data.train, *plain.data.test]
        # one for all cells: it keeps the patients of the slides that it reads
        patient = Preparation(plain).patient
        for held in _held_out(grid, slides, patient):
            test = plain.data.test if held is None else [held] if isinstance(held, str) else held
            unknown = [name for name in test if name not in slides]
            if unknown:
                raise ConfigError(f"held_out names {unknown[0]}, which is in neither data.train nor data.test")
            if not test:
                raise ConfigError(f"{grid.base} names no test slides; give held_out")
            train = plain.data.train if held is None else [name for name in slides if name not in test]
            label = "+".join(test)
            for seed in grid.seeds:
                folder = output / variant / label / f"seed{seed}"
                more = {"data.train": train, "data.test": test, "seed": seed, "sampling.seed": seed}
                if grid.held_out == "patients":
                    tested = {patient(name) for name in test}
                    more["data.pretrain"] = [name for name in plain.data.pretrain if patient(name) not in tested]
                cell = config(*_as_overrides({"output": str(folder), **more}))
                cells.append(Cell(variant, label, seed, cell))
    names = [cell.name for cell in cells]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"the grid holds {repeated[0]} more than once")
    return _with_shared_parts(cells, output, grid.seeds[0])


def _held_out(grid: Grid, slides: list[str], patient: Callable[[str], str]) -> Sequence[str | list[str] | None]:
    """Return the test sets of a grid, None for that of the base; `patient` gives that of a slide."""
    if grid.held_out != "patients":
        return [None] if grid.held_out is None else grid.held_out
    of_patients: dict[str, list[str]] = {}
    for name in slides:
        of_patients.setdefault(patient(name), []).append(name)
    if len(of_patients) < 2:
        raise ConfigError(
            f"held_out is patients, and all slides of {grid.base} are of patient {next(iter(of_patients))}; "
            "data.patient_prefix or the column patient of a table tells patients apart"
        )
    return list(of_patients.values())


def _with_shared_parts(cells: list[Cell], output: Path, first_seed: int) -> list[Cell]:
    """Return the cells with the paths of the features, the panel and the backbone that they share."""
    shared, first = [], None
    for cell in cells:
        config = cell.config
        features = config.features
        cut = (features.patch_um, features.views)
        first = first or cut
        folder = features.folder or output / "features"
        if cut != first:  # the name of a feature file holds slide and encoder only
            folder = folder / f"{'own' if cut[0] is None else f'{cut[0]:g}'}um-{cut[1]}views"
        update: dict[str, Any] = {"features": features.model_copy(update={"folder": folder})}
        foundation = None
        if config.backbone.path is None:
            # only the settings that panel and backbone depend on, so that variants share them
            own = {"weights": "pretrained", "tuning": "frozen"}
            foundation = RunConfig(
                output=output,
                seed=first_seed,
                transform=config.transform,
                data=config.data.model_copy(update={"test": []}),
                panel=config.panel,
                backbone=config.backbone.model_copy(update=own),
            )
            path = output / "shared" / _digest(foundation.model_dump(mode="json", exclude={"output"}))
            update["panel"] = config.panel.model_copy(update={"method": "file", "file": path / "panel.json"})
            # the architecture is that of the weights at the path
            given = {"path": path / "backbone", "architecture": "cellfm"}
            update["backbone"] = config.backbone.model_copy(update=given)
            foundation = foundation.model_copy(update={"output": path})
        shared.append(replace(cell, config=config.model_copy(update=update), foundation=foundation))
    return shared


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    # JSON is YAML
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
