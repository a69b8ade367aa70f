"""The attention half-block: Triton norms and attention against torch.compile and eager PyTorch with SDPA."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.adaln_attention import SPEC, adaln_attention


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, length, heads, dim = shape
    width = heads * dim

    def randn(*size, std=1.0, dtype=dtype):
        return (std * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    def norm():
        return [randn(width, dtype=torch.float32) for _ in range(2)]

    inputs = [randn(batch, length, width), *(randn(batch, width) for _ in range(3)), *norm()]
    inputs += [randn(3 * width, width, std=width**-0.5), randn(3 * width), randn(width, width, std=width**-0.5)]
    return [*inputs, randn(width), *norm(), randn(batch, width), randn(batch, width)]


@pytest.mark.parametrize("provider", PROVIDERS)
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((1, 258, 2, 72),))
def test_adaln_attention(measure, device, shape, dtype, direction, provider):
    def half_block(backend):
        return lambda *inputs: adaln_attention(*inputs[:10], shape[2], next_norm=tuple(inputs[10:]), backend=backend)

    compare(
        measure,
        SPEC,
        half_block("triton"),
        half_block("auto"),  # plain norms with SDPA: what a user would compile
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
    )
