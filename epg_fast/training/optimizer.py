"""AdamW with its parameter groups, the learning-rate factor, and averaged weights."""

from __future__ import annotations

import math
import re

import torch

from epg_fast.config import OptimizerConfig


def lr_factor(
    step: int,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    min_scale: float = 0.0,
    milestones: tuple[int, int] = (400_000, 500_000),
) -> float:
    """Factor of the learning rate for the update at `step` (0-based: with a warm-up the very first update has 0).

    warmup-cosine: step/warmup, then a cosine to `min_scale`; warmup-step: step/warmup, then 1, 0.3 after the first
    milestone and 0.08 after the second; constant: 1. As in the released code, negative warmup_steps mean 1 throughout.
    """
    if warmup_steps < 0 or schedule == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "warmup-step":
        return 1.0 if step <= milestones[0] else 0.3 if step <= milestones[1] else 0.08
    if schedule != "warmup-cosine":
        raise ValueError(f"learning-rate schedule {schedule!r}: want warmup-cosine, warmup-step or constant")
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return max(0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0, min_scale)


def make_optimizer(network: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; each group carries `peak_lr`, from which `set_lr` computes its lr."""
    groups: dict[tuple[float, float], list] = {}
    exempt = set() if config.decay_tokens else network.no_weight_decay()
    depth = len(network.blocks)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = (0.0 if name in exempt else config.weight_decay, config.layer_decay ** _depth_below(name, depth))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": decay, "lr": config.lr * factor, "peak_lr": config.lr * factor}
            for (decay, factor), params in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _depth_below(name: str, depth: int) -> int:
    """How many encoder blocks lie between a parameter and the encoder's end (0 for everything behind the encoder)."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return depth - int(block[1])
    return depth + 1 if re.match(r"patch_embed\.|pos_embed|cls_token|class_embed\.", name) else 0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def update_average(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * network over parameters; buffers are left alone, as officially."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
