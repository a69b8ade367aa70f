"""The large linears of a network's blocks in FP8: quantised anew in each pass in training, once for inference.

Attention's `qkv` and `proj`, the MLP's `fc1` and `fc2`, and `skip_linear` are nearly all of the work. Left alone are
first and last layers (`patch_embed`, `out`, the projection head), which set the quality of what enters and leaves,
`adaLN_modulation`, whose products have a row per image only, and `encoder_to_decoder`, which is one.
"""

from __future__ import annotations

import functools
from collections import Counter

import torch
import torch.nn as nn

from epg_fast.models.blocks import is_plain
from epg_fast.models.encoder import ViTEncoder
from epg_fast.ops import linear_fp8, linear_fp8_fused, quantize_rows_ref
from epg_fast.ops.backends import autocast_dtype
from epg_fast.ops.fp8 import fits, product_refusal
from epg_fast.ops.linear_fp8_dynamic import linear_fp8_dynamic


class Fp8Linear(nn.Linear):
    """Linear that multiplies float8_e4m3fn; parameters and their names are Linear's.

    In training its forward product and gradient of the input are FP8's. `quantize_` makes it one for inference.
    """

    backend = "scaled_mm"
    """Of `linear_fp8_dynamic`, or of `linear_fp8` once the weight is quantised."""
    weight_scale: torch.Tensor | None = None
    """[N], one per output channel, of a weight in float8_e4m3fn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] -> [..., N] in autocast's dtype, or x's where autocast is off; bfloat16 once quantised."""
        if self.weight_scale is not None:
            return self.product(*quantize_rows_ref(x))
        return linear_fp8_dynamic(x, self.weight, self.bias, autocast_dtype(x) or x.dtype, backend=self.backend)

    def product(self, rows: torch.Tensor, scale: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """rows: [..., K] in float8_e4m3fn, scale: [...] -> [..., N] bfloat16, of a quantised weight."""
        return linear_fp8(rows, scale, self.weight, self.weight_scale, self.bias, gelu, self.backend)

    def fused(self, rows: torch.Tensor, scale: torch.Tensor, **options) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """`linear_fp8_fused` of a quantised weight, with its options, by its Triton kernel."""
        operands = rows, scale, self.weight, self.weight_scale, self.bias
        return linear_fp8_fused(*operands, **options, backend="triton")

    @torch.no_grad()
    def quantize_(self) -> None:
        """Replace weight and bias by what `linear_fp8` takes."""
        weight, self.weight_scale = quantize_rows_ref(self.weight.float())
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.bfloat16(), requires_grad=False)


def convert(network: ViTEncoder, backend: str, flag: str) -> tuple[list[Fp8Linear], str]:
    """(the large linears of `network`'s blocks, now `Fp8Linear`s, what was done in words).

    Adapted linears, and those with sides that are no multiples of 16, stay as they are. flag: what asked for FP8.
    Raises ValueError when none is left.
    """
    converted, kept = [], Counter()
    for name, linear in network.large_linears():
        if not is_plain(linear, nn.Linear):
            kept[f"a {type(linear).__name__} as {name.rpartition('.')[2]}"] += 1
        elif not fits(linear.weight):
            kept[f"{name.rpartition('.')[2]} {linear.in_features} to {linear.out_features}"] += 1
        else:
            linear.__class__, linear.backend = Fp8Linear, backend
            converted.append(linear)
    sides = ", ".join(f"{count} x {what}" for what, count in kept.items())
    if not converted:
        raise ValueError(f"{flag}: got no linear with sides that are multiples of 16 ({sides}); leave it out")
    left = f"; in 16 bits, being adapted or no multiples of 16: {sides}" if kept else ""
    return converted, f"{flag}: {len(converted)} linears of the blocks, with a scale per row{left}"


def use_fp8(network: ViTEncoder, backend: str = "scaled_mm") -> str:
    """Train with the large linears of `network`'s blocks in FP8, changed in place; returns what was done, in one line.

    backend: of `linear_fp8_dynamic`; tests take "plain". Raises ValueError when no linear can be converted.
    """
    return convert(network, backend, "fp8")[1] + "; gradients of weights are in 16 bits"


def require_fp8(device: torch.device) -> None:
    """Raise ValueError unless `device` multiplies FP8 operands with a scale per row."""
    found = refusal(device)
    if found:
        raise ValueError(
            f"fp8: got {found}, wanted a GPU that multiplies FP8 (compute capability 8.9 or more: RTX 40, L40S, H100 "
            "and later); leave out --fp8"
        )


@functools.cache
def refusal(device: torch.device, lowest: tuple[int, int] = (8, 9)) -> str | None:
    """Why a device has not the products of an `Fp8Linear`; None if it has them. lowest: compute capability."""
    return product_refusal(device, lowest, _trial)


def _trial(device: torch.device) -> bool:
    """Whether a small product and its gradient are right."""
    x = torch.ones(256, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    with torch.enable_grad():
        y = linear_fp8_dynamic(x, torch.ones(48, 64, device=device))
        dx = torch.autograd.grad(y.sum(), x)[0]
    return bool((y == 64).all() and (dx == 48).all())
