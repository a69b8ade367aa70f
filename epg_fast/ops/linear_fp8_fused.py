"""`linear_fp8` with what comes before and after it in one kernel: a concatenation, GELU, a gated residual, rounding.

    z = concat[x, skip] @ weight^T + bias        of dequantised x, skip and weight; without a skip, of x
    y = residual + gate * act(z)                 act: GELU or the identity; gate left out: 1; residual left out: 0
    rows = y / row_scale                         row_scale = max |y| / 448 over each row and 128 of its columns
    largest = max |y| over the same

Source: scales for 128 columns of a row are those of DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 3.3. A
program that computes 128 columns of a product knows them, so that the next product reads FP8 without a pass of its own.

Shapes: x: [..., D]; skip: [..., E]; weight: [N, D + E], x's columns first; weight_scale, bias: [N]; x_scale: [...], one
for each row, or [T, ...], one for each row and 128 columns, T = D / 128 rounded up; likewise skip_scale; residual:
[B, L, N], with x [B, L, D]; gate: [B, N] or [B, 1, N]; y, rows: [..., N]; row_scale, largest: [T, ...] of N columns.
Dtypes: x, skip, weight and rows float8_e4m3fn, scales float32; bias, residual and gate any floating dtype; y has
residual's dtype, or bias's. Products are accumulated, and everything after them is computed, in float32; tensor cores
keep only the sums of 128 products. The reference multiplies in float32, or in float64 where the scales have it.
Error: of y at most 2x that of the reference in the same dtypes. row_scale as the reference's, up to float32's rounding;
which moves a value by one FP8 number at most, where it lies between two.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import accumulation_dtype, check_backend, refuse_gradient, require_triton
from epg_fast.ops.checks import check_dtype, check_floating, check_shapes
from epg_fast.ops.quantize_rows import per_sample, quantize_rows_ref
from epg_fast.ops.registration import operation
from epg_fast.ops.spec import OpSpec, of_tokens

_OP = "linear_fp8_fused"
COLUMNS = 128
"""That share a scale, where it is not that of a row."""


def linear_fp8_fused_ref(
    x, x_scale, weight, weight_scale, bias, skip=None, skip_scale=None, gelu=False, residual=None, gate=None,
    returns="y",
):  # fmt: skip
    """`linear_fp8_fused` in plain PyTorch, on dequantised operands."""
    operands = x, x_scale, weight, weight_scale, bias, skip, skip_scale
    return _wanted(_forward(*operands, gelu, residual, per_sample(gate), returns), returns)


def _forward(x, x_scale, weight, weight_scale, bias, skip, skip_scale, gelu: bool, residual, gate, returns: str):
    """(y, rows, row_scale or largest), None for what is not asked for."""
    operand = _dequantised(x, x_scale)
    if skip is not None:
        operand = torch.cat([operand, _dequantised(skip, skip_scale)], -1)
    weight = weight.to(operand.dtype) * weight_scale.to(operand.dtype).unsqueeze(-1)
    y = F.linear(operand, weight, bias.to(operand.dtype))
    y = F.gelu(y) if gelu else y
    if gate is not None:
        y = y * gate.unsqueeze(1).to(y.dtype)
    if residual is not None:
        y = y + residual.to(y.dtype)
    rows = row_scale = None
    if returns != "y":
        parts = F.pad(y, (0, -y.shape[-1] % COLUMNS)).unflatten(-1, (-1, COLUMNS))
        rows, row_scale = (None, parts.abs().amax(-1)) if returns == "largest" else quantize_rows_ref(parts)
        rows = None if rows is None else rows.flatten(-2)[..., : y.shape[-1]].contiguous()
        row_scale = row_scale.movedim(-1, 0).contiguous()
    dtype = bias.dtype if residual is None else residual.dtype
    return None if returns == "rows" else y.to(dtype), rows, row_scale


def _dequantised(x, scale):
    dtype = accumulation_dtype(scale)
    if scale.dim() < x.dim():
        return x.to(dtype) * scale.unsqueeze(-1)
    return x.to(dtype) * scale.movedim(0, -1).repeat_interleave(COLUMNS, -1)[..., : x.shape[-1]]


_operation = operation(_OP, _forward, "epg_kernels.linear_fp8_fused:linear_fp8_fused", "y rows row_scale")


def linear_fp8_fused(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    skip: torch.Tensor | None = None,
    skip_scale: torch.Tensor | None = None,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    returns: str = "y",
    backend: str = "plain",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """residual + gate * act(concat[x, skip] @ weight^T + bias) of FP8 operands, in FP8 if wanted.

    x: [..., D], skip: [..., E] or None, weight: [N, D + E] in float8_e4m3fn; x_scale: [...] or [T, ...], likewise
    skip_scale; weight_scale, bias: [N]; residual: [B, L, N]; gate: [B, N] or [B, 1, N]. returns: "y" ([..., N] in
    residual's dtype, or bias's), "rows" ((rows, row_scale) of y in FP8), "both" (y, rows, row_scale) or "largest"
    (y, largest).
    backend: "plain" (plain PyTorch on dequantised operands), "triton" (one kernel). There is no gradient.
    Raises ValueError for shapes and dtypes that do not fit, for a tensor that requires a gradient and for a backend
    that cannot run here.
    """
    check_backend(_OP, backend, ("plain", "triton"))
    given = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale, "bias": bias}
    given |= {"skip": skip, "skip_scale": skip_scale, "residual": residual, "gate": gate}
    _check(**given, returns=returns)
    refuse_gradient(_OP, *given.values())
    if backend == "plain":
        return linear_fp8_fused_ref(**given, gelu=gelu, returns=returns)
    operands = x, x_scale, weight, weight_scale, skip, skip_scale
    require_triton(_OP, *operands, fp8=True, bias=bias, residual=residual, gate=gate)
    operands = x, x_scale, weight, weight_scale, bias, skip, skip_scale
    return _wanted(_operation(*operands, gelu, residual, per_sample(gate), returns), returns)


def _wanted(made: tuple, returns: str):
    kept = tuple(result for result in made if result is not None)
    return kept[0] if returns == "y" else kept


def _check(x, x_scale, weight, weight_scale, bias, skip, skip_scale, residual, gate, returns) -> None:
    if returns not in ("y", "rows", "both", "largest"):
        raise ValueError(f"{_OP}: got returns={returns!r}, wanted y, rows, both or largest")
    if (skip is None) != (skip_scale is None) or (gate is not None and residual is None):
        raise ValueError(
            f"{_OP}: got a skip, a scale or a gate alone, wanted a skip with its scale, a gate on a residual"
        )
    check_fp8_linear(_OP, x, x_scale, weight, weight_scale, bias, "|T", skip=skip, skip_scale=skip_scale)
    check_floating(_OP, residual=residual, gate=gate)
    rows = _letters(x)
    sizes = dict(zip(rows, x.shape, strict=False)) | {"N": weight.shape[0]}
    check_shapes(_OP, sizes, residual=(residual, f"{rows}N"), gate=(gate, f"{rows[0]}N|{rows[0]}1N"))


def _letters(x: torch.Tensor) -> str:
    """Of all dimensions but the last."""
    return "abcdefgh"[: x.dim() - 1]


def require_linear_shapes(op: str, x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None) -> None:
    """Raise ValueError unless x is [..., K], with the columns of a skip, and weight [N, K]."""
    columns = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if x.dim() < 2 or weight.dim() != 2 or columns != weight.shape[1]:
        behind = "" if skip is None else f", skip of shape {tuple(skip.shape)}"
        raise ValueError(
            f"{op}: got x of shape {tuple(x.shape)}{behind} and weight of shape {tuple(weight.shape)}, wanted [..., K] "
            "and [N, K] with the same K; weight is that of a Linear, one row per output"
        )


def check_fp8_linear(op: str, x, x_scale, weight, weight_scale, bias, parts="", skip=None, skip_scale=None) -> None:
    """Raise ValueError for operands that do not fit. parts: "|T", where scales may be those of 128 columns."""
    require_linear_shapes(op, x, weight, skip)
    skips, skip_scales = ({}, {}) if skip is None else ({"skip": skip}, {"skip_scale": skip_scale})
    quantise = "quantise it row by row, as quantize_rows does"
    check_dtype(op, torch.float8_e4m3fn, quantise, x=x, weight=weight, **skips)
    check_dtype(op, torch.float32, "convert it", x_scale=x_scale, weight_scale=weight_scale, **skip_scales)
    check_floating(op, bias=bias)
    rows = _letters(x)
    scales, sizes = rows + (parts and parts + rows), dict(zip(rows, x.shape, strict=False)) | {"N": weight.shape[0]}
    check_shapes(op, sizes | {"T": _scales(x.shape[-1])}, x_scale=(x_scale, scales))
    check_shapes(op, sizes, weight_scale=(weight_scale, "N"), bias=(bias, "N"))
    if skip is not None:
        check_shapes(op, sizes, skip=(skip, f"{rows}E"))
        check_shapes(op, sizes | {"T": _scales(skip.shape[-1])}, skip_scale=(skip_scale, scales))


def _bytes(shape: tuple[int, int, int, int, int], itemsize: int) -> int:
    """Of all at once: read x, skip, weight, their scales, bias, gate and residual; write y, its rows and their scales.

    x has a scale for every 128 columns, a skip one.
    """
    batch, tokens, width, skip, n = shape
    rows = batch * tokens
    read = (rows + n) * (width + skip) + 4 * (n + rows * (_scales(width) + (skip > 0)))
    return read + (1 + batch + 2 * rows) * n * itemsize + rows * (n + 4 * _scales(n))


def _scales(columns: int) -> int:
    return -(-columns // COLUMNS)


SPEC = OpSpec(
    name=_OP,
    shapes=of_tokens((6336, 0, 1584), (1584, 768, 1584), (3072, 0, 768), (10_752, 0, 2688), (1920, 768, 1920)),
    odd_shapes=((3, 17, 144, 48, 208), (1, 130, 48, 0, 136), (2, 5, 272, 16, 48)),
    bytes=_bytes,
    multiply_adds=lambda batch, tokens, width, skip, n: batch * tokens * (width + skip) * n,
)
"""Of (B, L, D, E, N), without a skip where E is 0."""
