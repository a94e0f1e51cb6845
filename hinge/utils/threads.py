"""What makes torch fast on a CPU, set before it is needed."""

import contextlib
import ctypes
import os
import sys

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 1 << 28


def prepare_cpu() -> None:
    """Let idle threads sleep, and freed memory be used again.

    OpenMP's threads spin while they wait by default: two torch processes on the same cores then hinder each other
    twentyfold. It reads the setting when torch is imported, so this is to be called before. And the allocator of Linux
    hands back every large tensor to the system, which clears the pages of the next one: up to a fifth of a training
    step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _LARGEST)
            mallopt(_M_TRIM_THRESHOLD, _LARGEST)
