"""Write files atomically and durably, and compute digests of their content."""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from hinge.utils import checksums
from hinge.utils.errors import DataError

HOST = socket.gethostname()

_ROOM = 1 << 20
_OF_HDF5 = re.compile(r"error message = '([^']+)'")
_FLUSHED_AT_ONCE = 8
# of the C libraries of Linux and macOS
_WORKING_FOLDER, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


_TEMPORARY = re.compile(r"\..*\.(?P<pid>\d+)@(?P<host>.*)\.[^.]+")


def process_mark(pid: int, host: str) -> str:
    """Return the part of the name of a temporary folder that identifies its process."""
    return f"{pid}@{host[:40]}"


def left_behind(name: str, dead: str | None = None) -> bool:
    """Return whether a name is that of a temporary folder whose process has ended.

    Processes of this machine are looked up. Of other machines only the process with the mark `dead` counts as ended.
    """
    found = _TEMPORARY.fullmatch(name)
    if found is None:
        return False
    mark = process_mark(int(found["pid"]), found["host"])
    return mark == dead or (found["host"] == HOST[:40] and not psutil.pid_exists(int(found["pid"])))


def missing_folders(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist yet, innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that are empty, in the given order."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


@contextlib.contextmanager
def atomic_path(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, delete it on failure.

    Works for a file and, where the caller makes the temporary path a folder, for a folder
    (an existing folder of that name is replaced). Temporary folders of killed processes for the same path are removed.

    Parameters
    ----------
    path
        The finished file or folder. Parent folders are created; on failure those that are empty are removed.
    durable
        Whether to wait until the content is on the disk before it gets its name: a power loss then leaves the old
        content or the new one.

    Yields
    ------
    Path
        A path that does not exist, with the same suffix and on the same disk.

    Raises
    ------
    DataError
        The disk is full or permission is missing.
    """
    path = Path(path)
    created = missing_folders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_behind(path)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{process_mark(os.getpid(), HOST)}.", dir=path.parent))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = holder / path.name
    try:
        yield temporary
        if durable:
            _flush(temporary)
        checksums.record(path, temporary)
        _publish(temporary, path)
        if durable:
            _flush_one(path.parent)
    except Exception as error:
        reason = _why_not_written(error, holder)
        if reason is None:
            raise
        raise DataError(f"cannot write {path}: {reason}") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        remove_empty(created)


def remove_left_behind(path: Path) -> None:
    """Remove the temporary folders of `atomic_path(path)` whose processes have ended."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(f".{path.name}.") and left_behind(entry.name):
                shutil.rmtree(entry.path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder and all files in it, are on the disk."""
    if not path.is_dir():
        _flush_one(path)
        return
    files, folders = list[str](), [str(path)]
    for place, below, inside in os.walk(path):
        folders += [f"{place}/{name}" for name in below]
        files += [f"{place}/{name}" for name in inside]
    # one after the other, each would wait for the disk; `os.sync` would wait for what others write
    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
        for parts in (files, folders):  # a folder after what it holds
            list(pool.map(_flush_each, [parts[start::_FLUSHED_AT_ONCE] for start in range(_FLUSHED_AT_ONCE)]))


def _flush_each(paths: list[str]) -> None:
    for path in paths:
        _flush_one(path)


def _flush_one(path: str | Path) -> None:
    folder = os.path.isdir(path)
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not folder:  # Windows opens no folders, and some disks of several machines flush none
            raise


def _publish(temporary: Path, path: Path) -> None:
    """Give a file or folder its name; a folder of that name is replaced without a moment in which there is none."""
    if temporary.is_dir() and path.is_dir():
        if _exchange(temporary, path):
            return  # the old one is deleted with the temporary folder
        os.replace(path, temporary.parent / "replaced")
    os.replace(temporary, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return whether the system can."""
    with contextlib.suppress(OSError, AttributeError):
        library, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
        if sys.platform == "darwin":
            return library.renamex_np(*names, _RENAME_SWAP) == 0
        return library.renameat2(_WORKING_FOLDER, names[0], _WORKING_FOLDER, names[1], _RENAME_EXCHANGE) == 0
    return False


def _why_not_written(error: Exception, holder: Path) -> str | None:
    """Return why a folder cannot be written to, None if the error has another cause."""
    if isinstance(error, DataError):
        return None
    if isinstance(error, OSError):
        # an error that names another file is one of reading
        ours = error.filename is None or str(error.filename).startswith(str(holder))
        of_hdf5 = _OF_HDF5.search(str(error))
        reason = of_hdf5[1] if of_hdf5 else error.strerror or " ".join(str(error).split())
        return reason if ours else None
    # libraries have own messages: try to write
    try:
        with open(holder / "room", "wb") as file:
            file.write(bytes(_ROOM))
    except OSError as full:
        return full.strerror
    return f"{error}" if type(error).__name__ == "SafetensorError" else None


def write_json(path: str | Path, content: Any, durable: bool = True) -> Path:
    """Write `content` as indented JSON in one step; NaN and infinities become null. `durable` as in `atomic_path`."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
            value = value.item()
        if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
            return None
        return value

    with atomic_path(path, durable) as temporary:
        temporary.write_text(json.dumps(clean(content), indent=1) + "\n")
    return Path(path)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; one that is missing, damaged or not as its checksum says is a `DataError` that names it."""
    try:
        return json.loads(checksums.verified(path).read_text())
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from error


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrays_digest(arrays: dict[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a mapping of tensors or arrays, in name order.

    It identifies weights by content, independent of the file format.
    """
    import numpy as np

    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        if hasattr(array, "detach"):
            array = array.detach().cpu().contiguous()
            dtype = str(array.dtype).removeprefix("torch.")
            # numpy has no bfloat16; the digest is of the bytes
            import torch

            data = array.reshape(-1).view(torch.uint8).numpy()
            shape = tuple(array.shape)
        else:
            array = np.ascontiguousarray(array)
            dtype, shape, data = str(array.dtype), array.shape, array.reshape(-1).view(np.uint8)
        total.update(f"{name}|{dtype}|{shape}|".encode())
        total.update(data.data)  # without a copy
    return total.hexdigest()
