"""Floating-point operations of a training step, the nominal peaks of GPUs, and what a run makes of these: MFU.

Counted are matrix products, as `epg_fast.models.work` lists them, and what the method needs: twice the forward pass in
the backward pass, less what needs no gradient, and nothing twice. What is computed again for less memory stands apart;
the scores that attention kernels compute again in their backward pass stand nowhere. That is the convention of MFU
(Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

import torch

from epg_fast.diffusion import consistency_stage
from epg_fast.models.work import Operation, elementwise, encoder, flops, generator, head, recomputed, similarities
from epg_fast.training.stages import Stage
from epg_fast.wording import nearest

log = logging.getLogger("epg_fast")


@dataclass(frozen=True)
class Update:
    """The operations of a stage's update on all images of the global batch."""

    trained: list[Operation]
    """Those that a backward pass follows."""
    without_gradient: list[Operation] = field(default_factory=list)
    """Forward passes of targets and frozen networks."""
    frozen: list[Operation] = field(default_factory=list)
    """Those with a backward pass to what enters, but none to their parameters."""


def update(stage: Stage, step: int) -> Update:
    """What `stage` computes at `step`, but its optimiser; its networks may be on the meta device."""
    of_stage = {"pretrain": _pretrain, "finetune-diffusion": _diffusion, "finetune-consistency": _consistency}
    return of_stage[stage.name](stage, step)


def _pretrain(stage: Stage, step: int) -> Update:
    """3 encoder passes with gradient and 3 without; 2 and 4 of the projection head; 3 similarity matrices."""
    network, target, batch = stage.network, stage.ema, stage.config.batch_size
    widths = [network.projection_head[-1].out_features] * 2 + [network.embed_dim]
    return Update(
        encoder(network, 3 * batch) + 2 * head(network, batch) + [similarities(batch, width) for width in widths],
        encoder(network, batch) + 2 * head(network, batch) + encoder(target, 2 * batch) + head(target, 2 * batch),
    )


def _diffusion(stage: Stage, step: int) -> Update:
    network, batch = stage.network, stage.config.batch_size
    shape = (batch, network.in_chans, network.image_size, network.patch_size)
    return Update([*generator(network, batch), elementwise("patch_loss", "patch_loss", shape, "element-wise")])


def _consistency(stage: Stage, step: int) -> Update:
    """The generator at t with gradient and, once e > 0, at r without; the frozen encoder on both images then."""
    c, plain, judge = stage.config, _diffusion(stage, step), stage.perceptual
    if not consistency_stage(step, c.first_stage, c.stage_length, c.delta):
        return plain
    without = generator(stage.network, c.batch_size)
    if judge is None:
        return Update(plain.trained, without)
    features = encoder(judge, c.batch_size, image_gradient=True) + head(judge, c.batch_size)
    similarity = similarities(c.batch_size, judge.projection_head[-1].out_features)
    return Update([*plain.trained, similarity], without + features, features)


@dataclass(frozen=True)
class StepFlops:
    """Operations of a training step, per image of the global batch."""

    forward: int
    """Forward passes that a backward pass follows."""
    backward: int
    without_gradient: int = 0
    """Forward passes of targets and frozen networks."""
    recomputed: int = 0
    """What activation checkpointing and pre-training's gradient accumulation add to `total`; 0 without them."""

    @property
    def total(self) -> int:
        """What MFU counts."""
        return self.forward + self.backward + self.without_gradient


