import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from epg_fast.ops.backends import interpreting
from epg_fast.ops.layer_norm_modulate import (
    SPEC,
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_ref,
    residual_norm_modulate,
)
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    comparable_fp8,
    in_double,
    needs_triton,
    randn,
    run,
    shapes_of,
)
from tests.ops.tolerance import GRADIENT, assert_close_to_reference

ROOT = Path(__file__).resolve().parents[2]
# dtypes of x, of weight and bias, and of shift and scale
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16 with fp32 parameters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16 with fp32 modulation": (torch.float16, torch.float32, torch.float32),
}
SMALL = (2, 5, 40)
KERNEL = functools.partial(layer_norm_modulate, backend="triton")
FP8_KERNEL = functools.partial(layer_norm_modulate_fp8, backend="triton")
MODULATED = pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])


def make_inputs(shape, dtypes, modulated=True):
    batch, _, width = shape
    x_dtype, parameter_dtype, modulation_dtype = dtypes
    parameters = [randn(width, dtype=parameter_dtype, seed=seed) for seed in (1, 2)]
    modulation = [randn(batch, width, dtype=modulation_dtype, seed=seed) for seed in (3, 4)] if modulated else []
    return [randn(*shape, dtype=x_dtype), *parameters, *modulation]


def make_grads(shape):
    return [randn(*shape, seed=5, requires_grad=False)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@MODULATED
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, modulated):
    assert_accurate(KERNEL, layer_norm_modulate_ref, make_inputs(shape, dtypes, modulated), make_grads(shape))


@needs_triton
def test_kernel_writes_the_dtype_asked_for():
    inputs, out_dtype = make_inputs(SMALL, DTYPES["fp32"]), torch.float16
    assert_accurate(
        functools.partial(KERNEL, out_dtype=out_dtype),
        functools.partial(layer_norm_modulate_ref, out_dtype=out_dtype),
        inputs,
        make_grads(SMALL),
    )
    assert KERNEL(*inputs, out_dtype=out_dtype).dtype == out_dtype


@needs_triton
def test_kernel_computes_in_float64_when_x_is_float64():
    inputs = make_inputs((2, 3, 40), (torch.float64, torch.float64, torch.float64))
    assert_accurate(KERNEL, layer_norm_modulate_ref, inputs, make_grads((2, 3, 40)))


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
        assert_accurate(KERNEL, layer_norm_modulate_ref, inputs, [dy])
    inputs = [tensor.detach().requires_grad_() for tensor in (cropped, weight, bias)]
    dy = torch.ones((), device=DEVICE).expand(batch, tokens, width)
    assert_accurate(KERNEL, layer_norm_modulate_ref, inputs, [dy])


def residual_norm(backend, copy_dtype):
    """(2 x, its norm, 2 times its copy) of x, weight, bias, shift and scale; an input itself would have no gradient."""

    def function(*inputs):
        x, y, copied = residual_norm_modulate(*inputs, out_dtype=copy_dtype, copy_dtype=copy_dtype, backend=backend)
        return 2 * x, y, 2 * copied

    return function


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16], ids=["no copy", "bf16 copy"])
@pytest.mark.parametrize("shape", [SMALL, (3, 35, 40)], ids=str)
def test_gradients_past_the_norm_and_through_the_copy_meet_in_its_kernel(shape, copy_dtype):
    grads = [randn(*shape, seed=seed, requires_grad=False) for seed in (5, 6, 7)]
    for dtypes in (DTYPES["fp32"], DTYPES["bf16 with fp32 parameters"]):
        inputs = make_inputs(shape, dtypes)
        functions = [residual_norm(backend, copy_dtype) for backend in ("triton", "plain")]
        results = [run(function, inputs, grads) for function in functions]
        exact = run(residual_norm("plain", None), in_double(inputs), grads)
        for got, same, want in zip(results[0][0], results[1][0], exact[0], strict=True):
            assert_close_to_reference(got, same, want, name="output")
        for got, same, want in zip(results[0][1], results[1][1], exact[1], strict=True):
            assert_close_to_reference(got, same, want, factor=GRADIENT, name="gradient")
        assert_compiles_into_one_graph(functions[0], inputs, grads)


@needs_triton
def test_the_norm_of_a_residual_alone_has_its_gradient():
    inputs = make_inputs(SMALL, DTYPES["fp32"])
    for copy_dtype in (None, torch.float16):
        got, want = (
            torch.autograd.grad(residual_norm(backend, copy_dtype)(*inputs)[1].square().sum(), inputs)
            for backend in ("triton", "plain")
        )
        tolerance = 1e-4 if copy_dtype is None else 2e-3  # y in float16: 11 bits
        torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    shape = (3, 70, 40)
    assert_repeatable(KERNEL, make_inputs(shape, DTYPES["fp32"]), make_grads(shape))


