"""Heun's corrected step: the C++/CUDA extension against torch.compile of the reference and against eager PyTorch."""

import functools

import pytest

from bench.ops.steps import PROVIDERS, compare_steps, shapes
from epg_fast.ops.heun_step import SPEC, heun_step, heun_step_, heun_step_ref

STEP = {"sigma": 1.7, "sigma_next": 1.2, "clamp": (-1.0, 1.0)}


@pytest.mark.parametrize("provider", PROVIDERS)
@shapes(SPEC)
def test_heun_step(measure, device, shape, provider):
    functions = [functools.partial(function, **STEP) for function in (heun_step, heun_step_, heun_step_ref)]
    compare_steps(measure, SPEC, *functions, shape=shape, device=device, provider=provider)
