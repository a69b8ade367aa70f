"""The second half of a block: the MLP, gated, on the residual.

    z = y @ fc1_weight^T + fc1_bias
    x_out = x + gate * (gelu(z) @ fc2_weight^T + fc2_bias)        gate left out: 1; gelu is the exact one, z Phi(z)

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero blocks; Hendrycks & Gimpel,
"Gaussian Error Linear Units" (2016). GELU, gate and residual ride in the epilogues of the products, and in the backward
pass the derivative of GELU and the sums of fc1's bias in that of the product with fc2's weight.

Dtypes: y float32, bfloat16 or float16 (float64: reference only), or under autocast its dtype; the weights are converted
to it. x and the others: any of these; x_out has x's dtype. Products are accumulated and everything after them is
computed in float32; gelu(z) and x_out are rounded once.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients. For 16-bit
results the kernels take 1 - Phi from a polynomial with a relative error of 1.5e-5.
Backend "cuda" takes the products that have an epilogue from the extension: y bfloat16, x and gate in y's dtype or
float32, y, x and the weights contiguous, K, H and D multiples of 8; biases are added in y's dtype. The rest of its
backward pass is that of "triton".

With g the gradient of x_out: dx = g, dr = gate * g, dgate = sum_l r * g with r what the gate scales, which is kept;
dz = (dr @ fc2_weight) gelu'(z), gelu'(z) = Phi(z) + z phi(z); the rest follows as for two linear layers.
"""

import math

import torch
import torch.nn.functional as F

from epg_fast.ops.backends import (
    autocast_dtype,
    check_backend,
    needs_gradient,
    product_operand,
    require_dtypes,
    require_triton,
)
from epg_fast.ops.checks import check_shapes
from epg_fast.ops.layer_norm_modulate import per_sample
from epg_fast.ops.linear_residual_norm import (
    check_linear,
    linear_residual_cuda,
    require_residual_product,
    residual_product_ref,
)
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec, of_tokens

_OP = "mlp_residual"
_TILE = 128, 256  # rows and columns for which the extension sums up at once; it checks them


def mlp_residual_ref(x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate=None) -> torch.Tensor:
    """`mlp_residual` in plain PyTorch."""
    h = F.gelu(F.linear(y, fc1_weight.to(y.dtype), fc1_bias.to(y.dtype)))
    return residual_product_ref(x, h, fc2_weight, fc2_bias, gate)[0]


def _forward(
    x, y, fc1_parameter, fc1_weight, fc1_bias, fc2_parameter, fc2_weight, fc2_bias, gate, save: bool, backend: str
):
    """(x_out, z, gelu(z), what the gate scales), the last three None unless they are kept for a backward pass.

    fc1_weight, fc2_weight: the parameters in y's dtype. Products read these, and the gradients of the parameters are
    written in their own dtype.
    """
    z = F.linear(y, fc1_weight, fc1_bias.to(y.dtype))
    h = F.gelu(z)
    x_out, branch = residual_product_ref(x, h, fc2_weight, fc2_bias, gate)
    return x_out, *((z, h, None if gate is None else branch) if save else (None,) * 3)


def _forward_kernel(x, y, _, fc1_weight, fc1_bias, __, fc2_weight, fc2_bias, gate, save, backend):
    if backend == "triton":
        from epg_kernels.mlp_residual import mlp_residual_fwd

        return mlp_residual_fwd(x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate, save)
    h = y.new_empty((*y.shape[:-1], fc1_weight.shape[0]))
    z = torch.empty_like(h) if save else None
    torch.ops.epg_fast.linear_gelu_out(h, z, y, fc1_weight, fc1_bias.to(y.dtype).contiguous())
    x_out, branch = linear_residual_cuda(x, h, fc2_weight, fc2_bias, gate, save and gate is not None)
    return x_out, z, h if save else None, branch


def _backward(
    dx_out, y, z, h, branch, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate, fc1_parameter_dtype: torch.dtype,
    backend: str,
):  # fmt: skip
    acc_dtype = torch.promote_types(z.dtype, torch.float32)
    g = dx_out.to(acc_dtype)
    dr = g if gate is None else g * gate.to(acc_dtype).unsqueeze(1)
    rows = dr.to(z.dtype).flatten(0, 1)
    dh = (rows @ fc2_weight).view(z.shape)
    dz = torch.ops.aten.gelu_backward(dh.to(acc_dtype), z.to(acc_dtype)).flatten(0, 1)
    dgate = None if gate is None else (g * branch.to(acc_dtype)).sum(1).to(gate.dtype)
    dfc1_bias, dfc2_bias = dz.sum(0).to(fc1_bias.dtype), dr.sum((0, 1)).to(fc2_bias.dtype)
    dz = dz.to(z.dtype)
    dfc1_weight, dfc2_weight = ((a.t() @ b.flatten(0, 1)).to(fc1_parameter_dtype) for a, b in ((dz, y), (rows, h)))
    return (dz @ fc1_weight).view(y.shape), dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dgate


