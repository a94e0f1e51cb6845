"""Going on with less at a time when memory runs out."""

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from hinge.utils.errors import HingeError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# what oneDNN, torch's library on CPUs, says of memory that it did not get
_ONEDNN = ("could not create a primitive", "could not create a memory object")


def with_less_memory(batch_size: int, work: Callable[[int], Result]) -> tuple[Result, int]:
    """Do something by batches, of half the size as often as memory runs out.

    Parameters
    ----------
    batch_size
        To begin with.
    work
        Takes a batch size. What it returns must not depend on it, and it is called again from its start.

    Returns
    -------
    tuple
        What it returned, and the batch size with which it did.

    Raises
    ------
    HingeError
        A batch of one is too much.
    """
    while True:
        try:
            return work(batch_size), batch_size
        except Exception as error:
            # numpy has an error of its own; torch tells by the words alone on a CPU
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error) or str(error) in _ONEDNN):
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
        # out of the except block: the error holds on to what its frames allocated
        if batch_size == 1:
            raise HingeError(f"memory runs out even with one at a time: {reason}")
        batch_size = (batch_size + 1) // 2
        logger.warning("memory ran out: going on with batches of %d", batch_size)
        clear_device_cache(garbage_collection=True)
