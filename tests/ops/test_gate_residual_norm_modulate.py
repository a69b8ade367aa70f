import functools

import pytest
import torch
import torch.nn as nn

from epg_fast.ops.gate_residual_norm_modulate import (
    SPEC,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_fp8,
    gate_residual_norm_modulate_ref,
)
from epg_fast.ops.layer_norm_modulate import layer_norm_modulate_fp8
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    comparable_fp8,
    needs_triton,
    randn,
    run,
    shapes_of,
)

# dtypes of x, of branch, of weight and bias, and of gate, shift and scale
DTYPES = {
    "fp32": (torch.float32,) * 4,
    "bf16 with fp32 parameters": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "fp32 stream with a bf16 branch": (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    "fp16": (torch.float16,) * 4,
}
# whether there is a gate, whether there is modulation
FORMS = {
    "gated and modulated": (True, True),
    "plain": (False, False),
    "gated": (True, False),
    "modulated": (False, True),
}
SMALL = (2, 5, 40)
KERNEL = functools.partial(gate_residual_norm_modulate, backend="triton")
FP8_KERNEL = functools.partial(gate_residual_norm_modulate_fp8, backend="triton")


def make_inputs(shape, dtypes=DTYPES["fp32"], gated=True, modulated=True):
    batch, _, width = shape
    x_dtype, branch_dtype, parameter_dtype, modulation_dtype = dtypes

    def modulation(seed, wanted):
        return randn(batch, width, dtype=modulation_dtype, seed=seed) if wanted else None

    parameters = [randn(width, dtype=parameter_dtype, seed=seed) for seed in (2, 3)]
    stream = [randn(*shape, dtype=x_dtype, seed=0), randn(*shape, dtype=branch_dtype, seed=1)]
    return [*stream, modulation(4, gated), *parameters, modulation(5, modulated), modulation(6, modulated)]


def make_grads(shape):
    return [randn(*shape, seed=seed, requires_grad=False) for seed in (7, 8)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes):
    assert_accurate(KERNEL, gate_residual_norm_modulate_ref, make_inputs(shape, dtypes), make_grads(shape))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gate_and_modulation_can_be_left_out(form):
    inputs = make_inputs(SMALL, DTYPES["fp32 stream with a bf16 branch"], *form)
    assert_accurate(KERNEL, gate_residual_norm_modulate_ref, inputs, make_grads(SMALL))


@needs_triton
def test_kernel_computes_in_float64_when_x_is_float64():
    inputs = make_inputs(SMALL, (torch.float64,) * 4)
    assert_accurate(KERNEL, gate_residual_norm_modulate_ref, inputs, make_grads(SMALL))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, tokens, width = 3, 6, 40
    layouts = [
        torch.randn(1, tokens, width, device=DEVICE).expand(batch, -1, -1),
        torch.randn(batch, width, tokens, device=DEVICE).transpose(1, 2),
        torch.randn(batch, tokens + 2, width, device=DEVICE)[:, 2:],
        torch.randn(batch, tokens, 2 * width, device=DEVICE)[..., ::2],
    ]
    weight, bias = torch.randn(width, 2, device=DEVICE).unbind(1)
    shift, scale, gate = torch.randn(batch, 1, 6 * width, device=DEVICE).chunk(6, dim=-1)[:3]
    for i in range(4):
        x, branch, *grads = layouts[i:] + layouts[:i]
        inputs = [tensor.detach().requires_grad_() for tensor in (x, branch, gate, weight, bias, shift, scale)]
        assert_accurate(KERNEL, gate_residual_norm_modulate_ref, inputs, grads)


@needs_triton
@pytest.mark.parametrize("used", ["x_out", "y"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_of_the_two_results_can_be_left_unused(form, used):
    inputs = make_inputs(SMALL, DTYPES["fp32"], *form)

    def one_result(function, *inputs):
        return function(*inputs)[0 if used == "x_out" else 1]

    # The parameters and the modulation have no part in x_out.
    part = [tensor for i, tensor in enumerate(inputs) if tensor is not None and (used == "y" or i < 3)]
    grad = make_grads(SMALL)[0]
    actual, wanted = (
        torch.autograd.grad(one_result(function, *inputs), part, grad)
        for function in (KERNEL, gate_residual_norm_modulate_ref)
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    assert_repeatable(KERNEL, make_inputs((3, 70, 40)), make_grads((3, 70, 40)))


@needs_triton
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_operators_pass_opcheck(form):
    inputs = make_inputs(SMALL, DTYPES["fp32"], *form)
    torch.library.opcheck(torch.ops.epg_fast.gate_residual_norm_modulate.default, (*inputs, 1e-5, torch.bfloat16))
    without_gradient = [None if tensor is None else tensor.detach() for tensor in inputs]
    torch.library.opcheck(torch.ops.epg_fast.gate_residual_norm_modulate_fp8.default, (*without_gradient, 1e-5))


@needs_triton
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_compiles_into_one_graph(dtypes, form):
    assert_compiles_into_one_graph(KERNEL, make_inputs(SMALL, dtypes, *form), make_grads(SMALL))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_fp8_kernel_adds_the_branch_then_quantises_as_layer_norm_modulate_does(form):
    inputs = [None if tensor is None else tensor.detach() for tensor in make_inputs(SMALL, DTYPES["fp32"], *form)]
    x_out, y, row_scale = FP8_KERNEL(*inputs)
    wanted, wanted_scale = layer_norm_modulate_fp8(x_out, *inputs[3:])
    torch.testing.assert_close(x_out, gate_residual_norm_modulate_ref(*inputs)[0])
    torch.testing.assert_close(row_scale, wanted_scale, rtol=1e-5, atol=0)
    # A float32 rounding can move a value across the boundary between two neighbouring FP8 numbers.
    y, wanted = (tensor.float()[comparable_fp8(wanted)] for tensor in (y, wanted))
    assert (y != wanted).sum() <= 2
    torch.testing.assert_close(y, wanted, rtol=0.13, atol=0)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_operator_on_the_cpu_is_the_reference(form, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [
        None if tensor is None else tensor.detach().cpu().requires_grad_()
        for tensor in make_inputs(SMALL, DTYPES["fp32 stream with a bf16 branch"], *form)
    ]
    grads = [torch.randn(SMALL) for _ in range(2)]
    operator = torch.ops.epg_fast.gate_residual_norm_modulate
    actual = run(lambda *inputs: tuple(operator(*inputs, 1e-5, None)[:2]), inputs, grads)
    torch.testing.assert_close(actual, run(gate_residual_norm_modulate_ref, inputs, grads))
    with torch.no_grad():
        fp8 = torch.ops.epg_fast.gate_residual_norm_modulate_fp8(*inputs, 1e-5)
        torch.testing.assert_close(fp8, gate_residual_norm_modulate_fp8(*inputs))


def test_reference_is_the_step_of_an_adaln_zero_block():
    x, branch, gate, weight, bias, shift, scale = make_inputs(SMALL, (torch.float64,) * 4)
    norm = nn.LayerNorm(40, eps=1e-5, dtype=torch.float64, device=DEVICE)
    norm.weight.data, norm.bias.data = weight.data, bias.data
    wanted = x + gate[:, None] * branch
    x_out, y = gate_residual_norm_modulate(x, branch, gate, weight, bias, shift, scale)
    torch.testing.assert_close(x_out, wanted)
    torch.testing.assert_close(y, norm(wanted) * (1 + scale[:, None]) + shift[:, None])
    x_out, y = gate_residual_norm_modulate(x, branch, None, weight, bias)
    torch.testing.assert_close(y, norm(x + branch))


def test_reference_gradients_are_right_in_float64():
    inputs = make_inputs((2, 3, 4), (torch.float64,) * 4)
    assert torch.autograd.gradcheck(gate_residual_norm_modulate_ref, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, triton"),
        ({"x": torch.zeros(5, 40)}, r"got x of shape \(5, 40\), wanted \[B, L, D\]"),
        ({"branch": torch.zeros(2, 5, 41)}, r"got branch of shape \(2, 5, 41\), wanted \[2, 5, 40\] as x"),
        ({"gate": torch.zeros(40)}, r"got gate of shape \(40,\), wanted \[2, 40\] or \[2, 1, 40\]"),
        ({"scale": None}, "got no scale, wanted both shift and scale, or neither"),
    ],
)
@pytest.mark.parametrize("function", [gate_residual_norm_modulate, gate_residual_norm_modulate_fp8])
def test_a_mistake_is_answered_with_what_was_wanted(function, change, message):
    names = ("x", "branch", "gate", "weight", "bias", "shift", "scale")
    arguments = dict(zip(names, make_inputs(SMALL), strict=True)) | change
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        function(**arguments)


def test_fp8_has_no_gradient_and_says_so():
    with pytest.raises(ValueError, match="requires a gradient, which FP8 output has not"):
        gate_residual_norm_modulate_fp8(*make_inputs(SMALL))


def test_traffic_model_counts_two_reads_and_two_writes_forward():
    batch, tokens, width = shape = (2, 3, 8)
    x = batch * tokens * width * 2
    assert SPEC.bytes(shape, 2) == 4 * x + 3 * batch * width * 2 + 2 * width * 4 + 2 * batch * tokens * 4
    assert 6 * x < SPEC.bytes(shape, 2, backward=True) < 7 * x + 1000