def step_flops(stage: Stage, step: int) -> StepFlops:
    """Operations per image of `stage`'s update at `step`; its networks may be on the meta device."""
    network, batch, work = stage.network, stage.config.batch_size, update(stage, step)
    pretrains = stage.name == "pretrain"
    again = recomputed(network, 3 * batch if pretrains else batch)
    if pretrains and stage.config.gradient_accumulation > 1:
        again += flops(encoder(network, 3 * batch))
    backward = sum(o.weights + o.inputs for o in work.trained) + sum(o.inputs for o in work.frozen)
    sums = flops(work.trained + work.frozen), backward, flops(work.without_gradient), again
    return StepFlops(*(total // batch for total in sums))


@dataclass(frozen=True)
class Gpu:
    """Nominal dense peaks of matrix products in TFLOP/s, and of memory; `device` matches torch.cuda.get_device_name."""

    name: str
    device: str
    bf16: float
    """bf16 and fp16, summed in float32."""
    tf32: float
    fp32: float
    """Without tensor cores."""
    bandwidth: float | None
    """Of memory, in TB/s; None where the sources differ."""

    def peak(self, precision: str) -> tuple[float, str]:
        """(FLOP/s of products under `precision`, the format meant); float32 follows set_float32_matmul_precision."""
        if precision != "fp32":
            return self.bf16 * 1e12, precision
        if torch.get_float32_matmul_precision() == "highest":
            return self.fp32 * 1e12, "fp32"
        return self.tf32 * 1e12, "tf32"


# NVIDIA's datasheets, which give figures with 2:4 sparsity where one is halved here: A100 (2021), H100 (2023: SXM and
# PCIe), H200 (2024: SXM), L40S (2023), HGX B200 (2025: an eighth of the board; its memory is given as 7.7 to 8 TB/s);
# its Ada whitepaper (2023) for the RTX 4090. A device of another name (NVL, Laptop, MIG) has other peaks, and is not
# here.
GPUS = (
    Gpu("A100", r"(NVIDIA )?A100-SXM4-80GB", 312, 156, 19.5, 2.039),
    Gpu("A100 PCIe", r"NVIDIA A100 80GB PCIe", 312, 156, 19.5, 1.935),
    Gpu("A100 40GB", r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", 312, 156, 19.5, 1.555),
    Gpu("H100", r"NVIDIA H100 80GB HBM3", 1979 / 2, 989 / 2, 67, 3.35),
    Gpu("H100 PCIe", r"NVIDIA H100 PCIe", 1513 / 2, 756 / 2, 51, 2.0),
    Gpu("H200", r"NVIDIA H200", 1979 / 2, 989 / 2, 67, 4.8),
    Gpu("L40S", r"NVIDIA L40S", 362.05, 183, 91.6, 0.864),
    Gpu("RTX 4090", r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, 1.008),
    Gpu("B200", r"NVIDIA B200", 4500 / 2, 2250 / 2, 75, None),
)


def gpu_named(name: str) -> Gpu:
    """The GPU that the table calls `name`, in any case. Raises ValueError for another one."""
    known = {gpu.name.lower(): gpu for gpu in GPUS}
    if name.lower() not in known:
        names = [gpu.name for gpu in GPUS]
        near = nearest(name.upper(), names)
        raise ValueError(f"gpu {name!r}: its nominal peak is not known{near}; known: {', '.join(names)}")
    return known[name.lower()]


def gpu_of(device: torch.device) -> Gpu | None:
    """The table's entry for `device`; None for a CPU, and for a GPU, or a part of one, that is not in it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.device, name)), None)


class Utilization:
    """Figures of a line of metrics.jsonl that only a GPU has: `peak_memory_gib`, and `mfu` if its peak is known.

    Products in FP8 count against the peak of 16 bits, too: a run's mfu says how much faster it is than others, and
    what share of its products is in FP8 differs between networks.
    """

    def __init__(self, stage: Stage):
        self._stage, self._device, self._peak = stage, stage.ranks.device, None
        gpu = gpu_of(self._device)
        if gpu:
            self._peak = gpu.peak(stage.config.precision)[0] * stage.ranks.world_size
        elif self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
            log.info("MFU is not logged: the nominal peak of %s is not known", name)

    def figures(self, first: int, last: int, images_per_second: float) -> dict[str, float]:
        """Of the updates first..last-1 at a rate of images of the global batch.

        mfu: operations the method needs over those that all GPUs could do nominally; left out where the updates differ
        in their operations. peak_memory_gib: most memory allocated on this rank's GPU since the last call.
        """
        figures = {}
        if self._peak and last > first:
            start, end = (step_flops(self._stage, step).total for step in (first, last - 1))
            if start == end:
                figures["mfu"] = end * images_per_second / self._peak
        if self._device.type == "cuda":
            figures["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)
        return figures
