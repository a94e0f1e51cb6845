"""Processing of many slides by several processes: each slide once; failures are reported after the last slide.

Processes coordinate through files beside the results. They may run on several machines that share a disk, start at
different times, and die: a claim is a lock, which the operating system releases when its process ends.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hinge.utils.errors import DataError, HingeError, Interrupted
from hinge.utils.files import missing_folders, remove_empty
from hinge.utils.locks import try_lock

logger = logging.getLogger(__name__)

_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")


def work_alone() -> int:
    """Detach this process from those that `accelerate launch` started with it; return the number of processes.

    Each process then works on whole slides. Call this before accelerate counts its processes. On a machine with several
    GPUs each process keeps its own GPU.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        local = int(os.environ.pop("LOCAL_RANK", "0"))
        for name in [name for name in os.environ if name in _DISTRIBUTED or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
    return processes


def each_slide(names: Sequence[str], work: Callable[[str], Path], folder: Path) -> Iterator[tuple[str, Path]]:
    """Process every slide that no other process works on, and yield the results.

    The error of a single slide is raised unchanged.

    Parameters
    ----------
    names
        Slides.
    work
        Processes the slide of a name and returns the file it wrote; skips finished work.
    folder
        Folder of the results; claims lie in its `.claims`.

    Yields
    ------
    tuple
        Name and result of each slide that this process finished.

    Raises
    ------
    DataError
        After the last slide, if slides failed in this or a parallel process; the message names them with their errors.
    """
    if len(names) == 1:
        yield names[0], work(names[0])
        return
    started, claims = time.time(), folder / ".claims"
    failed: dict[str, str] = {}
    created = missing_folders(folder)
    claims.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            report = claims / f"{_file_name(name)}.failed"
            with try_lock(report.with_suffix(".lock")) as mine:
                if not mine:
                    continue
                if report.exists() and report.stat().st_mtime >= started:
                    continue  # a parallel process has tried
                report.unlink(missing_ok=True)
                try:
                    result = work(name)
                except Interrupted:
                    raise
                except HingeError as error:
                    failed[name] = str(error)
                except Exception as error:  # the other slides are processed nevertheless
                    logger.debug("slide %s", name, exc_info=True)
                    failed[name] = f"{type(error).__name__}: {error}"
                else:
                    yield name, result
                    continue
                logger.error("slide %s failed: %s", name, failed[name])
                report.write_text(failed[name], encoding="utf-8")
        for name in names:
            report = claims / f"{_file_name(name)}.failed"
            # a launcher ends all its processes when one ends with an error: none does before the last slide is done
            with try_lock(report.with_suffix(".lock"), wait=True), contextlib.suppress(OSError):
                if report.stat().st_mtime >= started:
                    failed.setdefault(name, report.read_text("utf-8"))
    finally:
        _tidy(claims)
        remove_empty(created)
    if failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise DataError(f"{len(failed)} of {len(names)} slides failed, the others are done: {reasons}")


def _file_name(name: str) -> str:
    """Return a name or path as the name of one file."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C").replace(".", "%2E")


def _tidy(claims: Path) -> None:
    """Remove the claims if no process holds one."""
    # another process may be tidying too
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as held:
        paths = list(claims.iterdir())
        if not all(held.enter_context(try_lock(path)) for path in paths if path.suffix == ".lock"):
            return
        for path in paths:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process has just started
            claims.rmdir()
