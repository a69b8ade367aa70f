"""What computes in a training run: the same on every rank, and after a resume what it was before."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import torch

from epg_fast.config import RunConfig
from epg_fast.files import write_atomically
from epg_fast.plans import Case, Chosen, Machine
from epg_fast.plans.plan import architecture

_RECORD = "plan.json"
log = logging.getLogger("epg_fast")


def training_case(job: str, config: RunConfig, network: torch.nn.Module, world_size: int) -> Case:
    """What a plan for this run is for."""
    images = config.batch_size // world_size // config.gradient_accumulation
    return Case(job, architecture(network), "fp8" if config.fp8 else config.precision, images)


def applied(config: RunConfig, chosen: Chosen, world_size: int) -> RunConfig:
    """The configuration with what was chosen where it says `auto`; flags that were given stay."""
    changes = {}
    if config.compile == "auto" and chosen.compile:
        changes["compile"] = chosen.compile
        if chosen.compile == "network" and config.parallelism == "fsdp":
            changes["compile"] = "blocks"
            log.info("blocks are compiled, not whole networks as in the plan: sharded networks take nothing else")
    if chosen.cuda_graphs and changes.get("compile") == "network":
        if world_size == 1 and config.gradient_accumulation == 1:
            changes["cuda_graphs"] = True
        else:
            log.info("no CUDA graphs, which the plan has: they take one rank and no gradient accumulation")
    return dataclasses.replace(config, **changes)


def kept_choice(outdir: Path) -> dict | None:
    """What the run in `outdir` has used so far; None for a run that has none."""
    try:
        record = json.loads((outdir / _RECORD).read_bytes())
        Chosen.from_record(record), Machine(**record["machine"])  # raise for what is none
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{outdir / _RECORD} is damaged; delete it, and the run goes on with another plan") from None


def choice_record(chosen: Chosen, device: torch.device) -> dict:
    """What `kept_choice` reads, and checkpoints hold."""
    return chosen.record() | {"machine": dataclasses.asdict(Machine.here(device))}


def note_choice(outdir: Path, record: dict) -> None:
    """Write what the run uses."""
    write_atomically(outdir / _RECORD, (json.dumps(record, indent=2) + "\n").encode())
