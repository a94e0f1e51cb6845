"""The one optimisation loop behind everything that is trained here.

Batches, noise and dropout are functions of (seed, step) alone. So a run that was stopped continues to the very
weights of one that was not, and several processes, each taking its rows of the same global batch, compute what
one process computes, to rounding.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from hinge.utils.errors import ConfigError, DataError, HingeError, Interrupted
from hinge.utils.files import atomic_path, write_json
from hinge.utils.packages import DISTRIBUTION, VERSION


class LoopConfig(BaseModel):
    """How something is optimised. `batch_size` is the global one, over all processes and accumulation steps."""

    model_config = ConfigDict(extra="forbid")

    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_at: list[float] = Field(default=[0.5, 0.875], description="shares of the run after which lr × decay_by")
    decay_by: float = Field(0.2, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float | None = Field(None, gt=0, lt=1)
    evaluate_every: int | None = Field(None, ge=1, description="steps between evaluations; None: once an epoch")
    evaluate_from: float = Field(0.0, ge=0, le=1, description="share of the run before the first evaluation")
    patience: int | None = Field(None, ge=1, description="evaluations without gain before an early stop")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints; None: once an epoch")
    tracker: Literal["none", "wandb", "tensorboard"] = "none"

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps of the whole run over `num_rows` training rows."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ConfigError("give either steps or epochs")
        return self.epochs * self.steps_per_epoch(num_rows)

    def steps_per_epoch(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.batch_size)

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 … total − 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = step / max(total, 1)
        if self.schedule == "cosine":
            share = (step - self.warmup_steps) / max(total - self.warmup_steps, 1)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        if self.schedule == "step":
            return self.learning_rate * self.decay_by ** sum(done >= at for at in self.decay_at)
        return self.learning_rate

    def weight_decay_at(self, step: int, total: int) -> float:
        """Weight decay of step 0 … total − 1."""
        return self.weight_decay

    def is_decayed(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay pulls at a parameter."""
        return True


@dataclass
class LoopResult:
    """Where the loop ended: the step, and the step and score of the weights that were kept."""

    step: int
    best_step: int | None
    best_score: float | None


