"""FP8 linear layer: the CUDA kernel against PyTorch's own FP8 product and against products in 16 bits.

The references dequantise the operands first; "16-bit linear" multiplies operands that never were in FP8.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.ops.compare import compare, shapes
from epg_fast.ops.linear_fp8 import SPEC, linear_fp8, linear_fp8_ref
from epg_fast.ops.quantize_rows import quantize_rows_ref

_SHAPES = shapes(SPEC, on_cpu=((66, 768, 3072),))
_GELU = pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])


def _inputs(shape, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    rows, k, n = shape
    x, weight, bias = (torch.randn(size, generator=generator, device=device) for size in ((rows, k), (n, k), (n,)))
    return [*quantize_rows_ref(x), *quantize_rows_ref(weight * k**-0.5), bias.bfloat16()]


@pytest.mark.parametrize("provider", ["cuda", "scaled_mm", "compile", "eager"])
@_GELU
@_SHAPES
def test_linear_fp8(measure, device, shape, gelu, provider):
    if provider == "scaled_mm" and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("scaled_mm: needs compute capability 9.0")
    compare(
        measure,
        SPEC,
        functools.partial(linear_fp8, gelu=gelu, backend="cuda"),
        functools.partial(linear_fp8_ref, gelu=gelu),
        functools.partial(_inputs, shape, device),
        shape=shape,
        dtype=torch.bfloat16,
        direction="forward",
        provider=provider,
        libraries={"scaled_mm": functools.partial(linear_fp8, gelu=gelu, backend="scaled_mm")},
        gelu=gelu,
    )


@_GELU
@_SHAPES
def test_linear_in_16_bits(measure, device, shape, gelu):
    def linear(x, x_scale, weight, weight_scale, bias):
        z = F.linear(x, weight, bias)
        return F.gelu(z) if gelu else z

    def inputs(seed):
        return [tensor.bfloat16() for tensor in _inputs(shape, device, seed)]

    rows, k, n = shape
    measure(
        linear,
        inputs,
        2 * (rows * k + n * k + (rows + 1) * n),
        SPEC.flops(shape),
        op=SPEC.name,
        shape=list(shape),
        dtype="torch.bfloat16",
        direction="forward",
        provider="16-bit linear",
        gelu=gelu,
    )
