"""Functions that launch many small kernels, as CUDA graphs: one launch instead."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Captured"]

WARM_UP = 2  # calls before the capture: kernels are compiled, libraries get their workspace, constants are made


class _Graph(NamedTuple):
    """A captured call, with the places of its arguments and results."""

    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    results: tuple[Tensor, ...]


class Captured:
    """A function that is captured at its first call with arguments of a kind, and replayed from then on.

    Parameters
    ----------
    function : callable
        From tensors on a GPU to tensors. It must neither wait for the GPU nor copy from the CPU, and what it does may
        depend on shapes and dtypes of its arguments alone. No gradients.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Captured, (self._function,)  # a copy captures for itself

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The function's results, in memory of their own."""
        kind = tuple((x.shape, x.dtype, x.device) for x in arguments)
        if kind not in self._graphs:
            with torch.cuda.device(arguments[0].device):
                self._graphs[kind] = self._capture(arguments)
        captured = self._graphs[kind]
        for place, x in zip(captured.arguments, arguments, strict=True):
            place.copy_(x)
        captured.graph.replay()
        return tuple(x.clone() for x in captured.results)

    def _capture(self, arguments: tuple[Tensor, ...]) -> _Graph:
        places = tuple(x.clone() for x in arguments)
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._function(*places)
        now.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._function(*places)
        return _Graph(graph, places, results)
