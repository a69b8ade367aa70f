"""The least time that the networks and their jobs can take, operation by operation.

    python -m bench.roofline                                              # EPG-XL/16, batch 64, a nominal H200
    python -m bench.roofline --preset epg_l_16_256 --batch 128 --gpu H100

A job is a list of operations in the largest fusion that the package has: a norm needs whole rows, so it cannot ride in
a matrix product, but everything else element-wise can. FLOPs are those of matrix products. They and the bytes are the
operations' `SPEC`s, of which norms and the MLP's first product are listed apart. A linear moves its operands and its
result once forward, and twice backward. A floor is the longer of an operation's products and bytes at the ceilings.

Left out, being small or hidden: casts of weights, embeddings of time and label, BatchNorm, mixing in guidance, random
numbers, the host.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from bench.ledger.cost import ATTENTION, ELEMENTWISE, NORMS, OPTIMISER, PRODUCTS
from bench.measure import Ceilings
from bench.results import markdown_table, significant
from epg_fast import config as configs
from epg_fast import training
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT, RCMViT, create_model
from epg_fast.models.blocks import Block, DecoderBlock
from epg_fast.models.encoder import ViTEncoder
from epg_fast.ops.spec import OpSpec
from epg_fast.training.estimate import planned_stage
from epg_fast.training.flops import GPUS, gpu_named
from epg_fast.training.stages import Stage

ITEMSIZE = 2
"""Bytes per value of activations and of the weights that products read."""

STAGES = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}
"""Training jobs, and what the names of their classes begin with."""


@dataclass(frozen=True)
class Op:
    """`times` calls of one operation; flops (of matrix products) and bytes are those of one call."""

    name: str
    kind: str
    """One of the ledger's."""
    shape: tuple[int, ...]
    flops: int
    bytes: int
    direction: str = "forward"
    times: int = 1

    def floor(self, ceilings: Ceilings) -> float:
        """Least seconds of all calls."""
        return self.times * ceilings.floor(self.flops, self.bytes)


@dataclass(frozen=True)
class Work:
    """The operations of a job, which makes or learns from `images` images."""

    images: int
    ops: tuple[Op, ...]

    @property
    def flops(self) -> int:
        return sum(op.times * op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.times * op.bytes for op in self.ops)

    def floor(self, ceilings: Ceilings) -> float:
        """Least seconds: the operations' after one another."""
        return sum(op.floor(ceilings) for op in self.ops)


def _work(images: int, ops: Iterable[Op]) -> Work:
    """Equal operations are one, called more often."""
    times: Counter[Op] = Counter()
    for op in ops:
        times[replace(op, times=1)] += op.times
    return Work(images, tuple(replace(op, times=n) for op, n in times.items()))


@dataclass(frozen=True)
class _Layer:
    """An operation of a network. weights, inputs: FLOPs of the gradients of parameters, and of what enters."""

    name: str
    kind: str
    shape: tuple[int, ...]
    moved: int
    moved_back: int
    flops: int = 0
    weights: int = 0
    inputs: int = 0

    def __sub__(self, other: _Layer) -> _Layer:
        """Without a part of it that is listed by itself."""
        names = ("moved", "moved_back", "flops", "weights", "inputs")
        return replace(self, **{name: getattr(self, name) - getattr(other, name) for name in names})

    def forward(self) -> Op:
        return Op(self.name, self.kind, self.shape, self.flops, self.moved)

    def backward(self) -> Op:
        return Op(self.name, self.kind, self.shape, self.weights + self.inputs, self.moved_back, "backward")

    def backward_of_frozen(self) -> Op:
        """Without gradients of parameters: a product for the input's moves what the forward pass moved."""
        moved = self.moved if self.weights else self.moved_back
        return Op(self.name, self.kind, self.shape, self.inputs, moved, "backward")


def _spec(name: str) -> OpSpec:
    return importlib.import_module(f"epg_fast.ops.{name}").SPEC


def _elementwise(name: str, op: str, shape: tuple[int, ...], kind: str = NORMS) -> _Layer:
    spec = _spec(op)
    return _Layer(name, kind, shape, spec.bytes(shape, ITEMSIZE), spec.bytes(shape, ITEMSIZE, backward=True))


