"""Peak memory of this process."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest


def peak_of(action: Callable[[], object]) -> int:
    """Bytes by which an action raises the memory in use at its peak, mapped pages of files included."""

    def memory(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before may not hide what is used now
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
        before = memory("VmRSS")
    except OSError:
        pytest.skip("the peak memory of a running process can be measured on Linux only")
    action()
    return memory("VmHWM") - before
