"""The package's own matrix products: what each saves, and what its tiles alone cost it against a library's.

What an operation saves is the floor of a sampling call without it less that with it, once with every other operation of
the package and once with none: the less of the two. What a norm saves that rides in the loads of products is counted
with every other operation alone, as it needs them. A product that is slower than a library's by more than its
break-even gives away more than that. Tiles and waves are the part of such a slow-down that arithmetic knows.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from functools import partial

from bench.ledger import triton_ir
from bench.ledger.cost import PRODUCTS, Kernel, Product, Tiles, resident, total
from bench.ledger.count import Counter
from bench.ledger.jobs import Job, Variant, count
from bench.report import OWN_PRODUCTS
from bench.resources import Usage, usage_of
from bench.results import ROOT, Row
from epg_fast.plans.sites import NETWORK, SITES

# Sites of the operations with products.
_OPERATIONS = {
    "embedding": "patch_embed",
    "encoder.proj": "linear_residual_norm",
    "encoder.mlp": "mlp_residual",
    "decoder.skip": "skip_linear",
    "decoder.proj": "linear_residual_norm",
    "decoder.mlp": "mlp_residual",
    "encoder.norm": "norm_linear",
    "decoder.norm": "norm_linear",
}


def study(job: Job, sites: Iterable[str] = tuple(_OPERATIONS)) -> list[Row]:
    """Microseconds of each product of a sampling call, were it a library's but for tiles and waves.

    job: the call; its network has one block of each kind.
    """
    small = dataclasses.replace(job, prepare=partial(job.prepare, depth=1, decoder_depth=1))

    def counted(sites: set[str], norm: str | None = None) -> tuple[float, Counter]:
        ops = dict.fromkeys(sites, "triton") | ({norm: "prologue"} if norm else {})
        found = count(small, Variant("", "ours", "blocks", ops))
        return total(found.of_phase("call")).floor, found

    rows, every = [], set(NETWORK)
    (none, _), (full, _) = counted(set()), counted(every)
    for site in sites:
        if site.endswith("norm"):
            riding, found = counted(every, site)
            saved, operation = full - riding, "norm_linear"
        else:
            (alone, found), (without, _) = counted({site}), counted(every - {site})
            saved, operation = min(none - alone, without - full), ""  # no other is in it
        kernels = [kernel for kernel in found.kernels if kernel.by == "ours" and kernel.kind == PRODUCTS]
        kernels = [kernel for kernel in kernels if kernel.detail.startswith(operation)]
        together = sum(kernel.seconds for kernel in kernels)
        for i, kernel in enumerate(kernels, 1):
            name = f"{site}, {_OPERATIONS[site]}" + f" ({i} of {len(kernels)})" * (len(kernels) > 1)
            tiles = triton_tiles(kernel.source)
            cuts = {"Triton": tiles} | ({"CUTLASS": cutlass_tiles(tiles)} if "cuda" in SITES[site] else {})
            for by, cut in cuts.items():
                product = Product(kernel.seconds, together, saved, cut)
                time = 1e6 * product.floor * product.slowdown
                what = (OWN_PRODUCTS, f"{name}, {by}", job.shape, job.dtype, "us")
                rows.append(Row(*what, time, time, time, details=product.as_json()))
    return rows


def triton_tiles(source: triton_ir.Source) -> Tiles:
    """By the names of a kernel's constants; its result is the largest tensor that it writes."""
    given = source.arguments
    height = given.get("BLOCK_M") or given["BLOCK_ROWS"]
    width = given.get("BLOCK_N") or given["BLOCK_COLUMNS"]
    *rows, columns = max((given[name] for name in triton_ir.accesses(source).stored), key=math.prod)
    return Tiles(math.prod(rows), columns, height, width, _resident(_usage(source)))


def cutlass_tiles(triton: Tiles) -> Tiles:
    """Of the same product by CUTLASS, by its header: one block on a multiprocessor, clusters along the rows."""
    header = (ROOT / "kernels" / "csrc" / "gemm_sm90.cuh").read_text()
    height, width = map(int, re.search(r"using Wide = cute::Shape<cute::_(\d+), cute::_(\d+)", header).groups())
    cluster = int(re.search(r"using ClusterShape = cute::Shape<cute::_(\d+)", header)[1])
    return Tiles(triton.rows, triton.columns, height, width, cluster=cluster)


def resources(kernels: Iterable[Kernel]) -> list[list]:
    """Of the package's Triton kernels among those, compiled for sm_90 as they were launched; each once."""
    sources = {(k.source.source.hash(), k.source.options.hash()): k.source for k in kernels if k.source}
    found = ((*usage.cells, _resident(usage)) for usage in map(_usage, sources.values()))
    return [list(cells) for cells in sorted(dict.fromkeys(found), key=str)]


def _usage(source: triton_ir.Source) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget

    made, options = source.source, source.options
    compiled = triton.compile(made, target=GPUTarget("cuda", 90, 32), options=vars(options))
    shape = " ".join(f"{name}={value}" for name, value in source.arguments.items() if name.startswith("BLOCK"))
    dtype = re.search(r"(?:\*|tensordesc<)(\w+)", " ".join(map(str, made.signature.values())))[1]  # the first tensor's
    return Usage(made.name, 90, shape, dtype, str(options.num_warps), **usage_of(compiled))


def _resident(usage: Usage) -> int:
    return resident(usage.registers, int(usage.warps), usage.shared)
