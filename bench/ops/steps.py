"""A sampler's step against its alternatives, measured alike: the body of the benchmarks of `*_step`.

Providers: the C++/CUDA extension, torch.compile of the reference and eager PyTorch; a trailing underscore means in
place. The result of every provider is checked before it is timed.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from epg_fast.ops.extension import extension_has_cuda, extension_status
from epg_fast.ops.spec import OpSpec
from tests.ops.tolerance import assert_close_to_reference

PROVIDERS = ("extension", "extension_", "compile", "compile_", "eager")


def shapes(spec: OpSpec):
    """Parametrises `shape`: the presets' shapes on a GPU, one small enough for a CPU without."""
    return pytest.mark.parametrize("shape", spec.shapes if torch.cuda.is_available() else ((4, 3, 256, 256),), ids=str)


def compare_steps(
    measure: Callable,
    spec: OpSpec,
    step: Callable,
    step_: Callable,
    reference: Callable,
    *,
    shape: tuple[int, ...],
    device: str,
    provider: str,
) -> None:
    """Check and time one provider.

    step, step_: the public operation and its form in place, of the state and the estimates; reference: likewise.
    """
    tensors = 2 if spec.name == "euler_step" else 3
    function = _function(provider, step, step_, reference, device)
    inputs = _inputs(shape, tensors, device, seed=0)
    same_dtype, exact = reference(*inputs), reference(*(tensor.double() for tensor in inputs))
    assert_close_to_reference(function(*inputs), same_dtype, exact)
    measure(
        function,
        functools.partial(_inputs, shape, tensors, device),
        spec.bytes(shape, itemsize=4),
        spec.flops(shape),
        op=spec.name,
        shape=list(shape),
        dtype="torch.float32",
        direction="forward",
        provider=provider,
    )


def _function(provider, step, step_, reference, device):
    if provider.startswith("extension"):
        available, reason = extension_status()
        if not available:
            pytest.skip(f"extension: {reason}")
        if device == "cuda" and not extension_has_cuda():
            pytest.skip("extension: built without CUDA")
        return functools.partial(step_ if provider == "extension_" else step, backend="extension")
    if provider.startswith("compile"):
        torch.compiler.reset()
        in_place = lambda x, *estimates: x.copy_(reference(x, *estimates))  # noqa: E731
        function = in_place if provider == "compile_" else reference
        return torch.compile(function, fullgraph=True, dynamic=False)
    return reference


def _inputs(shape, count, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(count)]
