"""Grids of runs: named variants of one configuration, for several held-out slides and seeds, and their table.

    OUT/slides/               simulated tissue, where the grid asks for it
    OUT/features/             one HDF5 file per slide and encoder, for all cells
    OUT/shared/DIGEST/        panel and pre-trained backbone, one for all cells with the same settings and slides
    OUT/VARIANT/SLIDE/seedN/  a cell: a run's folder, and cell.json with its scores
    OUT/table.csv, table.md   mean and standard deviation over slides and seeds

Cells that differ in sampling alone share the trained model too. What is finished is skipped: the same command goes on
where it stopped.
"""

import contextlib
import csv
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hinge.config import PATHS, BackboneConfig, RunConfig, check_config, explain, read_settings
from hinge.data.simulate import simulate_slides
from hinge.evaluation.statistics import summarise_rows
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.utils.errors import ConfigError, HingeError, Interrupted
from hinge.utils.files import atomic_path, read_json, write_json
from hinge.utils.locks import lock_folder

logger = logging.getLogger(__name__)

COLUMNS = {
    "pcc_50": "PCC-50",
    "pcc_mean": "mean PCC",
    "mse": "MSE",
    "crps": "CRPS",
    "energy": "energy",
    "variogram": "variogram",
    "coverage_50": "50 % covers",
    "coverage_90": "90 % covers",
    "coexpression_r": "co-expr. r",
    "coexpression_rmse": "RMSE",
    "coexpression_r_pooled": "pooled r",
    "coexpression_rmse_pooled": "RMSE",
    "moran_ratio": "Moran's I ratio",
    "c2st_auc": "C2ST AUC",
    "likelihood_gain": "log-likelihood gain, nats",
    "likelihood_share": "of the oracle's",
    "seconds_training": "training, s",
    "seconds_sampling": "sampling, s",
    "trainable": "trained parameters",
}
"""Columns of a table and their headings. Gains are over the marginal distribution of the training spots, per spot."""

_SIMULATED_PRETRAIN_FROM = 100  # slides without image have numbers of their own, from here on


def _name(value: str) -> str:
    if not value or value.startswith(".") or set(value) & set("/\\:"):
        raise ValueError(f"{value!r} cannot be the name of a folder")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SimulatedTissue(_Part):
    """Slides that are simulated for the grid: sim0, sim1, … with images, sim100, … counts alone."""

    slides: int = Field(4, ge=2, description="a number of slides with images; the last is the test slide")
    pretrain: int = Field(8, ge=1, le=200)
    grid: tuple[int, int] = (15, 15)
    pretrain_grid: tuple[int, int] = (20, 20)
    genes: int = Field(300, ge=2)
    seed: int = Field(0, ge=0)

    def data(self, folder: Path) -> dict[str, Any]:
        """The section `data` of a run on these slides."""
        names = [f"sim{number}" for number in range(self.slides)]
        pretrain = [f"sim{_SIMULATED_PRETRAIN_FROM + number}" for number in range(self.pretrain)]
        return {"path": str(folder), "format": "h5ad", "train": names[:-1], "test": names[-1:], "pretrain": pretrain}

    def write(self, folder: Path) -> None:
        """Simulate what is not there yet."""
        common: dict[str, Any] = {"n_genes": self.genes, "seed": self.seed}
        parts: tuple[tuple[int, int, dict[str, Any]], ...] = (
            (0, self.slides, {"grid": self.grid}),
            (_SIMULATED_PRETRAIN_FROM, self.pretrain, {"grid": self.pretrain_grid, "with_image": False}),
        )
        asked, claim = self.model_dump(mode="json"), folder / "simulated.json"
        if claim.exists() and read_json(claim) != asked:
            raise ConfigError(f"{folder} holds other simulated tissue; choose another output folder")
        write_json(claim, asked)
        for first, count, options in parts:
            if not all((folder / f"sim{first + number}.h5ad").exists() for number in range(count)):
                simulate_slides(folder, n_slides=count, first=first, **common, **options)


