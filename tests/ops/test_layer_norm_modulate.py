import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from epg_fast.ops.layer_norm_modulate import SPEC, layer_norm_modulate, layer_norm_modulate_ref
from tests.ops.tolerance import GRADIENT, assert_close_to_reference

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))
SHAPES = [*SPEC.odd_shapes, *(pytest.param(shape, marks=GPU) for shape in SPEC.shapes)]
# dtypes of x, of weight and bias, and of shift and scale
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16 with fp32 parameters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16 with fp32 modulation": (torch.float16, torch.float32, torch.float32),
}
GRADIENTS = ("dx", "dweight", "dbias", "dshift", "dscale")
SMALL = (2, 5, 40)

needs_triton = pytest.mark.usefixtures("triton_installed")


@pytest.fixture
def triton_installed():
    pytest.importorskip("triton")


def make_inputs(shape, dtypes, modulated=True, seed=0):
    batch, _, width = shape
    generator = torch.Generator().manual_seed(seed)
    x_dtype, parameter_dtype, modulation_dtype = dtypes

    def randn(size, dtype):
        return torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_()

    x, weight, bias = randn(shape, x_dtype), randn((width,), parameter_dtype), randn((width,), parameter_dtype)
    modulation = [randn((batch, width), modulation_dtype) for _ in range(2)] if modulated else []
    return [x, weight, bias, *modulation]


def run(inputs, dy, **options):
    """y and the gradients of all inputs."""
    y = layer_norm_modulate(*inputs, **options)
    return y, torch.autograd.grad(y, inputs, dy.to(y.dtype))


def assert_kernel_is_accurate(inputs, dy):
    y, gradients = run(inputs, dy, backend="triton")
    same_dtype, same_dtype_gradients = run(inputs, dy, backend="reference")
    exact, exact_gradients = run([tensor.detach().double().requires_grad_() for tensor in inputs], dy)
    assert_close_to_reference(y, same_dtype, exact)
    names = GRADIENTS[: len(inputs)]
    for name, *values in zip(names, gradients, same_dtype_gradients, exact_gradients, strict=True):
        assert_close_to_reference(*values, factor=GRADIENT, name=name)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, modulated):
    inputs = make_inputs(shape, dtypes, modulated)
    dy = torch.randn(shape, device=DEVICE).to(dtypes[0])
    assert_kernel_is_accurate(inputs, dy)


@needs_triton
def test_kernel_computes_in_float64_when_x_is_float64():
    inputs = make_inputs((2, 3, 40), (torch.float64, torch.float64, torch.float64))
    dy = torch.randn(2, 3, 40, dtype=torch.float64, device=DEVICE)
    assert_kernel_is_accurate(inputs, dy)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, tokens, width = 3, 6, 40
    expanded = torch.randn(1, tokens, width, device=DEVICE).expand(batch, -1, -1)
    transposed = torch.randn(batch, width, tokens, device=DEVICE).transpose(1, 2)
    cropped = torch.randn(batch, tokens + 2, width, device=DEVICE)[:, 2:]
    every_other = torch.randn(batch, tokens, 2 * width, device=DEVICE)[..., ::2]
    weight, bias = torch.randn(width, 2, device=DEVICE).unbind(1)
    shift, scale = torch.randn(batch, 1, 6 * width, device=DEVICE).chunk(6, dim=-1)[1:3]
    layouts = (expanded, transposed, cropped, every_other)
    for x, dy in zip(layouts, layouts[::-1], strict=True):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, shift, scale)]
        assert_kernel_is_accurate(inputs, dy)
    inputs = [tensor.detach().requires_grad_() for tensor in (cropped, weight, bias)]
    assert_kernel_is_accurate(inputs, torch.ones((), device=DEVICE).expand(batch, tokens, width))


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    inputs = make_inputs((3, 70, 40), DTYPES["fp32"])
    dy = torch.randn(3, 70, 40, device=DEVICE)
    (y, gradients), (y_again, gradients_again) = (run(inputs, dy, backend="triton") for _ in range(2))
    for first, second in zip((y, *gradients), (y_again, *gradients_again), strict=True):
        assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
def test_operator_passes_opcheck(modulated):
    inputs = make_inputs(SMALL, DTYPES["fp32"], modulated)
    arguments = (*inputs, 1e-5) if modulated else (*inputs, None, None, 1e-5)
    torch.library.opcheck(torch.ops.epg_fast.layer_norm_modulate.default, arguments)


