"""The MLP on the residual: the Triton and CUDA kernels against torch.compile and eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.mlp_residual import SPEC, mlp_residual, mlp_residual_ref


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, width, hidden = shape

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    return [
        randn(batch, tokens, width),
        randn(batch, tokens, width),
        randn(hidden, width, scale=width**-0.5),
        randn(hidden),
        randn(width, hidden, scale=hidden**-0.5),
        randn(width),
        randn(batch, width),
    ]


@pytest.mark.parametrize("provider", [*PROVIDERS, "cuda"])
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((1, 66, 768, 3072),))
def test_mlp_residual(measure, device, shape, dtype, direction, provider):
    compare(
        measure,
        SPEC,
        functools.partial(mlp_residual, backend="triton"),
        mlp_residual_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
        libraries={"cuda": functools.partial(mlp_residual, backend="cuda")},
    )
