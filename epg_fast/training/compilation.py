"""torch.compile of a stage's networks, block by block or whole, and CUDA graphs of the latter.

With CUDA graphs torch.compile records what it has compiled into graphs that share a memory pool.
A network may run several times before a backward pass, with and without gradient: each run of a step is recorded as
following the one before, and keeps its own memory until its results are gone. When the next step begins, all memory
of the step before is reused: nothing that a network, or its backward pass, returned may be read after that. An update
keeps to it: what it logs are copies, and it lets go of the gradients. Optimiser, losses and averages are outside.
"""

from __future__ import annotations

import logging

import torch
import torch.nn as nn

from epg_fast.config import RunConfig
from epg_fast.distributed import Ranks
from epg_fast.plans.sites import has_custom_operators
from epg_fast.runtime import compile_options
from epg_fast.training.stages import Stage

log = logging.getLogger("epg_fast")


def check_compilation(config: RunConfig, ranks: Ranks) -> None:
    """Raise ValueError for CUDA graphs where they cannot be, or are known to fail."""
    if not config.cuda_graphs:
        return
    if ranks.device.type != "cuda":
        raise ValueError(f"cuda_graphs: got device {ranks.device.type}, wanted a CUDA device; leave out --cuda_graphs")
    if config.gradient_accumulation > 1:
        raise ValueError(
            f"cuda_graphs: got gradient_accumulation {config.gradient_accumulation}, wanted 1: the gradients of a part "
            "would lie in memory that the next part's graph writes; leave out --cuda_graphs"
        )
    if ranks.world_size > 1:
        raise ValueError(
            f"cuda_graphs: got {ranks.world_size} ranks, wanted 1: torch's CUDA graph trees are known to fail under "
            "DistributedDataParallel, whose backward pass enters them from a second thread; leave out --cuda_graphs"
        )


def compile_stage(stage: Stage) -> None:
    """Compile what the stage's configuration asks for, in place."""
    config = stage.config
    if config.compile == "network":
        compile_networks(stage)
    elif config.compile == "blocks" or (config.compile == "auto" and stage.ranks.device.type == "cuda"):
        compile_blocks(stage)
    elif config.fp8:
        log.warning("fp8 without torch.compile rounds in kernels of its own, which can cost more than FP8 saves")


def begin_step(config: RunConfig) -> None:
    """Say that what compiled networks returned in the step before is no longer needed; before every update."""
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()


def compile_blocks(stage: Stage, **options) -> None:
    """torch.compile every transformer block in place: fast to compile, since all blocks of a kind share the graph.

    The shapes are static: a stage has a handful of them (pre-training three), and code for any batch size is slower.
    options: further arguments of torch.compile.
    """
    options = _options(stage) | options
    networks = [stage.network, stage.ema, getattr(stage, "perceptual", None)]
    for network in filter(None, networks):
        for block in [*network.blocks, *getattr(network, "decoder_blocks", ())]:
            if stage.sharded:
                # what puts the weights together before the block stays outside
                block.forward = torch.compile(block.forward, **options)
            else:
                block.compile(**options)


def compile_networks(stage: Stage, **options) -> None:
    """torch.compile every network that the stage's loss calls, in place and in one piece, for static shapes.

    The projection head of several ranks, which sums its statistics over them, stays as it is. options: further
    arguments of torch.compile.
    """
    options = {"fullgraph": True} | _options(stage) | options
    if stage.name != "pretrain":
        for network in filter(None, [stage.network, getattr(stage, "perceptual", None)]):
            network.compile(**options)
        return
    _compile_method(stage.network, "encode", options)
    if stage.ranks.world_size == 1:
        stage.network.projection_head.compile(**options)
    stage.ema.compile(**options)


def _options(stage: Stage) -> dict:
    return compile_options(has_custom_operators(stage.network.ops), stage.config.cuda_graphs, stage.chosen.options)


def _compile_method(module: nn.Module, name: str, options: dict) -> None:
    setattr(module, name, torch.compile(getattr(module, name), **options))
