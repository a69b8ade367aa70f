"""What a kernel is asked, written once: the same result as in plain PyTorch, to within a multiple of its error.

A function under test takes its arguments by name and returns a tensor or a tuple of them. How near it has to come is
measured: the exact result is the reference's in float64, the error allowed a multiple of the reference's own.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from epg_fast.ops.backends import interpreting
from epg_fast.ops.extension import extension_has_cuda, extension_has_gemms, extension_status
from tests.ops.examples import DEVICE, Example

GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))
CPU = pytest.mark.skipif(DEVICE == "cuda", reason="what holds on a CPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

AVAILABLE, REASON = extension_status()
if AVAILABLE and DEVICE == "cuda":
    AVAILABLE, REASON = extension_has_cuda(), "the extension was built without CUDA"
needs_extension = pytest.mark.skipif(not AVAILABLE, reason=f"extension: {REASON}")
each_steps_backend = pytest.mark.parametrize(
    "steps_backend", ["plain", pytest.param("extension", marks=needs_extension)]
)

FORWARD = 2.0
GRADIENT = 3.0


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


def tensors_of(inputs: dict) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def trained(inputs: dict) -> list[torch.Tensor]:
    return [tensor for tensor in tensors_of(inputs) if tensor.requires_grad]


def make_tensors(shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The same standard normal values on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def map_tensors(function: Callable, inputs: dict) -> dict:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, inputs)


def leaves_of(function: Callable, inputs: dict) -> dict:
    """function of every tensor, as leaves that require the gradients that those required."""
    return map_tensors(lambda t: function(t.detach()).requires_grad_(t.requires_grad), inputs)


def in_double(inputs: dict) -> dict:
    """The same values in float64, also where a result's dtype is asked for; integers and FP8 stay."""

    def double(leaf):
        if isinstance(leaf, torch.dtype):
            return torch.float64
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().double().requires_grad_(leaf.requires_grad)

    return tree_map(double, inputs)


def run(function: Callable, inputs: dict, grads: list[torch.Tensor] | None = None):
    """(outputs, gradients of the inputs that require one), for `grads` of the outputs, by default random ones.

    Outputs that have no gradient take no part.
    """
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = trained(inputs)
    if not wanted or not any(output.requires_grad for output in outputs):
        return outputs, ()
    grads = gradients_like(outputs) if grads is None else grads
    pairs = [(o, grad.to(o.dtype)) for o, grad in zip(outputs, grads, strict=True) if o.requires_grad]
    outputs_with_gradient, grads = zip(*pairs, strict=True)
    options = {"allow_unused": True, "materialize_grads": True}
    return outputs, torch.autograd.grad(outputs_with_gradient, wanted, grads, **options)