class Grid(_Part):
    """What `hinge ablate` runs."""

    base: Path = Field(description="the YAML file of a run")
    settings: dict[str, Any] = Field({}, description="key: value, for every cell")
    held_out: list[str | list[str]] | None = Field(
        None,
        description="a list of slides, or of lists of slides, each of which is the test once while the others of "
        "data.train and data.test train; None: as the base says",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="a list of seeds")
    simulate: SimulatedTissue | None = None
    variants: dict[Annotated[str, AfterValidator(_name)], dict[str, Any]] = Field(
        min_length=1, description="name: {key: value, …} for each variant"
    )


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    variant: str
    held_out: str
    seed: int
    config: RunConfig
    foundation: RunConfig | None = None  # the run that makes its panel and backbone

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.held_out}/seed{self.seed}"

    @property
    def result_path(self) -> Path:
        return self.config.output / "cell.json"

    def digest(self) -> str:
        return _digest(self.config.model_dump(mode="json", exclude={"output"}))

    def is_finished(self) -> bool:
        return self.result_path.exists() and read_json(self.result_path)["config"] == self.digest()


@dataclass(frozen=True)
class Failure:
    """What did not work, and why, in one sentence."""

    name: str
    message: str


@dataclass(frozen=True)
class Tables:
    """Where the tables lie, and which cells are missing in them."""

    csv: Path
    markdown: Path
    failures: list[Failure]


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
    """The runs of a grid, their settings checked; methods beside the model are scored in the first variant alone.

    Parameters
    ----------
    grid
        What to run.
    output
        Folder for everything.
    overrides
        `key=value`, for every cell.

    Raises
    ------
    ConfigError
        A setting is wrong; it names the variant.
    """
    output = Path(os.path.realpath(output))
    common = _as_overrides(grid.settings)
    if grid.simulate is not None:
        common.append(f"data={json.dumps(grid.simulate.data(output / 'slides'))}")
    common += overrides
    cells = []
    for number, (variant, own) in enumerate(grid.variants.items()):
        # the first variant's baselines are those of all
        alone = [] if number == 0 or "evaluation.baselines" in own else ["evaluation.baselines=[]"]

        def config(*more: str, variant=variant, own=own, alone=alone) -> RunConfig:
            settings = [*common, *alone, *_as_overrides(own), *more]
            return check_config(read_settings(grid.base, settings, PATHS), f"variant {variant} of {grid.base}")

        plain = config(f"output={json.dumps(str(output))}")
        slides = [*plain.data.train, *plain.data.test]
        for held in [None] if grid.held_out is None else grid.held_out:
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
                cell = config(*_as_overrides({"output": str(folder), **more}))
                cells.append(Cell(variant, label, seed, cell))
    names = [cell.name for cell in cells]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} stands in the grid more than once")
    return _with_shared_parts(cells, output, grid.seeds[0])


