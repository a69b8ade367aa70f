"""The networks in FP8, for inference: linears with quantised weights, and blocks with kernels that quantise tokens.

`quantize` turns the large linears into `Fp8Linear`s, which round the rows that they are given. Unless site "fp8" is
"plain" it also changes the classes of blocks, as `fuse` does. An `Fp8Block` has its rows quantised by kernels around
the products; in a `ChainedBlock` the products themselves, kernels of the package, end in what is read next. What such
a block would bypass keeps the modules it has: a block with an adapter or a hook inside, or with a linear whose sides
FP8 does not take.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn as nn

from epg_fast.models.blocks import Attention, Block, DecoderBlock, DropPath, LayerNorm, Mlp, is_plain, tokens
from epg_fast.models.encoder import ViTEncoder
from epg_fast.models.fp8 import Fp8Linear, convert
from epg_fast.models.fused import FusedTrunk, parameters_of
from epg_fast.ops import (
    attention,
    attention_fp8,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_fp8,
    layer_norm_modulate_fp8,
    quantize_rows,
    skip_norms_fp8,
)
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.fp8 import product_backend

_NOT_ASKED = ("norm", "proj", "mlp", "skip")
"""Sites of blocks in whose place is the site "fp8"."""


class Unsummed(NamedTuple):
    """x + gate * branch as a block leaves it: the kernel that reads it next adds it up in its own pass."""

    x: torch.Tensor
    branch: torch.Tensor
    gate: torch.Tensor | None

    def tokens(self) -> torch.Tensor:
        return self.x + (self.branch if self.gate is None else self.gate * self.branch)


class Chained(NamedTuple):
    """Tokens as a product of the package leaves them: in 16 bits, unless nothing reads them there, and in FP8."""

    x: torch.Tensor | None
    rows: torch.Tensor
    scale: torch.Tensor

    def tokens(self) -> torch.Tensor | None:
        return self.x


Tokens = torch.Tensor | Unsummed | Chained


def _normed(
    norm: LayerNorm, x: torch.Tensor | Unsummed, shift=None, scale=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, rows of its modulated norm in FP8, their scales)."""
    arguments = *parameters_of(norm, LayerNorm), shift, scale, norm.eps, "triton"
    if isinstance(x, Unsummed):
        return gate_residual_norm_modulate_fp8(*x, *arguments)
    return x, *layer_norm_modulate_fp8(x, *arguments)


