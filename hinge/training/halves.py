"""A step's batch in two halves, which a CPU computes at the same time.

The operations of a step are short: two threads that compute a half each are faster than two that share every operation.
A batch is halved whatever the number of threads is, so that results do not depend on it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

Part = Callable[[], Tensor]
"""Returns a part of a step's loss; threads may call several parts at once."""


def halves(positions: NDArray[np.int64], num_rows: int, device: torch.device) -> list[NDArray[np.int64]]:
    """Return the positions (n,) of a process's rows in two parts, or in one.

    One process on a CPU takes two. A process that has a share of the rows (`num_rows`, of the global batch) computes
    them together: there is a process for each core.
    """
    if device.type != "cpu" or len(positions) < max(2, num_rows):
        return [positions]
    return np.array_split(positions, 2)


class PartsOfLoss:
    """Computes parts of a loss with their gradients, each with half of the threads that torch may use on a CPU.

    Use it as a context manager, which ends the threads. It reduces the number of threads of torch from the first parts
    on, also for what is between the steps: changing it in every step costs more than it brings.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self.threads = torch.get_num_threads()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self.threads)

    def backward(self, module: nn.Module, parts: Sequence[Part], accelerator: Accelerator) -> Tensor:
        """Leave the gradients of the sum of some parts of a loss in the parameters, and return the sum."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

        def gradients(part: Part) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with accelerator.autocast():
                loss = part()
            # not backward(), which adds to parameters that threads share
            return loss.detach().float(), torch.autograd.grad(loss, parameters, allow_unused=True)

        if self._pool is None and self.threads > 1:
            torch.set_num_threads(self.threads // 2)
            self._pool = ThreadPoolExecutor(2, thread_name_prefix="halves of a batch")
        results = list(map(gradients, parts) if self._pool is None else self._pool.map(gradients, parts))
        for parameter, *found in zip(parameters, *(each for _, each in results), strict=True):
            own = [gradient for gradient in found if gradient is not None]
            if own:
                parameter.grad = sum(own[1:], own[0])
        return torch.stack([loss for loss, _ in results]).sum()

    @contextlib.contextmanager
    def all_threads(self) -> Iterator[None]:
        """Let one computation, such as an evaluation, use all threads."""
        reduced = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(reduced)
