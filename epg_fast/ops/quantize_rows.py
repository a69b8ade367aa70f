"""Rows in float8_e4m3fn with a scale each, for matrix products in FP8, of what a product, or attention, has returned.

    z = x + gate * branch                       only with a branch; gate left out: 1
    z = gelu(z) = z Phi(z)                      only if wanted; Phi: the normal distribution function
    z = concat[z, skip]                         only with a skip
    rows = z / row_scale,  row_scale = max |z| / 448 over each row

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), with a scale per row.

Dtypes: any floating dtypes, mixed freely; rows in float8_e4m3fn. Arithmetic and row_scale are float32 (float64 when x
is float64); a sum with a branch is rounded to x's dtype, as `gate_residual_norm_modulate` does.
Error: row_scale as the reference's, up to float32's rounding; which moves a value by one FP8 number at most, where it
lies between two. A row whose largest value is below 1e-30 is zero. One with values that are not finite has NaN in it.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import accumulation_dtype, check_backend, refuse_gradient, require_at_most, require_triton
from epg_fast.ops.checks import check_floating, check_shapes
from epg_fast.ops.registration import operation
from epg_fast.ops.spec import OpSpec, of_tokens

_OP = "quantize_rows"
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_FP8_TINY = 1e-30  # the scale of a smaller row would leave float32's normal numbers
_MAX_TRITON_WIDTH = 16_384


def quantize_rows_ref(x, branch=None, gate=None, skip=None, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` in plain PyTorch, for any x of rows [..., D]."""
    z = gated_sum_ref(x, branch, gate).to(accumulation_dtype(x))
    z = F.gelu(z) if gelu else z
    z = z if skip is None else torch.cat([z, skip.to(z.dtype)], -1)
    row_scale = scale_of(z.abs().amax(-1))
    return (z / row_scale.unsqueeze(-1)).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), row_scale


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """The scale of rows with these largest values."""
    return torch.where(largest > _FP8_TINY, largest / _FP8_MAX, 1.0)


def gated_sum_ref(x: torch.Tensor, branch: torch.Tensor | None, gate: torch.Tensor | None) -> torch.Tensor:
    """x + gate * branch, rounded once, to x's dtype; x without a branch."""
    if branch is None:
        return x
    branch = branch.to(accumulation_dtype(x))
    if gate is not None:
        branch = branch * per_sample(gate).unsqueeze(1).to(branch.dtype)
    return (x.to(branch.dtype) + branch).to(x.dtype)


def per_sample(modulation: torch.Tensor | None) -> torch.Tensor | None:
    """[B, 1, D] as [B, D]."""
    return modulation.squeeze(1) if modulation is not None and modulation.dim() == 3 else modulation


_operation = operation(_OP, quantize_rows_ref, "epg_kernels.quantize_rows:quantize_rows_fwd", "rows row_scale")


def quantize_rows(
    x: torch.Tensor,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    gelu: bool = False,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows in float8_e4m3fn [B, L, D + E], row_scale [B, L]) of concat[gelu(x + gate * branch), skip].

    x, branch: [B, L, D]; gate: [B, D], [B, 1, D] or None; skip: [B, L, E]; each but x may be left out, as may the GELU,
    which is the exact one.
    backend: "plain" (plain PyTorch, which torch.compile fuses with its neighbours), "triton" (one kernel, which reads
    and writes everything once).
    Raises ValueError for shapes that do not fit, for a tensor that requires a gradient and for a backend that cannot
    run here.
    """
    check_backend(_OP, backend, ("plain", "triton"))
    _check(x, branch, gate, skip)
    refuse_gradient(_OP, x, branch, gate, skip)
    if backend != "triton":
        return quantize_rows_ref(x, branch, gate, skip, gelu)
    require_triton(_OP, x, branch, gate, skip, batched=True, fp8=True)
    for name, tensor in (("x", x), ("skip", skip)):
        if tensor is not None:
            require_at_most(_OP, _MAX_TRITON_WIDTH, f"{name} of width ", tensor.shape[-1])
    return _operation(x, branch, per_sample(gate), skip, gelu)


def _check(x, branch, gate, skip) -> None:
    if gate is not None and branch is None:
        raise ValueError(f"{_OP}: got a gate and no branch, wanted both, or no gate")
    check_shapes(_OP, {}, x=(x, "BLD"), branch=(branch, "BLD"), gate=(gate, "BD|B1D"), skip=(skip, "BLE"))
    check_floating(_OP, x=x, branch=branch, gate=gate, skip=skip)


def _bytes(shape: tuple[int, int, int, int], itemsize: int) -> int:
    """Read x and, with a skip, a gated branch and the skip; write rows of a byte per value and their scales."""
    batch, tokens, width, skip = shape
    rows = batch * tokens
    read = rows * (width + skip) + (batch + rows) * width * (skip > 0)
    return read * itemsize + rows * (width + skip) + 4 * rows


SPEC = OpSpec(
    name=_OP,
    shapes=of_tokens((6336, 0), (1584, 768), (3072, 0), (10_752, 0), (1920, 768)),
    odd_shapes=((3, 17, 40, 24), (1, 258, 40, 0), (1, 17, 768, 0), (2, 3, 1584, 768)),
    bytes=_bytes,
)
"""Of (B, L, D, E): with a skip of width E and a gated branch, or without both and with GELU where E is 0."""