def _halves(block: Fp8Block | Fp8DecoderBlock, x, rows, scale, gate1, modulation2, gate2) -> Unsummed:
    """Both halves of a block behind its first norm: x is the residual, rows and scale are x's norm in FP8."""
    attn, mlp = block.attn, block.mlp
    batch, length, width = x.shape
    qkv = attn.qkv.product(rows, scale).view(batch, length, 3, attn.num_heads, width // attn.num_heads)
    h = attention(qkv, attn.scale, backend=attn.backend).flatten(2)
    branch = attn.proj.product(*quantize_rows(h, backend="triton"))
    x, rows, scale = _normed(block.norm2, Unsummed(x, branch, gate1), *modulation2)
    in_product = mlp.fc1.backend == "cuda"  # has GELU in its epilogue
    h = mlp.fc1.product(rows, scale, gelu=in_product)
    return Unsummed(x, mlp.fc2.product(*quantize_rows(h, gelu=not in_product, backend="triton")), gate2)


class Fp8Block(Block):
    def forward(self, x: torch.Tensor | Unsummed) -> tuple[Unsummed, torch.Tensor]:
        """x: [B, L, E] -> (what `Block` returns, x as a skip)."""
        x, *normed = _normed(self.norm1, x)
        return _halves(self, x, *normed, None, (), None), x


def _entered(block: Fp8DecoderBlock | ChainedDecoderBlock, x, skip, shift, scale):
    """(x with its long skip, if there is one, the first norm of that in FP8, its scales)."""
    if skip is not None:
        x = block._skip(x, skip)
    if skip is None or is_plain(block.skip_norm, nn.Identity):
        return _normed(block.norm1, x, shift, scale)
    norm, after = parameters_of(block.skip_norm, LayerNorm), parameters_of(block.norm1, LayerNorm)
    return skip_norms_fp8(x, *norm, (*after, shift, scale), block.norm1.eps, "triton")


class Fp8DecoderBlock(DecoderBlock):
    def forward(self, x: Tokens, cond, skip=None, modulation=None) -> Unsummed:
        shift1, scale1, gate1, *modulation2, gate2 = self.modulation(cond, modulation)
        x, *normed = _entered(self, x, skip, shift1, scale1)
        return _halves(self, x, *normed, gate1, modulation2, gate2)

    def _skip(self, x: Tokens, skip: torch.Tensor) -> torch.Tensor:
        if not is_plain(self.skip_linear, Fp8Linear):
            x = tokens(x)
            return self.skip_linear(torch.cat([x, skip.to(x.dtype)], dim=-1))
        x, branch, gate = x if isinstance(x, Unsummed) else (x, None, None)
        return self.skip_linear.product(*quantize_rows(x, branch, gate, skip, backend="triton"))


def _chained(x: torch.Tensor | Chained) -> Chained:
    return x if isinstance(x, Chained) else Chained(x, *quantize_rows(x, backend="triton"))


def _chained_halves(block: ChainedBlock | ChainedDecoderBlock, x, rows, scale, gate1, modulation2, gate2, returns):
    """Both halves of a block behind its first norm, x in 16 bits; returns: of `linear_fp8_fused`, for the result."""
    attn, mlp = block.attn, block.mlp
    batch, length, width = x.shape
    shape = batch, length, 3, attn.num_heads, width // attn.num_heads
    if attn.backend == "triton":
        qkv, largest = attn.qkv.fused(rows, scale, returns="largest")
        h, scale = attention_fp8(qkv.view(shape), largest, attn.scale, "triton")
        h = h.flatten(2), scale
    else:
        h = attention(attn.qkv.product(rows, scale).view(shape), attn.scale, backend=attn.backend)
        h = quantize_rows(h.flatten(2), backend="triton")
    x = attn.proj.fused(*h, residual=x, gate=gate1)
    _, *normed = _normed(block.norm2, x, *modulation2)
    h = mlp.fc1.fused(*normed, gelu=True, returns="rows")
    return mlp.fc2.fused(*h, residual=x, gate=gate2, returns=returns)


class ChainedBlock(Block):
    def forward(self, x: torch.Tensor | Chained) -> Chained:
        """x: [B, L, E] -> what `Block` returns, as tokens and as a skip."""
        return Chained(*_chained_halves(self, *_normed(self.norm1, tokens(x)), None, (), None, "both"))


class ChainedDecoderBlock(DecoderBlock):
    feeds_skip = False
    """Whether the result only enters the next block's `skip_linear`, and is made in FP8 alone."""

    def forward(self, x, cond, skip=None, modulation=None) -> torch.Tensor | Chained:
        """x, skip: [B, L, D] or [B, L, E], or what a block of this kind has returned."""
        shift1, scale1, gate1, *modulation2, gate2 = self.modulation(cond, modulation)
        x, *normed = _entered(self, x, skip, shift1, scale1)
        returns = "rows" if self.feeds_skip else "y"
        made = _chained_halves(self, x, *normed, gate1, modulation2, gate2, returns)
        return Chained(None, *made) if self.feeds_skip else made

    def _skip(self, x: torch.Tensor | Chained, skip: torch.Tensor | Chained) -> torch.Tensor:
        if not is_plain(self.skip_linear, Fp8Linear):
            return self.skip_linear(torch.cat([x, tokens(skip).to(x.dtype)], dim=-1))
        x, skip = _chained(x), _chained(skip)
        return self.skip_linear.fused(x.rows, x.scale, skip=skip.rows, skip_scale=skip.scale)


_AROUND = {Block: Fp8Block, DecoderBlock: Fp8DecoderBlock}
_CHAINED = {Block: ChainedBlock, DecoderBlock: ChainedDecoderBlock}


class Fp8Trunk(FusedTrunk):
    """Around blocks of which some leave their result `Unsummed` or `Chained`."""

    own = (*_AROUND.values(), *_CHAINED.values())

    def step(self, network: ViTEncoder, index: int, block: nn.Module, x: Tokens) -> tuple[Tokens, Tokens]:
        out, skip = super().step(network, index, block, x)
        return out, x if isinstance(x, Chained) else skip  # which has its rows in FP8

    def final(self, network: ViTEncoder, x: Tokens) -> tuple[Tokens, torch.Tensor]:
        return _final(network.norm, x)

    def patches(self, network, x: torch.Tensor | Unsummed) -> torch.Tensor:
        if isinstance(x, Unsummed):
            x = x._replace(x=x.x[:, network.extras :], branch=x.branch[:, network.extras :])
        else:
            x = x[:, network.extras :]
        return network.out(_final(network.out_norm, x)[1])


def _final(norm: nn.Module, x: Tokens) -> tuple[Tokens, torch.Tensor]:
    """(x, its norm in 16 bits)."""
    if isinstance(x, Unsummed):
        if is_plain(norm, LayerNorm):
            return gate_residual_norm_modulate(*x, *parameters_of(norm, LayerNorm), eps=norm.eps, backend="triton")
        x = x.tokens()
    return x, norm(tokens(x))


@torch.no_grad()
def quantize(network: ViTEncoder) -> str:
    """Compute the large linears of `network`'s blocks in FP8, for inference, in place; returns what was done, in words.

    Its site "fp8" decides how. Raises ValueError when no linear can be converted, and for a backend that cannot run.
    """
    device, site = network.pos_embed.device, network.ops["fp8"]
    chosen = {name for name, backend in network.ops.items() if backend != "plain"}
    left_out = [name for name in _NOT_ASKED if chosen & {f"encoder.{name}", f"decoder.{name}"}]
    network.use_ops({k: v for k, v in network.ops.items() if k.partition(".")[2] not in _NOT_ASKED})
    if site == "cuda":
        require_gemms("linear_fp8", device)
    linears, line = convert(network, "cuda" if site == "cuda" else product_backend(device), "precision fp8")
    for linear in linears:
        linear.quantize_()
    if site == "triton":
        line += _use_blocks(network, _CHAINED)
        _join_decoder(network)
        for norm in (network.norm, getattr(network, "out_norm", None)):
            if norm is not None and is_plain(norm, LayerNorm):
                norm.backend = "triton"
    elif site != "plain":
        line += _use_blocks(network, _AROUND)
    return line + (f"; sites {', '.join(left_out)} are not asked" if left_out else "")


def _use_blocks(network: ViTEncoder, classes: dict[type, type]) -> str:
    """Give blocks the classes that compute with rows in FP8; says which blocks do not."""
    blocks = network.all_blocks
    taken = [block for block in blocks if _is_unchanged(block)]
    for block in taken:
        block.__class__ = classes[type(block)]
    network.trunk = Fp8Trunk()
    left = len(blocks) - len(taken)
    if not left:
        return ""
    return f"; {left} of {len(blocks)} blocks call their modules (hooks, adapters or other sides), not the kernels"


def _join_decoder(network: ViTEncoder) -> None:
    """Let blocks of the decoder that the next one reads in FP8 alone return that."""
    with_skips = list(getattr(network, "decoder_blocks", ()))[: len(network.blocks)]
    for block, after in itertools.pairwise(with_skips):
        reads = isinstance(after, ChainedDecoderBlock) and is_plain(after.skip_linear, Fp8Linear)
        if isinstance(block, ChainedDecoderBlock):
            block.feeds_skip = reads


_BYPASSED = {
    "norm1": LayerNorm,
    "norm2": LayerNorm,
    "attn": Attention,
    "attn.qkv": Fp8Linear,
    "attn.proj": Fp8Linear,
    "attn.proj_drop": nn.Dropout,
    "mlp": Mlp,
    "mlp.fc1": Fp8Linear,
    "mlp.fc2": Fp8Linear,
    "mlp.drop": nn.Dropout,
    "drop_path": DropPath,
}
"""What a block in FP8 does not call."""


def _is_unchanged(block: nn.Module) -> bool:
    """Whether a block in FP8 would compute what this one does."""
    norm = getattr(block, "skip_norm", None)
    plain = norm is None or is_plain(norm, LayerNorm) or is_plain(norm, nn.Identity)
    plain = plain and type(block) in _AROUND and is_plain(block, type(block))
    return plain and all(is_plain(block.get_submodule(name), kind) for name, kind in _BYPASSED.items())
