"""The networks with fused operations in the place of the plain ones.

`fuse` changes classes of a network's modules and nothing else: parameters, their names and the results, up to
rounding, stay. What a fused operation would bypass is refused by name: an adapter, a quantised layer, a hook.
"""

from __future__ import annotations

import functools

import torch
import torch.nn as nn

from epg_fast.models.blocks import Attention, Block, DecoderBlock, LayerNorm, Mlp, PatchEmbed, is_plain
from epg_fast.models.encoder import RCMViT, ViTEncoder
from epg_fast.models.generator import EPGViT
from epg_fast.ops import (
    adaln_attention,
    gate_residual_norm_modulate,
    layer_norm_modulate,
    linear_gelu,
    patch_embed,
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


class FusedMlp(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(linear_gelu(x, *parameters_of(self.fc1), backend="triton"))))


class FusedBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = parameters_of(self.norm1, LayerNorm)
        dtype = autocast_dtype(x)
        y = layer_norm_modulate(x, weight, bias, eps=self.norm1.eps, out_dtype=dtype, backend="triton")
        branch = self.drop_path(self.attn(y))
        weight, bias = parameters_of(self.norm2, LayerNorm)
        x, y = gate_residual_norm_modulate(
            x, branch, None, weight, bias, eps=self.norm2.eps, out_dtype=dtype, backend="triton"
        )
        return x + self.drop_path(self.mlp(y))


class FusedDecoderBlock(DecoderBlock):
    def forward(self, x, cond, skip=None, modulation=None) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond, modulation)
        if skip is not None:
            norm = (None, None)
            if not is_plain(self.skip_norm, nn.Identity):
                norm = (*parameters_of(self.skip_norm, LayerNorm), self.skip_norm.eps)
            x = skip_linear(x, skip, *parameters_of(self.skip_linear), *norm, backend="triton")
        attn = self.attn
        require_plain(attn, Attention)
        x, y = adaln_attention(
            x,
            shift1,
            scale1,
            gate1,
            *parameters_of(self.norm1, LayerNorm),
            *parameters_of(attn.qkv),
            *parameters_of(attn.proj),
            attn.num_heads,
            attention_scale=attn.scale,
            eps=self.norm1.eps,
            attention_dropout=attn.attn_drop if self.training else 0.0,
            proj_dropout=attn.proj_drop.p if self.training else 0.0,
            next_norm=(*parameters_of(self.norm2, LayerNorm), shift2, scale2),
            backend="triton",
        )
        return x + gate2 * self.mlp(y)


class FusedTrunk(ViTEncoder):
    """What a network does outside of its blocks."""

    def _embed(self, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        require_plain(self.patch_embed, PatchEmbed)
        weight, bias = parameters_of(self.patch_embed.proj, nn.Conv2d)
        return patch_embed(x, weight, bias, self.pos_embed, prefix, backend="triton")


class FusedRCMViT(FusedTrunk, RCMViT):
    pass


class FusedEPGViT(FusedTrunk, EPGViT):
    def _to_decoder(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = parameters_of(self.norm, LayerNorm)
        x = layer_norm_modulate(x, weight, bias, eps=self.norm.eps, out_dtype=autocast_dtype(x), backend="triton")
        return x if self.encoder_to_decoder is None else self.encoder_to_decoder(x)


_FUSED = {Mlp: FusedMlp, Block: FusedBlock, DecoderBlock: FusedDecoderBlock, RCMViT: FusedRCMViT, EPGViT: FusedEPGViT}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}


@functools.cache
def _fused_network(kind: type[ViTEncoder]) -> type[ViTEncoder]:
    """The class of a subclass of the networks with what `FusedTrunk` replaces."""
    return type(f"Fused{kind.__name__}", (FusedTrunk, kind), {"__module__": kind.__module__})


def fuse(network: ViTEncoder) -> ViTEncoder:
    """Let `network` compute with fused operations, in place. Subclasses of blocks stay plain."""
    for module in network.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
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
