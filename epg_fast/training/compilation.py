"""torch.compile of a stage's networks, block by block or whole, and CUDA graphs of the latter.

The noised images of pre-training, which its networks read, are compiled in either case: element-wise work in one pass.

With CUDA graphs torch.compile records what it has compiled into graphs that share a memory pool.
A network may run several times before a backward pass, with and without gradient: each run of a step is recorded as
following the one before, and keeps its own memory until its results are gone. When the next step begins, all memory
of the step before is reused: nothing that a network, or its backward pass, returned may be read after that. An update
keeps to it: what it logs are copies, and it lets go of the gradients. Optimiser, losses and EMAs are outside.
"""

from __future__ import annotations

import logging

import torch

from epg_fast.config import RunConfig
from epg_fast.distributed import Ranks
from epg_fast.models.compilation import compile_blocks, compile_network, compile_options
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
            f"cuda_graphs: got gradient_accumulation {config.gradient_accumulation}, wanted 1: the gradients of one "
            "micro-batch would lie in memory that the next one's graph writes; leave out --cuda_graphs"
        )
    if ranks.world_size > 1:
        raise ValueError(
            f"cuda_graphs: got {ranks.world_size} ranks, wanted 1: torch's CUDA graph trees are known to fail under "
            "DistributedDataParallel, whose backward pass enters them from a second thread; leave out --cuda_graphs"
        )


def compile_stage(stage: Stage, how: str | None = None, **options) -> None:
    """Compile the networks that the loss calls, in place, as the stage's configuration asks for.

    how: instead of the configuration's `compile`. options: further arguments of torch.compile.
    """
    how, more = how or stage.config.compile, stage.chosen.options
    networks = [network for network in (stage.network, getattr(stage, "perceptual", None)) if network is not None]
    how = ("blocks" if stage.ranks.device.type == "cuda" else "off") if how == "auto" else how
    if stage.name == "pretrain" and how != "off":
        # outside of the networks, and of CUDA graphs: images and noise are new ones in every step
        stage.noised = torch.compile(stage.noised, fullgraph=True, **compile_options(more=more) | options)
    if how == "blocks":
        emas = [] if stage.ema is None else [stage.ema]
        for network in networks + emas:
            compile_blocks(network, more=more, sharded=stage.sharded, **options)
    elif how == "network":
        options = {"more": more, "cuda_graphs": stage.config.cuda_graphs} | options
        if stage.name == "pretrain":
            compile_network(stage.ema, **options)
            # the head of several ranks sums its statistics over them
            alone = ["projection_head"] if stage.ranks.world_size == 1 else []
            compile_network(stage.network, ["encode", *alone], **options)
        else:
            for network in networks:
                compile_network(network, **options)
    elif stage.config.fp8:
        log.warning("fp8 without torch.compile rounds in kernels of its own, which can cost more than FP8 saves")


def begin_step(config: RunConfig) -> None:
    """Say that what compiled networks returned in the step before is no longer needed; before every update."""
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()
