"""Encoder and generator (SPEC 3), for weights that are loaded: the initial ones are PyTorch's defaults."""

from __future__ import annotations

import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def from_config(kind: type[nn.Module], config: dict) -> nn.Module:
    """PlainEncoder or PlainGenerator from a preset's fields; those that are the other network's are ignored."""
    return kind(**{name: config[name] for name in inspect.signature(kind).parameters if name in config})


class LayerNorm(nn.LayerNorm):
    """In float32, whatever comes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, D] -> [B, L, D]."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(batch, length, dim)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x: [B, L, D]; shift, scale: [B, 1, D]."""
    return x * (1 + scale) + shift


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, encoder_dim: int, num_heads: int, mlp_ratio: float, drop: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, drop)
        self.norm2 = LayerNorm(dim)
        self.skip_linear = nn.Linear(dim + encoder_dim, dim)
        self.skip_norm = LayerNorm(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(encoder_dim, 6 * dim))
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, cond: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        """x: [B, L, D], cond: [B, 1, E], skip: [B, L, E] -> [B, L, D]."""
        if skip is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([x, skip], dim=-1)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t: [B] -> [cos(t f), sin(t f)]: [B, dim] in float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = t[:, None].float() * frequencies[None]
    embedding = torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)
    return torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1) if dim % 2 else embedding


class Trunk(nn.Module):
    """What both networks begin with: class token, time token and patches, position embedding, blocks, norm."""

    def __init__(self, image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio):
        super().__init__()
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.embed_dim = embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + (image_size // patch_size) ** 2, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(embed_dim)

    def embed(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """x: [B, C, H, W], time: [B, 1, E], label: [B, 1, E] or None -> tokens [B, L, E]."""
        cls = self.cls_token.expand(len(x), -1, -1)
        if label is not None:
            cls = cls + label
        return torch.cat([cls, time, self.patch_embed(x)], dim=1) + self.pos_embed


class PlainEncoder(Trunk):
    """`forward(x, t)`: x [B, C, H, W], scaled by c_in, t [B], 250 ln sigma -> (projection [B, P], feature [B, E])."""

    def __init__(
        self,
        image_size=256,
        patch_size=16,
        in_channels=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        hidden_dim=4096,
        output_dim=256,
    ):
        super().__init__(image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio)
        self.projection_head = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, output_dim, bias=False),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(x, timestep_embedding(t, self.embed_dim)[:, None])
        for block in self.blocks:
            x = block(x)
        feature = self.norm(x[:, 0])
        return self.projection_head(feature), feature


class PlainGenerator(Trunk):
    """`forward(x, t, y)`: x [B, C, H, W], scaled by c_in, t [B], 250 ln sigma, y [B] labels -> [B, C, H, W]."""

    def __init__(
        self,
        image_size=256,
        patch_size=16,
        in_channels=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        decoder_depth=12,
        decoder_embed_dim=1584,
        decoder_num_heads=22,
        num_classes=1000,
        drop=0.0,
    ):
        super().__init__(image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio)
        self.num_classes = num_classes
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_embed_dim, embed_dim, decoder_num_heads, mlp_ratio, drop) for _ in range(decoder_depth)
        )
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_embed_dim) if decoder_embed_dim != embed_dim else None
        self.out_norm = LayerNorm(decoder_embed_dim)
        self.out = nn.Linear(decoder_embed_dim, patch_size**2 * in_channels)
        self.class_embed = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time, label = timestep_embedding(t, self.embed_dim)[:, None], self.class_embed(y)[:, None]
        x = self.embed(x, time, label)
        skips = []
        for block in self.blocks:
            x = block(x)
            skips.append(x)
        x = self.norm(x)
        if self.encoder_to_decoder is not None:
            x = self.encoder_to_decoder(x)
        cond = time + label
        for block in self.decoder_blocks:
            x = block(x, cond, skips.pop() if skips else None)
        return self.unpatchify(self.out(self.out_norm(x[:, 2:])))

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [B, N, p*p*C], channels fastest -> [B, C, H, W]."""
        side, p = self.image_size // self.patch_size, self.patch_size
        x = tokens.reshape(-1, side, side, p, p, self.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, self.image_size, self.image_size)
