"""Training's FP8 linear, rounding included, against the same linear in 16 bits; both compiled.

"plain" multiplies the rounded values in float32 and shows only what the rounding alone would cost.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.ops.compare import DIRECTIONS, shapes
from epg_fast.ops.linear_fp8_dynamic import SPEC, linear_fp8_dynamic
from tests.ops.tolerance import assert_close_to_reference

_PROVIDERS = {
    "scaled_mm": linear_fp8_dynamic,
    "plain": functools.partial(linear_fp8_dynamic, backend="plain"),
    "16-bit linear": lambda x, weight, bias: F.linear(x, weight.bfloat16(), bias.bfloat16()),
}


def _inputs(shape, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    rows, k, n = shape
    x, weight, bias, dy = (
        torch.randn(size, generator=generator, device=device) for size in ((rows, k), (n, k), (n,), (rows, n))
    )
    leaves = [x.bfloat16(), weight * k**-0.5, bias]
    return [*(leaf.requires_grad_() for leaf in leaves), dy.bfloat16()]


def _run(function, backward, x, weight, bias, dy):
    if not backward:
        with torch.no_grad():
            return [function(x, weight, bias)]
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)]


@pytest.mark.parametrize("provider", _PROVIDERS)
@DIRECTIONS
@shapes(SPEC, on_cpu=((66, 768, 3072),))
def test_linear_fp8_dynamic(measure, device, shape, direction, provider):
    if provider == "scaled_mm" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("scaled_mm: needs compute capability 8.9")
    backward = direction != "forward"
    torch.compiler.reset()
    function = torch.compile(_PROVIDERS[provider], fullgraph=True, dynamic=False)
    if provider == "scaled_mm":
        _check(function, backward, _inputs(shape, device, 0))
    measure(
        functools.partial(_run, function, backward),
        functools.partial(_inputs, shape, device),
        SPEC.bytes(shape, 2) + (SPEC.bytes(shape, 2, backward=True) if backward else 0),
        SPEC.flops(shape) + (SPEC.flops(shape, backward=True) if backward else 0),
        op=SPEC.name,
        shape=list(shape),
        dtype="torch.bfloat16",
        direction=direction,
        provider=provider,
    )


def _check(function, backward, inputs):
    """Not timed where it is less accurate than the reference; a result near a tie may be rounded to the other side."""
    reference = _PROVIDERS["plain"]
    exact = _run(functools.partial(reference, dtype=torch.float64), backward, *(t.double() for t in inputs))
    for values in zip(_run(function, backward, *inputs), _run(reference, backward, *inputs), exact, strict=True):
        assert_close_to_reference(*values, factor=3)
