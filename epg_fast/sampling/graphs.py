"""A function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class GraphedFunction:
    """`function(*inputs)` recorded once and launched as a whole: no Python and no launch of a kernel in between.

    function: of tensors to a tensor, without host synchronisation; it is called once to warm up (compilation, handles,
    workspaces) and once to be recorded. Calls take tensors of the shapes and dtypes of `inputs`; what they return is
    overwritten by the next call of any function with the same `pool` (`torch.cuda.graph_pool_handle()`).
    Raises RuntimeError when the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], pool):
        self._inputs = [x.clone() for x in inputs]
        self._device = self._inputs[0].device
        self._graph = torch.cuda.CUDAGraph()
        # what is recorded, and where it runs, follows the current device
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph, pool=pool):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._output
