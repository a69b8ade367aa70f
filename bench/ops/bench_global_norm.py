"""Global norm of a list of gradients: the extension against torch's foreach norm, compiled and not."""

import functools
import math

import pytest
import torch

from epg_fast.ops.global_norm import SPEC, global_norm
from tests.ops.extension_checks import AVAILABLE, REASON

SHAPES = SPEC.shapes if torch.cuda.is_available() else ((20, 300_000), (500, 33))


def _provider(name):
    if name == "extension":
        if not AVAILABLE:
            pytest.skip(f"extension: {REASON}")
        return functools.partial(global_norm, backend="extension")
    reference = functools.partial(global_norm, backend="plain")
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    return reference


def _inputs(shape, device, seed):
    count, size = shape
    generator = torch.Generator(device).manual_seed(seed)
    return [[torch.randn(size, generator=generator, device=device) for _ in range(count)]]


@pytest.mark.parametrize("provider", ["extension", "compile", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_global_norm(measure, device, shape, provider):
    if provider == "compile" and shape[0] > 1000:
        pytest.skip("compile: thousands of tensors take minutes to compile")
    function = _provider(provider)
    (tensors,) = _inputs((5, 4099), device, seed=0)
    exact = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    assert function(tensors)[0].item() == pytest.approx(exact, rel=1e-5)
    measure(
        function,
        functools.partial(_inputs, shape, device),
        SPEC.bytes(shape, itemsize=4),
        SPEC.flops(shape),
        op=SPEC.name,
        shape=list(shape),
        dtype="torch.float32",
        direction="forward",
        provider=provider,
    )
