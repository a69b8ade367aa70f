"""LayerNorm + modulation: the Triton kernel against torch.compile of the reference and against eager PyTorch."""

import functools

import pytest
import torch

from epg_fast.ops.layer_norm_modulate import SPEC, layer_norm_modulate, layer_norm_modulate_ref
from tests.ops.tolerance import GRADIENT, assert_close_to_reference

SHAPES = SPEC.shapes if torch.cuda.is_available() else ((2, 258, 768),)


def _provider(name, device):
    if name == "triton":
        if device == "cpu":
            pytest.skip("triton: needs a CUDA device; the interpreter's speed says nothing")
        return functools.partial(layer_norm_modulate, backend="triton")
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(layer_norm_modulate_ref, fullgraph=True, dynamic=False)
    return layer_norm_modulate_ref


def _inputs(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    batch, _, width = shape

    def randn(*size, dtype=dtype):
        return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()

    parameters = [randn(width, dtype=torch.float32) for _ in range(2)]
    return [randn(*shape), *parameters, randn(batch, width), randn(batch, width)], randn(*shape).detach()


def _forward(function, inputs, dy):
    with torch.no_grad():
        return (function(*inputs),)


def _forward_and_backward(function, inputs, dy):
    y = function(*inputs)
    return (y, *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


@pytest.mark.parametrize("provider", ["triton", "compile", "eager"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_modulate(measure, device, shape, dtype, direction, provider):
    function = _provider(provider, device)
    step = _forward if direction == "forward" else _forward_and_backward
    _check(step, function, *_inputs(shape, dtype, device, seed=0))
    traffic = SPEC.bytes(shape, dtype.itemsize)
    if direction != "forward":
        traffic += SPEC.bytes(shape, dtype.itemsize, backward=True)
    measure(
        functools.partial(step, function),
        functools.partial(_inputs, shape, dtype, device),
        traffic,
        op=SPEC.name,
        shape=list(shape),
        dtype=str(dtype),
        direction=direction,
        provider=provider,
    )


def _check(step, function, inputs, dy):
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = step(layer_norm_modulate_ref, exact_inputs, dy)
    results = zip(step(function, inputs, dy), step(layer_norm_modulate_ref, inputs, dy), exact, strict=True)
    assert_close_to_reference(*next(results))
    for gradients in results:
        assert_close_to_reference(*gradients, factor=GRADIENT, name="gradient")
