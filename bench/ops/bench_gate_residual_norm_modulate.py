"""Gated residual, LayerNorm, modulation: the Triton kernel against torch.compile of the reference and eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.gate_residual_norm_modulate import (
    SPEC,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
)


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, _, width = shape

    def randn(*size, dtype=dtype):
        return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()

    parameters = [randn(width, dtype=torch.float32) for _ in range(2)]
    gate, shift, scale = (randn(batch, width) for _ in range(3))
    return [randn(*shape), randn(*shape), gate, *parameters, shift, scale]


@pytest.mark.parametrize("provider", PROVIDERS)
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@shapes(SPEC, on_cpu=((2, 258, 768),))
def test_gate_residual_norm_modulate(measure, device, shape, dtype, direction, provider):
    compare(
        measure,
        SPEC,
        functools.partial(gate_residual_norm_modulate, backend="triton"),
        gate_residual_norm_modulate_ref,
        functools.partial(_inputs, shape, dtype, device),
        shape=shape,
        dtype=dtype,
        direction=direction,
        provider=provider,
    )
