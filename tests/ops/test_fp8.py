"""FP8: rounding of rows with a scale each, products of such rows, and the linear layer that is trained with them."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epg_fast import ops
from epg_fast.ops import linear_fp8, linear_fp8_dynamic, linear_fp8_dynamic_ref, linear_fp8_ref, quantize_rows_ref
from epg_fast.ops.backends import interpreting
from epg_fast.ops.fp8 import cpu_has_row_scales
from epg_fast.ops.linear_fp8_dynamic import SPEC
from tests.ops.examples import EXAMPLES
from tests.ops.kernel_checks import DEVICE, in_double, native_operator_on_cpu, needs_gemms, needs_triton

SCHEMA = (
    "linear_fp8_out(Tensor(a!) y, Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor bias, bool gelu)"
    " -> ()"
)
MAIN = (33, 64, 48)
ON_GPU = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
HAS_PRODUCT = cpu_has_row_scales() if ON_GPU is None else ON_GPU >= (9, 0)
needs_product = pytest.mark.skipif(not HAS_PRODUCT, reason="PyTorch has no product with a scale per row here")


def test_a_row_is_the_formula_to_three_bits_behind_the_leading_one():
    inputs = in_double(EXAMPLES["quantize_rows"].inputs((2, 5, 40, 24), "fp32")) | {"gelu": True}
    x, branch, gate, skip, _ = inputs.values()
    z = x + gate[:, None] * branch
    wanted = torch.cat([z * torch.special.ndtr(z), skip], -1)
    for gates in (gate, gate[:, None]):
        rows, scale = ops.quantize_rows(**inputs | {"gate": gates})
        torch.testing.assert_close(scale, wanted.abs().amax(-1) / 448)
        restored = rows.double() * scale[..., None]
        assert ((restored - wanted).abs() <= wanted.abs() / 16 + scale[..., None] * 2**-10).all()


def test_a_row_of_zeros_stays_one_and_every_other_reaches_the_largest_number():
    y = torch.randn(1, 6, 400, dtype=torch.float64) * 10.0 ** torch.arange(-3, 3)[:, None]
    y[0, 2] = 0
    quantized, row_scale = quantize_rows_ref(y)
    restored = quantized.double() * row_scale[..., None]
    assert ((restored - y).abs() <= y.abs() / 16 + row_scale[..., None] * 2**-10).all()
    assert (quantized.float().abs().amax(-1) == torch.tensor([448.0, 448, 0, 448, 448, 448])).all()


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
@pytest.mark.parametrize("op", ["quantize_rows", "layer_norm_modulate_fp8"])
def test_nan_is_not_hidden(op, backend):
    if backend == "triton" and interpreting():
        pytest.skip("the interpreter converts NaN to a number")
    x, ones = torch.zeros(1, 2, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    x[0, 0, 3] = float("nan")
    options = {"gelu": True} if op == "quantize_rows" else {"weight": ones, "bias": ones}
    y = getattr(ops, op)(x, **options, backend=backend)[0].float()
    assert y[0, 0].isnan().any() and y[0, 1].isfinite().all()


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
@pytest.mark.parametrize("shape", [(2, 19, 3, 2, 72), (1, 40, 3, 3, 40)], ids=str)
def test_attention_in_fp8_is_attention_to_three_bits_behind_the_leading_one(shape, backend):
    qkv = torch.randn(shape, device=DEVICE).half()
    qkv[:, :, 2] *= torch.logspace(-3, 1, shape[0], device=DEVICE)[:, None, None, None]  # images of other sizes
    inputs = EXAMPLES["attention_fp8"].make(lambda *_, **__: qkv, (*shape[:2], *shape[3:]), (torch.float16,))
    rows, scale = ops.attention_fp8(**inputs, backend=backend)
    largest = inputs["largest"][2 * shape[3] * shape[4] // 128 :].amax((0, 2))
    torch.testing.assert_close(scale, (largest / 448)[:, None].expand(shape[:2]))
    assert (largest >= qkv[:, :, 2].float().abs().amax((1, 2, 3))).all()  # but for keys that share columns with values
    wanted = ops.attention_ref(qkv.double())
    error, unit = (rows.double() * scale[..., None, None] - wanted).abs(), scale.double()[..., None, None]
    # of four bits; the smallest number, to which the interpreter floors; the softmax in float16
    right = error <= wanted.abs() / 16 + unit * 2**-9 + unit * 448 * 2**-11
    if backend == "triton" and interpreting():
        right |= (rows.view(torch.uint8) & 0b111) == 0  # the interpreter loses the carry to the next power of two
    assert right.all()


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
def test_a_product_is_that_of_the_dequantised_operands(gelu):
    inputs = EXAMPLES["linear_fp8"].inputs((5, 48, 24), "bf16")
    x, x_scale, weight, weight_scale, bias = (inputs[name].double() for name in list(inputs)[:5])
    z = torch.einsum("mk,nk,m,n->mn", x, weight, x_scale, weight_scale) + bias
    wanted = z * torch.special.ndtr(z) if gelu else z
    y = linear_fp8_ref(x, x_scale, weight, weight_scale, bias, gelu)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert linear_fp8(**inputs | {"bias": bias.half()}).dtype == torch.float16


@needs_product
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("leading", [(33,), (3, 11)], ids=str)
def test_pytorchs_product_computes_the_same(leading, gelu):
    inputs = EXAMPLES["linear_fp8"].inputs((33, 64, 32), "bf16") | {"gelu": gelu}
    inputs |= {"x": inputs["x"].view(*leading, 64), "x_scale": inputs["x_scale"].view(leading)}
    # One more rounding to bfloat16, before GELU; PyTorch may leave the sums to the tensor cores.
    wanted = linear_fp8_ref(**inputs)
    torch.testing.assert_close(linear_fp8(**inputs, backend="scaled_mm"), wanted, rtol=2e-2, atol=2e-2)


def test_the_operator_counts_its_product_and_hands_the_kernel_what_it_takes():
    def kernel(y, x, x_scale, weight, weight_scale, bias, gelu):
        assert all(tensor.is_contiguous() for tensor in (x_scale, weight_scale, bias))
        y.copy_(linear_fp8_ref(x, x_scale, weight, weight_scale, bias, gelu))

    x, x_scale, weight, weight_scale, bias, _ = (
        EXAMPLES["linear_fp8"].inputs((6, 48, 24), "bf16", device="cpu").values()
    )
    with FlopCounterMode(display=False) as counter:
        torch.ops.epg_fast.linear_fp8(x, x_scale, weight, weight_scale, bias, True)
    assert counter.get_total_flops() == 2 * 6 * 48 * 24
    inputs = [x.view(2, 3, 48), x_scale.view(3, 2).t(), weight, weight_scale.expand(2, 24).t()[:, 0], bias]
    with native_operator_on_cpu(SCHEMA, kernel):
        y = importlib.import_module("epg_fast.ops.linear_fp8")._forward_cuda(*inputs, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, linear_fp8_ref(*inputs, True))


@needs_gemms
def test_the_extension_multiplies_each_row_and_column_by_its_own_scale():
    rows, k, n = 300, 16, 264
    x, weight = torch.zeros(rows, k, device=DEVICE), torch.zeros(n, k, device=DEVICE)
    x[:, 0], weight[:, 0] = 1, 1
    x_scale, weight_scale = 2.0 ** (torch.arange(rows) % 13 - 6), 2.0 ** (torch.arange(n) % 11 - 5)
    bias = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    y = linear_fp8(x, x_scale.to(DEVICE), weight, weight_scale.to(DEVICE), bias, backend="cuda")
    assert torch.equal(y.float().cpu(), torch.outer(x_scale, weight_scale))


# The linear layer that quantises its own operands, forward and backward.
FUNCTIONS = pytest.mark.parametrize(
    "function",
    [linear_fp8_dynamic_ref, pytest.param(linear_fp8_dynamic, marks=needs_product)],
    ids=["plain", "scaled_mm"],
)


def make_inputs(shape, factor=1.0):
    """x, weight and bias, rows and columns of very different sizes, and a gradient of y."""
    rows, k, n = shape
    x = torch.randn(rows, k, device=DEVICE) * torch.logspace(-3, 2, rows, device=DEVICE)[:, None] * factor
    weight = torch.randn(n, k, device=DEVICE) * torch.logspace(-2, 1, n, device=DEVICE)[:, None]
    weight = weight * torch.logspace(1, -1, k, device=DEVICE) * k**-0.5
    dy = (torch.randn(rows, n, device=DEVICE) * torch.logspace(1, -4, rows, device=DEVICE)[:, None]).bfloat16()
    return [t.requires_grad_() for t in (x, weight, torch.randn(n, device=DEVICE))], dy


def run(function, inputs, dy):
    """[y, dx, dweight, dbias]."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)]


