"""The encoder: its trunk, shared with the generator, and RCMViT, the network of the pre-training stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn

from epg_fast.models.blocks import BatchNorm1d, Block, LayerNorm, PatchEmbed, Trunk, is_plain
from epg_fast.models.fused import FusedLastBlock, fuse
from epg_fast.models.presets import register
from epg_fast.models.pretrained import Pretrained
from epg_fast.ops import timestep_condition
from epg_fast.plans import PLAIN, Case, choose, site_choices
from epg_fast.plans.plan import architecture
from epg_fast.plans.sites import KINDS

log = logging.getLogger("epg_fast")

# Arguments of the official classes for features that EPG does not use, with the only value that is accepted.
_OFFICIAL_UNUSED = {
    "mlp_time_embed": False,
    "qk_norm": False,
    "stop_grad_conv1": False,
    "moco_initialization": False,
    "output_format": "clstoken",
    "zero_init_out": True,
}
_TAGS = ["epg", "pixel-space", "image-generation", "arxiv:2510.12586"]


class ViTEncoder(Pretrained, library_name="epg_fast", tags=_TAGS):
    """Trunk: sequence [class tokens, time token, patches] + position embedding, blocks, final LayerNorm.

    `use_ops` chooses how the operations of `epg_fast.ops` are computed. use_checkpoint: the share of the blocks, evenly
    spread, whose activations are computed again in the backward pass instead of being kept; True: all of them.
    Raises ValueError when the image size is not a multiple of the patch size, or for official arguments whose feature
    the released models do not use.
    """

    ops: Mapping[str, str] = PLAIN
    """Backend by site."""
    operands: Mapping[str, torch.Tensor] = {}
    """As in a block of `epg_fast.models.fused`."""
    trunk = Trunk()

    def __init__(
        self,
        image_size,
        patch_size,
        in_channels,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        qkv_bias,
        qk_scale,
        tokens,
        use_checkpoint,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        **official,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}; "
                f"the next smaller one is {image_size // patch_size * patch_size}"
            )
        for name, value in official.items():
            if name not in _OFFICIAL_UNUSED:
                raise TypeError(f"{type(self).__name__}: unknown argument {name!r}")
            if value != _OFFICIAL_UNUSED[name]:
                raise ValueError(f"{type(self).__name__}: {name}={value!r} is not supported; leave it out")
        self.image_size, self.patch_size, self.in_chans = image_size, patch_size, in_channels
        if not 0 <= use_checkpoint <= 1:
            raise ValueError(
                f"use_checkpoint is {use_checkpoint}, want a share of the blocks from 0 to 1, or a boolean"
            )
        self.embed_dim, self.tokens, self.extras = embed_dim, tokens, tokens + 1
        self.num_patches = (image_size // patch_size) ** 2
        self.use_checkpoint = use_checkpoint
        self.metadata: dict = {}
        self.cls_token = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are usually exempt from weight decay."""
        return {"pos_embed", "cls_token"}

    def use_ops(
        self, ops: str | Mapping[str, str], *, job: str = "sample", precision: str = "bf16", batch_size: int = 64
    ) -> ViTEncoder:
        """Compute with these backends of `epg_fast.ops` from now on, and return the network.

        ops: "plain" (the default: PyTorch's own operators), "triton" (every Triton kernel), "cuda" (the extension's
        products, and Triton's kernels elsewhere), backends by site, such as
        {"attention": "cudnn", "decoder.mlp": "triton"}, the others plain (see `epg_fast.plans.sites`), or whatever else
        `--ops` takes: "auto" is the plan that `epg-fast tune` has made on this device for this job, precision and
        number of images per call, or plain code if there is none, which the log says.
        Where a fused operation computes, modules must be the original ones and free of forward hooks: ValueError in the
        forward pass otherwise. Parameters and results are the same with any of them, up to rounding; the last block of
        an RCMViT, whose result is the first token, then returns that alone.
        """
        if isinstance(ops, str) and ops not in KINDS:
            chosen = choose(ops, Case(job, architecture(self), precision, batch_size), self.pos_embed.device)
            log.info("%s", chosen.why)
            ops = chosen.ops
        self.ops = site_choices(ops)
        fuse(self)
        return self

    @property
    def all_blocks(self) -> list[nn.Module]:
        """Blocks of the encoder, then those of the decoder if there is one, in the order of the forward pass."""
        return [block for _, block in self._named_blocks()]

    @property
    def reads_first_token(self) -> bool:
        """Whether of what the last block returns the first token alone is read."""
        return False

    @property
    def drops_tokens(self) -> bool:
        """Whether, behind the attention of the last block, a feature is computed from the class token alone."""
        last = self.blocks[-1] if len(self.blocks) else None
        return isinstance(last, FusedLastBlock) and not last.drops_out

    @property
    def has_hooks(self) -> bool:
        """Whether any module has a forward hook, or a forward that is not its class's."""
        return any(not is_plain(module, type(module)) for module in self.modules())

    def large_linears(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the linears that do nearly all work: those of attention, MLP and skip in each block.

        What is left are the first and last layers and products with a row per image only.
        """
        for prefix, block in self._named_blocks():
            for outer, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
                module = block._modules[outer]
                # an adapter around the whole of attention or MLP is in the place of what is in it
                yield f"{prefix}.{outer}.{name}", module._modules.get(name, module)

    def projections(self) -> list[nn.Linear]:
        """Linears that one product may stand for beside those of the blocks; none, but in the generator."""
        return []

    def _named_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for half in ("blocks", "decoder_blocks"):
            yield from ((f"{half}.{i}", block) for i, block in enumerate(getattr(self, half, ())))

    def _initialize_trunk(self) -> None:
        bound = math.sqrt(6.0 / (self.in_chans * self.patch_size**2 + self.embed_dim))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _check(self, x: torch.Tensor) -> None:
        wanted = (self.in_chans, self.image_size, self.image_size)
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__}: got an image in {x.dtype}, want normalised floating pixels")
        if x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(
                f"{type(self).__name__}: got shape {list(x.shape)}, want [B, {', '.join(map(str, wanted))}]; "
                "for another resolution load the weights with from_pretrained(..., image_size=...)"
            )

    def _prefix(self, time: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        """time: [B, E], label embedding: [B, E] or None -> class and time tokens [B, tokens+1, E]."""
        cls = self.cls_token.expand(time.shape[0], -1, -1)
        cls = cls if label is None else cls + label[:, None]
        return torch.cat([cls, time[:, None]], dim=1)

    def _feature(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        """x: [B, C, H, W], time and label embedding as in `_prefix` -> normalised first class token [B, E]."""
        return self.trunk.feature(self, self.trunk.embed(self, x, self._prefix(time, label)))

    def _condition(self, t: torch.Tensor, label: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(time token, SiLU(time + label)): [B, E] each, from t [B] and the label embedding [B, E] or None."""
        dtype = self.cls_token.dtype
        return timestep_condition(t, self.embed_dim, label, dtype=dtype, backend=self.ops["condition"])


@register
class RCMViT(ViTEncoder):
    """Encoder with projection head, as pre-trained in stage 1 (SPEC 3). Arguments as in the official class.

    `forward(x, t)`: x [B, C, H, W] (already scaled by c_in), t [B] (250 ln sigma) ->
    (projection [B, output_dim], feature [B, embed_dim]).
    """

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        in_channels=3,
        embed_dim=768,
        hidden_dim=4096,
        output_dim=256,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        tokens=1,
        proj_layers=3,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        use_checkpoint=False,
        **official,
    ):
        sizes = image_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_scale, tokens
        super().__init__(*sizes, use_checkpoint, drop, attn_drop, drop_path, **official)
        self.projection_head = _projection_head(proj_layers, embed_dim, hidden_dim, output_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform Linears, the fused qkv as three matrices (SPEC 3)."""
        self._initialize_trunk()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_out = module.out_features // 3 if name.endswith("attn.qkv") else module.out_features
                bound = math.sqrt(6.0 / (fan_out + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: [B, C, H, W], t: [B] -> normalised first class token [B, E]; `projection_head` takes it from there."""
        self._check(x)
        return self._feature(x, self._condition(t, None)[0], None)

    @property
    def reads_first_token(self) -> bool:
        """Methods of a subclass may read others."""
        return (type(self).forward, type(self).encode) == (RCMViT.forward, RCMViT.encode)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(projection [B, output_dim], feature [B, E])."""
        feature = self.encode(x, t)
        return self.projection_head(feature), feature


def _projection_head(layers: int, embed_dim: int, hidden_dim: int, output_dim: int) -> nn.Module:
    """MLP without biases; BatchNorm1d and ReLU after each layer but the last."""
    widths = [embed_dim] + [hidden_dim] * (layers - 1) + [output_dim]
    modules: list[nn.Module] = []
    for i in range(layers):
        modules.append(nn.Linear(widths[i], widths[i + 1], bias=False))
        if i < layers - 1:
            modules += [BatchNorm1d(widths[i + 1]), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules)
