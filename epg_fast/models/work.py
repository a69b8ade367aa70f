"""What a network computes: the operations of its forward pass, their matrix products and the bytes they must move.

They stand in the largest fusion that the package has: a norm needs whole rows, so it cannot ride in a matrix product,
but everything else element-wise can. Products with weights and the two of attention count, a multiplication and an
addition as two operations, as torch.utils.flop_counter counts them. Bytes are the operations' `SPEC`s, in 16 bits, of
which norms and the MLP's first product are listed apart. A linear moves its operands and its result once forward, and
twice backward.

Left out, being small or hidden: casts of weights, embeddings of time and label, BatchNorm, random numbers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import torch.nn as nn

from epg_fast.models.blocks import Block, DecoderBlock
from epg_fast.models.encoder import RCMViT, ViTEncoder, is_recomputed
from epg_fast.models.generator import EPGViT
from epg_fast.ops.spec import OpSpec

_ITEMSIZE = 2
"""Bytes per value of activations and of the weights that products read."""


@dataclass(frozen=True)
class Operation:
    """One operation of a network on a batch."""

    name: str
    kind: str
    """ "products", "attention", "norms" or "element-wise"."""
    shape: tuple[int, ...]
    moved: int
    """Bytes of the forward pass; `moved_back`: of the backward pass."""
    moved_back: int
    flops: int = 0
    """Of the forward pass's products."""
    weights: int = 0
    """FLOPs of the gradients of parameters; `inputs`: of the gradients of what enters."""
    inputs: int = 0

    def __sub__(self, other: Operation) -> Operation:
        """Without a part of it that is listed by itself."""
        names = ("moved", "moved_back", "flops", "weights", "inputs")
        return replace(self, **{name: getattr(self, name) - getattr(other, name) for name in names})


def spec(name: str) -> OpSpec:
    """Of an operation of `epg_fast.ops`."""
    return importlib.import_module(f"epg_fast.ops.{name}").SPEC


def elementwise(name: str, op: str, shape: tuple[int, ...], kind: str = "norms") -> Operation:
    """An operation of the package that has no product, or whose products the caller counts."""
    moved, back = (spec(op).bytes(shape, _ITEMSIZE, backward=direction) for direction in (False, True))
    return Operation(name, kind, shape, moved, back)


def similarities(batch: int, width: int) -> Operation:
    """Of each query with all keys, which get no gradient; in float32."""
    product = _linear("similarities", batch, width, batch, itemsize=4)
    return replace(product, moved_back=product.moved, weights=0)


def head(network: RCMViT, batch: int) -> list[Operation]:
    """The projection head."""
    return [_module("projection head", batch, m) for m in network.projection_head if isinstance(m, nn.Linear)]


def encoder(network: ViTEncoder, batch: int, image_gradient: bool = False) -> list[Operation]:
    """The trunk up to its feature. image_gradient: whether the backward pass goes on to the image."""
    return _trunk(network, batch, 1, image_gradient)


def generator(network: EPGViT, batch: int) -> list[Operation]:
    """A call of the generator."""
    width, rows = network.out.in_features, batch * _length(network)
    operations = _trunk(network, batch, _length(network))
    if network.encoder_to_decoder is not None:
        operations.append(_module("encoder_to_decoder", rows, network.encoder_to_decoder))
    modulations = sum(block.adaLN_modulation[-1].out_features for block in network.decoder_blocks)
    joined = _linear("adaLN of all blocks", batch, network.embed_dim, modulations)
    # The time embedding has no parameter: without a class embedding the condition needs no gradient.
    operations.append(joined if network.num_classes else replace(joined, inputs=0))
    for block in blocks(network, batch)[len(network.blocks) :]:
        operations += block
    operations.append(elementwise("out_norm", "layer_norm_modulate", (batch, network.num_patches, width)))
    return [*operations, _module("out", batch * network.num_patches, network.out)]


