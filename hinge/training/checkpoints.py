"""Files of a training run: checkpoints, the best weights, and the log."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import arrays_digest, atomic_path

if TYPE_CHECKING:  # all of diffusers' diffusion models come along: seconds
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)

_REMEDY = "restore it, or delete the folder of the training to begin again"


class DamagedError(DataError):
    """A checkpoint that is cut off, or whose bytes were changed."""


@dataclass
class Progress:
    """How far a run is.

    Attributes
    ----------
    total
        Steps of the whole run.
    step
        Steps that were taken.
    best_step, best_score
        Step and score of the best evaluation.
    bad_evaluations
        Number of evaluations since then.
    stopped
        Whether the run ended early, after `patience` evaluations without gain.
    """

    total: int
    step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    bad_evaluations: int = 0
    stopped: bool = False


@dataclass
class TrainedState:
    """What changes in training.

    Attributes
    ----------
    parameters
        Parameters that are optimised, by name.
    optimizer
        Their AdamW.
    ema
        Their moving average, if there is one.
    carried
        A module that changes without being optimised, such as a teacher.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: "EMAModel | None" = None
    carried: nn.Module | None = None


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before the last one lies."""
    return path.with_name(f"previous-{path.name}")


def save_checkpoint(path: Path, trained: TrainedState, progress: Progress) -> None:
    """Write everything that a stopped run needs to continue; keep the checkpoint before, until training ends."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trained.parameters.items()}
    for name, parameter in trained.parameters.items():
        for key, value in trained.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    metadata = asdict(progress)
    if trained.ema is not None:
        for name, shadow in zip(trained.parameters, trained.ema.shadow_params, strict=True):
            tensors[f"ema.{name}"] = shadow
        metadata["ema_step"] = trained.ema.optimization_step
    if trained.carried is not None:
        tensors |= {f"carried.{name}": tensor for name, tensor in trained.carried.state_dict().items()}
    previous = previous_of(path)
    if path.exists():
        with atomic_path(previous, durable=False) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
    write_tensors(path, tensors, metadata)
    if progress.stopped or progress.step == progress.total:
        previous.unlink(missing_ok=True)


def resume(path: Path, trained: TrainedState, total: int) -> Progress:
    """Set `trained` to the last checkpoint that is whole, and return how far the run is; see `load_checkpoint`."""
    previous = previous_of(path)
    if not path.exists() and not previous.exists():
        return Progress(total)
    try:
        progress = load_checkpoint(path, trained, total)
        if progress.stopped or progress.step == total:  # the process was killed before it had removed the one before
            previous.unlink(missing_ok=True)
        return progress
    except DamagedError as error:
        if not previous.exists():
            raise
        logger.warning("%s; continuing from the one before, %s", error, previous)
        return load_checkpoint(previous, trained, total)


def load_checkpoint(path: Path, trained: TrainedState, total: int) -> Progress:
    """Set `trained` to what `save_checkpoint` wrote, and return how far the run is.

    Parameters
    ----------
    path, trained
        As of `save_checkpoint`.
    total
        Steps of the run that continues.

    Raises
    ------
    ConfigError
        The checkpoint is of a run with another number of steps.
    DataError
        The checkpoint is damaged, or of another model.
    """
    tensors, metadata = read_tensors(path)
    parameters, optimizer = trained.parameters, trained.optimizer
    if {f"model.{name}" for name in parameters} != {name for name in tensors if name.startswith("model.")}:
        raise DataError(f"{path} is the checkpoint of another model; choose another output folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[f"model.{name}"].shape != parameter.shape:
                raise DataError(f"{path} is the checkpoint of a model of another size; choose another output folder")
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU, the moments beside the parameter
                key: tensors[full].to("cpu" if key == "step" and not optimizer.defaults["fused"] else parameter.device)
                for full in tensors
                for key in [full.split(".", 2)[1]]
                if full.startswith("optimizer.") and full.split(".", 2)[2] == name
            }
        if trained.ema is not None:
            for name, shadow in zip(parameters, trained.ema.shadow_params, strict=True):
                shadow.copy_(tensors[f"ema.{name}"])
            trained.ema.optimization_step = metadata.pop("ema_step")
        if trained.carried is not None:
            names = [name for name in tensors if name.startswith("carried.")]
            trained.carried.load_state_dict({name.removeprefix("carried."): tensors[name] for name in names})
    metadata.pop("ema_step", None)
    progress = Progress(**metadata)
    if progress.total != total:
        raise ConfigError(
            f"{path.parent} holds a run of {progress.total} steps, this one has {total}; choose another output folder"
        )
    return progress


def save_best(path: Path, trained: TrainedState, progress: Progress) -> None:
    """Write the current weights, those of the moving average where there is one."""
    values = trained.ema.shadow_params if trained.ema is not None else trained.parameters.values()
    tensors = {f"model.{name}": value.detach() for name, value in zip(trained.parameters, values, strict=True)}
    write_tensors(path, tensors, {"best_step": progress.best_step, "best_score": progress.best_score})


def load_best(path: Path, trained: TrainedState) -> None:
    """Set the parameters to what `save_best` wrote."""
    tensors, _ = read_tensors(path)
    with torch.no_grad():
        for name, parameter in trained.parameters.items():
            parameter.copy_(tensors[f"model.{name}"])


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata as one safetensors file."""
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"progress": metadata, "sha256": _digest(tensors, json.dumps(metadata))}
    with atomic_path(path) as temporary:
        # one key: safetensors writes several in an order that differs from call to call
        save_file(tensors, temporary, metadata={"state": json.dumps(content)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata that `write_tensors` wrote.

    Raises
    ------
    DamagedError
        The file is another, or a byte of it was changed.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        state, right = json.loads(about["state"]), set(about) == {"state"}
        if set(state) & {"progress", "sha256"}:  # version 0.1 wrote no checksum
            content, state = state, state["progress"]
            right = right and content["sha256"] == _digest(tensors, json.dumps(state))
    except Exception as error:
        raise DamagedError(f"{path} is not a checkpoint of this package: {error}; {_REMEDY}") from error
    if not right:
        raise DamagedError(f"{path} was changed or damaged after it was written: its checksum differs; {_REMEDY}")
    return tensors, state


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    return hashlib.sha256(f"{arrays_digest(tensors)}|{state}".encode()).hexdigest()


class TrainingLog:
    """`log.jsonl`, one JSON object a step.

    Parameters
    ----------
    path
        The file. Lines of steps after `step`, which will be repeated, are dropped.
    step
        Steps that were taken.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists():
            lines = []
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a line that a kill cut off
                if record["step"] <= step:
                    lines.append(line)
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
