"""Locks of folders and files, and removal of temporary files of dead processes.

A lock is a file that the operating system unlocks when its process ends. A record beside it names the process that
holds it, and its time is renewed while the process lives. On a disk shared by machines that do not see each other's
locks, a record that is not renewed counts as that of a dead process.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from hinge.utils.errors import DataError
from hinge.utils.files import (
    HOST,
    left_behind,
    missing_folders,
    process_mark,
    read_json,
    remove_empty,
    write_json,
)

logger = logging.getLogger(__name__)

HEARTBEAT = 15.0
"""Seconds between two renewals of a record."""

SILENCE = 60.0
"""Seconds without renewal after which the holder on another machine counts as dead."""

_CHILDREN_END = 10.0  # seconds that child processes may outlive their parent: data loaders check for it every five
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate looks for them

_held: set[tuple[int, Path]] = set()


@contextlib.contextmanager
def try_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Try to hold the lock file `path` until the end of the block, and yield whether it is held.

    Raises
    ------
    DataError
        The lock file cannot be created.
    """
    lock, missing = FileLock(path), 0
    while not lock.is_locked:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        except OSError as error:
            missing += 1
            # the previous holder may just be removing the folder
            if not isinstance(error, FileNotFoundError) or missing == 10:
                raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Lock a folder until the end of the block; it is created if needed.

    Of several processes that were launched together the first locks for all. A process that holds the lock may lock
    again. Temporary files of dead processes are removed.

    Raises
    ------
    DataError
        Another process holds the lock (the message names it and since when), or the folder is not writable.
    """
    folder = Path(folder)
    with _lock(folder / ".lock", folder, wait=False):
        yield


def remove_left_lock(folder: str | Path) -> None:
    """Remove what a process left that was killed after it had finished the work in a folder: locks, temporary files."""
    if (Path(folder) / ".lock").exists():
        with contextlib.suppress(DataError), lock_folder(folder):  # in use: the other process removes them
            pass


@contextlib.contextmanager
def lock_file(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Lock a file that will be written until the end of the block, as `lock_folder` does.

    With `wait`, wait for another process that holds the lock.
    """
    path = Path(path)
    with _lock(path.with_name(f".{path.name}.lock"), path, wait):
        yield


@contextlib.contextmanager
def _lock(path: Path, what: Path, wait: bool) -> Iterator[None]:
    key = (os.getpid(), path.absolute())
    if key in _held or any(int(os.environ.get(name, 0)) > 0 for name in _RANKS):
        yield
        return
    record = path.with_name(f"{path.name}.json")
    with contextlib.ExitStack() as stack:
        stack.callback(remove_empty, missing_folders(path.parent))
        dead = _acquire(stack, path, record, what, wait)
        # the lock file is removed while it is held: a process that opened it notices and opens a new one
        stack.callback(_remove, record, path)
        if dead is not None:
            logger.info("%s was left by %s, which has died; taking it over", what, _described(dead))
        _sweep(what, None if dead is None else process_mark(dead["pid"], dead["host"]))
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        content = {"pid": os.getpid(), "host": HOST, "since": since, "command": " ".join(command)[:200]}
        write_json(record, content, durable=False)
        stack.enter_context(_heartbeat(record))
        _held.add(key)
        stack.callback(_held.discard, key)
        yield


def _acquire(stack: contextlib.ExitStack, path: Path, record: Path, what: Path, wait: bool) -> dict | None:
    """Acquire a lock, and return the record of its last holder if that process died."""
    began, reported, seen = time.monotonic(), None, None
    while True:
        with contextlib.ExitStack() as attempt:
            free = attempt.enter_context(try_lock(path))
            owner, beat = _read_record(record)
            if free and (owner is None or owner["host"] == HOST or _age(path, beat) > SILENCE):
                stack.enter_context(attempt.pop_all())
                return owner
        waited = time.monotonic() - began
        here = owner is not None and owner["host"] == HOST
        if owner is None:
            # between locking and recording, or between removing the record and unlocking
            refused, sentence = waited > 2, f"{what} is in use by another process"
        elif here and not psutil.pid_exists(owner["pid"]):
            refused = waited > _CHILDREN_END
            sentence = f"{what} is in use by processes that {_described(owner)} started"
        elif not free:
            refused, sentence = True, f"{what} is in use by {_described(owner)}"
        else:
            # locks of other machines may not be visible here: check whether the record is renewed
            seen = seen or beat
            refused, sentence = beat != seen, f"{what} is in use by {_described(owner)}"
            if reported is None and not refused:
                reported = "silence"
                logger.info(
                    "%s was left by %s: waiting %.0f s for it to renew its lock", what, _described(owner), SILENCE
                )
        if refused and not wait:
            raise DataError(f"{sentence}; wait until it has ended, or choose another output")
        if refused and reported != "waiting":
            reported = "waiting"
            logger.info("%s; waiting until it has ended", sentence)
        time.sleep(0.05)


def _described(owner: dict) -> str:
    return f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"


def _read_record(path: Path) -> tuple[dict | None, float | None]:
    """Return a record and its time; None if there is no valid record."""
    try:
        owner, beat = read_json(path), path.stat().st_mtime
    except (DataError, OSError):
        return None, None
    fields = {"pid": int, "host": str, "since": str, "command": str}
    if not isinstance(owner, dict) or not all(isinstance(owner.get(key), kind) for key, kind in fields.items()):
        return None, None
    return owner, beat


def _age(path: Path, beat: float) -> float:
    """Return the seconds since a time by the clock of the disk, which may differ from this machine's."""
    os.utime(path)
    return path.stat().st_mtime - beat


@contextlib.contextmanager
def _heartbeat(record: Path) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(record)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat of a lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _sweep(what: Path, dead: str | None) -> None:
    """Remove the temporary folders of `atomic_path` that ended processes left in a folder or beside it.

    A process that lost its permissions leaves them too.
    """
    found = list(what.rglob(".*@*")) if what.is_dir() else []
    for path in [*found, *what.parent.glob(".*@*")]:
        if left_behind(path.name, dead):
            shutil.rmtree(path, ignore_errors=True)


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
