"""What an operation promises about size and cost; its test and its benchmark read the same description."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OpSpec:
    """Shapes and traffic model of one operation.

    shapes: what the presets run, EPG-XL at batch 64 first, benchmarked and tested on a GPU.
    odd_shapes: small and awkward, for tests anywhere.
    bytes(shape, itemsize, backward): bytes that must cross the memory bus once, with `itemsize` bytes per value.
    multiply_adds(*shape): of the forward pass's matrix products; backward_products: how many times those the backward
    pass has.
    built_from: other operations, where it has no file of kernels of its own.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    odd_shapes: tuple[tuple[int, ...], ...]
    bytes: Callable[..., int]
    multiply_adds: Callable[..., int] = lambda *shape: 0
    backward_products: float = 2.0
    built_from: tuple[str, ...] = ()

    def flops(self, shape: tuple[int, ...], backward: bool = False) -> int:
        """Floating-point operations of the matrix products of one pass."""
        return round(2 * self.multiply_adds(*shape) * (self.backward_products if backward else 1))


def of_tokens(*sides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of 64 images of 258 tokens, with these sides behind."""
    return tuple((64, 258, *rest) for rest in sides)


def of_rows(*sides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The same, of images and tokens in one dimension."""
    return tuple((64 * 258, *rest) for rest in sides)