@needs_triton
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_compiles_into_one_graph(dtypes, modulated):
    inputs = make_inputs(SMALL, dtypes, modulated)
    dy = torch.randn(SMALL, device=DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(layer_norm_modulate, fullgraph=True, backend="aot_eager")
    y = compiled(*inputs, backend="triton")
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    eager, eager_gradients = run(inputs, dy, backend="triton")
    for actual, wanted in zip((y, *gradients), (eager, *eager_gradients), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
def test_operator_on_the_cpu_is_the_reference(modulated, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL, DTYPES["fp32"], modulated)]
    dy = torch.randn(SMALL)
    y = torch.ops.epg_fast.layer_norm_modulate(*inputs, *([] if modulated else [None, None]), 1e-5)[0]
    reference, reference_gradients = run(inputs, dy)
    torch.testing.assert_close(y, reference)
    for actual, wanted in zip(torch.autograd.grad(y, inputs, dy), reference_gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_reference_is_layer_norm_then_modulation():
    x, weight, bias, shift, scale = make_inputs((2, 7, 24), DTYPES["fp32"])
    wanted = F.layer_norm(x, (24,), weight, bias, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(layer_norm_modulate(x, weight, bias, shift, scale), wanted, rtol=0, atol=0)
    torch.testing.assert_close(
        layer_norm_modulate(x, weight, bias, shift[:, None], scale[:, None]), wanted, rtol=0, atol=0
    )
    torch.testing.assert_close(
        layer_norm_modulate(x, weight, bias, eps=0.1), F.layer_norm(x, (24,), weight, bias, 0.1), rtol=0, atol=0
    )


def test_reference_gradients_are_right_in_float64():
    inputs = make_inputs((2, 3, 4), (torch.float64,) * 3)
    assert torch.autograd.gradcheck(layer_norm_modulate_ref, inputs)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_autocast_changes_neither_the_dtype_nor_the_values_of_the_reference(dtypes):
    inputs = make_inputs(SMALL, dtypes)
    with torch.autocast(DEVICE, torch.bfloat16):
        under_autocast = layer_norm_modulate(*inputs)
    assert torch.equal(under_autocast, layer_norm_modulate(*inputs))


def test_reference_compiles_into_one_graph():
    inputs = make_inputs(SMALL, DTYPES["bf16 with fp32 parameters"])
    dy = torch.randn(SMALL, device=DEVICE)
    compiled = torch.compile(layer_norm_modulate_ref, fullgraph=True)
    exact, exact_gradients = run([tensor.detach().double().requires_grad_() for tensor in inputs], dy)
    eager, eager_gradients = run(inputs, dy)
    y = compiled(*inputs)
    assert_close_to_reference(y, eager, exact)
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    for name, *values in zip(GRADIENTS, gradients, eager_gradients, exact_gradients, strict=True):
        assert_close_to_reference(*values, factor=GRADIENT, name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of auto, triton, reference"),
        ({"x": torch.zeros(5, 40)}, r"got x of shape \(5, 40\), wanted \[B, L, D\]"),
        ({"weight": torch.zeros(41)}, r"got weight of shape \(41,\), wanted \[40\]"),
        ({"shift": None}, "got no shift, wanted both shift and scale, or neither"),
        ({"scale": torch.zeros(3, 40)}, r"got scale of shape \(3, 40\), wanted \[2, 40\] or \[2, 1, 40\]"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    names = ("x", "weight", "bias", "shift", "scale")
    arguments = dict(zip(names, make_inputs(SMALL, DTYPES["fp32"]), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        layer_norm_modulate(**arguments)


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu, wanted one on a CUDA device.*backend='reference'"):
        layer_norm_modulate(torch.zeros(SMALL), torch.ones(40), torch.zeros(40), backend="triton")


@needs_triton
def test_a_width_beyond_the_table_is_refused():
    from epg_kernels.layer_norm_modulate import MAX_WIDTH

    width = MAX_WIDTH + 1
    x, weight = torch.zeros(1, 1, width, device=DEVICE), torch.ones(width, device=DEVICE)
    with pytest.raises(ValueError, match=f"got width D={width}, wanted at most {MAX_WIDTH}"):
        layer_norm_modulate(x, weight, weight, backend="triton")


def test_importing_the_operations_loads_neither_triton_nor_the_extension():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, epg_fast.ops; "
        "assert 'epg_kernels' not in sys.modules; assert not torch.ops.loaded_libraries"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_traffic_model_counts_each_tensor_once():
    batch, tokens, width = shape = (2, 3, 8)
    x = batch * tokens * width * 2
    assert SPEC.bytes(shape, 2) == 2 * x + 2 * batch * width * 2 + 2 * width * 4 + 2 * batch * tokens * 4
    assert SPEC.bytes(shape, 2, backward=True) > 3 * x
