"""Linear, gate and residual: the CUDA kernel against torch.compile of the reference and against eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, compare, shapes
from epg_fast.ops.linear_gate_residual import SPEC, linear_gate_residual, linear_gate_residual_ref


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, k, n = shape

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    return [
        randn(batch, tokens, n),
        randn(batch, n),
        randn(batch, tokens, k),
        randn(n, k, scale=k**-0.5),
        randn(n),
    ]


@pytest.mark.parametrize("provider", ["cuda", "compile", "eager"])
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((1, 66, 768, 768),))
def test_linear_gate_residual(measure, device, shape, dtype, direction, provider):
    compare(
        measure,
        SPEC,
        functools.partial(linear_gate_residual, backend="cuda"),
        linear_gate_residual_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
    )
