"""What the networks and their jobs are made of: calls of operations, with the work and the traffic of each.

A part is one operation in the largest fusion that the package has: a norm needs whole rows, so it cannot ride in a
matrix product, but everything else element-wise can. Bytes are those of the operations' `SPEC`s, of which norms and
the MLP's first product are taken out as parts of their own; a linear moves its operands and result once forward, and
twice backward. Work is matrix products, counted as `epg_fast.training.flops` counts them: two gradients per product,
nothing twice.

Left out, being small or hidden: casts of weights, embeddings of time and label, BatchNorm, mixing in guidance, random
numbers, the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn

from epg_fast.config import ConsistencyConfig, DiffusionConfig, ModelConfig, PretrainConfig, RunConfig
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, RCMViT, create_model
from epg_fast.models.blocks import Block, DecoderBlock
from epg_fast.models.encoder import ViTEncoder
from epg_fast.ops.attention import SPEC as ATTENTION
from epg_fast.ops.euler_step import SPEC as EULER_STEP
from epg_fast.ops.fused_adamw_ema import SPEC as ADAMW
from epg_fast.ops.global_norm import SPEC as GLOBAL_NORM
from epg_fast.ops.heun_step import SPEC as HEUN_STEP
from epg_fast.ops.layer_norm_modulate import SPEC as NORM
from epg_fast.ops.linear_residual_norm import SPEC as LINEAR_RESIDUAL_NORM
from epg_fast.ops.mlp_residual import SPEC as MLP_RESIDUAL
from epg_fast.ops.patch_embed import SPEC as PATCH_EMBED
from epg_fast.ops.patch_loss import SPEC as PATCH_LOSS
from epg_fast.ops.skip_linear import SPEC as SKIP_LINEAR
from epg_fast.ops.spec import OpSpec
from epg_fast.training import ConsistencyStage, DiffusionStage, PretrainStage
from epg_fast.training.estimate import planned_stage
from epg_fast.training.flops import step_flops
from epg_fast.training.stages import Stage

ITEMSIZE = 2
"""Bytes per value of activations and of the weights that products read."""


@dataclass(frozen=True)
class Part:
    """`times` calls of one operation; work and traffic are those of one call."""

    name: str
    shape: tuple[int, ...]
    direction: str
    products: int
    """FLOPs of its matrix products."""
    bytes: int
    times: int = 1


@dataclass(frozen=True)
class Job:
    """A job for `images` images; work in FLOPs of matrix products."""

    name: str
    images: int
    parts: tuple[Part, ...]

    @property
    def products(self) -> int:
        return sum(part.times * part.products for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.times * part.bytes for part in self.parts)


@dataclass(frozen=True)
class Ceilings:
    """products: FLOP/s of matrix products in 16 bits; memory: bytes/s; source: of both."""

    products: float
    memory: float
    source: str

    def floor(self, part: Part) -> float:
        """Least seconds of one call."""
        return max(part.products / self.products, part.bytes / self.memory)

    def bound(self, part: Part) -> str:
        return "products" if part.products / self.products > part.bytes / self.memory else "memory"

    def at(self, intensity: float) -> float:
        """FLOP/s that an operation of so many FLOP per byte can reach."""
        return min(self.products, intensity * self.memory)


@dataclass(frozen=True)
class Point:
    """A measured operation; its operations are counted by its `SPEC`, element-wise ones included."""

    op: str
    shape: str
    dtype: str
    direction: str
    provider: str
    labels: str
    median_us: float
    intensity: float
    """FLOP per byte of the traffic model."""
    tflops: float
    share: float
    """Of what the ceilings allow at this intensity."""


@dataclass(frozen=True)
class _Op:
    """One operation of a network. weights, inputs: products of the gradients of parameters, and of what enters."""

    name: str
    shape: tuple[int, ...]
    moved: int
    moved_back: int
    products: int = 0
    weights: int = 0
    inputs: int = 0

    def forward(self) -> Part:
        return Part(self.name, self.shape, "forward", self.products, self.moved)

    def backward(self) -> Part:
        return Part(self.name, self.shape, "backward", self.weights + self.inputs, self.moved_back)

    def backward_of_frozen(self) -> Part:
        """Without gradients of parameters: a product for the input's moves what the forward pass moved."""
        moved = self.moved if self.weights else self.moved_back
        return Part(self.name, self.shape, "backward", self.inputs, moved)


def forward(network: EPGViT, batch: int) -> Job:
    """One call of the generator."""
    return _job("forward", batch, [op.forward() for op in _generator(network, batch)])


def onestep(network: EPGViT, batch: int) -> Job:
    return dataclasses.replace(forward(network, batch), name="sample-onestep")


