"""The package's own matrix products: what each saves, and what its tiles alone cost it against a library's.

What an operation saves is the floor of a block without it less that with it, once with every other operation of the
package and once with none: the less of the two. A product that is slower than a library's by more than its break-even
gives away more than that. Tiles and waves are the part of such a slow-down that arithmetic knows.
"""

from __future__ import annotations

import dataclasses

import torch

from bench.ledger.cost import Kernel, Tiles, break_even, resident, verdict
from bench.ledger.count import Counter, Launch, extension_tiles
from bench.ledger.jobs import compiling_as_is
from bench.resources import usage_of
from bench.results import Row
from epg_fast.plans.sites import NETWORK

# Where a network has an operation with products.
_SITES = {
    "linear_residual_norm": "proj",
    "mlp_residual": "mlp",
    "patch_embed": "embedding",
    "skip_linear": "skip",
}
# The extension's product of an operation, where it has one.
_CUTLASS = {
    "linear_residual_norm": "linear_gate_residual_out",
    "mlp_residual": "linear_gelu_out",
    "skip_linear": "skip_linear_out",
}


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of one block, in seconds.

    by: the kernel. floor: of the product. of_operation: of all products of its operation, which save `saved` together.
    """

    where: str
    op: str
    by: str
    floor: float
    of_operation: float
    saved: float
    tiles: Tiles

    @property
    def allowed(self) -> float:
        return break_even(self.saved, self.of_operation)


def study(preset: str, batch: int) -> list[Product]:
    """Of a sampling call in bfloat16, block by block."""
    every = {site.rpartition(".")[2] for site in NETWORK}
    none, full = _blocks(preset, batch, set()), _blocks(preset, batch, every)
    own = {op for kernels in full[0].values() for op in _own(kernels)}
    found = []
    for op in sorted(own):
        alone, without = _blocks(preset, batch, {_SITES[op]}), _blocks(preset, batch, every - {_SITES[op]})
        for where, kernels in full[0].items():
            products = _own(kernels).get(op, [])
            saved = min(_floor(none, where) - _floor(alone, where), _floor(without, where) - _floor(full, where))
            total = sum(kernel.seconds for kernel in products)
            for i, kernel in enumerate(products, 1):
                name = op if len(products) == 1 else f"{op} ({i} of {len(products)})"
                tiles = dataclasses.replace(kernel.tiles, resident=_resident(full[1], kernel.name))
                found.append(Product(where, name, "Triton", kernel.seconds, total, saved, tiles))
                if hasattr(torch.ops.epg_fast, _CUTLASS.get(op, "")):
                    tiles = extension_tiles(kernel.tiles.rows, kernel.tiles.columns)
                    found.append(Product(where, name, "CUTLASS", kernel.seconds, total, saved, tiles))
    return found


def rows_of(products: list[Product], job: str, shape: str) -> list[Row]:
    """As results: microseconds of a product with what its tiles and waves cost, were the rest as good."""
    rows = []
    for p in products:
        tiles, time = p.tiles, 1e6 * p.floor * p.tiles.slowdown
        details = {
            "floor_ms": 1e3 * p.floor,
            "saved_ms": 1e3 * p.saved,
            "break_even": p.allowed,
            "slowdown": tiles.slowdown,
            "outcome": verdict(tiles.slowdown, p.allowed),
            "tiles": [
                f"{tiles.rows} x {tiles.columns}",
                f"{tiles.height} x {tiles.width}",
                tiles.resident,
                f"{tiles.waves:.2f}",
                f"{100 * (tiles.unfilled - 1):.1f}%",
                f"{100 * (tiles.idle - 1):.1f}%",
            ],
        }
        rows.append(Row(job, f"{p.where} {p.op}, {p.by}", shape, "bf16", "us", time, time, time, details=details))
    return rows


RESOURCES = ("kernel", "warps", "registers", "spills", "shared", "matrix", "16-byte", "TMA", "resident")


def resources(launches: dict[str, Launch]) -> list[list]:
    """Of the package's Triton kernels as they were launched, compiled for sm_90; each configuration once."""
    found = {}
    for launch in launches.values():
        usage = usage_of(_compiled(launch))
        blocks = resident(usage["registers"], 32 * launch.num_warps, usage["shared"])
        costs = [usage[name] for name in ("registers", "spills", "shared", "matrix")]
        wide = f"{usage['wide']}/{usage['accesses']}"
        found[(launch.kernel.fn.__name__, launch.num_warps, *costs, wide, usage["tma"], blocks)] = None
    return sorted(map(list, found), key=str)


def _compiled(launch: Launch):
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(launch.source.source, target=GPUTarget("cuda", 90, 32), options=vars(launch.source.options))


def _resident(counter: Counter, name: str) -> int:
    """Blocks of a kernel on a multiprocessor; the least of its configurations."""
    found = []
    for launch in counter.launches.values():
        if launch.kernel.fn.__name__ == name:
            usage = usage_of(_compiled(launch))
            found.append(resident(usage["registers"], 32 * launch.num_warps, usage["shared"]))
    return min(found)


def _own(kernels: list[Kernel]) -> dict[str, list[Kernel]]:
    """The package's products by operation."""
    found = {}
    for kernel in kernels:
        if kernel.by in ("ours", "extension") and kernel.flops and kernel.tiles:
            found.setdefault(kernel.detail.partition(":")[0], []).append(kernel)
    return found


def _floor(counted: tuple[dict[str, list[Kernel]], Counter], where: str) -> float:
    return sum(kernel.seconds for kernel in counted[0][where])


def _blocks(preset: str, batch: int, sites: set[str]) -> tuple[dict[str, list[Kernel]], Counter]:
    """Kernels of one block of each kind and of what is around them, with the package's kernels at these sites."""
    from epg_fast.models import create_model
    from epg_fast.sampling.engine import _compile
    from epg_fast.sampling.precision import inference_network

    counter = Counter()
    with compiling_as_is(counter), torch.no_grad():
        with torch.device("cuda"):
            model = create_model(preset, depth=1, decoder_depth=1).use_ops(dict.fromkeys(sites, "triton")).eval()
            size = model.image_size
            x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16)
            t, y = torch.empty(batch), torch.empty(batch, dtype=torch.int64)
        network = inference_network(model, "bf16")
        _compile(network, "blocks")
        network.denoise(x, network.conditioning(t, y))
        counter.kernels.clear()
        with counter.counting():
            network.denoise(x, network.conditioning(t, y))
    encoder, decoder = (graph.name for graph in counter.graphs)
    names = {encoder: "encoder", decoder: "decoder"}
    found = {name: [] for name in (*names.values(), "around")}
    for kernel in counter.kernels:
        found[names.get(kernel.graph, "around")].append(kernel)
    return found, counter
