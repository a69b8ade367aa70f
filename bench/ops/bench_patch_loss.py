"""Loss in patch space: the Triton kernels against torch.compile of the reference and against eager PyTorch.

As denoising uses it (x0, mean) and as consistency does (edm, Huber, against the target's tokens).
"""

import dataclasses
import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.patch_loss import SPEC, patch_loss, patch_loss_ref


def _inputs(shape, dtype, device, objective, seed):
    """tokens, target, weight and, for consistency, scale, offset and offset_scale."""
    batch, channels, size, patch = shape
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    image = (batch, channels, size, size)
    tokens = (batch, (size // patch) ** 2, patch**2 * channels)
    inputs = [randn(*tokens, dtype=dtype).requires_grad_()]
    if objective == "denoising":
        return [*inputs, randn(*image), randn(batch).abs()]
    return [*inputs, randn(*tokens, dtype=dtype), randn(batch).abs(), randn(batch), randn(*image), randn(batch)]


def _consistency_bytes(shape, itemsize, backward=False):
    """The target is in tokens, in their dtype, and a float32 offset joins it."""
    batch, channels, size, _ = shape
    return SPEC.bytes(shape, itemsize, backward) + batch * channels * size**2 * itemsize


SPECS = {"denoising": SPEC, "consistency": dataclasses.replace(SPEC, bytes=_consistency_bytes)}


def _call(function, huber_c, tokens, target, weight, scale=None, offset=None, offset_scale=None):
    options = {"scale": scale, "offset": offset, "offset_scale": offset_scale, "weight": weight}
    return function(tokens, target, **options, huber_c=huber_c)[0]


@pytest.mark.parametrize("provider", PROVIDERS)
@DIRECTIONS
@pytest.mark.parametrize("objective", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@shapes(SPEC, on_cpu=((2, 3, 16, 8),))
def test_patch_loss(measure, device, shape, dtype, objective, direction, provider):
    huber_c = None if objective == "denoising" else 0.06
    compare(
        functools.partial(measure, objective=objective),
        SPECS[objective],
        functools.partial(_call, functools.partial(patch_loss, backend="triton"), huber_c),
        functools.partial(_call, patch_loss_ref, huber_c),
        functools.partial(_inputs, shape, dtype, device, objective),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
    )
