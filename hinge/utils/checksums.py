"""Checksums of the files in a folder: `checksums.json` at its top.

A folder that has this file records what `hinge.utils.files.atomic_path` writes in it, and what is read from it is
compared: a changed byte is an error that names the file, not another result. Folders named `training`, whose
checkpoints hold their own digests, are left out. An entry is written before its file gets its name, and keeps the
digest of the file before: a process that is killed between the two leaves no wrong entry.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hinge.utils.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "checksums.json"

_LEVELS = 4  # folders between a file and the checksums of its run
_SMALL = 1 << 18  # bytes of a file that is read at once
_MOST_FILES = 64  # of a folder with an entry for each file; larger ones have one for all
# first folder or file of a path → the command that writes it; all others are written by hinge train
_COMMANDS = {
    "samples": "sample",
    "baselines": "evaluate",
    "scores": "evaluate",
    "scores.json": "evaluate",
    "report.html": "report",
    "viewer": "report --interactive",
    "exports": "export",
    "maps": "map",
}

Entries = dict[str, list[str]]

_verified: dict[Path, tuple[tuple[int, ...], list[str]]] = {}


def start(folder: Path, command: str | None = None) -> None:
    """Make a folder one that records what is written in it; one that does so already is left as it is.

    `command` as in `accept`.
    """
    with _locked(folder):
        if not (folder / NAME).exists():
            _write(folder, {}, command)


def record(target: Path, content: Path) -> None:
    """Note the digests of a file or folder `content` that is about to become `target`."""
    root = _root_of(target)
    if root is None:
        return
    name = target.absolute().relative_to(root).as_posix()
    new = _digests(content, name)
    with _locked(root):
        entries = _read(root)
        # what a folder held before and does not hold now is no part of it any more
        gone = [key for key in entries if (key == name or key.startswith(f"{name}/")) and key not in new]
        kept = {key: digests for key, digests in entries.items() if key not in gone}
        _write(root, kept | {key: [digest, *entries.get(key, [])[:1]] for key, digest in new.items()})


def verified(path: str | Path) -> Path:
    """Return a path after comparing it, and what it holds if it is a folder, with the checksums of its folder.

    What has no checksum, as files of earlier versions, is not compared.

    Raises
    ------
    DataError
        A file was changed or damaged since it was written.
    """
    path = Path(path)
    root = path if (path / NAME).is_file() else _root_of(path)
    if root is not None:
        for file, digests in _expected(root, path).items():
            if (root / file).exists() and not _matches(root / file, digests):
                raise DataError(_sentence(root, file))
    return path


def differences(folder: Path) -> tuple[list[str], list[str], int]:
    """Compare all files of a folder with its checksums.

    Returns
    -------
    tuple
        A sentence for each file that was changed, the names of missing files, and the number of files that are as they
        were written.

    Raises
    ------
    DataError
        The checksums are damaged.
    """
    _verified.clear()
    changed, missing, right = [], [], 0
    for name, digests in _read(folder).items():
        if not (folder / name).exists():
            missing.append(name)
        elif _matches(folder / name, digests):
            right += 1
        else:
            changed.append(_sentence(folder, name))
    return changed, missing, right


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder: of the lines `NAME|SHA-256` of its files, sorted by name."""
    return _folder_digest(path, _files_below(path)) if path.is_dir() else _file_digest(path)


def names(folder: Path) -> list[str]:
    """Return the names of files, and of large folders, that have a checksum."""
    return list(_read(folder))


def accept(folder: Path, command: str | None = None) -> int:
    """Note the digests of all files of a folder as they are now; return their number.

    Parameters
    ----------
    folder
        The folder of a run, or another one that is complete.
    command
        What wrote the files of a folder that is not a run, for errors; None: as noted before.
    """
    with _locked(folder):
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        entries = {name.as_posix(): [_file_digest(folder / name)] for name in files if is_recorded(name)}
        _write(folder, entries, command)
    return len(entries)


def _sentence(root: Path, name: str) -> str:
    command = _command(root) or _COMMANDS.get(Path(name).parts[0], "train")
    return (
        f"{root / name} was changed or damaged after hinge {command.split()[0]} wrote it (its checksum differs): "
        f"restore it, or delete it and run hinge {command} again (an intended change: hinge check {root} --accept)"
    )


