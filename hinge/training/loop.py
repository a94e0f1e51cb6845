"""The one optimisation loop of everything that is trained.

Batches, noise and dropout are functions of seed and step alone. So a stopped run that continues ends with the same
weights as an uninterrupted one, and several processes, of which each takes its rows of the same global batch, compute
what one process computes, to rounding. Dropout inside modules is the exception: its masks depend on the number of
processes.
"""

import importlib.util
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from hinge.training.checkpoints import (
    Progress,
    TrainedState,
    TrainingLog,
    load_best,
    resume,
    save_best,
    save_checkpoint,
)
from hinge.training.halves import Part, PartsOfLoss
from hinge.training.schedules import advance, learning_rate_schedule
from hinge.training.settings import LoopConfig
from hinge.utils.errors import ConfigError, HingeError, Interrupted

logger = logging.getLogger(__name__)


@dataclass
class LoopResult:
    """Where the loop ended: the step, and the step and score of the weights that were kept."""

    step: int
    best_step: int | None
    best_score: float | None


def step_generator(seed: int, *numbers: int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the numbers only."""
    mixed = np.random.SeedSequence([seed, *numbers]).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def batch_rows(seed: int, step: int, num_rows: int, batch_size: int) -> np.ndarray:
    """Return the rows of a step's global batch; epochs are permutations, the last batch of an epoch may be short."""
    per_epoch = math.ceil(num_rows / batch_size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(num_rows, generator=step_generator(seed, 1, epoch)).numpy()
    return order[place * batch_size : (place + 1) * batch_size]


# batch_loss(model, step, rows of the global batch, this process's positions in it, generator) -> loss, or its parts;
# summed over the processes it must be the loss of the global batch. Several parts are for one process alone
BatchLoss = Callable[[nn.Module, int, np.ndarray, np.ndarray, torch.Generator], Tensor | Sequence[Part]]


def run_loop(
    model: nn.Module,
    batch_loss: BatchLoss,
    num_rows: int,
    config: LoopConfig,
    folder: str | Path,
    seed: int,
    evaluate: Callable[[nn.Module, np.ndarray], Tensor] | None = None,
    num_evaluation_rows: int = 0,
    accelerator: Accelerator | None = None,
    description: str = "training",
    unit: str = "spots",
    continue_with: str = "the same command",
    carried: nn.Module | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    weight_decay: Callable[[int], float] | None = None,
    max_grad_norm: float = 1.0,
    rows_of: Callable[[int], np.ndarray] | None = None,
    compiled: bool = False,
) -> LoopResult:
    """Optimise the parameters of `model` that require a gradient with AdamW, and leave the best of them in it.

    Parameters
    ----------
    model
        Its parameters without gradient are neither touched nor stored.
    batch_loss
        See `BatchLoss`.
    num_rows
        Rows of the training set.
    config, folder, seed
        `folder` receives `log.jsonl`, `latest.safetensors` and, with `evaluate`, `best.safetensors`. A loop that was
        stopped there continues from its latest checkpoint.
    evaluate
        evaluate(model, rows) → tensor [sum of losses, count] over those evaluation rows. Lower is better; the
        best weights (of the moving average where there is one) are the result.
    num_evaluation_rows
        Rows of the evaluation set, split over the processes.
    accelerator
        Of `accelerate`; one is made where it is not given.
    description, unit, continue_with
        Description for the progress bar and the message of an interrupted run.
    carried
        A module that changes without being optimised, such as a teacher or running means. Its state is part of every
        checkpoint.
    before_step, after_step
        Called with the step's number once gradients are there, and once the optimiser has used them (a step whose
        loss is not finite is not used).
    measure
        Returns more numbers for the log, beside evaluations and before the first step; called on the main process only.
    weight_decay
        Weight decay of a step, of matrices and kernels but not of biases and norms. None: none.
    max_grad_norm
        Gradients with a larger norm are scaled down to it.
    rows_of
        Step → rows of its global batch, a function of the step alone. None: `batch_rows`.
    compiled
        Whether `torch.compile` compiles what `batch_loss` calls; evaluations and checkpoints use the plain model.

    Raises
    ------
    ConfigError
        Nothing can be trained, the batch is smaller than the processes, or compiling needs what is not installed.
    HingeError
        The loss was not finite for ten steps in a row; or the run was interrupted (after a checkpoint).
    """
    folder = Path(folder)
    accelerator = accelerator or make_accelerator(config, folder)
    main, processes, total = accelerator.is_main_process, accelerator.num_processes, config.num_steps(num_rows)
    if compiled:
        check_compiler(accelerator.device)
    if config.batch_size < processes:
        raise ConfigError(f"batch_size {config.batch_size} is smaller than the {processes} processes")
    if main and processes > 1:
        logger.info("%s on %d processes", description, processes)
    checkpoint_every, evaluate_every = (
        every or config.steps_per_epoch(num_rows) for every in (config.checkpoint_every, config.evaluate_every)
    )

    model.to(accelerator.device)
    trained = _trained_state(model, config, carried, weight_decay is not None)
    latest, best = folder / "latest.safetensors", folder / "best.safetensors"
    progress = resume(latest, trained, total)
    wrapped, optimizer = accelerator.prepare(model, trained.optimizer)
    if compiled:  # around the model, whose parameters keep their names
        wrapped = torch.compile(wrapped, dynamic=False)
    schedule = learning_rate_schedule(trained.optimizer, config.schedule, config.warmup_steps, total, progress.step)
    updates = _Updates(accelerator, optimizer, trained, before_step, after_step, max_grad_norm)

    log = TrainingLog(folder / "log.jsonl", progress.step) if main else None
    _start_tracker(accelerator, config, folder, description)
    if log is not None and measure is not None and progress.step == 0:
        log.write({"step": 0, **_measured(measure, model)})
    model.train()
    with (
        _bar(total, progress.step, description, main) as bar,
        _interruptible() as interrupted,
        PartsOfLoss() as parts,
    ):
        while progress.step < total and not progress.stopped:
            step, started = progress.step, time.perf_counter()
            rate = schedule.get_last_lr()[0]
            if weight_decay is not None:
                optimizer.param_groups[0]["weight_decay"] = weight_decay(step)
            rows = batch_rows(seed, step, num_rows, config.batch_size) if rows_of is None else rows_of(step)
            loss = _backward(wrapped, batch_loss, step, rows, seed, accelerator, parts)
            updates.apply(step, loss, rate)
            advance(schedule)
            progress.step = step + 1

            record = {"step": progress.step, "loss": loss.item(), "learning_rate": rate}
            last = progress.step == total
            due = last or (progress.step % evaluate_every == 0 and progress.step >= config.evaluate_from * total)
            if evaluate is not None and due:
                with parts.all_threads():
                    score = _evaluate(model, evaluate, num_evaluation_rows, trained, accelerator)
                record["validation_loss"] = score
                _note_score(progress, score, config.patience)
                if main and progress.best_step == progress.step:
                    save_best(best, trained, progress)
            if measure is not None and main and due:
                record.update(_measured(measure, model))
            record["seconds"] = time.perf_counter() - started
            if log is not None:
                log.write(record)
            accelerator.log({key: value for key, value in record.items() if key != "step"}, step=progress.step)
            _show(bar, record, progress, f"{unit}/s", len(rows))
            stop_now = _any_process(bool(interrupted), accelerator)
            if main and (progress.step % checkpoint_every == 0 or last or stop_now or progress.stopped):
                save_checkpoint(latest, trained, progress)
            if stop_now and not last:
                accelerator.wait_for_everyone()
                message = f"stopped at step {progress.step} of {total}; {continue_with} continues from there"
                # the signal may have reached another process
                raise Interrupted(message, interrupted[-1] if interrupted else signal.SIGTERM)
    if config.tracker != "none":
        accelerator.end_training()
    accelerator.wait_for_everyone()
    _take_result(trained, best if evaluate is not None and best.exists() else None)
    model.eval()
    return LoopResult(progress.step, progress.best_step, progress.best_score)


def check_compiler(device: torch.device) -> None:
    """Raise a ConfigError unless `torch.compile` finds the compiler that it needs for a device."""
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        raise ConfigError("training.compile needs the package triton, which is not installed; set it to false")
    given = os.environ.get("CXX" if device.type == "cpu" else "CC")
    names = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    if not any(shutil.which(name) for name in ([given] if given else names)):
        raise ConfigError(
            f"training.compile needs a compiler, {' or '.join([given] if given else names)}, which is not installed; "
            "set training.compile to false"
        )


def _bar(total: int, done: int, description: str, shown: bool) -> tqdm:
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="step",
        disable=None if shown else True,
        dynamic_ncols=True,
    )


def _take_result(trained: TrainedState, best: Path | None) -> None:
    """Put the best weights into the parameters, or else their moving average."""
    if best is not None:
        load_best(best, trained)
    elif trained.ema is not None:
        trained.ema.copy_to(trained.parameters.values())


def make_accelerator(config: LoopConfig, folder: str | Path = ".") -> Accelerator:
    """Return the accelerator of a loop: device and processes from `accelerate launch`, precision from the config.

    Apple's MPS is not used, because nothing here was tested on it and it has no float64; the CPU takes its place.

    Parameters
    ----------
    config
        Of the loop.
    folder
        Where a tracker that writes files puts them.
    """
    # accelerate keeps the first precision of a process for ever; pre-training and training may differ in theirs
    AcceleratorState._reset_state()
    available = torch.accelerator.current_accelerator(check_available=True)
    return Accelerator(
        mixed_precision=config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(folder) if config.tracker == "tensorboard" else None,
        # processes on CPUs join only with cpu=True
        cpu=available is None or available.type == "mps",
    )


def _trained_state(model: nn.Module, config: LoopConfig, carried: nn.Module | None, with_decay: bool) -> TrainedState:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ConfigError("the model has no parameter to train")
    groups = [list(parameters.values())]
    if with_decay:  # the first group decays
        groups = [[each for each in groups[0] if (each.ndim > 1) == decays] for decays in (True, False)]
    fused = next(iter(parameters.values())).device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups], lr=config.learning_rate, weight_decay=0.0, fused=fused
    )
    ema = None
    if config.ema_decay:
        from diffusers.training_utils import EMAModel  # all of its diffusion models come along: seconds

        ema = EMAModel(parameters.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    return TrainedState(parameters, optimizer, ema, carried)


def _start_tracker(accelerator: Accelerator, config: LoopConfig, folder: Path, description: str) -> None:
    if config.tracker == "none":
        return
    settings = {key: str(value) for key, value in config.model_dump(mode="json").items()}
    # wandb's own folder belongs beside the log; WANDB_MODE=offline keeps everything there
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(
        "hinge", config={"description": description, **settings}, init_kwargs={"wandb": {"dir": str(folder)}}
    )


def _backward(
    wrapped: nn.Module,
    batch_loss: BatchLoss,
    step: int,
    rows: np.ndarray,
    seed: int,
    accelerator: Accelerator,
    parts: PartsOfLoss,
) -> Tensor:
    """Leave the gradients of a step in the parameters, and return the loss of the global batch."""
    processes = accelerator.num_processes
    mine = np.array_split(np.arange(len(rows)), processes)[accelerator.process_index]
    # the average over processes that DDP takes is undone by the factor
    factor = float(processes)
    if not len(mine):  # fewer rows than processes in a last, short batch: take part with a zero loss
        mine, factor = np.array([0]), 0.0
    # dropout inside modules draws from the global generator: reset, so that a resumed run draws the same
    torch.manual_seed(int(step_generator(seed, 2, step, accelerator.process_index).initial_seed()))
    with accelerator.autocast():
        loss = batch_loss(wrapped, step, rows, mine, step_generator(seed, 3, step))
    if not isinstance(loss, Tensor):
        return parts.backward(wrapped, loss, accelerator)
    loss = factor * loss
    # outside of autocast, which would compute float32 parts of the backward pass in bfloat16
    accelerator.backward(loss)
    return accelerator.reduce(loss.detach().float() / processes, reduction="sum")


class _Updates:
    """The optimiser's steps. A step whose loss or gradient is not finite is left out; ten in a row are an error."""

    def __init__(self, accelerator, optimizer, trained: TrainedState, before_step, after_step, max_grad_norm: float):
        self.accelerator, self.optimizer, self.trained = accelerator, optimizer, trained
        self.before_step, self.after_step, self.max_grad_norm = before_step, after_step, max_grad_norm
        self.not_finite = 0

    def apply(self, step: int, loss: Tensor, rate: float) -> None:
        parameters = self.trained.parameters.values()
        if self.before_step is not None:
            self.before_step(step)
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
        if bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)):
            self.not_finite = 0
            self.optimizer.step()
            if self.trained.ema is not None:
                self.trained.ema.step(parameters)
            if self.after_step is not None:
                self.after_step(step)
        else:
            self.not_finite += 1
            if self.not_finite == 10:
                raise HingeError(
                    f"the loss was not finite for ten steps up to step {step}: lower learning_rate (now {rate:.2g})"
                    + ("" if self.accelerator.mixed_precision == "no" else " or use precision no")
                )
        self.optimizer.zero_grad(set_to_none=True)


