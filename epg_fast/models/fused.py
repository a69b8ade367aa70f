"""The networks with fused operations in the place of the plain ones, site by site.

`fuse` changes the classes of blocks and the network's trunk, and nothing else: parameters, their names and the results,
up to rounding, stay. A fused block hands each operation the backend of its site, "plain" for those that stay as they
were. What a fused operation would bypass is refused by name: an adapter, a quantised layer, a hook.

Where autocast computes in 16 bits and weights are float32, each product casts its weight, unless whoever keeps copies
of the weights up to date lends them to the blocks, as `operands` (`WeightCopies` of `epg_fast.training.optimizer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn as nn

from epg_fast.models.blocks import Attention, Block, DecoderBlock, LayerNorm, Mlp, PatchEmbed, Trunk, is_plain, tokens
from epg_fast.ops import (
    attention,
    gate_residual_norm_modulate,
    linear,
    linear_residual,
    linear_residual_norm,
    mlp_residual,
    norm_linear,
    patch_embed,
    residual_norm_modulate,
    skip_linear,
)
from epg_fast.ops.backends import autocast_dtype
from epg_fast.plans.sites import of_half


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
            f"ops: got {found} in the place of a plain {kind.__name__}, which fused operations would bypass; "
            "use ops='plain'"
        )


class Rows(NamedTuple):
    """A residual stream [B, L, D] and the statistics of its rows, for a norm within the next product."""

    x: torch.Tensor
    statistics: torch.Tensor

    def tokens(self) -> torch.Tensor:
        return self.x


Tokens = torch.Tensor | Rows


def _qkv(block: Block | DecoderBlock, y: torch.Tensor) -> torch.Tensor:
    """Attention's first product, of the norm y: [B, L, D] -> [B, L, 3 D]."""
    require_plain(block.attn, Attention)
    return linear(y, *parameters_of(block.attn.qkv), block.operands.get("attn.qkv"))


def _attended(block: Block | DecoderBlock, qkv: torch.Tensor) -> torch.Tensor:
    """[B, L, 3 D] -> attention's heads side by side, [B, L, D]."""
    attn = block.attn
    qkv = qkv.unflatten(2, (3, attn.num_heads, -1))
    dropout = attn.attn_drop if block.training else 0.0
    return attention(qkv, attn.scale, dropout, backend=attn.backend).flatten(2)


