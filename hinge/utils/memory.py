"""Smaller batches when memory runs out.

`accelerate.utils.find_executable_batch_size` is not suitable: it does not recognise the errors of numpy and
oneDNN, does not return the batch size, and collects garbage before every call, even where memory suffices.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from hinge.utils.errors import HingeError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# messages of oneDNN, torch's library on CPUs, when an allocation fails
_ONEDNN = ("could not create a primitive", "could not create a memory object")


def with_less_memory(batch_size: int, work: Callable[[int], Result]) -> tuple[Result, int]:
    """Run work in batches, and halve the batch size each time that memory runs out.

    Parameters
    ----------
    batch_size
        The first batch size.
    work
        Takes a batch size. Its result must not depend on the batch size; after an error it is called again from the
        start.

    Returns
    -------
    tuple
        The result of `work`, and the batch size that it was computed with.

    Raises
    ------
    HingeError
        Memory does not suffice for a batch of one.
    """
    while True:
        try:
            return work(batch_size), batch_size
        except Exception as error:
            # numpy raises MemoryError; on a CPU, torch raises RuntimeErrors that differ only in their message
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error) or str(error) in _ONEDNN):
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
        # outside of the except block, because the error keeps the memory of its frames
        if batch_size == 1:
            raise HingeError(f"memory runs out even with one at a time: {reason}")
        batch_size = (batch_size + 1) // 2
        logger.warning("memory ran out: continuing with batches of %d", batch_size)
        clear_device_cache(garbage_collection=True)
