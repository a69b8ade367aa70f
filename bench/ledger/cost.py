"""Arithmetic of the ledger: what a kernel moves and computes, and the least time that takes.

A floor is the longer of a kernel's matrix products at one ceiling and its bytes at the other; kernels follow one
another. A launch costs nothing, no product and no access is less than perfect: a floor is never reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.measure import Ceilings

PRODUCTS, ATTENTION, NORMS, ELEMENTWISE = "products", "attention", "norms", "element-wise"
COPIES, REDUCTIONS, OPTIMISER = "casts and copies", "reductions", "optimiser"
KINDS = (PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, COPIES, REDUCTIONS, OPTIMISER)

H200 = Ceilings(788e12, 4.3e12)
"""What an H200 is taken to reach, with a large product in 16 bits (twice that in FP8) and with a large copy."""


@dataclass
class Kernel:
    """One call of a kernel, or `launches` of them that one operator makes of a list of tensors."""

    name: str
    kind: str
    read: int
    """Bytes; every value that is accessed crosses the bus once."""
    written: int
    flops: int = 0
    """Of its matrix products."""
    fp8: bool = False
    by: str = "eager"
    """Who launches it: "eager" (PyTorch, from Python), "library" (an operator in compiled code), "generated"
    (Inductor's Triton), "ours" (the package's Triton), "extension" (its CUDA)."""
    detail: str = ""
    launches: int = 1

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def seconds(self) -> float:
        """The floor of one call."""
        return H200.floor(self.flops / (2 if self.fp8 else 1), self.bytes)


@dataclass
class Total:
    """Of a list of kernels. seconds: of floors, by kind."""

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    @property
    def floor(self) -> float:
        return sum(self.seconds.values())

    @property
    def above(self) -> float:
        """Seconds of everything but matrix products, attention's included."""
        return self.floor - self.seconds[PRODUCTS] - self.seconds[ATTENTION]

    def as_json(self) -> dict:
        return {
            "kernels": self.kernels,
            "gigabytes": self.bytes / 1e9,
            "teraflop": self.flops / 1e12,
            "milliseconds": {kind: 1e3 * seconds for kind, seconds in self.seconds.items()},
            "above_products": 1e3 * self.above,
        }


def total(kernels: Iterable[Kernel]) -> Total:
    found = Total()
    for kernel in kernels:
        found.kernels += kernel.launches
        found.bytes += kernel.bytes
        found.flops += kernel.flops
        found.seconds[kernel.kind] += kernel.seconds
    return found
