"""What the test of every operation asks of its kernel, written once.

A function under test takes the inputs in order and returns a tensor or a tuple of tensors. `kernel` is the public
operation with backend="triton", `reference` the same with backend="plain"; the exact result is the reference's in
float64.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F

from epg_fast.ops.backends import interpreting
from epg_fast.ops.extension import extension_has_gemms, extension_status
from tests.ops.tolerance import GRADIENT, assert_close_to_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))
needs_triton = pytest.mark.usefixtures("triton_installed")


def gemms_run() -> bool:
    """Whether the extension's matrix products, backend "cuda", are built and have a GPU to run on."""
    hopper = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return hopper and extension_status()[0] and extension_has_gemms()


NO_GEMMS = "needs a GPU of compute capability 9.0 and the extension built with CUTLASS"
GEMMS = (pytest.mark.gpu, pytest.mark.skipif(not gemms_run(), reason=NO_GEMMS))


def needs_gemms(test: Callable) -> Callable:
    for mark in GEMMS:
        test = mark(test)
    return test


Inputs = Sequence[torch.Tensor | None]


def shapes_of(spec) -> list:
    """The odd shapes anywhere, the presets' shapes on a GPU."""
    return [*spec.odd_shapes, *(pytest.param(shape, marks=GPU) for shape in spec.shapes)]


def randn(*size, dtype=torch.float32, seed=0, requires_grad=True) -> torch.Tensor:
    """The same values on every device."""
    generator = torch.Generator().manual_seed(hash((seed, size)) % 2**32)
    return torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_(requires_grad)


def run(function: Callable, inputs: Inputs, grads: Sequence[torch.Tensor] | None):
    """Outputs, and the gradients of the inputs that require one (none of them if `grads` is None)."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grads is None:
        return outputs, ()
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    return outputs, torch.autograd.grad(outputs, wanted, grads)


def in_double(inputs: Inputs) -> list[torch.Tensor | None]:
    """The same values in float64, requiring gradients where the originals do; integers stay."""
    return [
        tensor
        if tensor is None or not tensor.is_floating_point()
        else tensor.detach().double().requires_grad_(tensor.requires_grad)
        for tensor in inputs
    ]


def assert_accurate(kernel: Callable, reference: Callable, inputs: Inputs, grads: Sequence[torch.Tensor] | None):
    """Outputs within 2x, gradients within 3x of the error that the reference makes in the same dtypes."""
    outputs, gradients = run(kernel, inputs, grads)
    same_dtype, same_dtype_gradients = run(reference, inputs, grads)
    exact, exact_gradients = run(reference, in_double(inputs), grads)
    for i, values in enumerate(zip(outputs, same_dtype, exact, strict=True)):
        assert_close_to_reference(*values, name=f"output {i}")
    for i, values in enumerate(zip(gradients, same_dtype_gradients, exact_gradients, strict=True)):
        assert_close_to_reference(*values, factor=GRADIENT, name=f"gradient {i}")


def assert_repeatable(kernel: Callable, inputs: Inputs, grads: Sequence[torch.Tensor] | None):
    """Two runs give the same bits."""
    _assert_same_bits(run(kernel, inputs, grads), run(kernel, inputs, grads))


def assert_compiles_into_one_graph(function: Callable, inputs: Inputs, grads: Sequence[torch.Tensor] | None):
    """torch.compile sees no graph break, forward and backward, and changes no bit."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _assert_same_bits(run(compiled, inputs, grads), run(function, inputs, grads))


def assert_capturable(kernel: Callable, inputs: Inputs, others: Inputs):
    """A CUDA graph that was captured with some inputs gives, on others, what the kernel gives on those."""
    with torch.no_grad():
        expected = run(kernel, others, None)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(kernel, inputs, None)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run(kernel, inputs, None)[0]
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
        graph.replay()
    _assert_same_bits((outputs, ()), (expected, ()))


@contextlib.contextmanager
def native_operator_on_cpu(schema: str, function: Callable) -> Iterator[None]:
    """`function` in the place of an operator of the extension, for CPU tensors; where it is built, with its schema."""
    name = schema.partition("(")[0]
    extension_status()
    with torch.library._scoped_library("epg_fast", "FRAGMENT") as library:
        if torch._C._dispatch_has_kernel(f"epg_fast::{name}"):
            assert str(torch._C._get_schema(f"epg_fast::{name}", "")) == f"epg_fast::{schema}"
        else:
            library.define(schema)
        library.impl(name, function, "CPU")
        yield


