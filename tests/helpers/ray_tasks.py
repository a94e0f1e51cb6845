"""Work that is done, or dies, in the workers of a Ray cluster."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hinge.utils.errors import DataError


def open_noted(open_worker: Callable[[], Callable[[Any], Any]], folder: Path, victim: str) -> Callable[[str], Any]:
    """Open a worker that notes what it has done; the first one with the task `victim` is killed in the middle of it."""
    import hinge.diffusion.sampler as sampler
    from hinge.utils.resumable import ResumableArrays

    work, write, names = open_worker(), ResumableArrays.write, []
    sampler.BATCHES_IN_A_PART = 1  # several parts

    def write_and_die(self, number, *arguments):
        write(self, number, *arguments)
        if names[-1].endswith(victim) and self.missing() and not (folder / "killed").exists():
            (folder / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    ResumableArrays.write = write_and_die

    def noted(name: str) -> Any:
        names.append(name)
        result = work(name)
        with (folder / "done").open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
        return result

    return noted


def open_unreliable() -> Callable[[str], list[Path]]:
    """Open a worker for tasks that are named after their end."""

    def work(name: str) -> list[Path]:
        if name == "damaged":
            raise DataError("the slide is damaged")
        if name == "bug":
            raise ZeroDivisionError("a bug")
        if name == "deadly":
            os._exit(9)
        return [Path(__file__)]

    return work


def open_nothing() -> Callable[[str], list[Path]]:
    """Fail as a worker whose model is missing does."""
    raise DataError("there is no model; run hinge train first")
