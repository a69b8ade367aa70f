"""The MLP of a block, GELU and the gated residual in its products' epilogues; its backward pass."""

import torch
import triton
import triton.language as tl

from epg_kernels._column_sums import sum_partial_sums
from epg_kernels._launch import strides, unit_stride, weight_gradient
from epg_kernels._matmul import linear, linear_dgelu, rows_of

TOKENS = 32  # of one image, that one program walks over: 258 tokens are nine of them
ROWS = 8  # of those, loaded at a time
COLUMNS = 256  # with ROWS rows of bfloat16, two 16-byte accesses in each of 128 threads


@triton.jit
def _residual_bwd_kernel(
    dout, branch, gate, dbranch, gate_sums, bias_sums, tokens,
    stride_dout_batch, stride_dout_token, stride_gate,
    D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dbranch = gate * dout, in its dtype; sums over TOKENS tokens of dbranch and of dout * branch, in float32."""
    chunk, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < D
    if gate is not None:
        opening = tl.load(gate + batch * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        sum_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, TOKENS, ROWS):
        token = chunk * TOKENS + first + tl.arange(0, ROWS)[:, None]
        mask = (token < tokens) & inside
        offsets = (batch * tokens + token) * D + columns
        grad = dout + batch * stride_dout_batch + token * stride_dout_token + columns
        grad = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            sum_gate += grad * tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)
            grad *= opening
        sum_bias += grad
        tl.store(dbranch + offsets, grad.to(dbranch.dtype.element_ty), mask=mask)
    out = (batch * tl.num_programs(1) + chunk) * D + columns
    tl.store(bias_sums + out, tl.sum(sum_bias, 0, keep_dims=True), mask=inside)
    if gate is not None:
        tl.store(gate_sums + out, tl.sum(sum_gate, 0, keep_dims=True), mask=inside)


def mlp_residual_fwd(
    x, y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate, save: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(x_out, z, gelu(z), the branch that a gate scales), the last three None unless `save`."""
    h, z = linear(y, None, fc1_weight, fc1_bias, gelu=True, save_preactivation=save)
    saving = save and gate is not None
    out, branch = linear(h, None, fc2_weight, fc2_bias, residual=x, gate=gate, tokens=x.shape[1], save_branch=saving)
    return out, z, h if save else None, branch


def mlp_residual_bwd(
    dout, y, z, h, branch, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate, weight_dtype, product=linear_dgelu
) -> tuple[torch.Tensor | None, ...]:
    """(dy, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dgate), of weights in weight_dtype; x has dout itself.

    product: `linear_dgelu` or what does the same.
    """
    dbranch, dfc2_bias, dgate = residual_bwd(dout, branch, gate, z.dtype, fc2_bias.dtype)
    dz, dfc1_bias = product(dbranch, fc2_weight, z)
    dz, dbranch = rows_of(dz), rows_of(dbranch)
    # Nothing is left to fuse into these products, and cuBLAS sets their ceiling.
    dy = torch.mm(dz, fc1_weight).view(y.shape)
    dfc1_weight = weight_gradient(dz, rows_of(y), weight_dtype)
    dfc2_weight = weight_gradient(dbranch, rows_of(h), weight_dtype)
    return dy, dfc1_weight, dfc1_bias.to(fc1_bias.dtype), dfc2_weight, dfc2_bias, dgate


def residual_bwd(
    dout, branch, gate, dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(gate * dout in `dtype`, its sum over images and tokens, the gradient of the gate, None without one)."""
    batch, tokens, width = dout.shape
    dout, gate = map(unit_stride, (dout, gate))
    dbranch = torch.empty(dout.shape, dtype=dtype, device=dout.device)
    chunks = triton.cdiv(tokens, TOKENS)
    bias_sums = torch.empty((batch, chunks, width), dtype=torch.float32, device=dout.device)
    gate_sums = None if gate is None else torch.empty_like(bias_sums)
    with torch.cuda.device_of(dout):
        _residual_bwd_kernel[(triton.cdiv(width, COLUMNS), chunks, batch)](
            dout, None if gate is None else branch.contiguous(), gate, dbranch, gate_sums, bias_sums, tokens,
            *strides(dout, 2), *strides(gate),
            D=width, TOKENS=TOKENS, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    dbias = sum_partial_sums(bias_sums.view(-1, width), bias_dtype)
    return dbranch, dbias, None if gate is None else gate_sums.sum(1, dtype=torch.float32).to(gate.dtype)