def step_generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on the seed and the numbers only."""
    mixed = np.random.SeedSequence([seed, *numbers]).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def batch_rows(seed: int, step: int, num_rows: int, batch_size: int) -> np.ndarray:
    """Rows of the global batch of a step: epochs are permutations, the last batch of an epoch may be short."""
    per_epoch = math.ceil(num_rows / batch_size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(num_rows, generator=step_generator(seed, 1, epoch)).numpy()
    return order[place * batch_size : (place + 1) * batch_size]


# batch_loss(model, step, rows of the global batch, positions in it that are this call's, generator) -> loss;
# summed over all calls of a step it must be the loss of the global batch
BatchLoss = Callable[[nn.Module, int, np.ndarray, np.ndarray, torch.Generator], Tensor]


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
) -> LoopResult:
    """Optimise the parameters of `model` that require a gradient; leave the best of them in it.

    Parameters
    ----------
    model
        Its parameters without gradient are neither touched nor stored.
    batch_loss
        See `BatchLoss`.
    num_rows
        Rows of the training set.
    config, folder, seed
        `folder` receives `log.jsonl`, `latest.safetensors` and, with `evaluate`, `best.safetensors`; a loop
        stopped there continues from its latest checkpoint.
    evaluate
        evaluate(model, rows) → tensor [sum of losses, count] over those evaluation rows. Lower is better; the
        best weights (of the EMA where there is one) are the result.
    num_evaluation_rows
        Rows of the evaluation set, split over the processes.
    accelerator
        Of `accelerate`; one is made where it is not given.
    description, unit, continue_with
        Words for the bar and for the message of an interrupted run.
    carried
        What changes as the run goes without being optimised, such as a teacher or running means: its state is stored
        with every checkpoint.
    before_step, after_step
        Called with the step's number once gradients are there and once the optimiser has used them (a step whose
        loss is not finite is not used).
    measure
        More numbers for the log, beside evaluations and before the first step; called on the main process only.

    Raises
    ------
    HingeError
        The loss was not finite for ten steps in a row; or the run was interrupted (after a checkpoint).
    """
    folder = Path(folder)
    accelerator = accelerator or make_accelerator(config, folder)
    total = config.num_steps(num_rows)
    per_epoch = config.steps_per_epoch(num_rows)
    checkpoint_every = config.checkpoint_every or per_epoch
    evaluate_every = config.evaluate_every or per_epoch
    main = accelerator.is_main_process
    if config.batch_size < accelerator.num_processes:
        raise ConfigError(f"batch_size {config.batch_size} is smaller than the {accelerator.num_processes} processes")

    model.to(accelerator.device)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("the model has no parameter to train")
    kept = [parameter for parameter in trainable.values() if not config.is_decayed(parameter)]
    decayed = [parameter for parameter in trainable.values() if config.is_decayed(parameter)]
    groups = [{"params": decayed, "decayed": True}, {"params": kept, "decayed": False, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    ema = None
    if config.ema_decay:
        from diffusers.training_utils import EMAModel  # all of its diffusion models come along: seconds

        ema = EMAModel(trainable.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    state: dict[str, Any] = {"step": 0, "best_step": None, "best_score": None, "bad_evaluations": 0, "stopped": False}
    latest, best = folder / "latest.safetensors", folder / "best.safetensors"
    if latest.exists():
        state = _load_checkpoint(latest, trainable, optimizer, ema, carried)
        if state["total"] != total:
            raise ConfigError(
                f"{folder} holds a run of {state['total']} steps, this one has {total}; choose another output folder"
            )
    state["total"] = total
    wrapped, prepared = accelerator.prepare(model, optimizer)

    log = _Log(folder / "log.jsonl", state["step"]) if main else None
    if config.tracker != "none":
        settings = {key: str(value) for key, value in config.model_dump(mode="json").items()}
        # wandb's own folder belongs beside the log; WANDB_MODE=offline keeps everything there
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(
            "hinge", config={"description": description, **settings}, init_kwargs={"wandb": {"dir": str(folder)}}
        )
    bar = tqdm(
        total=total,
        initial=state["step"],
        desc=description,
        unit="step",
        disable=None if main else True,
        dynamic_ncols=True,
    )
    not_finite = 0
    if measure is not None and main and state["step"] == 0:
        log.write({"step": 0, **_measured(measure, model)})
    model.train()
    with bar, _interruptible() as interrupted:
        while state["step"] < total and not state["stopped"]:
            step = state["step"]
            started = time.perf_counter()
            rate = config.learning_rate_at(step, total)
            for group in prepared.param_groups:
                group["lr"] = rate
                if group["decayed"]:
                    group["weight_decay"] = config.weight_decay_at(step, total)
            rows = batch_rows(seed, step, num_rows, config.batch_size)
            mine = np.array_split(np.arange(len(rows)), accelerator.num_processes)[accelerator.process_index]
            chunks = [part for part in np.array_split(mine, config.accumulation) if len(part)]
            # dropout inside modules draws from the global generator: reset, so that a resumed run draws the same
            torch.manual_seed(int(step_generator(seed, 2, step, accelerator.process_index).initial_seed()))
            loss_value = torch.zeros((), device=accelerator.device)
            if not chunks:  # fewer rows than processes in a last, short batch: take part with a zero loss
                chunks, scale = [np.array([0])], 0.0
            else:
                scale = float(accelerator.num_processes)
            for number, chunk in enumerate(chunks):
                final = number == len(chunks) - 1
                with nullcontext() if final else accelerator.no_sync(wrapped), accelerator.autocast():
                    # the average over processes that DDP takes is undone by the scale
                    loss = scale * batch_loss(wrapped, step, rows, chunk, step_generator(seed, 3, step))
                    accelerator.backward(loss)
                loss_value += loss.detach().float() / accelerator.num_processes
            loss_value = accelerator.reduce(loss_value, reduction="sum")
            if before_step is not None:
                before_step(step)
            norm = accelerator.clip_grad_norm_(trainable.values(), config.max_grad_norm)
            if bool(torch.isfinite(loss_value)) and bool(torch.isfinite(norm)):
                prepared.step()
                not_finite = 0
                if ema is not None:
                    ema.step(trainable.values())
                if after_step is not None:
                    after_step(step)
            else:
                not_finite += 1
                if not_finite == 10:
                    raise HingeError(
                        f"the loss was not finite for ten steps up to step {step}: lower learning_rate "
                        f"(now {rate:.2g}) or use precision bf16 or no"
                    )
            prepared.zero_grad(set_to_none=True)
            state["step"] = step + 1

            record = {"step": step + 1, "loss": loss_value.item(), "learning_rate": rate}
            last = step + 1 == total
            due = (step + 1) % evaluate_every == 0 and (step + 1) >= config.evaluate_from * total
            if evaluate is not None and (due or last):
                record["validation_loss"] = _evaluate(
                    wrapped, model, evaluate, num_evaluation_rows, ema, trainable, accelerator
                )
                _note_score(state, record["validation_loss"], config.patience)
                if state["best_step"] == step + 1 and main:
                    _save_best(best, trainable, ema, state)
            if measure is not None and main and (due or last):
                record.update(_measured(measure, model))
            record["seconds"] = time.perf_counter() - started
            if main:
                log.write(record)
            accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step + 1)
            bar.set_postfix(
                {
                    "loss": f"{record['loss']:.4g}",
                    **({"best": f"{state['best_score']:.4g}"} if state["best_score"] is not None else {}),
                    f"{unit}/s": f"{len(rows) / record['seconds']:.0f}",
                },
                refresh=False,
            )
            bar.update()
            stop_now = _any_process(bool(interrupted), accelerator)
            if main and ((step + 1) % checkpoint_every == 0 or last or stop_now or state["stopped"]):
                _save_checkpoint(latest, trainable, optimizer, ema, state, carried)
            if stop_now and not last:
                accelerator.wait_for_everyone()
                message = f"stopped at step {step + 1} of {total}; {continue_with} continues from there"
                # another process of several may have been the one that was asked
                raise Interrupted(message, interrupted[-1] if interrupted else signal.SIGTERM)
    if config.tracker != "none":
        accelerator.end_training()
    accelerator.wait_for_everyone()
    if evaluate is not None and best.exists():
        _load_weights(best, trainable)
    elif ema is not None:
        ema.copy_to(trainable.values())
    model.eval()
    return LoopResult(state["step"], state["best_step"], state["best_score"])


def make_accelerator(config: LoopConfig, folder: str | Path = ".") -> Accelerator:
    """The accelerator of a loop: device and processes from `accelerate launch`, precision from the config.

    `folder` is where a tracker that writes files puts them.
    """
    # accelerate keeps the first precision of a process for ever; pre-training and training may differ in theirs
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(folder) if config.tracker == "tensorboard" else None,
        cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    )


def _evaluate(wrapped, model, evaluate, num_rows, ema, trainable, accelerator) -> float:
    mine = np.array_split(np.arange(num_rows), accelerator.num_processes)[accelerator.process_index]
    model.eval()
    if ema is not None:
        ema.store(trainable.values())
        ema.copy_to(trainable.values())
    with torch.no_grad(), accelerator.autocast():
        # the bare model: fewer rows on one process must not leave another waiting
        total = evaluate(model, mine) if len(mine) else torch.zeros(2)
    if ema is not None:
        ema.restore(trainable.values())
    model.train()
    total = accelerator.reduce(total.to(accelerator.device).float(), reduction="sum")
    return (total[0] / total[1].clamp_min(1)).item()


def _measured(measure: Callable[[], dict[str, float]], model: nn.Module) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        numbers = measure()
    model.train()
    return numbers


def _note_score(state: dict[str, Any], score: float, patience: int | None) -> None:
    if math.isfinite(score) and (state["best_score"] is None or score < state["best_score"]):
        state.update(best_score=score, best_step=state["step"], bad_evaluations=0)
    else:
        state["bad_evaluations"] += 1
        state["stopped"] = patience is not None and state["bad_evaluations"] >= patience


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


class _Log:
    """log.jsonl; a resumed run first drops the lines of steps that will be repeated."""

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists():
            lines = []
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a line cut off by a kill
                if record["step"] <= step:
                    lines.append(line)
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop reads between steps.

    One that comes too late for that, at the last step, is passed on at the end.
    """
    seen: list[int] = []

    def note(number, frame):
        seen.append(number)
        if len(seen) > 1:  # asked twice: do not wait for the step to end
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