def heun(network: EPGViT, batch: int, steps: int = 32, interval: tuple[float, float] = (0.19, 1.61)) -> Job:
    """Heun's method at `steps` levels; in the unshifted interval both calls of guidance are one of twice the batch."""
    levels = NoiseSchedule(steps).sigmas().tolist()
    evaluations = [sigma for pair in zip(levels, levels[1:], strict=False) for sigma in pair]
    guided = sum(interval[0] < sigma <= interval[1] for sigma in evaluations)
    parts = []
    for images, times in ((batch, len(evaluations) - guided), (2 * batch, guided)):
        parts += [dataclasses.replace(op.forward(), times=times) for op in _generator(network, images)]
    pixels = (batch, network.in_chans, network.image_size, network.image_size)
    for spec in (EULER_STEP, HEUN_STEP):
        parts.append(Part(spec.name, pixels, "forward", 0, spec.bytes(pixels, 4), steps - 1))
    return _job(f"sample-heun-{steps}", batch, parts)


def training_stages(preset: str, batch: int) -> list[Stage]:
    """The three stages with networks on the meta device; consistency training with its frozen encoder."""
    model = ModelConfig(preset)
    jobs: list[tuple[RunConfig, type[Stage]]] = [
        (PretrainConfig(model=model, batch_size=batch), PretrainStage),
        (DiffusionConfig(model=model, batch_size=batch), DiffusionStage),
        (ConsistencyConfig(model=model, batch_size=batch, perceptual="the preset's own"), ConsistencyStage),
    ]
    return [planned_stage(config, stage_class, 1) for config, stage_class in jobs]


def training(stage: Stage) -> Job:
    """The last of a stage's updates, on one GPU. Raises ValueError for a stage that recomputes or accumulates."""
    batch = stage.config.batch_size
    flops = step_flops(stage, stage.config.steps - 1)
    if flops.recomputed:
        raise ValueError("roofline: got a step that computes something again, wanted one without checkpointing")
    job = _job(stage.name, batch, [*_STEPS[stage.name](stage, batch), *_optimizer(stage.network)])
    assert job.products == batch * flops.total, "parts and epg_fast.training.flops count differently"
    return job


def jobs_of(preset: str, batch: int) -> list[Job]:
    """All of a preset's jobs. Raises ValueError for an unknown preset."""
    with torch.device("meta"):
        network = create_model(preset)
    sampling = [forward(network, batch), heun(network, batch), onestep(network, batch)]
    return sampling + [training(stage) for stage in training_stages(preset, batch)]


def _pretrain(stage: Stage, batch: int) -> list[Part]:
    network, target = stage.network, stage.ema
    head = _head(network, batch)
    trained = _encoder(network, 3 * batch) + 2 * head
    without = _encoder(network, batch) + 2 * head + _encoder(target, 2 * batch) + _head(target, 2 * batch)
    widths = [network.projection_head[-1].out_features] * 2 + [network.embed_dim]
    return _trained(trained) + _forward(without) + _trained([_similarity(batch, width) for width in widths])


def _diffusion(stage: Stage, batch: int) -> list[Part]:
    return _trained([*_generator(stage.network, batch), _patch_loss(stage.network, batch)])


def _consistency(stage: Stage, batch: int) -> list[Part]:
    network, perceptual = stage.network, stage.perceptual
    judge = _encoder(perceptual, batch, image_gradient=True) + _head(perceptual, batch)
    parts = _diffusion(stage, batch) + _forward(_generator(network, batch))
    parts += _forward(judge) + [op.backward_of_frozen() for op in judge] + _forward(judge)
    return parts + _trained([_similarity(batch, perceptual.projection_head[-1].out_features)])


_STEPS = {"pretrain": _pretrain, "finetune-diffusion": _diffusion, "finetune-consistency": _consistency}


def _optimizer(network: ViTEncoder) -> list[Part]:
    """Norm of the gradients, AdamW and one average, float32."""
    shape = (1, sum(p.numel() for p in network.parameters()))
    return [Part(spec.name, shape, "update", 0, spec.bytes(shape, 4)) for spec in (GLOBAL_NORM, ADAMW)]


def _job(name: str, images: int, parts: Iterable[Part]) -> Job:
    """Equal parts are one, called more often."""
    times: dict[Part, int] = {}
    for part in parts:
        one = dataclasses.replace(part, times=1)
        times[one] = times.get(one, 0) + part.times
    return Job(name, images, tuple(dataclasses.replace(part, times=n) for part, n in times.items()))


def _forward(ops: list[_Op]) -> list[Part]:
    return [op.forward() for op in ops]


def _trained(ops: list[_Op]) -> list[Part]:
    return [op.forward() for op in ops] + [op.backward() for op in ops]


