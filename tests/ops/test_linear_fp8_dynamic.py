import pytest
import torch

from epg_fast.ops.fp8 import cpu_has_row_scales
from epg_fast.ops.linear_fp8_dynamic import SPEC, linear_fp8_dynamic, linear_fp8_dynamic_ref
from tests.ops.kernel_checks import DEVICE

MAIN = (33, 64, 48)
HAS_FP8 = cpu_has_row_scales() if DEVICE == "cpu" else torch.cuda.get_device_capability() >= (8, 9)


def scaled_mm(*inputs):
    """PyTorch's product, which torch 2.11 has on a GPU only."""
    return linear_fp8_dynamic(*inputs)


FUNCTIONS = pytest.mark.parametrize(
    "function",
    [
        linear_fp8_dynamic_ref,
        pytest.param(scaled_mm, marks=pytest.mark.skipif(not HAS_FP8, reason="PyTorch has no such product here")),
    ],
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


@pytest.mark.parametrize("factor", [1e-25, 1e-4, 1.0, 1e4, 1e25], ids=str)
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


def test_gradients_in_e4m3_are_nearer_than_in_e5m2():
    """Rows as heavy-tailed as gradients get: each value times a power of ten of its own."""
    weight = torch.randn(256, 128, dtype=torch.float64)
    for spread in (0.0, 1.0, 3.0):
        dy = torch.randn(64, 256, dtype=torch.float64) * 10 ** (spread * torch.randn(64, 256, dtype=torch.float64))
        errors = []
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = dy.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
            rounded = (dy / scale).float().to(dtype).double() * scale
            errors.append((((rounded - dy) @ weight).norm(dim=1) / (dy @ weight).norm(dim=1)).mean())
        assert errors[0] < 0.6 * errors[1]


@FUNCTIONS
def test_rows_of_zeros_stay_zeros(function):
    inputs, dy = make_inputs(MAIN)
    with torch.no_grad():
        inputs[0][3] = inputs[1][5] = dy[7] = 0
        inputs[0][4] = 1e-33
    y, dx, dweight, dbias = run(function, [*inputs[:2], None], dy) + [None]
    assert (y[3] == 0).all() and (y[4] == 0).all() and (y[:, 5] == 0).all() and (dx[7] == 0).all()
    assert all(t.isfinite().all() for t in (y, dx, dweight)) and (y != 0).any() and dbias is None


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "auto"}, "got backend='auto', wanted one of scaled_mm, plain"),
        ({"x": torch.zeros(5, 47)}, r"got x of shape \(5, 47\) and weight of shape \(32, 48\).*with the same K"),
        ({"bias": torch.zeros(48)}, r"got bias of shape \(48,\), wanted \[32\]"),
        ({"x": torch.zeros(5, 40), "weight": torch.zeros(32, 40)}, "got a weight of 32 x 40, wanted multiples of 16"),
        ({"weight": torch.zeros(24, 48), "bias": None}, "got a weight of 24 x 48, wanted multiples of 16"),
        ({"dtype": torch.float16}, "got dtype torch.float16, wanted torch.bfloat16 for backend='scaled_mm'"),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(change, message):
    good = {"x": torch.zeros(5, 48), "weight": torch.zeros(32, 48), "bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=message):
        linear_fp8_dynamic(**(good | change))


def test_traffic_model_counts_copies_in_fp8():
    rows, k, n = shape = (6, 16, 32)
    forward = 2 * rows * (k + n) + 4 * (n * k + n) + 2 * k * (rows + n)
    # dy for either product, x, weight; dx, dweight in 16 bits and converted, dbias; copies of dy and weight
    backward = 2 * (2 * rows * n + rows * k + rows * k + n * k) + 8 * n * k + 4 * n + 2 * n * (rows + k)
    assert SPEC.bytes(shape, 2) == forward and SPEC.bytes(shape, 2, backward=True) == backward
    assert (SPEC.flops(shape), SPEC.flops(shape, backward=True)) == (2 * rows * k * n, 4 * rows * k * n)