def rounded_to_e4m3(rows):
    """What a row is after rounding, in float64: four significant bits of row / scale, none below 2^-9."""
    scale = (rows.float().abs().amax(1, keepdim=True) / 448).double()
    values = (rows.float() / scale.float()).double()
    exponent = torch.frexp(values).exponent.clamp_min(-5) - 4  # of the last bit: 2^-9 is the smallest
    return torch.ldexp(torch.ldexp(values, -exponent).round().clamp(-(2**62), 2**62), exponent).clamp(-448, 448) * scale


def exact(inputs, dy):
    """y and gradients in float64, from operands rounded as the formula says; then the same sums of absolute values."""
    x, weight, bias = (t.detach() for t in inputs)
    x, dy = x.bfloat16(), dy.double()
    factors = (
        (rounded_to_e4m3(x), rounded_to_e4m3(weight).T, bias.bfloat16().double()),
        (rounded_to_e4m3(dy), rounded_to_e4m3(weight.T).T, torch.zeros((), dtype=dy.dtype, device=DEVICE)),
        (dy.T, x.double(), torch.zeros((), dtype=dy.dtype, device=DEVICE)),
    )
    sums = [[f(a) @ f(b) + f(c) for a, b, c in factors] + [f(dy).sum(0)] for f in (torch.clone, torch.abs)]
    return list(zip(*sums, strict=True))


