"""Settings of the CPU threads and of memory allocation, and threads for work in numpy and scipy."""

import contextlib
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 1 << 28


def prepare_cpu() -> None:
    """Let idle threads sleep and reuse freed memory; call this before torch is imported.

    By default OpenMP threads spin while they wait: two torch processes on the same cores then slow each other down
    about twenty times. OpenMP reads the setting when torch is imported. By default glibc returns every large tensor to
    the system, which clears the pages of the next one: up to a fifth of the time of a training step. And every thread
    keeps freed memory for itself; with one arena for all, two threads need a sixth less.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _LARGEST)
            mallopt(_M_TRIM_THRESHOLD, _LARGEST)
            mallopt(_M_ARENA_MAX, 1)


def release_memory() -> None:
    """Return freed memory to the system between stages, which `prepare_cpu` lets the C library keep."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def num_threads() -> int:
    """Return the number of threads that this process may use: OMP_NUM_THREADS, or its cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def limit_threads() -> Iterator[None]:
    """Keep libraries for numbers from starting threads of their own, for work in small pieces and for `in_threads`."""
    import sklearn.ensemble  # noqa: F401  # only libraries that are loaded can be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yield the results of a function in the order of the items, computed by some threads; None: by `num_threads`.

    For functions that spend their time in numpy, scipy or torch, which let other threads run. At most one result per
    thread waits to be taken, so that memory does not grow with the items.
    """
    threads = threads or num_threads()
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(waiting) == threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_torch_threads(function: Callable[[Item], Result], items: Sequence[Item], device: str) -> Iterator[Result]:
    """Yield the results of a function of torch in the order of the items, several items at a time on a CPU.

    The threads that torch may use are shared out among the items: work in pieces that fit the cache gains little from
    several threads in each operation.

    Parameters
    ----------
    function
        May be called by several threads at once.
    items
        What it is called with.
    device
        Type of the device that computes. Items are worked on one after the other on all but "cpu".
    """
    import torch

    threads = torch.get_num_threads()
    together = min(threads, len(items)) if device == "cpu" else 1
    if together <= 1:
        yield from map(function, items)
        return
    torch.set_num_threads(threads // together)
    try:
        yield from in_threads(function, items, together)
    finally:
        torch.set_num_threads(threads)
