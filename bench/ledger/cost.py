"""Arithmetic of the ledger: what a kernel moves and computes, the least time that takes, what tiles and waves add.

A floor is the longer of a kernel's matrix products at one ceiling and its bytes at the other; kernels follow one
another. A launch costs nothing, no product and no access is less than perfect: a floor is never reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.measure import Ceilings

if TYPE_CHECKING:
    from bench.ledger.triton_ir import Source

PRODUCTS, ATTENTION, NORMS, ELEMENTWISE = "products", "attention", "norms", "element-wise"
COPIES, REDUCTIONS, OPTIMISER = "casts and copies", "reductions", "optimiser"
KINDS = (PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, COPIES, REDUCTIONS, OPTIMISER)

H200 = Ceilings(788e12, 4.3e12)
"""What an H200 is taken to reach, with a large product in 16 bits (twice that in FP8) and with a large copy."""

MULTIPROCESSORS = 132
_REGISTERS, _SHARED, _THREADS, _BLOCKS = 65536, 228 << 10, 2048, 32  # of a multiprocessor of compute capability 9.0


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
    source: Source | None = None
    """What Triton compiles, of the package's Triton."""

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


@dataclass(frozen=True)
class Tiles:
    """How a matrix product [rows, columns] is cut.

    height, width: of a tile; resident: blocks that a multiprocessor holds at once; cluster: neighbouring tiles that are
    launched together, so that their number is rounded up to it.
    """

    rows: int
    columns: int
    height: int
    width: int
    resident: int = 1
    cluster: int = 1

    @property
    def count(self) -> int:
        down = math.ceil(math.ceil(self.rows / self.height) / self.cluster) * self.cluster
        return down * math.ceil(self.columns / self.width)

    @property
    def waves(self) -> float:
        return self.count / (MULTIPROCESSORS * self.resident)

    @property
    def unfilled(self) -> float:
        """Area of all tiles over that of the result: 1 where every tile is full."""
        return self.count * self.height * self.width / (self.rows * self.columns)

    @property
    def idle(self) -> float:
        """Waves rounded up over waves: 1 where the last wave is full."""
        return math.ceil(self.waves) / self.waves


def resident(registers: int, warps: int, shared: int) -> int:
    """Blocks that fit on a multiprocessor. registers: per thread, given out by 256 for a warp; shared: bytes, to which
    the system adds 1 KiB."""
    per_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    by_registers = _REGISTERS // (per_warp * warps)
    return min(by_registers, _SHARED // (shared + 1024), _THREADS // (32 * warps), _BLOCKS)


@dataclass(frozen=True)
class Product:
    """A matrix product of the package's own against the library's, in seconds.

    floor: of the product. of_operation: of all products of its operation, which save `saved` together.
    """

    floor: float
    of_operation: float
    saved: float
    tiles: Tiles

    @property
    def break_even(self) -> float:
        """How much slower than the library's it may be before what it saves is gone."""
        return 1 + self.saved / self.of_operation

    @property
    def slowdown(self) -> float:
        """By tiles and waves alone, against a product that loses nothing to either."""
        return self.tiles.unfilled * self.tiles.idle

    @property
    def outcome(self) -> str:
        return "a win if the rest is as good" if self.slowdown < self.break_even else "not a win"

    def as_json(self) -> dict:
        tiles = self.tiles
        return {
            "result": [tiles.rows, tiles.columns],
            "tile": [tiles.height, tiles.width],
            **{name: getattr(tiles, name) for name in ("resident", "waves", "unfilled", "idle")},
            "floor_us": 1e6 * self.floor,
            "saved_us": 1e6 * self.saved,
            **{name: getattr(self, name) for name in ("slowdown", "break_even", "outcome")},
        }