def _root_of(path: Path) -> Path | None:
    """Return the folder whose checksums a path belongs to, None if there is none."""
    path = path.absolute()
    for folder in list(path.parents)[:_LEVELS]:
        if (folder / NAME).is_file():
            return folder if is_recorded(path.relative_to(folder)) else None
    return None


def is_recorded(name: Path) -> bool:
    """Return whether a file of this name in the folder has a checksum there."""
    trained = any(part == "training" or part.endswith("-training") for part in name.parts)
    edited = name.parts[:1] == ("regions",)  # the user's own files
    return not trained and not edited and name.name != NAME and not any(part.startswith(".") for part in name.parts)


def _expected(root: Path, path: Path) -> Entries:
    """Return the entries of a path: of a file, or of all files of a folder, which may be the root."""
    if path == root:
        return _read(root)
    name, entries = path.absolute().relative_to(root).as_posix(), _read(root)
    return {key: digests for key, digests in entries.items() if key == name or key.startswith(f"{name}/")}


def _digests(content: Path, name: str) -> dict[str, str]:
    """Return the digest of a file, or of each file of a folder, or one of all if they are many."""
    if not content.is_dir():
        return {name: _file_digest(content)}
    files = _files_below(content)
    if len(files) <= _MOST_FILES:
        return {f"{name}/{inner}": _file_digest(content / inner) for inner in files}
    return {name: _folder_digest(content, files)}


def _files_below(folder: str | Path, below: str = "") -> list[str]:
    """Return the names of all files in a folder and its folders, sorted by their parts."""
    found = list[str]()
    # `Path.rglob` and `os.walk` take several times as long, which counts for stores of hundreds of small files
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                found += _files_below(entry.path, f"{below}{entry.name}/")
            elif entry.is_file():
                found.append(below + entry.name)
    return found


def _file_digest(path: str | Path) -> str:
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size <= _SMALL:  # `file_digest` clears a buffer of this size first
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path, files: list[str]) -> str:
    total = hashlib.sha256()
    for name in files:
        total.update(f"{name}|{_file_digest(f'{folder}/{name}')}\n".encode())
    return total.hexdigest()


def _matches(path: Path, digests: list[str]) -> bool:
    """Return whether a file or folder has one of some digests; a file that was compared already is not read again."""
    if path.is_dir():
        return _folder_digest(path, _files_below(path)) in digests
    facts = path.stat()
    state = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    if _verified.get(path) == (state, digests):
        return True
    try:
        right = _file_digest(path) in digests
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if right:
        _verified[path] = (state, digests)
    return right


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing the checksums of a folder; the folder itself is locked, so nothing is left."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not every file system of several machines has locks
            if fcntl is not None:
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> Entries:
    """Return the entries of a folder: name → digest, and the digest before if there was one.

    Raises
    ------
    DataError
        They are damaged: they have a digest too.
    """
    path = folder / NAME
    try:
        content: Any = json.loads(path.read_bytes())
        files = content["files"]
        if content["sha256"] == _own_digest(files):
            return files
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DataError(
        f"{path} was changed or damaged: restore it; hinge check {folder} --accept accepts the files as they are"
    )


def _own_digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _command(folder: Path) -> str | None:
    """Return the command that wrote a folder that is not a run, None if it is not noted."""
    try:
        command = json.loads((folder / NAME).read_bytes()).get("command")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return command if isinstance(command, str) else None


def _write(folder: Path, files: Entries, command: str | None = None) -> None:
    command = command or _command(folder)
    temporary = folder / f".{NAME}.{os.getpid()}"
    files = dict(sorted(files.items()))
    for left in folder.glob(f".{NAME}.*"):  # by a process that was killed here
        left.unlink(missing_ok=True)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            about = {} if command is None else {"command": command}
            file.write(json.dumps({**about, "files": files, "sha256": _own_digest(files)}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / NAME)
    except OSError as error:
        raise DataError(f"cannot write {folder / NAME}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
