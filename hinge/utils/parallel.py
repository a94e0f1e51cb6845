"""Work on many slides, cells or folds: one after the other in this process, or by workers of a Ray cluster.

What is worked on is a task with a name. A function opens a worker: it loads what the tasks share, such as an encoder
and a model, and returns the function that does one task. A task that fails does not stop the others.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hinge.utils.catalogue import Catalogue
from hinge.utils.errors import ConfigError, DataError, Interrupted, sentence
from hinge.utils.ray_workers import Cluster, Open, Outcome, RunTasks, connected

logger = logging.getLogger(__name__)

_MOST_REASONS = 20


@contextlib.contextmanager
def task_runner(cluster: Cluster | None) -> Iterator[RunTasks]:
    """Give the function that runs tasks.

    Parameters
    ----------
    cluster
        None: this process does one task after the other.

    Yields
    ------
    callable
        Takes what the tasks are (`slides`), the tasks (name → argument), and a function that opens a worker. Yields
        outcomes as tasks end. With a cluster, the function and the arguments are pickled.

    Raises
    ------
    ConfigError
        Ray is not installed, there is no cluster at the address, or several processes were launched together.
    """
    if cluster is None:
        yield _one_after_the_other
        return
    if launched_processes() > 1:
        raise ConfigError("--ray starts workers itself: start the command as one process, without accelerate launch")
    with connected(cluster) as run:
        yield run


def each_slide(
    names: Sequence[str],
    open_worker: Callable[[], Callable[[str], list[Path]]],
    folder: Path,
    cluster: Cluster | None = None,
) -> Iterator[tuple[str, list[Path]]]:
    """Process slides and yield the files that are written, as slides end.

    The error of a single slide is raised unchanged.

    Parameters
    ----------
    names
        Slides.
    open_worker
        Returns the function that processes the slide of a name, skips finished work and returns the files.
    folder
        Of the results; with a cluster, it gets their catalogue, see `hinge.utils.catalogue`.
    cluster
        Where slides are processed; None: in this process, one after the other.

    Yields
    ------
    tuple
        Name and files of each slide that is finished.

    Raises
    ------
    DataError
        After the last slide, if slides failed; the message names them with their errors.
    """
    if cluster is None and len(names) == 1:
        yield names[0], open_worker()(names[0])
        return
    failed, catalogue = {}, None if cluster is None else Catalogue(folder)
    opened = open_worker if catalogue is None else catalogue.noting(open_worker)
    with task_runner(cluster) as run:
        try:
            for outcome in run("slides", {name: name for name in names}, opened):
                if outcome.failure:
                    failed[outcome.name] = outcome.failure
                else:
                    yield outcome.name, outcome.result if catalogue is None else catalogue.add(outcome.result)
        finally:
            if catalogue is not None:
                catalogue.write()
    if failed:
        raise DataError(_report("slides", failed, len(names)))


def require_all(outcomes: Iterator[Outcome], what: str) -> None:
    """Wait until all tasks have ended.

    Raises
    ------
    DataError
        Tasks failed; the message names them with their errors.
    """
    ended = list(outcomes)
    failed = {outcome.name: outcome.failure for outcome in ended if outcome.failure}
    if failed:
        raise DataError(_report(what, failed, len(ended)))


def launched_processes() -> int:
    """Return the number of processes that `accelerate launch` or `torchrun` started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one_process(command: str) -> None:
    """Check that a command whose processes would write the same files was not launched several times.

    Raises
    ------
    ConfigError
        Several processes were launched together.
    """
    if launched_processes() > 1:
        raise ConfigError(
            f"{command} is one process: start it without accelerate launch, on several devices with --ray"
        )


def _one_after_the_other(what: str, tasks: Mapping[str, Any], open_worker: Open) -> Iterator[Outcome]:
    if not tasks:
        return
    work = open_worker()
    if len(tasks) > 1:
        logger.info("%s: %d to do", what, len(tasks))
    for name, argument in tasks.items():
        try:
            yield Outcome(name, work(argument))
        except Interrupted:
            raise
        except Exception as error:
            # processes that were launched together would wait for each other at different slides
            if launched_processes() > 1:
                raise
            logger.debug("%s", name, exc_info=True)
            logger.error("%s failed: %s", name, sentence(error))
            yield Outcome(name, failure=sentence(error))


def _report(what: str, failed: dict[str, str], total: int) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(failed.items())[:_MOST_REASONS]]
    if len(failed) > _MOST_REASONS:
        shown.append(f"and {len(failed) - _MOST_REASONS} more")
    done = "the others are done" if len(failed) < total else "none is done"
    return f"{len(failed)} of {total} {what} failed, {done}: {'; '.join(shown)}"