def _save_checkpoint(path, trainable, optimizer, ema, state, carried) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    metadata = dict(state)
    if ema is not None:
        for name, shadow in zip(trainable, ema.shadow_params, strict=True):
            tensors[f"ema.{name}"] = shadow
        metadata["ema_step"] = ema.optimization_step
    if carried is not None:
        tensors |= {f"carried.{name}": tensor for name, tensor in carried.state_dict().items()}
    _write_tensors(path, tensors, metadata)


def _load_checkpoint(path, trainable, optimizer, ema, carried) -> dict[str, Any]:
    tensors, state = _read_tensors(path)
    expected = {f"model.{name}" for name in trainable}
    if expected != {name for name in tensors if name.startswith("model.")}:
        raise DataError(f"{path} is the checkpoint of another model; choose another output folder")
    with torch.no_grad():
        for name, parameter in trainable.items():
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
        if ema is not None:
            for name, shadow in zip(trainable, ema.shadow_params, strict=True):
                shadow.copy_(tensors[f"ema.{name}"])
            ema.optimization_step = state.pop("ema_step")
        if carried is not None:
            names = [name for name in tensors if name.startswith("carried.")]
            carried.load_state_dict({name.removeprefix("carried."): tensors[name] for name in names})
    return state


def _save_best(path, trainable, ema, state) -> None:
    values = ema.shadow_params if ema is not None else trainable.values()
    tensors = {f"model.{name}": value.detach() for name, value in zip(trainable, values, strict=True)}
    _write_tensors(path, tensors, {"best_step": state["best_step"], "best_score": state["best_score"]})


def _load_weights(path, trainable) -> None:
    tensors, _ = _read_tensors(path)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[f"model.{name}"])


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(metadata)})


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118
    except Exception as error:
        raise DataError(f"{path} is not a checkpoint of this package: {error}") from error


def write_environment(path: str | Path) -> None:
    """Record the versions, device and thread count a result was made with."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages: dict[str, str | None] = {DISTRIBUTION: VERSION}
    for name in ("torch", "timm", "diffusers", "transformers", "accelerate", "anndata", "scanpy", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    write_json(
        path,
        {
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "packages": packages,
        },
    )