def _attention_half(
    block: Block | DecoderBlock, x, qkv, gate, modulation, kept: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + gate * attention of qkv, the MLP's input), from x and its qkv; modulation: shift, scale of the next norm.

    kept: only the first so many tokens go on, which still attend to all.
    """
    attn = block.attn
    h = _attended(block, qkv)
    if kept is not None:
        x, h = x[:, :kept].contiguous(), h[:, :kept].contiguous()
    norm, eps = parameters_of(block.norm2, LayerNorm), block.norm2.eps
    proj, operand = parameters_of(attn.proj), block.operands.get("attn.proj")
    backend = block.ops["proj"]
    if backend == "norm" or (block.training and attn.proj_drop.p):
        branch = attn.proj_drop(linear(h, *proj, operand))
        dtype, backend = autocast_dtype(x), "plain" if backend == "plain" else "triton"
        return gate_residual_norm_modulate(x, branch, gate, *norm, *modulation, eps, dtype, backend)
    return linear_residual_norm(x, h, *proj, *norm, gate, *modulation, eps, backend, operand)


def _mlp_half(block: Block | DecoderBlock, x, y, gate) -> torch.Tensor:
    """x + gate * MLP of y."""
    mlp = block.mlp
    require_plain(mlp, Mlp)
    if block.training and mlp.drop.p:
        branch = mlp(y)
        return x + (branch if gate is None else gate * branch)
    operands = block.operands.get("mlp.fc1"), block.operands.get("mlp.fc2")
    return mlp_residual(x, y, *parameters_of(mlp.fc1), *parameters_of(mlp.fc2), gate, block.ops["mlp"], operands)


def _norms_ride(block: Block | DecoderBlock) -> bool:
    """Whether the block's norms are made by the products that read them: those have no gradient, and no dropout."""
    return block.ops["norm"] == "prologue" and not (torch.is_grad_enabled() or block.training)


def _alone(backend: str) -> str:
    """Of a norm at a site of that backend that is a kernel of its own."""
    return "triton" if backend == "prologue" else backend


def _halves(block: Block | DecoderBlock, x: torch.Tensor, qkv: torch.Tensor, gate1, modulation2, gate2) -> Rows:
    """Both halves of a block behind attention's first product, the second norm in the loads of the MLP's first."""
    attn, mlp, operand = block.attn, block.mlp, block.operands.get
    require_plain(attn, Attention)
    require_plain(mlp, Mlp)
    h, proj = _attended(block, qkv), parameters_of(attn.proj)
    x = Rows(*linear_residual(x, h, *proj, gate1, "triton", operand("attn.proj")))
    h = _product_of_norm(x, block.norm2, mlp.fc1, *modulation2, gelu=True, operand=operand("mlp.fc1"))
    return Rows(*linear_residual(x.x, h, *parameters_of(mlp.fc2), gate2, "triton", operand("mlp.fc2")))


def _product_of_norm(x: Rows, norm, module, shift=None, scale=None, gelu=False, operand=None) -> torch.Tensor:
    """act(module(norm(x))) as one kernel."""
    normed, weight_and_bias = parameters_of(norm, LayerNorm), parameters_of(module)
    return norm_linear(*x, *normed, *weight_and_bias, shift, scale, norm.eps, gelu, "triton", operand)


def _residual_norm(backend, norm, x, shift=None, scale=None, skip=False) -> tuple[torch.Tensor, ...]:
    """(x, the next product's input, x as a skip, if that is wanted in the dtype of products): [B, L, D] each."""
    parameters, dtype = parameters_of(norm, LayerNorm), autocast_dtype(x)
    copy_dtype = dtype if skip else None
    return residual_norm_modulate(x, *parameters, shift, scale, norm.eps, dtype, copy_dtype, _alone(backend))


def _first_product(block: Block | DecoderBlock, x: Tokens, shift=None, scale=None, skip=False):
    """(x, attention's first product of its norm [B, L, 3 D], x as a skip)."""
    if isinstance(x, Rows) and _norms_ride(block):
        operand = block.operands.get("attn.qkv")
        return x.x, _product_of_norm(x, block.norm1, block.attn.qkv, shift, scale, operand=operand), x.x
    x, y, skip = _residual_norm(block.ops["norm"], block.norm1, tokens(x), shift, scale, skip)
    return x, _qkv(block, y), skip


class _Fused:
    ops: Mapping[str, str]
    """Backend by site of the block's half."""
    operands: Mapping[str, torch.Tensor] = {}
    """Copies of weights in the dtype of products by their linears, such as "mlp.fc1"; a weight without one is cast."""


class FusedBlock(_Fused, Block):
    makes_skip = False
    """Whether the input is wanted as a skip in the dtype of products."""

    def forward(self, x: Tokens) -> Tokens | tuple[Tokens, torch.Tensor]:
        """x: [B, L, E] -> what `Block` returns, or if `makes_skip` (that, x as a skip)."""
        return self._computed(x)

    def _computed(self, x: Tokens, kept: int | None = None):
        """kept: only the first so many tokens are computed behind the attention, and returned."""
        x, qkv, skip = _first_product(self, x, skip=self.makes_skip)
        if _norms_ride(self):
            x = _halves(self, x, qkv, None, (), None)
            x = x if kept is None else x.x[:, :kept]
        else:
            early = None if self.drops_out else kept
            x, y = _attention_half(self, x, qkv, self._drawn_gate(x, qkv.dtype), (None, None), early)
            x = _mlp_half(self, x, y, self._drawn_gate(x, y.dtype))[:, :kept]
        # compiled code would fill and add a gradient of zeros for a skip that nobody takes
        return (x, skip) if self.makes_skip else x

    @property
    def drops_out(self) -> bool:
        """Whether dropout draws, for all tokens, as in `Block`."""
        return self.training and bool(self.attn.proj_drop.p or self.mlp.drop.p)

    def _drawn_gate(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What stochastic depth multiplies a branch with, [B, 1, D]; None while it does not."""
        if not (self.training and self.drop_path.p):
            return None
        return self.drop_path(torch.ones_like(x[:, :1], dtype=dtype))


class FusedLastBlock(FusedBlock):
    """The last of an encoder whose result is its first token; torch.compile counts graphs by each `forward`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, L, E] -> the first token of what `Block` returns, [B, 1, E]."""
        return self._computed(x, kept=1)


class FusedDecoderBlock(_Fused, DecoderBlock):
    def forward(self, x: Tokens, cond, skip=None, modulation=None) -> Tokens:
        shift1, scale1, gate1, *modulation2, gate2 = self.modulation(cond, modulation)
        if skip is None:
            x, qkv, _ = _first_product(self, x, shift1, scale1)
        else:
            x, y = self._skip(tokens(x), skip, (*parameters_of(self.norm1, LayerNorm), shift1, scale1))
            qkv = _qkv(self, y)
        if _norms_ride(self):
            return _halves(self, x, qkv, gate1, modulation2, gate2)
        x, y = _attention_half(self, x, qkv, gate1, modulation2)
        return _mlp_half(self, x, y, gate2)

    def _skip(self, x, skip, next_norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(the residual with the long skip, its modulated norm)."""
        norm = (None, None)
        if not is_plain(self.skip_norm, nn.Identity):
            norm = parameters_of(self.skip_norm, LayerNorm)
        weight_and_bias, operand = parameters_of(self.skip_linear), self.operands.get("skip_linear")
        return skip_linear(x, skip, *weight_and_bias, *norm, self.norm1.eps, self.ops["skip"], next_norm, operand)


class FusedTrunk(Trunk):
    """Around blocks that hand each other more than a tensor, which other modules do not take."""

    own: tuple[type, ...] = (_Fused,)

    def embed(self, network: nn.Module, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        backend = network.ops["embedding"]
        if backend == "plain":
            return super().embed(network, x, prefix)
        require_plain(network.patch_embed, PatchEmbed)
        weight_and_bias = parameters_of(network.patch_embed.proj, nn.Conv2d)
        return patch_embed(x, *weight_and_bias, network.pos_embed, prefix, backend=backend)

    def run(self, network: nn.Module, index: int, block: nn.Module, *args: Tokens | None):
        return super().run(network, index, block, *(args if isinstance(block, self.own) else map(tokens, args)))

    def step(self, network: nn.Module, index: int, block: nn.Module, x: Tokens) -> tuple[Tokens, Tokens]:
        x = x if isinstance(block, self.own) else tokens(x)
        out = self.run(network, index, block, x)
        return out if type(out) is tuple else (out, x)  # `Rows` is one, too

    def final(self, network: nn.Module, x: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        _, normalised, skip = _residual_norm(network.ops["encoder.norm"], network.norm, tokens(x), skip=True)
        return skip, normalised

    def modulations(self, network: nn.Module, condition: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        linears = network.projections()
        joined = network._joined_projection is not None or autocast_dtype(condition) is None
        if joined or not (torch.is_grad_enabled() and linears):
            return super().modulations(network, condition)
        weights, biases = zip(*((module.weight, module.bias) for module in linears), strict=True)
        made = linear(condition, weights, torch.cat(biases), network.operands.get(_MODULATION))
        return made[:, None].chunk(len(linears), dim=-1)

    def patches(self, network: nn.Module, x: Tokens) -> torch.Tensor:
        if isinstance(x, Rows) and is_plain(network.out_norm, LayerNorm) and is_plain(network.out, nn.Linear):
            return _product_of_norm(x, network.out_norm, network.out)[:, network.extras :]
        return super().patches(network, tokens(x))


_FUSED = {Block: FusedBlock, DecoderBlock: FusedDecoderBlock}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()} | {FusedLastBlock: Block}
_MODULATION = "adaLN_modulation"
_SITES = {"attn.qkv": None, "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp", "skip_linear": "skip"}


def linears_with_operands(network: nn.Module) -> Iterator[tuple[nn.Module, str, list[nn.Linear]]]:
    """(module, name in its `operands`, linears) of each large product that reads a copy of its weight if it has one.

    The product of several linears reads their weights one below the other.
    """
    for path, module in network.large_linears():
        half, index, name = path.split(".", 2)
        block = network.get_submodule(f"{half}.{index}")
        fused = isinstance(block, _Fused) and block.ops.get(_SITES[name]) != "plain"
        if fused and is_plain(module, nn.Linear):
            yield block, name, [module]
    if isinstance(network.trunk, FusedTrunk) and (linears := network.projections()):
        yield network, _MODULATION, linears


def fuse(network: nn.Module) -> None:
    """Let `network` compute as its `ops` say, in place.

    Subclasses of blocks stay plain, but for their norms and attention.
    """
    decoder = getattr(network, "decoder_blocks", None)
    for half, blocks in (("encoder", network.blocks), ("decoder", decoder or ())):
        ops = of_half(network.ops, half)
        for block in blocks:
            _choose(block, ops)
            if isinstance(block, FusedBlock):
                block.makes_skip = decoder is not None
    if network.reads_first_token and len(network.blocks) and type(network.blocks[-1]) is FusedBlock:
        network.blocks[-1].__class__ = FusedLastBlock
    network.norm.backend = _alone(network.ops["encoder.norm"])
    if decoder is not None:
        network.out_norm.backend = _alone(network.ops["decoder.norm"])
    fused = network.ops["embedding"] != "plain" or any(isinstance(block, _Fused) for block in network.all_blocks)
    network.trunk = FusedTrunk() if fused else Trunk()


def _choose(block: nn.Module, ops: dict[str, str]) -> None:
    """Give a block its operations: attention and norms take theirs alone, for the others the block is another class."""
    fused = any(ops[site] != "plain" for site in ops if site != "attention")
    classes = _FUSED if fused else _PLAIN
    block.__class__ = classes.get(type(block), type(block))
    if fused:
        block.ops = ops
    for module in block.modules():
        if isinstance(module, LayerNorm):
            module.backend = _alone(ops["norm"])
        elif isinstance(module, Attention):
            module.backend = ops["attention"]
