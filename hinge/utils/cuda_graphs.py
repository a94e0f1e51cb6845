"""Functions of tensors as CUDA graphs: a pass of many small kernels is launched at once.

A small model on a GPU waits for the host, which launches hundreds of kernels a pass. A graph records them once and
launches them together (NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs"; `torch.cuda.CUDAGraph`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

MOST_GRAPHS = 64
"""Graphs that are kept; further shapes are computed without one."""


class GraphedFunction:
    """A function that is computed as it is the first time that shapes occur, and as a CUDA graph from then on.

    Parameters
    ----------
    function
        Takes tensors on one device, or None, and returns a tensor. It reads nothing back to the host, and tensors that
        it uses besides its arguments, such as weights, stay where they are. On other devices than CUDA it is called as
        it is.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self._graphs: dict[tuple, _Graph | None] = {}
        self._pool: tuple[int, int] | None = None

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        """Return function(*arguments)."""
        given = [each for each in arguments if each is not None]
        if not given[0].is_cuda or torch.is_grad_enabled():
            return self.function(*arguments)
        key = tuple(None if each is None else (each.shape, each.dtype) for each in arguments)
        if key not in self._graphs:
            # also what kernels and libraries need before they can be recorded
            self._graphs[key] = None
            return self.function(*arguments)
        graph = self._graphs[key]
        if graph is None:
            if sum(each is not None for each in self._graphs.values()) >= MOST_GRAPHS:
                return self.function(*arguments)
            # results are copied before another graph runs, so that all graphs can use the same memory
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = self._graphs[key] = _Graph(self.function, arguments, self._pool)
        return graph(*arguments)

    def clear(self) -> None:
        """Forget all graphs, which gives their memory back."""
        self._graphs.clear()
        self._pool = None


class _Graph:
    """One recorded call; arguments are copied into the tensors that it was recorded with."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...], pool: tuple[int, int]):
        self.inputs = [None if each is None else each.clone() for each in arguments]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = function(*self.inputs)

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        for own, given in zip(self.inputs, arguments, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self.output.clone()
