"""Linear, gate, residual and norm: the Triton and CUDA kernels against torch.compile and eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.linear_residual_norm import SPEC, linear_residual_norm, linear_residual_norm_ref


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, k, n = shape

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    vectors = [randn(n) for _ in range(3)]
    images = [randn(batch, n) for _ in range(3)]
    return [randn(batch, tokens, n), randn(batch, tokens, k), randn(n, k, scale=k**-0.5), *vectors, *images]


@pytest.mark.parametrize("provider", [*PROVIDERS, "cuda"])
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((1, 66, 768, 768),))
def test_linear_residual_norm(measure, device, shape, dtype, direction, provider):
    compare(
        measure,
        SPEC,
        functools.partial(linear_residual_norm, backend="triton"),
        linear_residual_norm_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
        libraries={"cuda": functools.partial(linear_residual_norm, backend="cuda")},
    )
