"""torch.compile of networks, in place: block by block, or whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn

from epg_fast.models.encoder import ViTEncoder
from epg_fast.models.generator import EPGViT
from epg_fast.plans.sites import has_custom_operators


def compile_options(custom: bool = False, cuda_graphs: bool = False, more: Mapping[str, object] | None = None) -> dict:
    """Arguments of torch.compile: static shapes, since code for any batch size is slower, and Inductor's settings.

    custom: custom operators are called. They take exact strides, and rows that Inductor has padded are copied for them.
    cuda_graphs: torch's graph trees record what is compiled. more: further settings of Inductor.
    """
    options = ({"comprehensive_padding": False} if custom else {}) | dict(more or {})
    if cuda_graphs:
        options["triton.cudagraphs"] = True
    return {"dynamic": False, "options": options or None}


def compile_blocks(
    network: ViTEncoder, *, more: Mapping[str, object] | None = None, sharded: bool = False, **options
) -> None:
    """Compile every transformer block: fast, since all blocks of a kind share the graph.

    more: further settings of Inductor. sharded: leave what puts the weights together before a block outside of it.
    options: further arguments of torch.compile.
    """
    options = compile_options(has_custom_operators(network.ops), more=more) | options
    for block in network.all_blocks:
        if sharded:
            block.forward = torch.compile(block.forward, **options)
        else:
            block.compile(**options)


def compile_network(
    network: ViTEncoder,
    parts: Iterable[str] = ("__call__",),
    *,
    more: Mapping[str, object] | None = None,
    cuda_graphs: bool = False,
    **options,
) -> None:
    """Compile the whole, or these methods or modules of it, as one graph each.

    Arguments as in `compile_blocks` and `compile_options`.
    """
    options = {"fullgraph": True} | compile_options(has_custom_operators(network.ops), cuda_graphs, more) | options
    for name in parts:
        part = network if name == "__call__" else getattr(network, name)
        if isinstance(part, nn.Module):
            part.compile(**options)
        else:
            setattr(network, name, torch.compile(part, **options))


def compile_denoising(network: EPGViT, how: str, more: Mapping[str, object] | None = None) -> None:
    """Compile what sampling calls: the "blocks", or of the "network" `conditioning` and `denoise`."""
    if how == "network":
        compile_network(network, ["conditioning", "denoise"], more=more)
    else:
        compile_blocks(network, more=more)
