"""What an operation promises about size and cost; its test and its benchmark read the same description."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OpSpec:
    """Shapes and traffic model of one operation.

    shapes: what the presets run, EPG-XL at batch 64 first, benchmarked and tested on a GPU.
    odd_shapes: small and awkward, for tests anywhere.
    bytes(shape, itemsize, backward): bytes that must cross the memory bus once, with `itemsize` bytes per value.
    flops(shape, backward): floating-point operations, element-wise ones included.
    built_from: other operations, where it has no kernel of its own.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    odd_shapes: tuple[tuple[int, ...], ...]
    bytes: Callable[..., int]
    flops: Callable[..., int]
    built_from: tuple[str, ...] = ()