@needs_triton
@MODULATED
def test_operators_pass_opcheck(modulated):
    inputs = make_inputs(SMALL, DTYPES["fp32"], modulated)
    inputs = inputs if modulated else [*inputs, None, None]
    torch.library.opcheck(torch.ops.epg_fast.layer_norm_modulate.default, (*inputs, 1e-5, None))
    torch.library.opcheck(torch.ops.epg_fast.layer_norm_modulate.default, (*inputs, 1e-5, torch.bfloat16))
    without_gradient = [None if tensor is None else tensor.detach() for tensor in inputs]
    torch.library.opcheck(torch.ops.epg_fast.layer_norm_modulate_fp8.default, (*without_gradient, 1e-5))


@needs_triton
@MODULATED
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_compiles_into_one_graph(dtypes, modulated):
    assert_compiles_into_one_graph(KERNEL, make_inputs(SMALL, dtypes, modulated), make_grads(SMALL))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@MODULATED
@pytest.mark.parametrize("shape", SPEC.odd_shapes, ids=str)
def test_fp8_kernel_is_as_accurate_as_pytorch(shape, modulated):
    inputs = [tensor.detach() for tensor in make_inputs(shape, DTYPES["fp32"], modulated)]
    exact = layer_norm_modulate_ref(*in_double(inputs))
    (y, row_scale), (wanted, wanted_scale) = FP8_KERNEL(*inputs), layer_norm_modulate_fp8(*inputs)
    assert y.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(row_scale, wanted_scale, rtol=1e-5, atol=0)
    actual, same_dtype = y.float() * row_scale[..., None], wanted.float() * wanted_scale[..., None]
    where = comparable_fp8(wanted)
    assert_close_to_reference(actual[where], same_dtype[where], exact[where])


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_fp8_does_not_hide_nan(backend):
    if backend == "triton" and interpreting():
        pytest.skip("the interpreter converts NaN to a number")
    x = torch.zeros(1, 2, 16, device=DEVICE)
    x[0, 0, 3] = float("nan")
    ones = torch.ones(16, device=DEVICE)
    y = layer_norm_modulate_fp8(x, ones, ones, backend=backend)[0].float()
    assert y[0, 0].isnan().all() and y[0, 1].isfinite().all()


def test_fp8_has_no_gradient_and_says_so():
    with pytest.raises(ValueError, match=r"requires a gradient, which FP8 output has not; use torch.no_grad\(\)"):
        layer_norm_modulate_fp8(*make_inputs(SMALL, DTYPES["fp32"]))


@MODULATED
def test_operator_on_the_cpu_is_the_reference(modulated, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL, DTYPES["fp32"], modulated)]
    arguments = (*inputs, *([] if modulated else [None, None]), 1e-5)
    dy = torch.randn(SMALL)
    y = torch.ops.epg_fast.layer_norm_modulate(*arguments, None)[0]
    (reference,), reference_gradients = run(layer_norm_modulate_ref, inputs, [dy])
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), reference_gradients)
    with torch.no_grad():
        quantized = torch.ops.epg_fast.layer_norm_modulate_fp8(*arguments)
        torch.testing.assert_close(quantized, layer_norm_modulate_fp8(*inputs))


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


def test_reference_compiles_into_one_graph(inductor):
    inputs, grads = make_inputs(SMALL, DTYPES["bf16 with fp32 parameters"]), make_grads(SMALL)
    compiled = torch.compile(layer_norm_modulate_ref, fullgraph=True)
    actual, eager = run(compiled, inputs, grads), run(layer_norm_modulate_ref, inputs, grads)
    exact = run(layer_norm_modulate_ref, in_double(inputs), grads)
    for values in zip((*actual[0], *actual[1]), (*eager[0], *eager[1]), (*exact[0], *exact[1]), strict=True):
        assert_close_to_reference(*values, factor=GRADIENT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, triton"),
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
    with pytest.raises(ValueError, match="on cpu, wanted one on a CUDA device.*backend='plain'"):
        layer_norm_modulate(torch.zeros(SMALL), torch.ones(40), torch.zeros(40), backend="triton")


@needs_triton
def test_a_width_beyond_the_table_is_refused():
    from epg_kernels._norm_modulate import MAX_WIDTH

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
