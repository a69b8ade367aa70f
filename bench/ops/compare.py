"""One operation against its alternatives, measured alike: the body of every `bench_<op>.py`.

Providers that any operation has: "triton" or "cuda" (its kernel), "compile" (torch.compile of the reference) and
"eager" (the reference as it is). A benchmark adds the library kernels that a user would pick. The result of every
provider is checked before it is timed: a provider that is wrong is not reported.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from epg_fast.ops.spec import OpSpec
from tests.ops.kernel_checks import gemms_run, in_double, run
from tests.ops.tolerance import FORWARD, GRADIENT, assert_close_to_reference

DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "forward+backward"])
PROVIDERS = ("triton", "compile", "eager")


def shapes(spec: OpSpec, on_cpu: tuple[tuple[int, ...], ...]):
    """Parametrises `shape`: the presets' shapes on a GPU, small ones on a CPU, where only the machinery is tried."""
    return pytest.mark.parametrize("shape", spec.shapes if torch.cuda.is_available() else on_cpu, ids=str)


def compare(
    measure: Callable,
    spec: OpSpec,
    kernel: Callable,
    reference: Callable,
    make_inputs: Callable[[int], list[torch.Tensor | None]],
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    direction: str,
    provider: str,
    libraries: dict[str, Callable] | None = None,
    checked: Callable | None = None,
    **labels,
) -> None:
    """Check and time one provider in one direction.

    kernel, reference: functions of the inputs; kernel is the public operation with backend="triton", or "cuda".
    make_inputs: seed -> inputs on the device, leaves that require a gradient where one is wanted.
    libraries: further providers, by name, "cuda" among them where kernel is Triton's. checked: makes of outputs what
    is compared, by default themselves. labels: more of the row.
    """
    function = _function(provider, kernel, reference, libraries or {})
    step = _forward if direction == "forward" else _forward_and_backward
    compared = (function, reference) if checked is None else (_then(f, checked) for f in (function, reference))
    _check(step, *compared, make_inputs(0))
    backward = direction != "forward"
    traffic, flops = spec.bytes(shape, dtype.itemsize), spec.flops(shape)
    if backward:
        traffic += spec.bytes(shape, dtype.itemsize, backward=True)
        flops += spec.flops(shape, backward=True)
    measure(
        functools.partial(step, function),
        lambda seed: _with_gradients(step, reference, make_inputs(seed), seed),
        traffic,
        flops,
        op=spec.name,
        shape=list(shape),
        dtype=str(dtype),
        direction=direction,
        provider=provider,
        **labels,
    )


def _function(provider: str, kernel: Callable, reference: Callable, libraries: dict[str, Callable]) -> Callable:
    if provider == "triton":
        if not torch.cuda.is_available():
            pytest.skip("triton: needs a CUDA device; the interpreter's speed says nothing")
        return kernel
    if provider == "cuda":
        if not gemms_run():
            pytest.skip("cuda: needs a GPU of compute capability 9.0 and the extension built with CUTLASS")
        return libraries.get("cuda", kernel)
    if provider == "compile":
        torch.compiler.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    return libraries.get(provider, reference)


def _then(function: Callable, checked: Callable) -> Callable:
    return lambda *inputs: checked(*function(*inputs))


def _forward(function, inputs, grads):
    with torch.no_grad():
        return run(function, inputs, None)[0]


def _forward_and_backward(function, inputs, grads):
    outputs, gradients = run(function, inputs, grads)
    return (*outputs, *gradients)


def _with_gradients(step, reference, inputs, seed):
    """Arguments of a step: the inputs, and random gradients of the outputs."""
    with torch.no_grad():
        outputs = run(reference, inputs, None)[0]
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return inputs, [
        torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype) for output in outputs
    ]


def _check(step, function, reference, inputs):
    inputs, grads = _with_gradients(step, reference, inputs, seed=0)
    results = step(function, inputs, grads)
    same_dtype = step(reference, inputs, grads)
    exact = step(reference, in_double(inputs), grads)
    outputs = len(grads)
    for i, values in enumerate(zip(results, same_dtype, exact, strict=True)):
        is_output = i < outputs
        assert_close_to_reference(
            *values, factor=FORWARD if is_output else GRADIENT, name="output" if is_output else "gradient"
        )