def _backward_kernel(*arguments):
    from epg_kernels.mlp_residual import linear_dgelu, mlp_residual_bwd

    *arguments, backend = arguments
    return mlp_residual_bwd(*arguments, linear_dgelu if backend == "triton" else linear_dgelu_cuda)


def linear_dgelu_cuda(dy: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """((dy @ weight) * gelu'(z), the sums of its columns in float32) from the extension's product."""
    from epg_kernels._column_sums import sum_partial_sums

    dz, columns = torch.empty_like(z), z.shape[-1]
    tiles = math.ceil(z.numel() / columns / _TILE[0]), math.ceil(columns / _TILE[1]) * _TILE[1]
    sums = z.new_empty(tiles, dtype=torch.float32)
    torch.ops.epg_fast.linear_dgelu_out(dz, sums, dy, weight, z)
    return dz, sum_partial_sums(sums[:, :columns], torch.float32)


_operation = operation(
    _OP,
    _forward,
    _forward_kernel,
    "x_out z h branch",
    Backward(
        _backward,
        _backward_kernel,
        "y fc1_parameter fc1_bias fc2_parameter fc2_bias gate",
        others=lambda made, given: {"x": given["dx_out"]},
    ),
)


def mlp_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    gate: torch.Tensor | None = None,
    backend: str = "plain",
    operands: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """x + gate * (gelu(y @ fc1_weight^T + fc1_bias) @ fc2_weight^T + fc2_bias), with the exact GELU: [B, L, D].

    x: [B, L, D]; y: [B, L, K]; fc1_weight: [H, K]; fc1_bias: [H]; fc2_weight: [D, H]; fc2_bias: [D]; gate: [B, D],
    [B, 1, D] or None for ones.
    backend: "plain" (plain PyTorch), "triton" (two kernels forward; it keeps what the backward pass needs only
    where there will be one), "cuda" (the same two by the C++/CUDA extension, for compute capability 9.0). operands:
    copies of the weights in the dtype of products, which kernels read instead of casting them; "plain" leaves them.
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend(_OP, backend, ("plain", "triton", "cuda"))
    _check_shapes(x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate)
    dtype = autocast_dtype(y) or y.dtype
    y, gate = y.to(dtype), per_sample(gate)
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate
    if backend == "plain":
        return mlp_residual_ref(x, y, *parameters)
    if fc1_weight.dtype != fc2_weight.dtype:
        raise ValueError(
            f"{_OP}: got weights in {fc1_weight.dtype} and {fc2_weight.dtype}, wanted one dtype; convert one"
        )
    weights = zip((fc1_weight, fc2_weight), operands, strict=True)
    fc1, fc2 = ((weight, product_operand(_OP, weight, operand, dtype)) for weight, operand in weights)
    save, biases = needs_gradient(x, y, *parameters), {"fc1_bias": fc1_bias, "fc2_bias": fc2_bias}
    if backend == "cuda":
        require_dtypes(_OP, (torch.bfloat16,), "cuda", y=y)
        read = {"y": y, "fc1_weight": fc1[1], "fc2_weight": fc2[1]}
        require_residual_product(_OP, x, gate, read, biases)
    if backend == "triton" or save:
        floats = {"x": x, "y": y, **biases, "gate": gate}
        require_triton(_OP, fc1_weight, fc2_weight, backend=backend, batched=True, **floats)
    return _operation(x, y, *fc1, fc1_bias, *fc2, fc2_bias, gate, save, backend)[0]


def _check_shapes(x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate) -> None:
    hidden = y[..., :1].expand(*y.shape[:-1], fc1_weight.shape[0])
    check_linear(_OP, "y", y, hidden, fc1_weight, fc1_bias)
    check_linear(_OP, "gelu(z)", hidden, x, fc2_weight, fc2_bias)
    check_shapes(_OP, dict(zip("BLD", x.shape, strict=True)), gate=(gate, "BD|B1D"))


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """For K = D. Forward reads x, y, the weights and gelu(z), and writes gelu(z) and x_out; training writes z too.

    Backward reads dout and the branch and writes dr, reads dr twice, z, gelu(z), dz twice, y and the weights, and
    writes dz, dy and the weights' gradients.
    """
    batch, tokens, width, hidden = shape
    rows = batch * tokens
    x, z, weights = rows * width * itemsize, rows * hidden * itemsize, 2 * width * hidden * itemsize
    if backward:
        return 7 * x + 5 * z + 2 * weights
    return 3 * x + 2 * z + weights


SPEC = OpSpec(  # shapes: (B, L, D, H)
    name=_OP,
    shapes=of_tokens((1584, 6336), (768, 3072), (1024, 4096), (1920, 7680), (2688, 10752)),
    odd_shapes=((3, 17, 40, 24), (2, 70, 24, 264), (2, 18, 17, 9)),
    bytes=_bytes,
    multiply_adds=lambda batch, tokens, width, hidden: 2 * batch * tokens * width * hidden,
)
