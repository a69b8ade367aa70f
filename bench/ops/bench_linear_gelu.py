"""Linear + GELU: the Triton and the CUDA kernel against torch.compile of the reference and against eager PyTorch.

The product alone, without GELU, is what cuBLAS could reach if GELU were free.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.linear_gelu import SPEC, linear_gelu, linear_gelu_ref

_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
_SHAPES = shapes(SPEC, on_cpu=((66, 768, 3072),))


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    rows, k, n = shape

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    return [randn(rows, k), randn(n, k, scale=k**-0.5), randn(n)]


@pytest.mark.parametrize("provider", [*PROVIDERS, "cuda"])
@DIRECTIONS
@_DTYPES
@_SHAPES
def test_linear_gelu(measure, device, shape, dtype, direction, provider):
    if provider == "cuda" and dtype != torch.bfloat16:
        pytest.skip("cuda: takes bfloat16 alone")
    compare(
        measure,
        SPEC,
        functools.partial(linear_gelu, backend="triton"),
        linear_gelu_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
        libraries={"cuda": functools.partial(linear_gelu, backend="cuda")},
    )


@_DTYPES
@_SHAPES
def test_linear_alone(measure, device, shape, dtype):
    def linear(*inputs):
        with torch.no_grad():
            return F.linear(*inputs)

    measure(
        linear,
        functools.partial(_inputs, shape, dtype, device),
        SPEC.bytes(shape, dtype.itemsize),
        SPEC.flops(shape),
        op="linear_gelu",
        shape=list(shape),
        dtype=str(dtype),
        direction="forward",
        provider="cublas without GELU",
    )
