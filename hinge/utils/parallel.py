"""Many slides: each done once, by whichever process comes first; what fails is told at the end and stops nothing.

Processes find each other through files beside the results, so that they may run on several machines that share a disk,
be started at different times, and die: a claim is a lock that its process's end releases.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hinge.utils.errors import DataError, HingeError, Interrupted
from hinge.utils.locks import try_lock

logger = logging.getLogger(__name__)

_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")


def work_alone() -> int:
    """Make this process of `accelerate launch` one that does whole slides by itself; how many there are.

    To be called before anything asks accelerate for its processes. On a machine with several GPUs each process keeps
    its own.
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
    """Do something with every slide that no other process is at, and give what came of it.

    One slide alone is simply done, and its failure is raised as it is.

    Parameters
    ----------
    names
        Slides.
    work
        Does one, given its name, and returns what it wrote; recognises what is finished.
    folder
        Where the results go; claims lie in its `.claims`.

    Yields
    ------
    tuple
        Name and result, of the slides that this process did.

    Raises
    ------
    DataError
        After the last slide, if any failed, here or in a process beside this one: which, and why.
    """
    if len(names) == 1:
        yield names[0], work(names[0])
        return
    started, claims = time.time(), folder / ".claims"
    failed: dict[str, str] = {}
    claims.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            told = claims / f"{_file_name(name)}.failed"
            with try_lock(told.with_suffix(".lock")) as mine:
                if not mine:
                    continue
                if told.exists() and told.stat().st_mtime >= started:
                    continue  # a process beside this one has tried
                told.unlink(missing_ok=True)
                try:
                    result = work(name)
                except Interrupted:  # nobody wants the others either
                    raise
                except HingeError as error:
                    failed[name] = str(error)
                except Exception as error:  # whatever it is, the other slides do not suffer
                    logger.debug("slide %s", name, exc_info=True)
                    failed[name] = f"{type(error).__name__}: {error}"
                else:
                    yield name, result
                    continue
                logger.error("slide %s failed: %s", name, failed[name])
                told.write_text(failed[name], encoding="utf-8")
        for name in names:
            told = claims / f"{_file_name(name)}.failed"
            # a launcher ends all its processes when one ends with an error: none does before the last slide is done
            with try_lock(told.with_suffix(".lock"), wait=True), contextlib.suppress(OSError):
                if told.stat().st_mtime >= started:
                    failed.setdefault(name, told.read_text("utf-8"))
    finally:
        _tidy(claims)
    if failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise DataError(f"{len(failed)} of {len(names)} slides failed, the others are done: {reasons}")


def _file_name(name: str) -> str:
    """A name or path as the name of one file."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C").replace(".", "%2E")


def _tidy(claims: Path) -> None:
    """Remove claims that nobody holds, once nobody holds any."""
    # another process may be tidying too
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as held:
        paths = list(claims.iterdir())
        if not all(held.enter_context(try_lock(path)) for path in paths if path.suffix == ".lock"):
            return
        for path in paths:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process has just begun
            claims.rmdir()
