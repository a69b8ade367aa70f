"""`--fp8 rowwise`: the large linears of a network's blocks in FP8, while it trains."""

from __future__ import annotations

import logging
from collections import Counter

import torch
import torch.nn as nn

from epg_fast.models.encoder import ViTEncoder
from epg_fast.ops.backends import autocast_dtype
from epg_fast.ops.fp8 import fits, product_refusal
from epg_fast.ops.linear_fp8_dynamic import linear_fp8_dynamic

log = logging.getLogger("epg_fast")

_LOWEST = (8, 9)


class Fp8Linear(nn.Linear):
    """Linear whose forward product and gradient of the input are FP8's; parameters and their names are Linear's."""

    backend = "scaled_mm"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] -> [..., N] in autocast's dtype, or x's where autocast is off."""
        return linear_fp8_dynamic(x, self.weight, self.bias, autocast_dtype(x) or x.dtype, backend=self.backend)


def require_fp8(device: torch.device) -> None:
    """Raise ValueError unless `device` multiplies FP8 operands with a scale per row."""
    found = product_refusal(device, _LOWEST, _trial)
    if found:
        raise ValueError(
            f"fp8: got {found}, wanted a GPU that multiplies FP8 (compute capability 8.9 or more: RTX 40, L40S, H100 "
            "and later); leave out --fp8"
        )


def _trial(device: torch.device) -> bool:
    """Both directions."""
    x = torch.ones(256, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = linear_fp8_dynamic(x, torch.ones(48, 64, device=device))
    dx = torch.autograd.grad(y.sum(), x)[0]
    return bool((y == 64).all() and (dx == 48).all())


def use_fp8(network: ViTEncoder, backend: str = "scaled_mm") -> str:
    """Turn the large linears of `network`'s blocks into `Fp8Linear`, in place; returns what was done, in one line.

    These are attention's `qkv` and `proj`, the MLP's `fc1` and `fc2`, and `skip_linear`: nearly all of the work. Left
    alone are first and last layers (`patch_embed`, `out`, the projection head), which set the quality of what enters
    and leaves, `adaLN_modulation`, whose products have a row per image only, and `encoder_to_decoder`, which is one.
    backend: of `linear_fp8_dynamic`; tests take "reference".
    Raises ValueError when no linear has sides that are multiples of 16.
    """
    converted, odd = 0, Counter()
    for name, linear in network.large_linears():
        if type(linear) is not nn.Linear:
            raise ValueError(f"fp8: got a {type(linear).__name__} in the place of {name}, wanted a plain Linear")
        if not fits(linear.weight):
            odd[f"{name.rpartition('.')[2]} {linear.in_features} to {linear.out_features}"] += 1
            continue
        linear.__class__, linear.backend = Fp8Linear, backend
        converted += 1
    sides = ", ".join(f"{count} x {what}" for what, count in odd.items())
    if not converted:
        raise ValueError(f"fp8: got widths that are no multiples of 16 ({sides}); leave out --fp8")
    others = sum(type(module) is nn.Linear for module in network.modules()) - odd.total()
    line = f"fp8: {converted} linears of the blocks, with a scale per row; in 16 bits: gradients of weights, "
    return line + (f"{sides} (no multiples of 16), " if odd else "") + f"{others} other linears (small, first or last)"