def _generator(network: EPGViT, batch: int) -> list[_Op]:
    length, depth, width = network.extras + network.num_patches, len(network.blocks), network.out.in_features
    ops = _encoder(network, batch, norm=length)
    if network.encoder_to_decoder is not None:
        ops.append(_linear("encoder_to_decoder", batch * length, *_sizes(network.encoder_to_decoder)))
    modulations = sum(block.adaLN_modulation[-1].out_features for block in network.decoder_blocks)
    joined = _linear("adaLN of all blocks", batch, network.embed_dim, modulations)
    # The time embedding has no parameter: without a class embedding the condition needs no gradient.
    ops.append(joined if network.num_classes else dataclasses.replace(joined, inputs=0))
    for j, block in enumerate(network.decoder_blocks):
        if j < depth:
            shape = (batch, length, width, network.embed_dim)
            ops.append(_product("decoder skip_linear", shape, SKIP_LINEAR.flops(shape), *_moved(SKIP_LINEAR, shape)))
        ops += _block("decoder", block, batch, length)
    ops.append(_elementwise("out_norm", NORM, (batch, network.num_patches, width)))
    return [*ops, _linear("out", batch * network.num_patches, *_sizes(network.out))]


def _encoder(network: ViTEncoder, batch: int, norm: int = 1, image_gradient: bool = False) -> list[_Op]:
    """norm: how many tokens the last norm is for."""
    length = network.extras + network.num_patches
    ops = [_patch_embed(network, batch, image_gradient)]
    for block in network.blocks:
        ops += _block("encoder", block, batch, length)
    return [*ops, _elementwise("encoder norm", NORM, (batch, norm, network.embed_dim))]


def _block(where: str, block: Block | DecoderBlock, batch: int, length: int) -> list[_Op]:
    heads, (hidden, width) = block.attn.num_heads, block.mlp.fc1.weight.shape
    rows, tokens = batch * length, (batch, length)
    shape = (*tokens, heads, width // heads)
    products = ATTENTION.flops(shape)
    norm = _elementwise(f"{where} norm, modulate", NORM, (*tokens, width))
    fc1 = _linear(f"{where} fc1, GELU", rows, width, hidden)
    return [
        norm,
        _linear(f"{where} qkv", rows, *_sizes(block.attn.qkv)),
        _Op(f"{where} attention", shape, *_moved(ATTENTION, shape), products, 0, 2 * products),
        _rest(f"{where} proj, gate, residual", LINEAR_RESIDUAL_NORM, (*tokens, width, width), norm),
        norm,
        fc1,
        _rest(f"{where} fc2, gate, residual", MLP_RESIDUAL, (*tokens, width, hidden), fc1),
    ]


def _head(network: RCMViT, batch: int) -> list[_Op]:
    linears = [module for module in network.projection_head if isinstance(module, nn.Linear)]
    return [_linear("projection head", batch, *_sizes(module)) for module in linears]


def _patch_embed(network: ViTEncoder, batch: int, image_gradient: bool) -> _Op:
    weight = network.patch_embed.proj.weight
    products = 2 * batch * network.num_patches * weight.numel()
    shape = (batch, network.in_chans, network.image_size, network.patch_size, network.embed_dim)
    moved = _moved(PATCH_EMBED, shape)
    return _Op("patch_embed", shape, *moved, products, products, products if image_gradient else 0)


def _patch_loss(network: ViTEncoder, batch: int) -> _Op:
    return _elementwise("patch_loss", PATCH_LOSS, (batch, network.in_chans, network.image_size, network.patch_size))


def _similarity(batch: int, width: int) -> _Op:
    """Of each query with all keys, which get no gradient; float32."""
    products, moved = 2 * batch * width * batch, _linear_bytes(batch, width, batch, 4)
    return _Op("similarities", (batch, width, batch), moved, moved, products, 0, products)


def _sizes(module: nn.Linear) -> tuple[int, int]:
    return module.in_features, module.out_features


def _linear(name: str, rows: int, k: int, n: int) -> _Op:
    moved = _linear_bytes(rows, k, n, ITEMSIZE)
    return _product(name, (rows, k, n), 2 * rows * k * n, moved, 2 * moved)


def _linear_bytes(rows: int, k: int, n: int, itemsize: int) -> int:
    """Operands and result once; the bias is float32."""
    return (rows * k + n * k + rows * n) * itemsize + 4 * n


def _product(name: str, shape: tuple[int, ...], products: int, moved: int, moved_back: int) -> _Op:
    """An operation with a weight."""
    return _Op(name, shape, moved, moved_back, products, products, products)


def _rest(name: str, spec: OpSpec, shape: tuple[int, ...], part: _Op) -> _Op:
    """An operation without a part of it that is listed by itself."""
    moved, moved_back = _moved(spec, shape)
    return _product(name, shape, spec.flops(shape) - part.products, moved - part.moved, moved_back - part.moved_back)


def _elementwise(name: str, spec: OpSpec, shape: tuple[int, ...]) -> _Op:
    return _Op(name, shape, *_moved(spec, shape))


def _moved(spec: OpSpec, shape: tuple[int, ...]) -> tuple[int, int]:
    return spec.bytes(shape, ITEMSIZE), spec.bytes(shape, ITEMSIZE, backward=True)
