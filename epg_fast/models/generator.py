"""The generator: pre-trained encoder trunk, fresh decoder with long skips and adaptive LayerNorm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from epg_fast.models.blocks import DecoderBlock, LayerNorm, is_plain
from epg_fast.models.encoder import ViTEncoder
from epg_fast.models.presets import register
from epg_fast.ops.backends import autocast_dtype

# The latter is a parameter's type where only shapes are computed with.
_PLAIN_PARAMETERS = (nn.Parameter, FakeTensor)


def _is_plain_modulation(module: nn.Module) -> bool:
    """SiLU, then Linear with bias, without hooks, with ordinary parameters."""
    return (
        is_plain(module, nn.Sequential)
        and len(module) == 2
        and is_plain(module[0], nn.SiLU)
        and is_plain(module[1], nn.Linear)
        and type(module[1].weight) in _PLAIN_PARAMETERS
        and type(module[1].bias) in _PLAIN_PARAMETERS
    )


class Conditioning(NamedTuple):
    """What the generator is told beside the image: the same for every image at one noise level with one label."""

    prefix: torch.Tensor
    """Class and time tokens: [B, tokens+1, E]."""
    cond: torch.Tensor
    """Time embedding plus class embedding: [B, 1, E]."""
    modulations: tuple[torch.Tensor, ...] | None
    """adaLN's shift, scale and gate, twice, of every decoder block: [B, 1, 6 D]; None if blocks compute their own."""