def blocks(network: ViTEncoder, batch: int) -> list[list[Operation]]:
    """Of each block of `all_blocks`."""
    depth, found = len(network.blocks), []
    for i, block in enumerate(network.all_blocks):
        kept = 1 if network.drops_tokens and i == depth - 1 else _length(network)
        found.append(_block("encoder" if i < depth else "decoder", block, batch, _length(network), kept))
        if depth <= i < 2 * depth:
            shape = (batch, _length(network), block.skip_linear.out_features, network.embed_dim)
            found[i].insert(0, _fused("decoder skip_linear", "skip_linear", shape))
    return found


def recomputed(network: ViTEncoder, batch: int) -> int:
    """FLOPs that activation checkpointing computes again: those of a block up to what its backward pass needs.

    An encoder block's last product is only added to x; a decoder block's is gated, which needs its result.
    """
    again = []
    for i, (block, operations) in enumerate(zip(network.all_blocks, blocks(network, batch), strict=True)):
        if is_recomputed(i, network.use_checkpoint):
            again += operations if isinstance(block, DecoderBlock) else operations[:-1]
    return flops(again)


def flops(operations: list[Operation]) -> int:
    """Of the products of a forward pass."""
    return sum(operation.flops for operation in operations)


def _length(network: ViTEncoder) -> int:
    return network.extras + network.num_patches


def _trunk(network: ViTEncoder, batch: int, normed: int, image_gradient: bool = False) -> list[Operation]:
    """normed: how many tokens of an image the last norm is for."""
    shape = (batch, network.in_chans, network.image_size, network.patch_size, network.embed_dim)
    count = 2 * batch * network.num_patches * network.patch_embed.proj.weight.numel()
    embedding = elementwise("patch_embed", "patch_embed", shape, "products")
    operations = [replace(embedding, flops=count, weights=count, inputs=count if image_gradient else 0)]
    for block in blocks(network, batch)[: len(network.blocks)]:
        operations += block
    return [*operations, elementwise("encoder norm", "layer_norm_modulate", (batch, normed, network.embed_dim))]


def _block(where: str, block: Block | DecoderBlock, batch: int, length: int, kept: int) -> list[Operation]:
    """kept: tokens that are computed behind the attention."""
    heads, (hidden, width) = block.attn.num_heads, block.mlp.fc1.weight.shape
    shape = (batch, length, heads, width // heads)
    products = spec("attention").flops(shape)
    attention = elementwise(f"{where} attention", "attention", shape, "attention")
    first, norm = (
        elementwise(f"{where} norm, modulate", "layer_norm_modulate", (batch, tokens, width))
        for tokens in (length, kept)
    )
    fc1 = _linear(f"{where} fc1, GELU", batch * kept, width, hidden)
    return [
        first,
        _module(f"{where} qkv", batch * length, block.attn.qkv),
        replace(attention, flops=products, inputs=2 * products),
        _fused(f"{where} proj, gate, residual", "linear_residual_norm", (batch, kept, width, width)) - norm,
        norm,
        fc1,
        _fused(f"{where} fc2, gate, residual", "mlp_residual", (batch, kept, width, hidden)) - fc1,
    ]


def _fused(name: str, op: str, shape: tuple[int, ...]) -> Operation:
    """One of the package's operations with a weight."""
    count = spec(op).flops(shape)
    return replace(elementwise(name, op, shape, "products"), flops=count, weights=count, inputs=count)


def _linear(name: str, rows: int, k: int, n: int, itemsize: int = _ITEMSIZE) -> Operation:
    """The bias is float32."""
    count, moved = 2 * rows * k * n, (rows * k + n * k + rows * n) * itemsize + 4 * n
    return Operation(name, "products", (rows, k, n), moved, 2 * moved, count, count, count)


def _module(name: str, rows: int, module: nn.Linear) -> Operation:
    return _linear(name, rows, module.in_features, module.out_features)
