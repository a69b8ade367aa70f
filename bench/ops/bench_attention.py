"""Attention: the Triton kernel against plain products and softmax, compiled and eager, and the libraries' kernels."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.attention import SPEC, attention, attention_ref

NAMES = ("flash", "cudnn", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4")
LIBRARIES = {name: functools.partial(attention, backend=name) for name in NAMES}


def _inputs(shape, dtype, device, seed):
    batch, length, heads, head_dim = shape
    generator = torch.Generator(device).manual_seed(seed)
    size = (batch, length, 3, heads, head_dim)
    return [torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()]


def _skip_if_unavailable(provider, inputs):
    try:
        LIBRARIES[provider](*inputs)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"{provider}: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("provider", [*PROVIDERS, *LIBRARIES])
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@shapes(SPEC, on_cpu=((1, 258, 2, 72),))
def test_attention(measure, device, shape, dtype, direction, provider):
    make_inputs = functools.partial(_inputs, shape, dtype, device)
    if provider in LIBRARIES:
        _skip_if_unavailable(provider, make_inputs(0))
    compare(
        measure,
        SPEC,
        functools.partial(attention, backend="triton"),
        attention_ref,
        make_inputs,
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
        libraries=LIBRARIES,
    )