def run_grid(
    grid: Grid, output: str | Path, overrides: Sequence[str] = (), jobs: int = 1
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Do what is missing of a grid.

    Parameters
    ----------
    grid, overrides
        As `make_cells`.
    output
        Folder for everything.
    jobs
        Processes at the same time, each with its share of the cores; where there are several GPUs, each has one.

    Returns
    -------
    tuple
        The rows of scores of all finished cells (each with `variant`, `seed`, and what it cost), and the failures.
    """
    output = Path(output)
    cells = make_cells(grid, output, overrides)
    with lock_folder(output):
        if grid.simulate is not None:
            grid.simulate.write(Path(os.path.realpath(output)) / "slides")
        waiting = [cell for cell in cells if not cell.is_finished()]
        logger.info("%d cells, %d of them finished", len(cells), len(cells) - len(waiting))

        patches = {}
        for cell in waiting:
            (cell.config.output / "error.txt").unlink(missing_ok=True)
            for slide in (*cell.config.data.train, *cell.config.data.test):
                features = cell.config.features
                patches[features.folder, features.encoder, cell.config.data.path, slide] = (cell, slide)
        foundations = {str(cell.foundation.output): cell.foundation for cell in waiting if cell.foundation is not None}
        groups: dict[str, list[Cell]] = {}
        failures = []
        with _Workers(jobs) as workers:
            # what fails here is told by the cells that need it
            workers.run(
                "features", _extract, {f"features of {slide}": (cell, slide) for cell, slide in patches.values()}
            )
            broken = workers.run("backbones", _pretrain, {path: (config,) for path, config in foundations.items()})
            for cell in waiting:
                path = "" if cell.foundation is None else str(cell.foundation.output)
                if path in broken:
                    failures.append(Failure(cell.name, f"no backbone: {broken[path]}"))
                else:
                    groups.setdefault(_training_digest(cell), []).append(cell)
            outcome = workers.run("cells", _run_cells, {group[0].name: (group,) for group in groups.values()})
        # a group that died as a whole: which of its cells are there is on the disk
        for cell in (cell for group in groups.values() for cell in group):
            if not cell.is_finished():
                written = cell.config.output / "error.txt"
                group = groups[_training_digest(cell)][0].name
                reason = (
                    written.read_text().splitlines()[0] if written.exists() else outcome.get(group, "it did not end")
                )
                failures.append(Failure(cell.name, reason))
        rows = []
        for cell in cells:
            if cell.is_finished():
                rows += read_json(cell.result_path)["rows"]
        return rows, failures


def ablate(grid: Grid, output: str | Path, overrides: Sequence[str] = (), jobs: int = 1) -> Tables:
    """Do what is missing of a grid and write `table.csv` and `table.md`; arguments as those of `run_grid`.

    Returns
    -------
    Tables
        Of the cells that are finished; the failures name the others.
    """
    with lock_folder(output):
        rows, failures = run_grid(grid, output, overrides, jobs)
        entries = summarise_cells(rows)
        tables = Tables(Path(output) / "table.csv", Path(output) / "table.md", failures)
        with atomic_path(tables.csv) as temporary, temporary.open("w", newline="") as file:
            parts = ("mean", "sd", "sd_seeds", "sd_slides")
            writer = csv.writer(file)
            writer.writerow(["variant", "method", "n", *(f"{key}_{part}" for key in COLUMNS for part in parts)])
            for entry in entries:
                numbers = [entry[part].get(key) for key in COLUMNS for part in parts]
                writer.writerow(
                    [entry["variant"], entry["method"], entry["n"], *("" if n is None else f"{n:.6g}" for n in numbers)]
                )
        with atomic_path(tables.markdown) as temporary:
            temporary.write_text(markdown(entries) + "\n")
        return tables


def summarise_cells(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the scores of each variant and method.

    Returns
    -------
    list of dict
        `variant`, `method`, `n` (rows), and `mean`, `sd` (over all of them, slides and seeds), `sd_seeds` (over seeds,
        of the mean over slides) and `sd_slides` (the other way round), each score → number.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["method"]), []).append(row)
    entries = []
    for (variant, method), members in groups.items():
        summary = summarise_rows(members, list(COLUMNS))[0]
        entry = {"variant": variant, "method": method, "n": summary["n"], "mean": summary["mean"], "sd": summary["sd"]}
        for part, key in (("sd_seeds", "seed"), ("sd_slides", "slide")):
            levels = {row[key] for row in members}
            means = [
                summarise_rows([row for row in members if row[key] == level], list(COLUMNS))[0]["mean"]
                for level in levels
            ]
            entry[part] = {
                name: float(np.std([mean[name] for mean in means if name in mean], ddof=1))
                for name in COLUMNS
                if sum(name in mean for mean in means) > 1
            }
        entries.append(entry)
    return entries


def markdown(entries: Sequence[dict[str, Any]], spread: str = "sd", with_variant: bool = True) -> str:
    """A table of `summarise_cells`, mean ± the standard deviation named by `spread`; columns without a score go."""
    keys = [key for key in COLUMNS if any(key in entry["mean"] for entry in entries)]
    names = ["variant", "method"] if with_variant else ["method"]
    lines = ["| " + " | ".join([*names, *(COLUMNS[key] for key in keys)]) + " |"]
    lines.append("| --- " * (len(names) + len(keys)) + "|")
    for entry in entries:
        cells = [entry[name] for name in names]
        for key in keys:
            if key not in entry["mean"]:
                cells.append("")
                continue
            digits = 0 if key == "trainable" else 1 if key.startswith("seconds") else 3
            deviation = entry[spread].get(key, 0.0)
            cell = f"{entry['mean'][key]:,.{digits}f}"
            cells.append(f"{cell} ± {deviation:,.{digits}f}" if deviation >= 0.5 * 10**-digits else cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- what cells share ----------------------------------------------------------------------------


def _with_shared_parts(cells: list[Cell], output: Path, first_seed: int) -> list[Cell]:
    """The cells, told where features, panel and backbone lie that are made once."""
    shared, first = [], None
    for cell in cells:
        config = cell.config
        features = config.features
        cut = (features.patch_um, features.views)
        first = first or cut
        folder = features.folder or output / "features"
        if cut != first:  # a feature file is named by slide and encoder alone
            folder = folder / f"{'own' if cut[0] is None else f'{cut[0]:g}'}um-{cut[1]}views"
        update: dict[str, Any] = {"features": features.model_copy(update={"folder": folder})}
        foundation = None
        if config.backbone.path is None:
            # nothing but what panel and backbone depend on, so that all variants ask for the same
            own = {"weights": "pretrained", "tuning": "frozen", "lora_rank": BackboneConfig().lora_rank}
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
            update["backbone"] = config.backbone.model_copy(update={"path": path / "backbone"})
            foundation = foundation.model_copy(update={"output": path})
        shared.append(replace(cell, config=config.model_copy(update=update), foundation=foundation))
    return shared


def _training_digest(cell: Cell) -> str:
    return _digest(cell.config.model_dump(mode="json", exclude={"output", "sampling", "evaluation"}))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    # JSON is YAML
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


# --- what a process does -------------------------------------------------------------------------


def _extract(cell: Cell, slide: str) -> None:
    run = Run(cell.config)
    run.features(run.slide(slide))


def _pretrain(config: RunConfig) -> None:
    Run(config).pretrain()


def _run_cells(cells: list[Cell]) -> None:
    """Cells that share a trained model, one after the other; a failure is written into its folder."""
    for cell in cells:
        try:
            trained = [other for other in cells if (other.config.output / "model" / HingeModel.config_name).exists()]
            _run_cell(cell, trained[0] if trained else None)
        except Interrupted:
            raise
        except Exception as error:
            cell.config.output.mkdir(parents=True, exist_ok=True)
            (cell.config.output / "error.txt").write_text(f"{_sentence(error)}\n\n{traceback.format_exc()}")
            logger.warning("%s failed: %s", cell.name, _sentence(error))


def _run_cell(cell: Cell, trained: Cell | None) -> None:
    run = Run(cell.config)
    if trained is not None and not (run.model_path / HingeModel.config_name).exists():
        _take_over(trained.config.output, run.folder)
    run.train()
    seconds_path = run.folder / "seconds.json"
    for slide in cell.config.data.test:
        before = read_json(seconds_path) if seconds_path.exists() else {}
        there = run.samples_path(slide).stat().st_mtime_ns if run.samples_path(slide).exists() else None
        started = time.perf_counter()
        drawn = run.sample(slide).stat().st_mtime_ns
        if drawn != there:
            write_json(seconds_path, before | {slide: time.perf_counter() - started})
    sampling = read_json(seconds_path) if seconds_path.exists() else {}
    scores = read_json(run.evaluate())
    model = run.pipeline().model
    of_model = {
        "trainable": model.num_trainable(),
        "seconds_training": _seconds_of_training(run.folder / "training"),
    }
    rows: list[dict[str, Any]] = []
    for row in scores["rows"]:
        row = {"variant": cell.variant, "held_out": cell.held_out, "seed": cell.seed, **row}
        if row["method"] == "hinge":
            row |= {**of_model, "seconds_sampling": sampling.get(row["slide"])}
            found = run.log_likelihoods(row["slide"])
            if found is not None:
                row["log_likelihoods"] = found
                row["likelihood_gain"] = found["model"] - found["marginal"]
                row["likelihood_share"] = found.get("share")
        else:
            row["seconds_training"] = _seconds_of_training(run.folder / "baselines" / row["method"] / "training")
        if row["method"] == "oracle" and rows and "log_likelihoods" in rows[0]:
            found = rows[0]["log_likelihoods"]
            row |= {"likelihood_gain": found["oracle"] - found["marginal"], "likelihood_share": 1.0}
        rows.append(row)
    write_json(cell.result_path, {"config": cell.digest(), "rows": rows})
    logger.info("%s is finished", cell.name)


def _take_over(trained: Path, folder: Path) -> None:
    """Copy what training left in another cell's folder; the model comes last, as it counts as finished."""
    for part in ("backbone", "training", "model"):
        if (trained / part).is_dir():
            with atomic_path(folder / part) as temporary:
                shutil.copytree(trained / part, temporary)


def _seconds_of_training(folder: Path) -> float | None:
    log = folder / "log.jsonl"
    return sum(json.loads(line)["seconds"] for line in log.read_text().splitlines()) if log.exists() else None


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, HingeError) else f"{type(error).__name__}: {text}"


