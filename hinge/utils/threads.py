"""Settings of the CPU threads and of memory allocation."""

import contextlib
import ctypes
import os
import sys

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 1 << 28


def prepare_cpu() -> None:
    """Let idle threads sleep and reuse freed memory; call this before torch is imported.

    By default OpenMP threads spin while they wait: two torch processes on the same cores then slow each other down
    about twenty times. OpenMP reads the setting when torch is imported. By default glibc returns every large tensor to
    the system, which clears the pages of the next one: up to a fifth of the time of a training step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _LARGEST)
            mallopt(_M_TRIM_THRESHOLD, _LARGEST)