def _fused(name: str, op: str, shape: tuple[int, ...]) -> _Layer:
    """One of the package's operations with a weight."""
    layer, flops = _elementwise(name, op, shape, PRODUCTS), _spec(op).flops(shape)
    return replace(layer, flops=flops, weights=flops, inputs=flops)


def _linear(name: str, rows: int, k: int, n: int, itemsize: int = ITEMSIZE) -> _Layer:
    """The bias is float32."""
    flops, moved = 2 * rows * k * n, (rows * k + n * k + rows * n) * itemsize + 4 * n
    return _Layer(name, PRODUCTS, (rows, k, n), moved, 2 * moved, flops, flops, flops)


def _module(name: str, rows: int, module: nn.Linear) -> _Layer:
    return _linear(name, rows, module.in_features, module.out_features)


def _block(where: str, block: Block | DecoderBlock, batch: int, length: int, kept: int | None = None) -> list[_Layer]:
    """kept: tokens that are computed behind the attention; None: all."""
    heads, (hidden, width) = block.attn.num_heads, block.mlp.fc1.weight.shape
    rows, tokens, behind = batch * length, (batch, length), (batch, kept or length)
    shape = (*tokens, heads, width // heads)
    products = _spec("attention").flops(shape)
    first, norm = (
        _elementwise(f"{where} norm, modulate", "layer_norm_modulate", (*t, width)) for t in (tokens, behind)
    )
    fc1 = _linear(f"{where} fc1, GELU", batch * behind[1], width, hidden)
    return [
        first,
        _module(f"{where} qkv", rows, block.attn.qkv),
        replace(_elementwise(f"{where} attention", "attention", shape, ATTENTION), flops=products, inputs=2 * products),
        _fused(f"{where} proj, gate, residual", "linear_residual_norm", (*behind, width, width)) - norm,
        norm,
        fc1,
        _fused(f"{where} fc2, gate, residual", "mlp_residual", (*behind, width, hidden)) - fc1,
    ]


def _encoder(network: ViTEncoder, batch: int, norm: int = 1, image_gradient: bool = False) -> list[_Layer]:
    """norm: how many tokens the last norm is for."""
    length = network.extras + network.num_patches
    kept = norm if network.drops_tokens else None
    shape = (batch, network.in_chans, network.image_size, network.patch_size, network.embed_dim)
    flops = 2 * batch * network.num_patches * network.patch_embed.proj.weight.numel()
    embedding = _elementwise("patch_embed", "patch_embed", shape, PRODUCTS)
    layers = [replace(embedding, flops=flops, weights=flops, inputs=flops if image_gradient else 0)]
    for block in network.blocks:
        layers += _block("encoder", block, batch, length, kept if block is network.blocks[-1] else None)
    return [*layers, _elementwise("encoder norm", "layer_norm_modulate", (batch, norm, network.embed_dim))]


def _head(network: RCMViT, batch: int) -> list[_Layer]:
    return [_module("projection head", batch, m) for m in network.projection_head if isinstance(m, nn.Linear)]


def _generator(network: EPGViT, batch: int) -> list[_Layer]:
    length, depth, width = network.extras + network.num_patches, len(network.blocks), network.out.in_features
    layers = _encoder(network, batch, norm=length)
    if network.encoder_to_decoder is not None:
        layers.append(_module("encoder_to_decoder", batch * length, network.encoder_to_decoder))
    modulations = sum(block.adaLN_modulation[-1].out_features for block in network.decoder_blocks)
    joined = _linear("adaLN of all blocks", batch, network.embed_dim, modulations)
    # The time embedding has no parameter: without a class embedding the condition needs no gradient.
    layers.append(joined if network.num_classes else replace(joined, inputs=0))
    for j, block in enumerate(network.decoder_blocks):
        if j < depth:
            layers.append(_fused("decoder skip_linear", "skip_linear", (batch, length, width, network.embed_dim)))
        layers += _block("decoder", block, batch, length)
    layers.append(_elementwise("out_norm", "layer_norm_modulate", (batch, network.num_patches, width)))
    return [*layers, _module("out", batch * network.num_patches, network.out)]


def _similarity(batch: int, width: int) -> _Layer:
    """Of each query with all keys, which get no gradient; float32."""
    product = _linear("similarities", batch, width, batch, itemsize=4)
    return replace(product, moved_back=product.moved, weights=0)


def _forward(layers: list[_Layer]) -> list[Op]:
    return [layer.forward() for layer in layers]


def _trained(layers: list[_Layer]) -> list[Op]:
    return [*_forward(layers), *(layer.backward() for layer in layers)]


def _pretrain(stage: Stage, batch: int) -> list[Op]:
    network, target = stage.network, stage.ema
    head = _head(network, batch)
    trained = _encoder(network, 3 * batch) + 2 * head
    without = _encoder(network, batch) + 2 * head + _encoder(target, 2 * batch) + _head(target, 2 * batch)
    widths = [network.projection_head[-1].out_features] * 2 + [network.embed_dim]
    return _trained(trained) + _forward(without) + _trained([_similarity(batch, width) for width in widths])


def _diffusion(stage: Stage, batch: int) -> list[Op]:
    network = stage.network
    shape = (batch, network.in_chans, network.image_size, network.patch_size)
    return _trained([*_generator(network, batch), _elementwise("patch_loss", "patch_loss", shape, ELEMENTWISE)])


def _consistency(stage: Stage, batch: int) -> list[Op]:
    network, frozen = stage.network, stage.perceptual
    layers = _encoder(frozen, batch, image_gradient=True) + _head(frozen, batch)
    ops = _diffusion(stage, batch) + _forward(_generator(network, batch))
    ops += 2 * _forward(layers) + [layer.backward_of_frozen() for layer in layers]
    return ops + _trained([_similarity(batch, frozen.projection_head[-1].out_features)])


_UPDATES: dict[str, Callable] = {
    "pretrain": _pretrain,
    "finetune-diffusion": _diffusion,
    "finetune-consistency": _consistency,
}


def forward(network: EPGViT, batch: int) -> Work:
    """One call of the generator."""
    return _work(batch, _forward(_generator(network, batch)))


def heun(network: EPGViT, batch: int, steps: int = 32, interval: tuple[float, float] = (0.19, 1.61)) -> Work:
    """Heun's method at `steps` levels; in the unshifted interval both calls of guidance are one of twice the batch."""
    levels = NoiseSchedule(steps).sigmas().tolist()
    evaluations = [sigma for pair in zip(levels, levels[1:], strict=False) for sigma in pair]
    guided = sum(interval[0] < sigma <= interval[1] for sigma in evaluations)
    ops = []
    for images, times in ((batch, len(evaluations) - guided), (2 * batch, guided)):
        ops += [replace(layer.forward(), times=times) for layer in _generator(network, images)]
    pixels = (batch, network.in_chans, network.image_size, network.image_size)
    for name in ("euler_step", "heun_step"):
        ops.append(Op(name, ELEMENTWISE, pixels, 0, _spec(name).bytes(pixels, 4), times=steps - 1))
    return _work(batch, ops)


def sampling(preset: str, batch: int, steps: int = 1, interval: tuple[float, float] = (0.19, 1.61)) -> Work:
    """A batch of images: one call of the generator, or Heun's method at `steps` levels."""
    with torch.device("meta"):
        network = create_model(preset)
    return forward(network, batch) if steps == 1 else heun(network, batch, steps, interval)


def update_of(stage: Stage) -> Work:
    """The last of a stage's updates on one GPU, without accumulation or checkpointing; consistency's at its end."""
    batch = stage.config.batch_size
    parameters = (1, sum(p.numel() for p in stage.network.parameters()))
    optimiser = [  # the norm of the gradients, AdamW and one EMA in float32
        Op(name, OPTIMISER, parameters, 0, _spec(name).bytes(parameters, 4), "update")
        for name in ("global_norm", "fused_adamw_ema")
    ]
    return _work(batch, [*_UPDATES[stage.name](stage, batch), *optimiser])


def update(job: str, preset: str, batch: int) -> Work:
    """An update of the training job by fused blocks, consistency training with its frozen encoder."""
    options = {"perceptual": "the preset's own"} if job == "finetune-consistency" else {}
    name = STAGES[job]
    model = configs.ModelConfig(preset)
    config = getattr(configs, f"{name}Config")(model=model, batch_size=batch, **options)
    stage = planned_stage(config, getattr(training, f"{name}Stage"), 1)
    for network in filter(None, (stage.network, stage.ema, getattr(stage, "perceptual", None))):
        network.use_ops("triton")
    return update_of(stage)


def jobs_of(preset: str, batch: int) -> dict[str, Work]:
    """All of a preset's jobs. Raises ValueError for an unknown preset."""
    jobs = {"forward (sample-onestep)": sampling(preset, batch), "sample-heun": sampling(preset, batch, 32)}
    return jobs | {job: update(job, preset, batch) for job in STAGES}


def nominal(name: str) -> Ceilings:
    """Of a datasheet. Raises ValueError for a GPU whose figures are not known."""
    gpu = gpu_named(name)
    if gpu.bandwidth is None:
        known = ", ".join(gpu.name for gpu in GPUS if gpu.bandwidth)
        raise ValueError(f"gpu {gpu.name}: its nominal memory bandwidth is not known; known: {known}")
    return Ceilings(gpu.bf16 * 1e12, gpu.bandwidth * 1e12)


def summary(jobs: dict[str, Work], ceilings: Ceilings) -> str:
    """A row per job."""
    rows = []
    for name, work in jobs.items():
        floor, products = work.floor(ceilings), work.flops / ceilings.products
        per_image = work.flops / work.images / 1e12, work.bytes / work.images / 1e9
        numbers = (*per_image, 1e3 * floor, work.images / floor, work.images / products)
        rows.append((name, *map(significant, numbers), f"{100 * products / floor:.0f}%"))
    columns = ("job", "TFLOP/image", "GB/image", "floor, ms", "images/s at most", "products alone, images/s")
    return markdown_table((*columns, "products' share"), rows)


def breakdown(work: Work, ceilings: Ceilings) -> str:
    """A row per operation, the largest first."""
    total, rows = work.floor(ceilings), []
    for op in sorted(work.ops, key=lambda op: -op.floor(ceilings)):
        floor = op.floor(ceilings)
        by_products = op.flops / ceilings.products > op.bytes / ceilings.memory
        gflop = significant(op.flops / 1e9) if op.flops else ""
        numbers = op.times, gflop, significant(op.bytes / 1e6), "products" if by_products else "memory"
        times = significant(1e6 * floor / op.times), significant(1e3 * floor), f"{100 * floor / total:.1f}%"
        rows.append((op.name, op.direction, " x ".join(map(str, op.shape)), *numbers, *times))
    columns = ("operation", "direction", "shape", "calls", "GFLOP", "MB", "bound by", "floor, us")
    return markdown_table((*columns, "all calls, ms", "share"), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="epg_xl_16_256")
    parser.add_argument("--batch", type=int, default=64, help="images per call and per update (default: 64)")
    parser.add_argument("--gpu", default="H200", help=f"of {', '.join(g.name for g in GPUS)} (default: H200)")
    options = parser.parse_args(arguments)
    try:
        if options.batch < 1:
            raise ValueError(f"batch {options.batch}: wanted 1 or more images")
        ceilings, jobs = nominal(options.gpu), jobs_of(options.preset, options.batch)
    except ValueError as error:
        print(f"bench.roofline: {error}", file=sys.stderr)
        return 2
    print(
        f"# Roofline of {options.preset}, batch {options.batch}\n\n"
        f"Derived, nothing measured: ceilings are those of the {options.gpu}'s datasheet, "
        f"{significant(ceilings.products / 1e12)} TFLOP/s and {significant(ceilings.memory / 1e12)} TB/s.\n\n"
        f"{summary(jobs, ceilings)}"
    )
    for name, work in jobs.items():
        print(f"## {name}\n\n{breakdown(work, ceilings)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
