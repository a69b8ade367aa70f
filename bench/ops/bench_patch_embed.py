"""Patch embedding: the Triton kernels against torch.compile of the reference and eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.patch_embed import SPEC, patch_embed, patch_embed_ref

_EXTRAS = 2  # a class token and the time token


def _inputs(shape, dtype, device, seed):
    """image, weight, bias, position, prefix; parameters but the weight and the bias are float32."""
    batch, channels, size, patch, width = shape
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    trained = (
        randn(width, channels, patch, patch, dtype=dtype),
        randn(width, dtype=dtype),
        randn(1, _EXTRAS + (size // patch) ** 2, width),
        randn(batch, _EXTRAS, width),
    )
    return [randn(batch, channels, size, size, dtype=dtype), *(tensor.requires_grad_() for tensor in trained)]


@pytest.mark.parametrize("provider", PROVIDERS)
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((2, 3, 64, 16, 256),))
def test_patch_embed(measure, device, shape, dtype, direction, provider):
    compare(
        measure,
        SPEC,
        functools.partial(patch_embed, backend="triton"),
        patch_embed_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
    )
