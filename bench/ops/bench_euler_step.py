"""One Euler step: the C++/CUDA extension against torch.compile of the reference and against eager PyTorch."""

import functools

import pytest
import torch

from epg_fast.ops.euler_step import SPEC, euler_step, euler_step_ref
from epg_fast.ops.extension import extension_has_cuda, extension_status
from tests.ops.tolerance import assert_close_to_reference

SHAPES = SPEC.shapes if torch.cuda.is_available() else ((4, 3, 256, 256),)
STEP = {"sigma": 1.7, "sigma_next": 1.2, "clamp": (-1.0, 1.0)}


def _provider(name, device):
    if name == "extension":
        available, reason = extension_status()
        if not available:
            pytest.skip(f"extension: {reason}")
        if device == "cuda" and not extension_has_cuda():
            pytest.skip("extension: built without CUDA")
        return functools.partial(euler_step, backend="extension", **STEP)
    reference = functools.partial(euler_step_ref, **STEP)
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    return reference


def _inputs(shape, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(2)]


@pytest.mark.parametrize("provider", ["extension", "compile", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_euler_step(measure, device, shape, provider):
    function = _provider(provider, device)
    inputs = _inputs(shape, device, seed=0)
    exact = euler_step_ref(*(tensor.double() for tensor in inputs), **STEP)
    assert_close_to_reference(function(*inputs), euler_step_ref(*inputs, **STEP), exact)
    measure(
        function,
        functools.partial(_inputs, shape, device),
        SPEC.bytes(shape, itemsize=4),
        op=SPEC.name,
        shape=list(shape),
        dtype="torch.float32",
        direction="forward",
        provider=provider,
    )
