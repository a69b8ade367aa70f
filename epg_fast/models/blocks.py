"""Building blocks of both networks; parameter names and shapes are those of the released checkpoints.

They are plain: `epg_fast.models.fused` holds what computes the same with fused operations. Modules whose forward is
one operation of `epg_fast.ops` have its `backend`.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from epg_fast.ops import attention, layer_norm_modulate


def is_plain(module: nn.Module, kind: type[nn.Module], *, subclass: bool = False, hooks: bool = False) -> bool:
    """Whether a call of `module` computes `kind.forward` and nothing else.

    It is a `kind`, or if `subclass` one of those with the same forward; it has no forward of its own, and unless
    `hooks` neither forward hooks nor a compiled call.
    """
    own = type(module).forward is kind.forward if subclass else type(module) is kind
    hooked = module._forward_pre_hooks or module._forward_hooks or module._compiled_call_impl
    return own and "forward" not in vars(module) and (hooks or not hooked)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, computed in float32, optionally followed by `* (1 + scale) + shift`."""

    backend = "plain"

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None):
        """x: [B, L, D]; shift, scale: [B, 1, D] or None. Returns x's shape and dtype."""
        return layer_norm_modulate(x, self.weight, self.bias, shift, scale, eps=self.eps, backend=self.backend)


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d that does not lose its statistics to a 16-bit input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, C]; returns the same shape and dtype."""
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype))).to(x.dtype)


class DropPath(nn.Module):
    """Drops the residual branch of whole samples (stochastic depth)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, D]; samples are zeroed with probability p, the others scaled by 1/(1-p), in training mode only."""
        if self.p == 0.0 or not self.training:
            return x
        keep = torch.empty(x.shape[0], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1.0 - self.p)
        return x * keep / (1.0 - self.p)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection (order q, k, v)."""

    backend = "plain"

    def __init__(self, dim, num_heads, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"attention: width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, D] -> [B, L, D]."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        dropout = self.attn_drop if self.training else 0.0
        x = attention(qkv, self.scale, dropout, backend=self.backend).flatten(2)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, D] -> [B, L, D]."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-LayerNorm transformer block of the encoder."""

    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop=0.0, attn_drop=0.0, drop_path=0.0):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, E] -> [B, L, E]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Block with a long skip from the encoder and adaptive LayerNorm (shift, scale, gate from the condition).

    `adaLN_modulation` holds this block's projection of the condition; the generator computes all blocks' at once.
    """

    def __init__(
        self, dim, encoder_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path, skip_post_norm
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.norm2 = LayerNorm(dim)
        self.skip_linear = nn.Linear(encoder_dim + dim, dim)
        self.skip_norm = LayerNorm(dim) if skip_post_norm else nn.Identity()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(encoder_dim, 6 * dim))
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: torch.Tensor,
        cond: torch.Tensor | None,
        skip: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: [B, L, D], cond: [B, 1, E], skip: [B, L, E] or None -> [B, L, D].

        modulation: what `adaLN_modulation` makes of cond, if it has been computed: [B, 1, 6 D].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond, modulation)
        if skip is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([x, skip.to(x.dtype)], dim=-1)))
        x = x + gate1 * self.attn(self.norm1(x, shift1, scale1))
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))

    def modulation(self, cond: torch.Tensor | None, modulation: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """shift, scale and gate of attention, then of the MLP: [B, 1, D] each. Arguments as in `forward`."""
        if modulation is None:
            modulation = self.adaLN_modulation(cond)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        return shift1, scale1, self.drop_path(gate1), shift2, scale2, self.drop_path(gate2)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, C, H, W] -> [B, N, E], patches in row-major order."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Trunk:
    """What a network does around its blocks, plainly; `fused` and `fused_fp8` have trunks for blocks of theirs."""

    def embed(self, network: nn.Module, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """x: [B, C, H, W], prefix: [B, tokens+1, E] -> tokens [B, L, E]."""
        return torch.cat([prefix, network.patch_embed(x)], dim=1) + network.pos_embed

    def run(self, network: nn.Module, index: int, block: nn.Module, *args: torch.Tensor | None):
        """`block(*args)`; the decoder's blocks count after the encoder's."""
        if torch.is_grad_enabled() and is_recomputed(index, network.use_checkpoint):
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def step(self, network: nn.Module, index: int, block: nn.Module, x: torch.Tensor):
        """(output of a block of the encoder, its input as a skip)."""
        return self.run(network, index, block, x), x

    def feature(self, network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, E] -> normalised first class token [B, E] after the last block."""
        for i, block in enumerate(network.blocks):
            x, _ = self.step(network, i, block, x)
        return network.norm(tokens(x)[:, :1])[:, 0]

    def encoded(self, network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Tokens [B, L, E] -> (output of every encoder block, normalised output of the last)."""
        entered = []
        for i, block in enumerate(network.blocks):
            x, skip = self.step(network, i, block, x)
            entered.append(skip)
        last, normalised = self.final(network, x)
        return [*entered, last][1:], normalised

    def final(self, network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the last block of the encoder as a skip, its norm)."""
        return x, network.norm(x)

    def modulations(self, network: nn.Module, condition: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """SiLU'd condition [B, E] -> [B, 1, 6 D] for every decoder block; None if the blocks must compute their own."""
        return network.modulations(condition)

    def patches(self, network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Output of the last decoder block [B, L, D] -> patches [B, N, p*p*C]."""
        return network.out(network.out_norm(x[:, network.extras :]))


def is_recomputed(index: int, share: float) -> bool:
    """Whether block `index` is among the evenly spread `share` of blocks; the decoder's count after the encoder's."""
    return math.floor((index + 1) * share) > math.floor(index * share)


def tokens(x) -> torch.Tensor | None:
    """What blocks hand on, as a tensor: that itself or None, or one that a block of `fused` has left in parts."""
    return x if x is None or isinstance(x, torch.Tensor) else x.tokens()