@register
class EPGViT(ViTEncoder):
    """Image to image network of stage 2 (SPEC 3). Arguments as in the official class (which also calls it DMViT).

    `forward(x, t, y)`: x [B, C, H, W] (already scaled by c_in), t [B] (250 ln sigma), y [B] int64 class labels in
    0..num_classes, the last one being the unconditional label -> [B, C, H, W]. `num_classes=0` makes an unconditional
    model, which takes no y. `drop` is the dropout of the output projection of decoder attention (nowhere else).
    """

    _joined_projection = None

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        in_channels=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        tokens=1,
        decoder_depth=12,
        decoder_embed_dim=768,
        decoder_num_heads=12,
        num_classes=1000,
        skip_post_norm=True,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        use_checkpoint=False,
        **official,
    ):
        sizes = image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_scale, tokens
        super().__init__(*sizes, use_checkpoint, **official)
        self.num_classes = num_classes
        widths = decoder_embed_dim, embed_dim, decoder_num_heads
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(*widths, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path, skip_post_norm)
            for _ in range(decoder_depth)
        )
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_embed_dim) if decoder_embed_dim != embed_dim else None
        self.out_norm = LayerNorm(decoder_embed_dim)
        self.out = nn.Linear(decoder_embed_dim, patch_size**2 * in_channels)
        self.class_embed = nn.Embedding(num_classes + 1, embed_dim) if num_classes > 0 else None
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform Linears; zero output layer and adaLN projections (SPEC 3)."""
        self._initialize_trunk()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in [self.out, *(block.adaLN_modulation[-1] for block in self.decoder_blocks)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed.weight, std=0.02)

    def large_linears(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().large_linears()
        # decoder blocks beyond the encoder's depth have no skip, and do not call the layer
        for i, block in enumerate(self.decoder_blocks[: len(self.blocks)]):
            yield f"decoder_blocks.{i}.skip_linear", block.skip_linear

    def _label_embedding(self, y: torch.Tensor | None) -> torch.Tensor | None:
        if (y is None) != (self.class_embed is None):
            raise ValueError(
                "EPGViT: this model is unconditional (num_classes=0); do not pass y"
                if self.class_embed is None
                else f"EPGViT: y is missing; pass labels in 0..{self.num_classes - 1}, or {self.num_classes} for none"
            )
        return None if y is None else self.class_embed(y)

    def encode(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """x: [B, C, H, W], t: [B], y: [B] (default: the unconditional label) -> normalised first class token [B, E]."""
        self._check(x)
        if y is None and self.class_embed is not None:
            y = torch.full((x.shape[0],), self.num_classes, device=x.device)
        label = self._label_embedding(y)
        return self._feature(x, self._condition(t, label)[0], label)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, *, patches: bool = False
    ) -> torch.Tensor:
        """x: [B, C, H, W], t: [B], y: [B] int64 -> [B, C, H, W], or what `unpatchify` makes that of if `patches`."""
        self._check(x)
        return self.denoise(x, self.conditioning(t, y), patches=patches)

    def conditioning(self, t: torch.Tensor, y: torch.Tensor | None = None) -> Conditioning:
        """All that `denoise` needs to know of the time condition t [B] and the labels y [B] int64."""
        label = self._label_embedding(y)
        time, condition = self._condition(t, label)
        cond = (time if label is None else time + label)[:, None]
        return Conditioning(self._prefix(time, label), cond, self.trunk.modulations(self, condition))

    def denoise(self, x: torch.Tensor, conditioning: Conditioning, *, patches: bool = False) -> torch.Tensor:
        """x: [B, C, H, W] -> [B, C, H, W]; with `conditioning(t, y)` this is `forward(x, t, y)`."""
        skips, x = self.trunk.encoded(self, self.trunk.embed(self, x, conditioning.prefix))
        if self.encoder_to_decoder is not None:
            x = self.encoder_to_decoder(x)
        modulations = conditioning.modulations or [None] * len(self.decoder_blocks)
        for i, (block, modulation) in enumerate(zip(self.decoder_blocks, modulations, strict=True), len(self.blocks)):
            skip = skips.pop() if skips else None
            x = self.trunk.run(self, i, block, x, conditioning.cond, skip, modulation)
        tokens = self.trunk.patches(self, x)
        return tokens if patches else self.unpatchify(tokens)

    def modulations(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """SiLU'd condition [B, E] -> [B, 1, 6 D] for every decoder block; None if the blocks must compute their own.

        One matrix product for all blocks: one for each would read its weights at a fraction of a GPU's bandwidth. For a
        forward pass alone on a CPU, joining them costs more than that saves. Adapters, hooks and sharded or quantised
        weights have their effect inside the block's own module.
        """
        joined = self._joined_projection
        if joined is None and (torch.is_grad_enabled() or condition.device.type != "cpu"):
            joined = self._projection()
        if joined is None:
            return None
        dtype = autocast_dtype(condition) or joined[0].dtype
        weight, bias = (tensor.to(dtype) for tensor in joined)
        return F.linear(condition, weight, bias)[:, None].chunk(len(self.decoder_blocks), dim=-1)

    def _projection(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(weight [blocks 6 D, E], bias) of all adaLN projections; None if the blocks must compute their own."""
        linears = self.projections()
        if not linears:
            return None
        dtype = autocast_dtype(linears[0].weight) or linears[0].weight.dtype
        return tuple(torch.cat([getattr(linear, name).to(dtype) for linear in linears]) for name in ("weight", "bias"))

    def projections(self) -> list[nn.Linear]:
        """The adaLN projections of all blocks; none if the blocks must compute their own."""
        modules = [block.adaLN_modulation for block in self.decoder_blocks]
        return [module[1] for module in modules] if all(map(_is_plain_modulation, modules)) else []

    @torch.no_grad()
    def join_projection(self) -> None:
        """Keep the adaLN projections of all blocks in one tensor, of which each block holds its part, for inference.

        Saves putting them together in every call. Parameters must not be replaced afterwards, nor change their dtype.
        """
        self._joined_projection = self._projection()
        if self._joined_projection is not None:
            for name, joined in zip(("weight", "bias"), self._joined_projection, strict=True):
                for block, part in zip(self.decoder_blocks, joined.chunk(len(self.decoder_blocks)), strict=True):
                    getattr(block.adaLN_modulation[1], name).data = part

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [B, N, p*p*C] with features in the order (row, column, channel) -> [B, C, H, W]."""
        return unpatchify(tokens, self.patch_size)


def unpatchify(tokens: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The inverse of `patchify` for square images: [B, N, p*p*C] -> [B, C, H, W]."""
    grid = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (grid, grid))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


DMViT = EPGViT