def gradients_like(outputs: tuple[torch.Tensor, ...], seed: int = 5) -> list[torch.Tensor]:
    """The same values for outputs of other dtypes."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(output.shape, generator=generator, device=output.device) for output in outputs]


def assert_accurate(kernel: Callable, reference: Callable, inputs: dict, grads: list[torch.Tensor] | None = None):
    """Outputs within 2x, gradients within 3x of the error that the reference makes in the same dtypes.

    Integers equal the reference's, and FP8 numbers but for few that lie between two.
    """
    outputs, gradients = run(kernel, inputs, grads)
    same_dtype, same_dtype_gradients = run(reference, inputs, grads)
    exact, exact_gradients = run(reference, in_double(inputs), grads)
    # The interpreter truncates to bfloat16 instead of rounding, also what is kept for the gradients.
    coarse = interpreting() and any(t.dtype == torch.bfloat16 for t in (*tensors_of(inputs), *outputs))
    for i, (actual, same, wanted) in enumerate(zip(outputs, same_dtype, exact, strict=True)):
        if actual.dtype == torch.float8_e4m3fn:
            assert_same_rows(actual, same)
        elif actual.is_floating_point():
            assert_close_to_reference(actual, same, wanted, name=f"output {i}")
        else:
            assert torch.equal(actual, same)
    for i, values in enumerate(zip(gradients, same_dtype_gradients, exact_gradients, strict=True)):
        assert_close_to_reference(*values, factor=GRADIENT * (1 + coarse), name=f"gradient {i}")


def assert_backend_accurate(example: Example, backend: str, inputs: dict, grads: list[torch.Tensor] | None = None):
    assert_accurate(example.by(backend), example.reference, inputs, grads)


def assert_close_to_reference(actual, same_dtype, exact, factor=FORWARD, name="output"):
    """actual's largest error is at most `factor` times same_dtype's, both against `exact`, computed in float64."""
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, wanted {same_dtype.dtype}"
    assert actual.shape == same_dtype.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(same_dtype.shape)}"
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values are not finite"
    if not actual.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = (
        factor * (same_dtype.double() - exact).abs().max().item() + _floor(actual.dtype) * exact.abs().max().item()
    )
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} ({factor}x PyTorch's in {actual.dtype})"


def _floor(dtype: torch.dtype) -> float:
    """Relative to the largest value: a few roundings of the accumulation, which PyTorch may happen not to make."""
    if dtype == torch.bfloat16 and interpreting():
        return torch.finfo(dtype).eps  # the interpreter truncates float32 to bfloat16 instead of rounding it
    return 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_same_rows(rows: torch.Tensor, wanted: torch.Tensor):
    """The same FP8 numbers; a hundredth, which a rounding in float32 may move over a boundary, are neighbours.

    Triton's interpreter loses the carry when rounding up reaches the next power of two, and floors subnormal numbers:
    neither is compared there.
    """
    assert rows.dtype == wanted.dtype and rows.shape == wanted.shape
    clear = torch.ones_like(rows, dtype=torch.bool)
    for bits in (rows.view(torch.uint8), wanted.view(torch.uint8)) if interpreting() else ():
        clear &= ((bits & 0b111) != 0) & ((bits & 0b1111000) != 0)
    rows, wanted = rows.float()[clear], wanted.float()[clear]
    assert clear.sum() > 0.3 * clear.numel() and (rows != wanted).sum() <= max(2, len(rows) // 100)
    torch.testing.assert_close(rows, wanted, rtol=0.13, atol=2**-9)


def assert_same_bits(first, second):
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        bits = (a.view(torch.uint8), b.view(torch.uint8)) if a.dtype == torch.float8_e4m3fn else (a, b)
        assert torch.equal(*bits)


class Operators(TorchDispatchMode):
    """Notes the calls of the package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "epg_fast":
            self.calls.append((operator, args, kwargs or {}))
        return operator(*args, **(kwargs or {}))


def assert_refused(message: str, example: Example, backend: str, inputs: dict):
    """A call of an operation of tests/ops/examples.py is answered in one line that begins with its name."""
    with pytest.raises(ValueError, match=message) as caught:
        example.call(backend, **inputs)
    op = str(caught.value).split(":")[0].rstrip("_")
    assert "\n" not in str(caught.value) and op in (example.name, example.spec.name, "global_norm")


def assert_compiles_into_one_graph(function: Callable, inputs: dict):
    """torch.compile sees no graph break, forward and backward, and changes no bit."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, inputs), run(function, inputs))


def assert_capturable(kernel: Callable, inputs: dict, others: dict):
    """A CUDA graph that was captured with some inputs gives, on others, what the kernel gives on those."""
    with torch.no_grad():
        expected = run(kernel, others)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(kernel, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run(kernel, inputs)[0]
        for tensor, other in zip(tensors_of(inputs), tensors_of(others), strict=True):
            tensor.copy_(other)
        graph.replay()
    assert_same_bits((outputs, ()), expected)


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
        for op in ("linear_residual_norm", "skip_linear", "linear_fp8"):
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
