"""Products of FP8 operands, of a concatenation, with GELU or onto a gated residual, into 16 bits, FP8 or both."""

import torch
import triton

from epg_kernels import AotCase
from epg_kernels._matmul import (
    BY_POINTERS_FP8,
    BY_TMA_FP8,
    Config,
    constexprs_of,
    launch_linear,
    linear_fwd_kernel,
    product_case,
)
from epg_kernels._quantize import FP8_MAX


def linear_fp8_fused(
    x, x_scale, weight, weight_scale, bias, skip=None, skip_scale=None, gelu=False, residual=None, gate=None,
    dtype: torch.dtype = torch.bfloat16, returns: str = "y",
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Returns y = residual + gate * act(z) of FP8 operands in `dtype`, itself in FP8 and the scales of that.

    What is not asked for is None; see `epg_fast.ops.linear_fp8_fused`. If it is "largest" that is in place of scales.

    x: [..., D]; x_scale: [...], or one for every 128 columns [T, ...]; likewise skip [..., E] and skip_scale; weight:
    [N, D + E]; weight_scale, bias: [N]; residual: [B, L, N]; gate: [B, N].
    """
    shape = *x.shape[:-1], weight.shape[0]
    scales = triton.cdiv(shape[-1], BY_TMA_FP8.block_n), *shape[:-1]
    y = None if returns == "rows" else torch.empty(shape, dtype=dtype, device=x.device)
    y_fp8 = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device) if returns in ("rows", "both") else None
    y_scale = None if returns == "y" else torch.empty(scales, dtype=torch.float32, device=x.device)
    tokens = None if gate is None else x.shape[1]
    matrices = {"x": x, "skip": skip, "weight": weight, "residual": residual, "y": y, "y_fp8": y_fp8}
    scales = {"x_scale": x_scale, "skip_scale": skip_scale, "weight_scale": weight_scale, "y_scale": y_scale}
    launch_linear(matrices, bias, gate, gelu, tokens, scales)
    return y, y_fp8, y_scale


def aot_cases() -> list[AotCase]:
    """What blocks of XL ask for, the widest product and a GPU without TMA."""
    on_bf16 = {"residual": "bf16", "rows": True}
    return [
        _case(BY_TMA_FP8, 2304, 768, largest=True),
        _case(BY_TMA_FP8, 4752, 1584, largest=True),
        _case(BY_TMA_FP8, 3072, 768, gelu=True, rows=True),
        _case(BY_TMA_FP8, 6336, 1584, gelu=True, rows=True),
        _case(BY_TMA_FP8, 768, 768, residual="bf16"),
        _case(BY_TMA_FP8, 768, 3072, scales=24, **on_bf16),
        _case(BY_TMA_FP8, 1584, 1584, residual="bf16", tokens=258),
        _case(BY_TMA_FP8, 1584, 6336, scales=50, tokens=258, **on_bf16),
        _case(BY_TMA_FP8, 1584, 1584, 768, scales=13),
        _case(BY_TMA_FP8, 2688, 10752, scales=84, tokens=258, **on_bf16),
        _case(BY_POINTERS_FP8, 1584, 6336, scales=50, tokens=258, **on_bf16),
    ]


def _case(
    config: Config, columns: int, x_width: int, skip_width: int = 0, scales: int = 1, gelu=False,
    residual: str | None = None, tokens: int | None = None, rows=False, largest=False,
) -> AotCase:  # fmt: skip
    """scales: of a row of x; residual: its dtype, if there is one, which is y's, too; rows: in FP8, as a second result.

    Without a residual there are rows in the place of y, or y in bfloat16.
    """
    dtypes = {"x": "fp8e4nv", "weight": "fp8e4nv"} | ({"skip": "fp8e4nv"} if skip_width else {})
    dtypes |= {"residual": residual} if residual else {}
    dtypes |= {"y": residual or "bf16"} if residual or not rows else {}
    dtypes |= {"y_fp8": "fp8e4nv"} if rows else {}
    vectors = {"bias": "bf16", "x_scale": "fp32", "weight_scale": "fp32"} | ({"gate": "bf16"} if tokens else {})
    vectors |= ({"skip_scale": "fp32"} if skip_width else {}) | ({"y_scale": "fp32"} if rows or largest else {})
    widths = f"{x_width}+{skip_width}" if skip_width else x_width
    extras = (
        " gelu" * gelu
        + f" on {residual}" * bool(residual)
        + f" gate/{tokens}" * bool(tokens)
        + " rows" * rows
        + " largest" * largest
    )
    constants = {"D": x_width, "E": skip_width, "TOKENS": tokens, "GELU": gelu, "EXACT": False, "FP8_MAX": FP8_MAX}
    constants |= {"EPS": None, "PARTS_X": 1, "BLOCK_PARTS_X": 1, "DEPENDENT": False}  # no norm
    constants |= {"SCALES_X": scales, "SCALES_SKIP": triton.cdiv(skip_width, config.block_k)}
    constants |= constexprs_of(config, columns, "tf32")
    shape = f"K={widths}{f'/{scales}' if scales > 1 else ''} N={columns}"
    return product_case(linear_fwd_kernel, config, dtypes, vectors, constants, shape, extras, archs=(90, 100))
