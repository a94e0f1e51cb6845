"""Run tasks by the workers of a Ray cluster.

A worker is an actor on one device, which keeps what its tasks share. Every worker has one task at a time and gets the
next when that ends. If a worker or its machine is lost, its task goes back to the waiting ones and another worker is
started: nothing else is lost. Tasks write whole files and resume unfinished work, so that a task may run twice.
"""

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from hinge.utils.errors import ConfigError, HingeError, sentence
from hinge.utils.files import HOST
from hinge.utils.packages import require
from hinge.utils.threads import prepare_cpu

logger = logging.getLogger(__name__)

TRIES = 3
"""Workers that may be lost with a task before the task counts as failed."""

STARTS = 3
"""Attempts to start Ray, which gives up after 30 seconds: on a busy machine it may need longer."""

OBJECT_STORE = 80 << 20  # bytes; results are names of files. Ray's minimum is 75 MiB
MEMORY_OF_WORKER = 4 << 30  # bytes for a worker without a GPU


@dataclass(frozen=True)
class Outcome:
    """The end of one task.

    Attributes
    ----------
    name
        Name of the task.
    result
        What the task returned; None if it failed.
    failure
        Why it failed, as one sentence; empty if it did not.
    """

    name: str
    result: Any = None
    failure: str = ""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that works on tasks.

    Attributes
    ----------
    address
        Of a running cluster: `auto` or `HOST:PORT`; `local` starts one on this machine.
    workers
        Number of workers; None: one for each GPU, or, without GPUs, for each core, as far as memory reaches.
    """

    address: str = "local"
    workers: int | None = None


Open = Callable[[], Callable[[Any], Any]]
RunTasks = Callable[[str, Mapping[str, Any], Open], Iterator[Outcome]]


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[RunTasks]:
    """Connect to a cluster, or start one, and give the function that runs tasks; see `task_runner`."""
    local = cluster.address == "local"
    if local:
        _set_environment()
    ray = require("ray", "ray", "--ray")
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if local else {}
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if on_main else None
    with contextlib.ExitStack() as stack:
        if local:
            # Ray's own folder belongs to the first user of a machine; the names of sockets must be short
            folder = tempfile.mkdtemp(prefix="hinge-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {"_temp_dir": folder, "num_cpus": max(os.cpu_count() or 1, cluster.workers or 1)}
            logger.info("starting Ray on this machine")
        stack.callback(ray.shutdown)
        try:
            _connect(ray, cluster.address, options)
        finally:
            if on_main:
                signal.signal(signal.SIGTERM, handler)
        share = _share(ray.nodes(), cluster.workers, local)
        if share is None:
            logger.info("waiting for the first machine of the cluster that can work")
        while share is None:
            time.sleep(1)
            share = _share(ray.nodes(), cluster.workers, local)
        logger.info("Ray: %d workers, each with %g GPUs and %d cores", share.workers, share.gpus, share.cpus)
        idle: list[Any] = []
        yield lambda what, tasks, open_worker: _Pool(ray, share, idle, what, tasks, open_worker).outcomes()


def _connect(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster; one on this machine is started again if Ray did not start in its time."""
    local = address == "local"
    for attempt in range(STARTS if local else 1):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:
            ray.shutdown()
            if not local:
                raise ConfigError(f"--ray {address} is no running cluster: {sentence(error)}") from error
            if attempt + 1 == STARTS:
                raise ConfigError(f"Ray cannot start on this machine: {sentence(error)}") from error


