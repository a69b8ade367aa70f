"""Floating-point operations of a training step, counted from the shapes of its matrix products.

Products with weights and the two of attention count, a multiplication and an addition as two operations, as
torch.utils.flop_counter counts them; norms, softmax and element-wise work do not. Counted is what the method needs: a
product per gradient in the backward pass, and nothing twice. What is computed again for less memory stands apart; the
scores that attention kernels compute again in their backward pass stand nowhere. That is the convention of MFU
(Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch.nn as nn

from epg_fast.diffusion import consistency_stage
from epg_fast.models import EPGViT, RCMViT
from epg_fast.models.blocks import Attention, Block, DecoderBlock
from epg_fast.models.encoder import ViTEncoder, is_recomputed
from epg_fast.training.stages import Stage


@dataclass(frozen=True)
class _Pass:
    """Operations of one image's pass through a part of a network."""

    forward: int = 0
    weights: int = 0
    """Backward: gradients of parameters."""
    inputs: int = 0
    """Backward: gradients of what enters the products."""
    recomputed: int = 0
    """Forward operations that activation checkpointing repeats."""

    def __add__(self, other: _Pass) -> _Pass:
        return _Pass(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __rmul__(self, times: int) -> _Pass:
        return _Pass(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StepFlops:
    """Operations of a training step, per image of the global batch."""

    forward: int
    """Forward passes that a backward pass follows."""
    backward: int
    without_gradient: int
    """Forward passes of targets and frozen networks."""
    recomputed: int
    """What activation checkpointing and pre-training's gradient accumulation add to `total`; 0 without them."""

    @property
    def total(self) -> int:
        """What MFU counts."""
        return self.forward + self.backward + self.without_gradient


def step_flops(stage: Stage, step: int) -> StepFlops:
    """Operations per image of `stage`'s update at `step`; its networks may be on the meta device."""
    return _STEPS[stage.name](stage, step)


def _pretrain(stage: Stage, step: int) -> StepFlops:
    """3 encoder passes with gradient and 3 without; 2 and 4 of the projection head; 3 similarity matrices."""
    network, target = stage.network, stage.ema
    trunk, head = _feature(network), _head(network)
    similarity = 2 * _similarity(stage, network.projection_head[-1].out_features)
    similarity += _similarity(stage, network.embed_dim)
    without = 1 * trunk.forward + 2 * head.forward + 2 * (_feature(target).forward + _head(target).forward)
    again = 3 * trunk.forward if stage.config.gradient_accumulation > 1 else 0
    return _step(network, 3 * trunk + 2 * head, similarity, without, again)


def _diffusion(stage: Stage, step: int) -> StepFlops:
    return _step(stage.network, _generator(stage.network), 0, 0)


def _consistency(stage: Stage, step: int) -> StepFlops:
    """The generator at t with gradient and, once e > 0, at r without; the frozen encoder on both images then."""
    c, generator, perceptual = stage.config, _generator(stage.network), stage.perceptual
    if not consistency_stage(step, c.first_stage, c.stage_length, c.delta):
        return _step(stage.network, generator, 0, 0)
    if perceptual is None:
        return _step(stage.network, generator, 0, generator.forward)
    encoder = _feature(perceptual, image_gradient=True) + _head(perceptual)
    similarity = _similarity(stage, perceptual.projection_head[-1].out_features)
    frozen = _Pass(encoder.forward, 0, encoder.inputs)
    return _step(stage.network, generator + frozen, similarity, generator.forward + encoder.forward)


_STEPS = {"pretrain": _pretrain, "finetune-diffusion": _diffusion, "finetune-consistency": _consistency}


def _step(network: ViTEncoder, trained: _Pass, similarity: int, without_gradient: int, again: int = 0) -> StepFlops:
    return StepFlops(
        forward=trained.forward + similarity,
        backward=trained.weights + trained.inputs + similarity,  # only the queries get a gradient
        without_gradient=without_gradient,
        recomputed=again + trained.recomputed,
    )


def _similarity(stage: Stage, width: int) -> int:
    """One image's query against the keys of the global batch."""
    return 2 * stage.config.batch_size * width


def _generator(network: EPGViT) -> _Pass:
    length, depth = network.extras + network.num_patches, len(network.blocks)
    total = _trunk(network) + _linear(network.out, network.num_patches)
    if network.encoder_to_decoder is not None:
        total += _linear(network.encoder_to_decoder, length)
    for j, block in enumerate(network.decoder_blocks):
        total += _block(block, length, has_skip=j < depth, again=is_recomputed(depth + j, network.use_checkpoint))
        modulation = _linear(block.adaLN_modulation[-1], 1)
        # The time embedding has no parameter: without a class embedding the condition needs no gradient.
        total += modulation if network.num_classes else _Pass(modulation.forward, modulation.weights)
    return total


def _feature(network: ViTEncoder, image_gradient: bool = False) -> _Pass:
    return _trunk(network, image_gradient, kept=1 if network.drops_tokens else None)


def _trunk(network: ViTEncoder, image_gradient: bool = False, kept: int | None = None) -> _Pass:
    """kept: tokens that are computed behind the attention of the last block; None: all."""
    length, weight = network.extras + network.num_patches, network.patch_embed.proj.weight
    product = 2 * network.num_patches * weight.numel()
    total = _Pass(product, product, product if image_gradient else 0)
    for i, block in enumerate(network.blocks):
        behind = kept if i == len(network.blocks) - 1 else None
        total += _block(block, length, has_skip=False, again=is_recomputed(i, network.use_checkpoint), kept=behind)
    return total


def _head(network: RCMViT) -> _Pass:
    total = _Pass()
    for module in network.projection_head:
        if isinstance(module, nn.Linear):
            total += _linear(module, 1)
    return total


def _block(block: Block | DecoderBlock, length: int, has_skip: bool, again: bool, kept: int | None = None) -> _Pass:
    """kept: tokens behind the attention; None: all."""
    kept = kept or length
    attention = _linear(block.attn.qkv, length) + _attention(block.attn, length) + _linear(block.attn.proj, kept)
    total = attention + _linear(block.mlp.fc1, kept)
    if has_skip:
        total += _linear(block.skip_linear, length)
    last = _linear(block.mlp.fc2, kept)
    # Checkpointing stops once it has what the backward pass needs, and that of an encoder block's last sum is nothing;
    # the gate of a decoder block needs the product's result.
    recomputed = total.forward + (last.forward if isinstance(block, DecoderBlock) else 0)
    return total + last + _Pass(recomputed=recomputed if again else 0)


def _linear(module: nn.Linear, tokens: int) -> _Pass:
    product = 2 * tokens * module.in_features * module.out_features
    return _Pass(product, product, product)


def _attention(module: Attention, length: int) -> _Pass:
    """q k^T and p v over all heads; each has two gradients."""
    products = 4 * length * length * module.proj.in_features
    return _Pass(products, 0, 2 * products)
