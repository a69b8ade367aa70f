"""Patch embedding of noised images: the Triton kernels against torch.compile of the reference and eager PyTorch.

With given noise, which every provider reads, and with noise that every provider draws from the same seed.
"""

import dataclasses
import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.patch_embed import SPEC, patch_embed, patch_embed_ref

_EXTRAS = 2  # a class token and the time token


def _inputs(shape, dtype, device, drawn, seed):
    """image, weight, bias, position, prefix, noise, sigma, c_in; parameters but the weight and the bias are float32."""
    batch, channels, size, patch, width = shape
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    image = (batch, channels, size, size)
    trained = (
        randn(width, channels, patch, patch, dtype=dtype),
        randn(width, dtype=dtype),
        randn(_EXTRAS + (size // patch) ** 2, width),
        randn(batch, _EXTRAS, width),
    )
    noise = None if drawn else randn(*image, dtype=dtype)
    levels = (randn(batch).exp(), randn(batch).abs())
    return [randn(*image, dtype=dtype), *(tensor.requires_grad_() for tensor in trained), noise, *levels]


def _drawn_bytes(shape, itemsize, backward=False):
    """Drawn noise is not read."""
    batch, channels, size, *_ = shape
    return SPEC.bytes(shape, itemsize, backward) - (0 if backward else batch * channels * size**2 * itemsize)


SPECS = {"given": SPEC, "drawn": dataclasses.replace(SPEC, bytes=_drawn_bytes)}


def _call(function, drawn, image, weight, bias, position, prefix, noise, sigma, c_in):
    noise = {"seed": 0} if drawn else {"noise": noise}
    return function(image, weight, bias, position, prefix, sigma=sigma, c_in=c_in, **noise)


@pytest.mark.parametrize("provider", PROVIDERS)
@DIRECTIONS
@pytest.mark.parametrize("noise", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((2, 3, 64, 16, 256),))
def test_patch_embed(measure, device, shape, dtype, noise, direction, provider):
    drawn = noise == "drawn"
    compare(
        functools.partial(measure, noise=noise),
        SPECS[noise],
        functools.partial(_call, functools.partial(patch_embed, backend="triton"), drawn),
        functools.partial(_call, patch_embed_ref, drawn),
        functools.partial(_inputs, shape, dtype, device, drawn),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
    )