@FUNCTIONS
@pytest.mark.parametrize("shape", [MAIN, *SPEC.odd_shapes], ids=str)
def test_output_and_gradients_are_those_of_the_rounded_operands(function, shape):
    inputs, dy = make_inputs(shape)
    for got, (want, size) in zip(run(function, inputs, dy), exact(inputs, dy), strict=True):
        # Rounding of the result to bfloat16, twice with a bias; sums in float32, or fewer bits of the tensor cores.
        error = (got.double() - want).abs()
        assert (error <= 2**-7 * want.abs() + (1e-6 if DEVICE == "cpu" else 1e-3) * size).all()


@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25], ids=str)
def test_rounding_costs_what_four_significant_bits_cost_at_any_scale(factor):
    inputs, dy = make_inputs((65, 128, 64), factor)
    (x, weight), dy = (t.detach().double() for t in inputs[:2]), dy.double()
    y, dx, _ = run(linear_fp8_dynamic_ref, [*inputs[:2], None], dy.bfloat16())
    for got, a, b in ((y, x, weight.T), (dx, dy, weight)):
        error = (got.double() - a @ b).abs()
        # Either operand is off by 2^-4 of itself at most, if it is not tiny in its row, and by 2.6% in the mean square.
        assert (error <= (2**-3 + 2**-6) * (a.abs() @ b.abs())).all()
        relative = error.norm(dim=-1) / (a @ b).norm(dim=-1)
        assert 0.02 < relative.mean() < 0.045 and relative.max() < 0.1


def test_the_gradient_points_where_the_function_grows():
    """Finite differences that span many steps of the rounding, against dx and dweight."""
    inputs, dy = make_inputs((256, 64, 48))
    x, weight, bias = (t.detach().double() for t in inputs)

    def objective(x, weight):
        return (linear_fp8_dynamic_ref(x, weight, bias, torch.float64) * dy.double()).sum()

    for place, tensor in ((0, x), (1, weight)):
        gradient = run(linear_fp8_dynamic_ref, inputs, dy)[1 + place].double()
        direction = gradient / gradient.norm() * tensor.norm()
        ahead, behind = ([x, weight], [x, weight])
        ahead[place], behind[place] = tensor + direction, tensor - direction
        slope = (objective(*ahead) - objective(*behind)) / 2
        assert slope / (gradient * direction).sum() == pytest.approx(1, abs=0.03)


@FUNCTIONS
def test_rows_of_zeros_stay_zeros(function):
    inputs, dy = make_inputs(MAIN)
    with torch.no_grad():
        inputs[0][3] = inputs[1][5] = dy[7] = 0
        inputs[0][4] = 1e-33
    y, dx, dweight = run(function, [*inputs[:2], None], dy)
    assert (y[3] == 0).all() and (y[4] == 0).all() and (y[:, 5] == 0).all() and (dx[7] == 0).all()
    assert all(t.isfinite().all() for t in (y, dx, dweight)) and (y != 0).any()


@FUNCTIONS
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_what_is_not_finite_stays_visible(function, value):
    for place, seen in ((0, (0, 2)), (1, (0, 1)), (None, (1, 2, 3))):
        inputs, dy = make_inputs(MAIN)
        with torch.no_grad():
            (dy if place is None else inputs[place])[2, 9] = value
        results = run(function, inputs, dy)
        assert [i for i, t in enumerate(results) if not t.isfinite().all()] == list(seen)
        if place == 0:
            assert not results[0][2].isfinite().any() and results[0][3:].isfinite().all()


def test_shapes_and_dtypes_are_those_of_a_linear_under_autocast():
    linear = torch.nn.Linear(48, 32, bias=True, device=DEVICE)
    for x in (torch.randn(2, 3, 48, device=DEVICE), torch.randn(3, 2, 48, device=DEVICE).transpose(0, 1).bfloat16()):
        x.requires_grad_()
        y = linear_fp8_dynamic_ref(x, linear.weight, linear.bias)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            want = linear(x)
        assert y.dtype == want.dtype and y.shape == want.shape
        dy = torch.ones(1, 1, 32, device=DEVICE, dtype=y.dtype).expand_as(y)
        inputs = (x, linear.weight, linear.bias)
        for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and (a - b).norm() < 0.05 * b.norm()


def test_there_is_no_second_derivative():
    inputs, dy = make_inputs(MAIN)
    gradient = torch.autograd.grad(linear_fp8_dynamic_ref(*inputs), inputs[0], dy, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
