"""Time embedding and decoder condition: the Triton kernel against torch.compile of the reference and eager PyTorch."""

import functools

import pytest
import torch

from bench.ops.compare import DIRECTIONS, PROVIDERS, compare, shapes
from epg_fast.ops.timestep_embedding import SPEC, timestep_condition, timestep_condition_ref


def _inputs(shape, device, seed):
    batch, dim = shape
    generator = torch.Generator(device).manual_seed(seed)
    t = 250 * (2 * torch.randn(batch, generator=generator, device=device))
    return [t.requires_grad_(), torch.randn(batch, dim, generator=generator, device=device).requires_grad_()]


@pytest.mark.parametrize("provider", PROVIDERS)
@DIRECTIONS
@shapes(SPEC, on_cpu=((64, 768),))
def test_timestep_embedding(measure, device, shape, direction, provider):
    dim = shape[1]
    compare(
        measure,
        SPEC,
        lambda t, label: timestep_condition(t, dim, label, backend="triton"),
        lambda t, label: timestep_condition_ref(t, dim, label),
        functools.partial(_inputs, shape, device),
        shape=shape,
        dtype=torch.float32,
        direction=direction,
        provider=provider,
    )
