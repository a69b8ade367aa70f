"""Linear layer on FP8 operands with a scale per row, optionally followed by GELU; for inference.

    z = (x * x_scale) @ (weight * weight_scale)^T + bias
    y = z, or gelu(z) = z Phi(z)                    Phi: the normal distribution function, not its tanh approximation

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); scales per row of both operands, as
`layer_norm_modulate_fp8` and `gate_residual_norm_modulate_fp8` return them.

Dtypes: x and weight float8_e4m3fn (`linear_fp8_ref`: any floating dtype); scales float32; y has the dtype of bias,
bfloat16 for the backends "cuda" and "scaled_mm". K is a multiple of 16 and N of 8 there (of 16 for "scaled_mm"). The
reference multiplies in float32, or in float64 where the scales have it.
Error: at most 2x that of the reference in the same dtypes, which is the rounding of y. For that, "cuda" leaves only the
sums of 128 products to the tensor cores, which keep fewer bits of them than float32 has, and adds these in float32.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import check_backend, refuse_gradient, require_dtypes, require_gemm_operands
from epg_fast.ops.extension import require_gemms
from epg_fast.ops.fp8 import require_row_scales, scaled_mm
from epg_fast.ops.linear_fp8_fused import check_fp8_linear, linear_fp8_fused_ref
from epg_fast.ops.registration import operation
from epg_fast.ops.spec import OpSpec, of_rows

_OP = "linear_fp8"


def linear_fp8_ref(x, x_scale, weight, weight_scale, bias, gelu: bool = False) -> torch.Tensor:
    """`linear_fp8` in plain PyTorch, on dequantised operands."""
    return linear_fp8_fused_ref(x, x_scale, weight, weight_scale, bias, gelu=gelu)


def _forward_cuda(x, x_scale, weight, weight_scale, bias, gelu):
    y = bias.new_empty((*x.shape[:-1], weight.shape[0]))
    torch.ops.epg_fast.linear_fp8_out(
        y, x, x_scale.contiguous(), weight, weight_scale.contiguous(), bias.contiguous(), gelu
    )
    return y


_operation = operation(_OP, linear_fp8_ref, _forward_cuda, "y", in_triton=False)


def linear_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    gelu: bool = False,
    backend: str = "plain",
) -> torch.Tensor:
    """(x * x_scale) @ (weight * weight_scale)^T + bias, then exact GELU if asked for.

    x: [..., K] and weight: [N, K] in float8_e4m3fn; x_scale: [...] and weight_scale: [N] in float32; bias: [N]. Returns
    [..., N] in the dtype of bias.
    backend: "plain" (plain PyTorch on dequantised operands), "cuda" (one kernel of the C++/CUDA extension, for
    compute capability 9.0), "scaled_mm" (PyTorch's FP8 product, then GELU). There is no gradient.
    Raises ValueError for shapes and dtypes that do not fit, for a tensor that requires a gradient and for a backend
    that cannot run here.
    """
    check_backend(_OP, backend, ("plain", "cuda", "scaled_mm"))
    check_fp8_linear(_OP, x, x_scale, weight, weight_scale, bias)
    refuse_gradient(_OP, x_scale, weight_scale, bias)
    if backend == "cuda":
        require_dtypes(_OP, (torch.bfloat16,), "cuda", bias=bias)
        others = {"x_scale": x_scale, "weight_scale": weight_scale, "bias": bias}
        require_gemm_operands(_OP, weight.shape[0], {"x": x, "weight": weight}, others)
        require_gemms(_OP, x.device)
        return _operation(x, x_scale, weight, weight_scale, bias, gelu)
    if backend == "scaled_mm":
        return _scaled_mm(x, x_scale, weight, weight_scale, bias, gelu)
    return linear_fp8_ref(x, x_scale, weight, weight_scale, bias, gelu)


def _scaled_mm(x, x_scale, weight, weight_scale, bias, gelu) -> torch.Tensor:
    require_dtypes(_OP, (torch.bfloat16,), "scaled_mm", bias=bias)
    for name, size in (("K", weight.shape[1]), ("N", weight.shape[0])):
        if size % 16:
            raise ValueError(
                f"{_OP}: got {name}={size}, wanted a multiple of 16 for backend='scaled_mm'; pad it or use "
                "backend='plain'"
            )
    compiling = torch.compiler.is_compiling()
    if not compiling and x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        raise ValueError(
            f"{_OP}: got {torch.cuda.get_device_name(x.device)}, wanted a GPU of compute capability 9.0 or more for "
            "backend='scaled_mm'; use backend='plain'"
        )
    require_row_scales(_OP, x.device)
    z = scaled_mm(x.flatten(0, -2).contiguous(), x_scale, weight.contiguous(), weight_scale, bias, bias.dtype)
    z = z.view(*x.shape[:-1], weight.shape[0])
    return F.gelu(z) if gelu else z


def _bytes(shape: tuple[int, int, int], itemsize: int) -> int:
    """Read x and weight, of one byte per value, their scales and bias, and write y, of `itemsize` bytes per value."""
    rows, k, n = shape
    return rows * k + n * k + 4 * (rows + n) + (rows + 1) * n * itemsize


SPEC = OpSpec(
    name=_OP,
    shapes=of_rows((1584, 6336), (1584, 4752), (6336, 1584), (768, 3072), (1024, 4096)),
    odd_shapes=((5, 48, 24), (129, 144, 136), (1, 16, 8), (300, 1584, 72)),
    bytes=_bytes,
    multiply_adds=lambda rows, k, n: rows * k * n,
)
