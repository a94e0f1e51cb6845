"""Run tasks in this process, or in several worker processes through joblib."""

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from hinge.utils.errors import HingeError, Interrupted
from hinge.utils.locks import try_lock
from hinge.utils.threads import prepare_cpu

logger = logging.getLogger(__name__)

# locks that a worker process holds until it ends
_held = contextlib.ExitStack()


def run_tasks(
    what: str, function: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], jobs: int
) -> dict[str, str]:
    """Call a function for every task; a task that fails does not stop the others.

    Each of several worker processes gets its share of the cores and, where there are several GPUs, one of them. When
    the user stops this process, its workers are killed; what they wrote so far is whole.

    Parameters
    ----------
    what
        Name of the tasks in the log.
    function
        Importable by name.
    tasks
        Name → arguments.
    jobs
        Number of processes; with 1, everything runs in this process.

    Returns
    -------
    dict
        Name → reason, for every task that failed.

    Raises
    ------
    Interrupted
        A task was stopped by the user.
    """
    if not tasks:
        return {}
    logger.info("%s: %d to do", what, len(tasks))
    if jobs == 1:
        outcomes = {name: _reason(function, arguments) for name, arguments in tasks.items()}
    else:
        outcomes = _in_processes(function, tasks, jobs)
        # whose process died is not known: each task without an outcome is tried once more, alone
        for name in [name for name in tasks if name not in outcomes]:
            outcomes |= _in_processes(function, {name: tasks[name]}, jobs)
            outcomes.setdefault(name, "its process died (out of memory?)")
    return {name: outcomes[name] for name in tasks if outcomes[name]}


def sentence(error: BaseException) -> str:
    """Return the message of an error as one line, with its type unless the error is a HingeError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, HingeError) else f"{type(error).__name__}: {text}"


def _in_processes(function: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], jobs: int) -> dict[str, str]:
    """Return the outcome of every task, or, if a process died, of those that ended before."""
    import torch
    from joblib import Parallel, delayed

    level = logging.getLogger("hinge").getEffectiveLevel()
    parallel = Parallel(
        jobs,
        backend="loky",
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch="all",
        initializer=_start_worker,
        initargs=(level, jobs, torch.cuda.device_count(), Path(_lock_folder().name)),
    )
    outcomes: dict[str, str] = {}
    with contextlib.suppress(BrokenExecutor):
        for name, reason in parallel(delayed(_outcome)(name, function, tasks[name]) for name in tasks):
            outcomes[name] = reason
    return outcomes


def _outcome(name: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[str, str]:
    return name, _reason(function, arguments)


def _reason(function: Callable[..., None], arguments: tuple[Any, ...]) -> str:
    """Call a function; return why it failed, empty if it did not."""
    try:
        function(*arguments)
    except Interrupted:
        raise
    except Exception as error:
        return sentence(error)
    return ""


def _start_worker(level: int, jobs: int, num_gpus: int, locks: Path) -> None:
    prepare_cpu()  # this module imports no torch, which reads the settings when it is imported
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hinge").setLevel(level)
    if num_gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(_free_slot(jobs, locks) % num_gpus)


def _free_slot(slots: int, locks: Path) -> int:
    """Return the lowest number that no other worker holds, and hold it until this process ends."""
    return next((slot for slot in range(slots) if _held.enter_context(try_lock(locks / f"{slot}.lock"))), 0)


@functools.cache
def _lock_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="hinge-workers-")