def _evaluate(
    model: nn.Module,
    evaluate: Callable[[nn.Module, np.ndarray], Tensor],
    num_rows: int,
    trained: TrainedState,
    accelerator: Accelerator,
) -> float:
    mine = np.array_split(np.arange(num_rows), accelerator.num_processes)[accelerator.process_index]
    parameters, ema = trained.parameters.values(), trained.ema
    model.eval()
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    with torch.no_grad(), accelerator.autocast():
        # the bare model: fewer rows on one process must not leave another waiting
        total = evaluate(model, mine) if len(mine) else torch.zeros(2)
    if ema is not None:
        ema.restore(parameters)
    model.train()
    total = accelerator.reduce(total.to(accelerator.device).float(), reduction="sum")
    return (total[0] / total[1].clamp_min(1)).item()


def _measured(measure: Callable[[], dict[str, float]], model: nn.Module) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        numbers = measure()
    model.train()
    return numbers


def _note_score(progress: Progress, score: float, patience: int | None) -> None:
    if math.isfinite(score) and (progress.best_score is None or score < progress.best_score):
        progress.best_score, progress.best_step, progress.bad_evaluations = score, progress.step, 0
    else:
        progress.bad_evaluations += 1
        progress.stopped = patience is not None and progress.bad_evaluations >= patience


def _show(bar: tqdm, record: dict[str, float], progress: Progress, speed: str, num_rows: int) -> None:
    shown = {"loss": f"{record['loss']:.4g}"}
    if progress.best_score is not None:
        shown["best"] = f"{progress.best_score:.4g}"
    bar.set_postfix({**shown, speed: f"{num_rows / record['seconds']:.0f}"}, refresh=False)
    bar.update()


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop reads between steps.

    One that comes too late for that, at the last step, is passed on at the end.
    """
    seen: list[int] = []

    def note(number, frame):
        seen.append(number)
        if len(seen) > 1:  # the second signal: do not wait for the end of the step
            raise KeyboardInterrupt

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: the caller's handlers stay
        pass
    stopped = True
    try:
        yield seen
        stopped = False
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if seen and not stopped:
        signal.raise_signal(seen[-1])