def _set_environment() -> None:
    """Keep a cluster of this machine to this machine and its user; Ray reads most of it when it is imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all servers listen on 127.0.0.1 alone, as on macOS
    os.environ.setdefault("RAY_worker_niceness", "0")  # or other programs would go before
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray would write one to the home folder


@dataclass(frozen=True)
class _Share:
    """The number of workers, and the part of a machine that each one has."""

    workers: int
    cpus: int
    gpus: float


def _share(nodes: list[dict[str, Any]], workers: int | None, local: bool) -> _Share | None:
    """Return how workers share the machines of a cluster: those with GPUs, or, if there are none, all.

    None if no machine can work yet. A cluster may grow: workers without a place wait for one, and on this machine,
    which does not grow, they share GPUs.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    machines = with_gpus or machines
    if not machines:
        return None
    places = [
        int(machine["GPU"])
        if with_gpus
        else max(1, min(int(machine["CPU"]), int(machine.get("memory", math.inf) // MEMORY_OF_WORKER)))
        for machine in machines
    ]
    workers = workers or sum(places)
    on_each = [math.ceil(workers / len(machines))] * len(machines)
    gpus = 1.0 if with_gpus else 0.0
    if with_gpus and local:
        gpus /= math.ceil(workers / places[0])
    elif with_gpus:
        on_each = [min(number, place) for number, place in zip(on_each, places, strict=True)]
    cpus = min(int(machine["CPU"]) // number for machine, number in zip(machines, on_each, strict=True))
    return _Share(workers, max(1, cpus), gpus)


class Worker:
    """An actor: it opens once, then does tasks one by one."""

    def __init__(self) -> None:
        prepare_cpu()  # before what is unpickled imports torch
        logging.basicConfig(level=logging.WARNING)
        self.name = f"{HOST}/{os.getpid()}"

    def open(self, open_worker: Open, folder: str) -> tuple[str, HingeError | None]:
        """Load what the tasks share; return the worker's name, and the error that a user can correct.

        Relative paths are relative to `folder`.
        """
        try:
            try:
                os.chdir(folder)
            except OSError as error:
                raise ConfigError(
                    f"{HOST} has no folder {folder}: start hinge in one that all machines share"
                ) from error
            self.work = open_worker()
        except HingeError as error:
            return self.name, error
        return self.name, None

    def close(self) -> None:
        """Release what the tasks shared, until the worker is opened for others."""
        del self.work

    def run(self, argument: Any) -> "_Done":
        """Do a task."""
        done, started = _Done(), time.monotonic()
        with _noticed(done.notices):
            try:
                done.result = self.work(argument)
            except Exception as error:
                done.failure, done.final = sentence(error), isinstance(error, HingeError)
        done.seconds = time.monotonic() - started
        return done


@dataclass
class _Done:
    """What a worker sends back: `final` is whether a failure would be the same in another worker."""

    result: Any = None
    failure: str = ""
    final: bool = True
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0


@contextlib.contextmanager
def _noticed(notices: list[str]) -> Iterator[None]:
    """Collect the warnings of a block, which would end in a log of Ray."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notices.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger("hinge").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            yield
    finally:
        logging.getLogger("hinge").removeHandler(handler)
        notices += [str(warning.message) for warning in caught if warning.category is UserWarning]


class _Pool:
    """The workers that do some tasks."""

    def __init__(
        self, ray: Any, share: _Share, idle: list[Any], what: str, tasks: Mapping[str, Any], open_worker: Open
    ):
        self.ray, self.share, self.what, self.tasks, self.open_worker = ray, share, what, tasks, open_worker
        self.idle = idle  # workers of earlier tasks, which have imported what takes seconds
        self.waiting = deque(tasks)
        self.losses: Counter[str] = Counter()
        self.opening: dict[Any, Any] = {}
        self.busy: dict[Any, tuple[Any, str]] = {}
        self.names: dict[Any, str] = {}
        self.never_opened = 0
        self.table: dict[str, list[float]] = {}

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as tasks end."""
        started, failed = time.monotonic(), 0
        progress = tqdm(total=len(self.tasks), desc=self.what, unit=self.what.rstrip("s"), disable=None, smoothing=0.05)
        try:
            with progress:
                for _ in range(min(self.share.workers, len(self.tasks))):
                    self._start()
                while self.waiting or self.busy:
                    for ended in self.ray.wait([*self.opening, *self.busy], num_returns=1)[0]:
                        if ended in self.opening:
                            self._opened(ended)
                            continue
                        outcome = self._ended(ended)
                        if outcome is None:
                            continue
                        failed += bool(outcome.failure)
                        progress.update()
                        progress.set_postfix(failed=failed, lost=sum(self.losses.values()))
                        yield outcome
            self._report(time.monotonic() - started, failed)
        finally:
            for actor in [*self.opening.values(), *(actor for actor, _ in self.busy.values())]:
                self.ray.kill(actor)

    def _start(self) -> None:
        """Open an idle worker, or start one; a cluster without room for it starts it later."""
        if self.idle:
            actor = self.idle.pop()
        else:
            actor = self.ray.remote(Worker).options(num_cpus=self.share.cpus, num_gpus=self.share.gpus).remote()
        self.opening[actor.open.remote(self.open_worker, os.getcwd())] = actor

    def _opened(self, ended: Any) -> None:
        actor = self.opening.pop(ended)
        try:
            self.names[actor], error = self.ray.get(ended)
        except self.ray.exceptions.RayTaskError as failure:
            raise HingeError(f"a worker cannot start: {sentence(failure.cause)}") from failure
        except self.ray.exceptions.RayError as loss:
            self.never_opened += 1
            if self.never_opened > TRIES:
                raise HingeError(f"{self.never_opened} workers died while they started: {_why(loss)}") from loss
            self._replace(actor)
            return
        if error is not None:
            raise error
        self._next(actor)

    def _ended(self, ended: Any) -> Outcome | None:
        actor, name = self.busy.pop(ended)
        row = self.table.setdefault(self.names[actor], [0, 0, 0.0])
        try:
            done: _Done = self.ray.get(ended)
        except self.ray.exceptions.RayTaskError:
            raise  # a result that cannot be pickled
        except self.ray.exceptions.RayError as loss:
            return self._again(actor, name, f"its worker was lost (out of memory?): {_why(loss)}")
        row[2] += done.seconds
        for notice in done.notices:
            logger.warning("%s: %s", name, notice)
        if not done.final:  # the device or a file may be at fault, and another worker may succeed
            return self._again(actor, name, done.failure)
        if done.failure:
            logger.error("%s failed: %s", name, done.failure)
        row[bool(done.failure)] += 1
        self._next(actor)
        return Outcome(name, done.result, done.failure)

    def _again(self, actor: Any, name: str, reason: str) -> Outcome | None:
        """Let another worker do the task, or give it up."""
        self.losses[name] += 1
        if self.losses[name] < TRIES:
            logger.warning("%s goes to another worker: %s", name, reason)
            self.waiting.append(name)
            self._replace(actor)
            return None
        reason = f"{reason}; {TRIES} workers tried"
        logger.error("%s failed: %s", name, reason)
        self.table[self.names[actor]][1] += 1
        self._replace(actor)
        return Outcome(name, failure=reason)

    def _replace(self, actor: Any) -> None:
        self.ray.kill(actor)  # on a machine that is out of reach it may live
        if len(self.opening) < len(self.waiting):
            self._start()

    def _next(self, actor: Any) -> None:
        if not self.waiting:
            actor.close.remote()
            self.idle.append(actor)
            return
        name = self.waiting.popleft()
        self.busy[actor.run.remote(self.tasks[name])] = (actor, name)

    def _report(self, seconds: float, failed: int) -> None:
        if not self.table:
            return
        done = len(self.tasks) - failed
        rate = len(self.tasks) / max(seconds, 1e-9) * 60
        logger.info("%s: %d done, %d failed in %.0f s, %.1f a minute", self.what, done, failed, seconds, rate)
        width = max(len("worker"), *map(len, self.table))
        logger.info("%-*s  %6s  %6s  %9s", width, "worker", "done", "failed", "seconds")
        for name, (finished, broken, worked) in sorted(self.table.items()):
            logger.info("%-*s  %6d  %6d  %9.1f", width, name, finished, broken, worked)


def _why(loss: Exception) -> str:
    """Return the first sentence of Ray's description of a loss."""
    return " ".join(str(loss).split()).partition(". ")[0][:200] or type(loss).__name__