# --- processes -----------------------------------------------------------------------------------


class _Workers:
    """Calls functions in several processes, or in this one; the processes live until the end of the `with` block.

    Parameters
    ----------
    jobs
        How many.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.pool: ProcessPoolExecutor | None = None
        self.kept: dict[str, str | None] = {}

    def __enter__(self) -> "_Workers":
        if self.jobs > 1:
            settings = {
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs)),
                # threads that wait for each other by spinning take the cores from the other jobs
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            self.kept = {key: os.environ.get(key) for key in settings}
            os.environ.update(settings)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self.pool is not None:
            if kind is not None:
                # SIGTERM came to this process alone: the others save what they have and end too
                for child in multiprocessing.active_children():
                    child.terminate()
            self.pool.shutdown(cancel_futures=True)
        for key, value in self.kept.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value

    def run(self, what: str, function: Callable[..., None], tasks: dict[str, tuple]) -> dict[str, str]:
        """Call function(*arguments) for every task; name → why it failed."""
        failed: dict[str, str] = {}
        if tasks:
            logger.info("%s: %d to do", what, len(tasks))
        if self.jobs == 1:
            for name, arguments in tasks.items():
                with _reason_kept(failed, name):
                    function(*arguments)
            return failed
        died = self._in_processes(function, tasks, failed)
        # who killed the processes is not known: each task that they took along is tried once more, alone
        for name in died:
            if self._in_processes(function, {name: tasks[name]}, failed):
                failed[name] = "its process died (out of memory?)"
        return failed

    def _in_processes(self, function: Callable[..., None], tasks: dict[str, tuple], failed: dict[str, str]) -> list:
        """Fill `failed`; names of the tasks whose process died."""
        self.pool = self.pool or _start_pool(self.jobs)
        futures = {name: self.pool.submit(function, *arguments) for name, arguments in tasks.items()}
        died = []
        for name, future in futures.items():
            try:
                with _reason_kept(failed, name):
                    future.result()
            except BrokenExecutor:
                died.append(name)
        if died:
            self.pool.shutdown()
            self.pool = None
        return died


@contextlib.contextmanager
def _reason_kept(failed: dict[str, str], name: str) -> Iterator[None]:
    """Write into `failed` why a task failed, unless the user stopped it or its process died."""
    try:
        yield
    except (Interrupted, BrokenExecutor):
        raise
    except Exception as error:
        failed[name] = _sentence(error)


def _start_pool(jobs: int) -> ProcessPoolExecutor:
    import torch

    context = multiprocessing.get_context("spawn")
    devices = context.Queue() if torch.cuda.device_count() > 1 else None
    if devices is not None:
        for number in range(jobs):
            devices.put(number % torch.cuda.device_count())
    return ProcessPoolExecutor(jobs, context, initializer=_start_process, initargs=(devices, logger.level))


def _start_process(devices, level: int) -> None:
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hinge").setLevel(level or logging.INFO)
