"""Products of FP8 operands, of a concatenation, with GELU or onto a gated residual, into 16 bits, FP8 or both."""

import torch
import triton

from epg_kernels._matmul import BY_TMA_FP8, launch_linear


def linear_fp8_fused(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    skip=None,
    skip_scale=None,
    gelu=False,
    residual=None,
    gate=None,
    returns="y",
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(y, rows, row_scale or largest) of `epg_fast.ops.linear_fp8_fused`, None for what is not asked for."""
    shape, dtype = (*x.shape[:-1], weight.shape[0]), (bias if residual is None else residual).dtype
    scales = triton.cdiv(shape[-1], BY_TMA_FP8.block_n), *shape[:-1]
    y = None if returns == "rows" else torch.empty(shape, dtype=dtype, device=x.device)
    y_fp8 = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device) if returns in ("rows", "both") else None
    y_scale = None if returns == "y" else torch.empty(scales, dtype=torch.float32, device=x.device)
    tokens = None if gate is None else x.shape[1]
    matrices = {"x": x, "skip": skip, "weight": weight, "residual": residual, "y": y, "y_fp8": y_fp8}
    scales = {"x_scale": x_scale, "skip_scale": skip_scale, "weight_scale": weight_scale, "y_scale": y_scale}
    launch_linear(matrices, bias, gate, gelu, tokens, scales)
    return y, y_fp8, y_scale
