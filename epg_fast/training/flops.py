"""Floating-point operations of a training step, the nominal peaks of GPUs, and what a run makes of these: MFU.

Products with weights and the two of attention count, a multiplication and an addition as two operations, as
torch.utils.flop_counter counts them; norms, softmax and element-wise work do not. Counted is what the method needs:
twice the forward pass in the backward pass, less what needs no gradient, and nothing twice. What is computed again for
less memory stands apart; the scores that attention kernels compute again in their backward pass stand nowhere. That is
the convention of MFU (Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch
import torch.nn as nn

from epg_fast.diffusion import consistency_stage
from epg_fast.models import EPGViT
from epg_fast.models.blocks import Block, DecoderBlock, is_recomputed
from epg_fast.models.encoder import ViTEncoder
from epg_fast.training.stages import Stage
from epg_fast.wording import nearest

log = logging.getLogger("epg_fast")


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
    count = {"pretrain": _pretrain, "finetune-diffusion": _diffusion, "finetune-consistency": _consistency}
    return count[stage.name](stage, step)


def _pretrain(stage: Stage, step: int) -> StepFlops:
    """3 encoder passes with gradient and 3 without; 2 and 4 of the projection head; 3 similarity matrices."""
    network, config = stage.network, stage.config
    trunk, head = _trunk(network), _linears(network.projection_head)
    similarity = 2 * _similarity(stage, network.projection_head[-1].out_features)
    similarity += _similarity(stage, network.embed_dim)
    return StepFlops(
        forward=3 * trunk + 2 * head + similarity,
        backward=2 * (3 * trunk + 2 * head) - 3 * _patches(network) + similarity,
        without_gradient=3 * trunk + 4 * head,
        recomputed=3 * _recomputed(network) + (3 * trunk if config.gradient_accumulation > 1 else 0),
    )


def _diffusion(stage: Stage, step: int) -> StepFlops:
    network, forward = stage.network, _generator(stage.network)
    without = _patches(network)
    if not network.num_classes:  # the time embedding has no parameter: the condition needs no gradient
        without += sum(_linears(block.adaLN_modulation) for block in network.decoder_blocks)
    return StepFlops(forward, 2 * forward - without, recomputed=_recomputed(network))


def _consistency(stage: Stage, step: int) -> StepFlops:
    """The generator at t with gradient and, once e > 0, at r without; the frozen encoder on both images then."""
    c, plain, frozen = stage.config, _diffusion(stage, step), stage.perceptual
    if not consistency_stage(step, c.first_stage, c.stage_length, c.delta):
        return plain
    if frozen is None:
        return StepFlops(plain.forward, plain.backward, plain.forward, plain.recomputed)
    encoder = _trunk(frozen) + _linears(frozen.projection_head)
    attention = sum(_attention(frozen, block) for block in frozen.blocks)  # has two gradients, a frozen weight has one
    similarity = _similarity(stage, frozen.projection_head[-1].out_features)
    return StepFlops(
        forward=plain.forward + encoder + similarity,
        backward=plain.backward + encoder + attention + similarity,
        without_gradient=plain.forward + encoder,
        recomputed=plain.recomputed,
    )


def _similarity(stage: Stage, width: int) -> int:
    """One image's query against the keys of the global batch, which get no gradient."""
    return 2 * stage.config.batch_size * width


def _linears(module: nn.Module, tokens: int = 1) -> int:
    return sum(2 * tokens * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _tokens(network: ViTEncoder) -> int:
    return network.extras + network.num_patches


def _patches(network: ViTEncoder) -> int:
    """The product that embeds the patches."""
    return 2 * network.num_patches * network.patch_embed.proj.weight.numel()


def _attention(network: ViTEncoder, block: Block | DecoderBlock) -> int:
    """q k^T and p v over all heads."""
    return 4 * _tokens(network) ** 2 * block.attn.proj.in_features


def _behind(network: ViTEncoder, index: int) -> int:
    """Tokens that block `index` computes behind its attention."""
    return 1 if network.drops_tokens and index == len(network.blocks) - 1 else _tokens(network)


def _blocks(network: ViTEncoder) -> list[int]:
    """Of each block, without the modulation of a decoder block."""
    tokens, depth, found = _tokens(network), len(network.blocks), []
    for i, block in enumerate(network.all_blocks):
        total = _linears(block.attn.qkv, tokens) + _attention(network, block)
        total += _linears(block.attn.proj, _behind(network, i)) + _linears(block.mlp, _behind(network, i))
        has_skip = depth <= i < 2 * depth
        found.append(total + (_linears(block.skip_linear, tokens) if has_skip else 0))
    return found


def _trunk(network: ViTEncoder) -> int:
    return _patches(network) + sum(_blocks(network)[: len(network.blocks)])


def _generator(network: EPGViT) -> int:
    total = _patches(network) + sum(_blocks(network)) + _linears(network.out, network.num_patches)
    total += sum(_linears(block.adaLN_modulation) for block in network.decoder_blocks)
    joint = network.encoder_to_decoder
    return total if joint is None else total + _linears(joint, _tokens(network))


def _recomputed(network: ViTEncoder) -> int:
    """What activation checkpointing computes again: a block up to what its backward pass needs.

    An encoder block's last product is only added to x; a decoder block's is gated, which needs its result.
    """
    total = 0
    for i, (block, size) in enumerate(zip(network.all_blocks, _blocks(network), strict=True)):
        if is_recomputed(i, network.use_checkpoint):
            total += size - (0 if isinstance(block, DecoderBlock) else _linears(block.mlp.fc2, _behind(network, i)))
    return total


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
