"""The work on the cells of a grid: features, backbone, and the run itself with its scores and costs."""

import json
import logging
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from hinge.config import RunConfig
from hinge.experiments.grid import Cell
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.utils.errors import Interrupted, sentence
from hinge.utils.files import atomic_path, read_json, write_json

logger = logging.getLogger(__name__)


def extract(features: tuple[Cell, str]) -> None:
    """Write the features of one slide, with the settings of a cell."""
    cell, slide = features
    run = Run(cell.config)
    run.features(run.slide(slide))


def pretrain(config: RunConfig) -> None:
    """Write the panel and the backbone that several cells share."""
    Run(config).pretrain()


def run_cells(cells: list[Cell]) -> None:
    """Run cells that share a trained model, one after the other; write why one fails into its folder."""
    for cell in cells:
        try:
            trained = [other for other in cells if (other.config.output / "model" / HingeModel.config_name).exists()]
            _run_cell(cell, trained[0] if trained else None)
        except Interrupted:
            raise
        except Exception as error:
            cell.config.output.mkdir(parents=True, exist_ok=True)
            cell.error_path.write_text(f"{sentence(error)}\n\n{traceback.format_exc()}")
            logger.warning("%s failed: %s", cell.name, sentence(error))


def _run_cell(cell: Cell, trained: Cell | None) -> None:
    run = Run(cell.config)
    if trained is not None and not (run.paths.model / HingeModel.config_name).exists():
        _take_over(trained.config.output, run.folder)
    run.train()
    run.panel()  # a cell that took over its model has not written it yet
    seconds_path = run.folder / "seconds.json"
    for slide in cell.config.data.test:
        before = read_json(seconds_path) if seconds_path.exists() else {}
        there = run.paths.samples(slide).stat().st_mtime_ns if run.paths.samples(slide).exists() else None
        started = time.perf_counter()
        drawn = run.sample(slide).stat().st_mtime_ns
        if drawn != there:
            write_json(seconds_path, before | {slide: time.perf_counter() - started})
    sampling = read_json(seconds_path) if seconds_path.exists() else {}
    scores = read_json(run.evaluate())
    model = run.pipeline().model
    of_model = {
        "trainable": model.num_parameters(only_trainable=True),
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
    """Copy the result of training from another cell; the model last, because its presence marks the end of training."""
    for part in ("backbone", "training", "model"):
        if (trained / part).is_dir():
            with atomic_path(folder / part) as temporary:
                shutil.copytree(trained / part, temporary)


def _seconds_of_training(folder: Path) -> float | None:
    log = folder / "log.jsonl"
    return sum(json.loads(line)["seconds"] for line in log.read_text().splitlines()) if log.exists() else None