def pretend_gemms_run(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Backend "cuda" of an operation passes its checks of the build and the GPU."""

    @torch.compiler.assume_constant_result
    def require_gemms(op: str, device: torch.device) -> None:
        return None

    monkeypatch.setattr(importlib.import_module(f"epg_fast.ops.{op}"), "require_gemms", require_gemms)


@contextlib.contextmanager
def gemms_on_cpu() -> Iterator[list[str]]:
    """Inside, backend "cuda" of the networks' operations runs on CPU tensors: formulas stand for the products.

    Yields a list that the names of the products that are called are appended to.
    """
    called = []

    def noting(name: str, formula: Callable) -> Callable:
        return lambda *arguments: called.append(name) or formula(*arguments)

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as stack:
        for op in ("linear_residual_norm", "skip_linear"):
            pretend_gemms_run(monkeypatch, op)
        for schema, formula in _FORMULAS.items():
            stack.enter_context(native_operator_on_cpu(schema, noting(schema.partition("(")[0], formula)))
        yield called


def _linear(x, weight, bias):
    """Accumulated in float32, as under no autocast; what CUTLASS asks of its operands is asked here."""
    assert all(t.is_contiguous() and t.dtype == x.dtype and t.shape[-1] % 8 == 0 for t in (x, weight, bias))
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), bias.float())


def _linear_gelu(y, z, x, weight, bias):
    value = _linear(x, weight, bias)
    y.copy_(F.gelu(value))
    if z is not None:
        z.copy_(value)


def _linear_gate_residual(out, branch, x, gate, h, weight, bias):
    value = _linear(h, weight, bias)
    assert x.is_contiguous() and x.dtype == out.dtype and x.dtype in (h.dtype, torch.float32)
    if branch is not None:
        branch.copy_(value)
    if gate is not None:
        assert gate.dim() == 2 and gate.stride(1) == 1 and gate.stride(0) % 2 == 0
        value = value * gate.float()[:, None]
    out.copy_(x.float() + value)


def _linear_dgelu(dz, sums, dy, weight, z):
    """A row of sums for 128 of dz, padded to a multiple of 256 columns."""
    assert all(t.is_contiguous() and t.dtype == z.dtype for t in (dz, dy, weight, z))
    value = torch.ops.aten.gelu_backward(dy.float() @ weight.float(), z.float())
    dz.copy_(value)
    if sums is None:
        return
    rows = value.flatten(0, -2)
    padded = F.pad(rows, (0, -rows.shape[1] % 256, 0, -rows.shape[0] % 128))
    sums.copy_(padded.view(-1, 128, padded.shape[1]).sum(1))


def _skip_linear(z, x, skip, weight, bias):
    assert x.is_contiguous() and skip.is_contiguous() and x.shape[-1] % 8 == skip.shape[-1] % 8 == 0
    z.copy_(_linear(torch.cat([x, skip], dim=-1), weight, bias))


_FORMULAS = {
    "linear_gelu_out(Tensor(a!) y, Tensor(b!)? z, Tensor x, Tensor weight, Tensor bias) -> ()": _linear_gelu,
    "linear_gate_residual_out(Tensor(a!) out, Tensor(b!)? branch, Tensor x, Tensor? gate, Tensor h, Tensor weight, "
    "Tensor bias) -> ()": _linear_gate_residual,
    "linear_dgelu_out(Tensor(a!) dz, Tensor(b!)? sums, Tensor dy, Tensor weight, Tensor z) -> ()": _linear_dgelu,
    "skip_linear_out(Tensor(a!) z, Tensor x, Tensor skip, Tensor weight, Tensor bias) -> ()": _skip_linear,
}


def _assert_same_bits(first, second):
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def comparable_fp8(y: torch.Tensor) -> torch.Tensor:
    """Where a correctly rounded float8_e4m3fn y can be compared with a kernel's: everywhere, but in the interpreter.

    Its conversion loses the carry when rounding up reaches the next power of two.
    """
    return (y.view(torch.uint8) & 0b111) != 0 if interpreting() else torch.ones_like(y, dtype=torch.bool)
