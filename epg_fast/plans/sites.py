"""Where a job computes, and with what: every site of the networks, the optimiser and the samplers, and its backends.

A choice is a mapping {site: backend}. Parameters, their names and the results, up to rounding, are the same with any.
"""

from __future__ import annotations

from collections.abc import Mapping

from epg_fast.ops.attention import SDPA
from epg_fast.wording import nearest

_BLOCK = {
    "norm": ("plain", "triton", "prologue"),
    "attention": ("plain", *SDPA[1:], "flash_attn", "flash_attn_3", "flash_attn_4", "triton"),
    "proj": ("plain", "norm", "triton", "cuda"),
    "mlp": ("plain", "triton", "cuda"),
}
SITES: dict[str, tuple[str, ...]] = {
    "embedding": ("plain", "triton"),
    "condition": ("plain", "triton"),
    **{f"encoder.{name}": backends for name, backends in _BLOCK.items()},
    "decoder.skip": ("plain", "triton", "cuda"),
    **{f"decoder.{name}": backends for name, backends in _BLOCK.items()},
    "loss": ("plain", "triton"),
    "fp8": ("plain", "scaled_mm", "triton", "cuda"),
    "optimizer": ("plain", "fused"),
    "steps": ("plain", "extension"),
}
"""Site -> backends.

embedding: patches, position and class tokens. condition: time embedding and its SiLU. norm: the first norm of a block,
and the final one; "prologue" makes every norm but the first of the encoder and those behind a long skip within the
Triton product that reads it, which takes all of the block but attention and skip from Triton, and a pass that has a
gradient computes as with "triton". attention: softmax attention, without its products with weights. proj: attention's
output projection, its gate, the residual and the second norm; "norm" takes the product from PyTorch and the rest as one
Triton kernel. mlp: both products, GELU, gate and residual. skip: the long skip's product, its norm and the first norm
of the block. loss: the loss of patches. fp8: blocks in FP8, with which precision fp8 samples; "plain" quantises in
PyTorch's operators, "scaled_mm" in Triton's kernels around the products, which are PyTorch's, "cuda" likewise around
those of the extension; "triton" has products by Triton and quantises in them, and in attention if that is "triton",
too. Sites norm, proj, mlp and skip are not asked in FP8. optimizer: "plain" is PyTorch's fused AdamW, "fused"
the extension's update. steps: of the samplers `euler` and `heun`. Elsewhere "cuda" takes products with an epilogue from
the extension (compute capability 9.0, bfloat16), and the rest as "triton" does.
"""
NETWORK = tuple(site for site in SITES if site not in ("optimizer", "steps"))
"""Those that a network's `use_ops` asks."""
PLAIN = dict.fromkeys(SITES, "plain")
KINDS = {"plain": (), "triton": ("triton",), "cuda": ("cuda", "triton")}
"""What stands for a choice of all sites: the backends that each takes the first of that it has."""


def site_choices(ops: str | Mapping[str, str]) -> dict[str, str]:
    """{site: backend} of every site, from "plain", a kind of kernels, or {site: backend}, the rest plain.

    "triton": every Triton kernel. "cuda": the extension's products, and Triton's kernels elsewhere.

    A name without its half, such as "attention", stands for the encoder's and the decoder's.
    Raises ValueError for a site or backend that does not exist, with the nearest that does.
    """
    if isinstance(ops, str):
        if ops not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(f"ops {ops!r}: want {kinds}, or sites with their backends such as {{'mlp': 'triton'}}")
        wanted = KINDS[ops]
        return {site: next((kind for kind in wanted if kind in SITES[site]), "plain") for site in SITES}
    if not isinstance(ops, Mapping):
        raise ValueError(f"ops {ops!r}: want a name such as 'triton', or sites with their backends")
    chosen = dict(PLAIN)
    for name, backend in ops.items():
        sites = sites_of(name)
        if not sites:
            shown = sorted({site.rpartition(".")[2] for site in SITES})
            raise ValueError(f"ops: got site {name!r}{nearest(name, [*SITES, *shown])}, want one of {', '.join(shown)}")
        for site in sites:
            if backend not in SITES[site]:
                raise ValueError(f"ops: got {name}={backend!r}, want one of {', '.join(SITES[site])}")
            chosen[site] = backend
    return chosen


def sites_of(name: str) -> list[str]:
    """The site of that name, or those of both halves."""
    return [site for site in SITES if name in (site, site.partition(".")[2])]


def of_half(ops: Mapping[str, str], half: str) -> dict[str, str]:
    """{name: backend} of the blocks of one half, "encoder" or "decoder"."""
    prefix = f"{half}."
    return {site.removeprefix(prefix): backend for site, backend in ops.items() if site.startswith(prefix)}


def has_custom_operators(ops: Mapping[str, str]) -> bool:
    """Whether anything but PyTorch's own operators computes."""
    return any(ops[site] not in SDPA for site in NETWORK)


def has_fused_operations(ops: Mapping[str, str]) -> bool:
    """Whether a block is computed by operations that read its weights themselves, past its linear layers."""
    sites = [f"{half}.{name}" for half in ("encoder", "decoder") for name in ("norm", "proj", "mlp")]
    return any(ops[site] != "plain" for site in (*sites, "decoder.skip"))
