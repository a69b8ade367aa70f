"""The networks with fused operations in the place of the plain ones.

`fuse` changes classes of a network's modules and nothing else: parameters, their names and the results, up to
rounding, stay. What a fused operation would bypass is refused by name: an adapter, a quantised layer, a hook.
"""

from __future__ import annotations

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from epg_fast.models.blocks import Attention, Block, DecoderBlock, LayerNorm, Mlp, PatchEmbed, is_plain
from epg_fast.models.encoder import RCMViT, ViTEncoder
from epg_fast.models.generator import EPGViT
from epg_fast.ops import (
    attention,
    gate_residual_norm_modulate,
    linear_residual_norm,
    mlp_residual,
    patch_embed,
    residual_norm_modulate,
    skip_linear,
)
from epg_fast.ops.backends import autocast_dtype


def parameters_of(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of a plain module, for a fused operation that does not call it."""
    require_plain(module, kind)
    return module.weight, module.bias


def require_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise ValueError for what a fused operation would bypass: an adapter, a quantised layer, a module with hooks."""
    if not is_plain(module, kind):
        changed = "" if type(module) is not kind else " with forward hooks or a forward of its own"
        found = f"a {type(module).__name__}{changed}"
        raise ValueError(
            f"ops='triton': got {found} in the place of a plain {kind.__name__}, which fused operations would bypass; "
            "use ops='auto'"
        )


def _attention_half(block: Block | DecoderBlock, x, y, gate, modulation) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + gate * attention of y, the MLP's input), from the norm y of x; modulation: shift, scale of the next norm."""
    attn = block.attn
    require_plain(attn, Attention)
    batch, length, width = x.shape
    qkv = F.linear(y, *parameters_of(attn.qkv)).view(batch, length, 3, attn.num_heads, width // attn.num_heads)
    dropout = attn.attn_drop if block.training else 0.0
    h = attention(qkv, attn.scale, dropout, backend="triton").flatten(2)
    norm, eps = parameters_of(block.norm2, LayerNorm), block.norm2.eps
    linear = parameters_of(attn.proj)
    if block.training and attn.proj_drop.p:
        branch = attn.proj_drop(F.linear(h, *linear))
        dtype = autocast_dtype(x)
        return gate_residual_norm_modulate(x, branch, gate, *norm, *modulation, eps, dtype, backend="triton")
    return linear_residual_norm(x, h, *linear, *norm, gate, *modulation, eps, backend="triton")


def _mlp_half(block: Block | DecoderBlock, x, y, gate) -> torch.Tensor:
    """x + gate * MLP of y."""
    mlp = block.mlp
    require_plain(mlp, Mlp)
    if block.training and mlp.drop.p:
        branch = mlp(y)
        return x + (branch if gate is None else gate * branch)
    return mlp_residual(x, y, *parameters_of(mlp.fc1), *parameters_of(mlp.fc2), gate, backend="triton")


def _residual_norm(norm, x, shift=None, scale=None, skip=False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, the next product's input, x as a skip, if that is wanted in the dtype of products): [B, L, D] each."""
    parameters, dtype = parameters_of(norm, LayerNorm), autocast_dtype(x)
    copy_dtype = dtype if skip else None
    return residual_norm_modulate(x, *parameters, shift, scale, norm.eps, dtype, copy_dtype, backend="triton")


class FusedBlock(Block):
    makes_skip = False
    """Whether the input is wanted as a skip in the dtype of products."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, L, E] -> (what `Block` returns, x as a skip)."""
        x, y, skip = _residual_norm(self.norm1, x, skip=self.makes_skip)
        x, y = _attention_half(self, x, y, self._drawn_gate(y), (None, None))
        return _mlp_half(self, x, y, self._drawn_gate(y)), skip

    def _drawn_gate(self, y: torch.Tensor) -> torch.Tensor | None:
        """What stochastic depth multiplies a branch with, [B, 1, D]; None while it does not."""
        if not (self.training and self.drop_path.p):
            return None
        return self.drop_path(torch.ones_like(y[:, :1]))


class FusedDecoderBlock(DecoderBlock):
    def forward(self, x, cond, skip=None, modulation=None) -> torch.Tensor:
        shift1, scale1, gate1, *modulation2, gate2 = self.modulation(cond, modulation)
        if skip is None:
            x, y, _ = _residual_norm(self.norm1, x, shift1, scale1)
        else:
            x, y = self._skip(x, skip, (*parameters_of(self.norm1, LayerNorm), shift1, scale1))
        x, y = _attention_half(self, x, y, gate1, modulation2)
        return _mlp_half(self, x, y, gate2)

    def _skip(self, x, skip, next_norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(the residual with the long skip, its modulated norm)."""
        norm = (None, None)
        if not is_plain(self.skip_norm, nn.Identity):
            norm = parameters_of(self.skip_norm, LayerNorm)
        linear, eps = parameters_of(self.skip_linear), self.norm1.eps
        return skip_linear(x, skip, *linear, *norm, eps, backend="triton", next_norm=next_norm)


class FusedTrunk(ViTEncoder):
    """What a network does outside of its blocks."""

    def _embed(self, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        require_plain(self.patch_embed, PatchEmbed)
        weight, bias = parameters_of(self.patch_embed.proj, nn.Conv2d)
        return patch_embed(x, weight, bias, self.pos_embed, prefix, backend="triton")

    def _feature(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x, _ = self._entered(i, block, x)
        return self.norm(x[:, :1])[:, 0]

    def _entered(self, index: int, block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the block, its input as a skip); a block that is not fused leaves its input as it is."""
        out = self._run(index, block, x)
        return out if isinstance(out, tuple) else (out, x)


class FusedRCMViT(FusedTrunk, RCMViT):
    pass


class FusedEPGViT(FusedTrunk, EPGViT):
    def _encoded(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        skips = []
        for i, block in enumerate(self.blocks):
            x, entered = self._entered(i, block, x)
            skips.append(entered)
        _, normalised, last = _residual_norm(self.norm, x, skip=True)
        return [*skips[1:], last], normalised


_FUSED = {Block: FusedBlock, DecoderBlock: FusedDecoderBlock, RCMViT: FusedRCMViT, EPGViT: FusedEPGViT}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}


@functools.cache
def _fused_network(kind: type[ViTEncoder]) -> type[ViTEncoder]:
    """The class of a subclass of the networks with what `FusedTrunk` replaces."""
    return type(f"Fused{kind.__name__}", (FusedTrunk, kind), {"__module__": kind.__module__})


def fuse(network: ViTEncoder) -> ViTEncoder:
    """Let `network` compute with fused operations, in place. Subclasses of blocks stay plain."""
    for module in network.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
        if isinstance(module, FusedBlock):
            module.makes_skip = isinstance(network, EPGViT)
    if not isinstance(network, FusedTrunk):
        network.__class__ = _fused_network(type(network))
    return network


def unfuse(network: ViTEncoder) -> ViTEncoder:
    """Undo `fuse`."""
    for module in network.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    if isinstance(network, FusedTrunk):
        network.__class__ = type(network).__bases__[1]
    return network
