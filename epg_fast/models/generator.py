"""The generator: pre-trained encoder trunk, fresh decoder with long skips and adaptive LayerNorm."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from epg_fast.models.blocks import DecoderBlock, LayerNorm, is_plain
from epg_fast.models.encoder import ViTEncoder
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


class EPGViT(ViTEncoder):
    """Image to image network of stage 2 (SPEC 3). Arguments as in the official class (which also calls it DMViT).

    `forward(x, t, y)`: x [B, C, H, W] (already scaled by c_in), t [B] (250 ln sigma), y [B] int64 class labels in
    0..num_classes, the last one being the unconditional label -> [B, C, H, W]. `num_classes=0` makes an unconditional
    model, which takes no y. `drop` is the dropout of the output projection of decoder attention (nowhere else).
    """

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
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            tokens=tokens,
            drop=0.0,
            attn_drop=0.0,
            drop_path=0.0,
            use_checkpoint=use_checkpoint,
            official=official,
        )
        self.num_classes = num_classes
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(
                decoder_embed_dim,
                embed_dim,
                decoder_num_heads,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                proj_drop=drop,
                attn_drop=attn_drop,
                drop_path=drop_path,
                skip_post_norm=skip_post_norm,
            )
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
        return self._feature(self._embed(x, self._condition(t, label)[0], label))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, *, patches: bool = False
    ) -> torch.Tensor:
        """x: [B, C, H, W], t: [B], y: [B] int64 -> [B, C, H, W], or what `unpatchify` makes that of if `patches`."""
        self._check(x)
        label = self._label_embedding(y)
        time, condition = self._condition(t, label)
        skips, x = self._encode(self._embed(x, time, label))
        if self.encoder_to_decoder is not None:
            x = self.encoder_to_decoder(x)
        cond = (time if label is None else time + label)[:, None]
        modulations = self._modulations(condition) or [None] * len(self.decoder_blocks)
        for i, (block, modulation) in enumerate(zip(self.decoder_blocks, modulations, strict=True), len(self.blocks)):
            x = self._run(i, block, x, cond, skips.pop() if skips else None, modulation)
        tokens = self.out(self.out_norm(x[:, self.extras :]))
        return tokens if patches else self.unpatchify(tokens)

    def _modulations(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """SiLU'd condition [B, E] -> [B, 1, 6 D] for every decoder block; None if the blocks must compute their own.

        One matrix product for all blocks: one for each would read its weights at a fraction of the bandwidth. Adapters,
        hooks and sharded or quantised weights have their effect inside the block's own module.
        """
        modules = [block.adaLN_modulation for block in self.decoder_blocks]
        if not modules or not all(_is_plain_modulation(module) for module in modules):
            return None
        dtype = autocast_dtype(condition) or modules[0][1].weight.dtype
        weight = torch.cat([module[1].weight.to(dtype) for module in modules])
        bias = torch.cat([module[1].bias.to(dtype) for module in modules])
        return F.linear(condition, weight, bias)[:, None].chunk(len(modules), dim=-1)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [B, N, p*p*C] with features in the order (row, column, channel) -> [B, C, H, W]."""
        grid = self.image_size // self.patch_size
        x = tokens.view(-1, grid, grid, self.patch_size, self.patch_size, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_chans, self.image_size, self.image_size)


DMViT = EPGViT
