"""Matrix products with what rides in their epilogues: Triton's, which several operations share, and the extension's."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from epg_fast import ops
from epg_fast.ops.mlp_residual import linear_dgelu_cuda
from tests.ops.examples import BF16, EXAMPLES, FP16, FP32, Values
from tests.ops.kernel_checks import (
    DEVICE,
    GEMMS,
    GPU,
    assert_accurate,
    assert_same_bits,
    leaves_of,
    needs_gemms,
    needs_triton,
    run,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_empty")]
KERNELS = pytest.mark.kernels
# Images, tokens, widths of x and of the result.
SMALL, LARGE = (3, 17, 40, 24), (64, 258, 6336, 1584)
# In the last 10 x 3 tiles: a full group of rows of tiles, and one that is not.
ODD = [(2, 130, 72, 136), (5, 1, 17, 40), (1, 33, 16, 11), (9, 129, 16, 264)]
SHAPES = [SMALL, *(pytest.param(shape, marks=KERNELS) for shape in ODD)]
SHAPES.append(pytest.param(LARGE, marks=GPU))
# For the extension, whose widths are multiples of 8; the last two are EPG-XL's, in tiles of both widths.
CUTLASS_SHAPES = [SMALL, (2, 1, 8, 8), (5, 130, 64, 184), (9, 258, 72, 176), (1, 2000, 64, 528)]
CUTLASS_SHAPES += [LARGE, (64, 258, 3072, 768)]


@pytest.fixture(params=["small", "large"])
def tiles(request, monkeypatch):
    """With a single multiprocessor no product has too few tiles for large ones."""
    if request.param == "large":
        monkeypatch.setattr("epg_kernels._matmul.MULTIPROCESSORS", 1)


SKIP = EXAMPLES["skip_linear"]
each_tile = pytest.mark.usefixtures("tiles")


def linear(*, x, weight, bias, **options):
    """Imported late: Triton is optional."""
    from epg_kernels._matmul import linear

    y, z = linear(x, None, weight, bias, **options)
    return y if z is None else (y, z)


def cutlass_linear(*, x, weight, bias, residual=None, gate=None, gelu=False, tokens=None, **save):
    """The extension's products, as `linear` is called: with GELU, or onto a residual."""
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype if gelu else residual.dtype, device=DEVICE)
    z = torch.empty_like(y, dtype=x.dtype) if any(save.values()) else None
    if gelu:
        torch.ops.epg_fast.linear_gelu_out(y, z, x, weight, bias.to(x.dtype))
    else:
        gate = None if gate is None else gate.view(gate.shape[0], -1)
        torch.ops.epg_fast.linear_gate_residual_out(y, z, residual, gate, x, weight, bias.to(x.dtype))
    return y if z is None else (y, z)


PRODUCTS = pytest.mark.parametrize(
    "product", [linear, pytest.param(cutlass_linear, marks=GEMMS)], ids=["triton", "cuda"]
)


def plain_linear(*, x, weight, bias, residual=None, gate=None, gelu=False, save_preactivation=False, save_branch=False):
    z = F.linear(x, weight, bias.to(x.dtype))
    y = F.gelu(z) if gelu else z
    y = y if gate is None else gate.reshape(gate.shape[0], 1, -1) * y
    y = y if residual is None else (residual + y).to(residual.dtype)
    return (y, z) if save_preactivation or save_branch else y


def make_inputs(shape, dtype=FP32, residual=None, gate=None):
    """residual and gate: their dtypes, or None."""
    values, (batch, tokens, width, n) = Values(DEVICE, grad=False), shape
    made = {"x": values(batch, tokens, width, dtype=dtype)}
    made |= {"weight": values(n, width, dtype=dtype, scale=width**-0.5), "bias": values(n)}
    made |= {"residual": values(batch, tokens, n, dtype=residual)} if residual else {}
    return made | ({"gate": values(batch, n, dtype=gate)} if gate else {})


def linear_dgelu(*, dy, weight, z):
    from epg_kernels._matmul import linear_dgelu

    return linear_dgelu(dy, weight, z)


def plain_dgelu(*, dy, weight, z):
    dz = torch.ops.aten.gelu_backward(dy @ weight, z)
    return dz, dz.flatten(0, -2).sum(0, dtype=torch.promote_types(dz.dtype, FP32))


def make_dgelu_inputs(shape, dtype=FP32):
    values, (batch, tokens, width, n) = Values(DEVICE, grad=False), shape
    rows = batch * tokens
    weight = values(width, n, dtype=dtype, scale=width**-0.5)
    return {"dy": values(rows, width, dtype=dtype), "weight": weight, "z": values(rows, n, dtype=dtype, scale=2.0)}


# Of x, residual and gate; the second as under autocast, whose residual is float32 until the first long skip.
DTYPES = [(FP32, FP32, FP32), (BF16, FP32, BF16)]
MORE = [(BF16, BF16, BF16), (BF16, FP32, None), (FP16, FP16, FP32), (FP16, BF16, FP16), (FP16, None, FP16)]
GRID = [*itertools.product(ODD, DTYPES), *itertools.product([SMALL], MORE)]


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        *((SMALL, dtypes) for dtypes in DTYPES),
        *(pytest.param(*case, marks=KERNELS) for case in GRID),
        *(pytest.param(LARGE, dtypes, marks=GPU) for dtypes in DTYPES + MORE),
    ],
    ids=str,
)
@each_tile
def test_gate_and_residual_ride_on_the_product_and_the_branch_is_saved(shape, dtypes):
    inputs = make_inputs(shape, *dtypes)
    assert_accurate(linear, plain_linear, inputs)
    assert_accurate(linear, plain_linear, inputs | {"save_branch": True})


@each_tile
@pytest.mark.parametrize("shape", [SMALL, (2, 130, 40, 136)], ids=str)
def test_a_norm_rides_in_the_loads_whatever_the_tiles_hold_of_images(shape):
    example = EXAMPLES["norm_linear"]
    inputs = example.inputs(shape, "fp16", device=DEVICE)
    assert_accurate(functools.partial(example.call, "triton"), example.reference, inputs)


def test_gelu_comes_before_the_gate_and_what_entered_it_is_saved():
    inputs = make_inputs(SMALL, FP16, FP16, FP16) | {"gelu": True, "save_preactivation": True}
    assert_accurate(linear, plain_linear, inputs)


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=KERNELS), FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_through_gelu_rides_on_the_product_with_the_sums_of_its_columns(shape, dtype):
    assert_accurate(linear_dgelu, plain_dgelu, make_dgelu_inputs(shape, dtype))


def test_float32_is_multiplied_as_pytorch_is_told_to():
    precision, example = torch.get_float32_matmul_precision(), EXAMPLES["patch_embed"]
    torch.set_float32_matmul_precision("high")
    try:
        assert_accurate(linear_dgelu, plain_dgelu, make_dgelu_inputs(SMALL))
        assert_accurate(linear, plain_linear, make_inputs(SMALL, FP32, FP32, FP32))
        inputs = example.inputs((2, 3, 8, 4, 24), "fp32", device=DEVICE)
        tokens = [example.call(backend, **inputs) for backend in ("triton", "plain")]
        torch.testing.assert_close(*tokens, rtol=1e-2, atol=1e-2)
    finally:
        torch.set_float32_matmul_precision(precision)


def gelu_of(product, z):
    """z comes in by the bias: infinity does not meet the zeros of the other operands."""
    x, weight = (torch.zeros(*size, 8, dtype=z.dtype, device=DEVICE) for size in ((2,), (len(z),)))
    return product(x=x, weight=weight, bias=z, gelu=True)[1]


@PRODUCTS
def test_gelu_in_16_bits_is_wrong_only_by_its_last_rounding_far_into_the_tail(product):
    dtype = FP16 if product is linear else BF16
    z = torch.linspace(-5.5, 8, 2000, dtype=dtype, device=DEVICE)
    y, exact = gelu_of(product, z).double(), 0.5 * z.double() * torch.special.erfc(-z.double() * 0.5**0.5)
    rounding = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps / 2
    assert ((y - exact).abs() <= 1.05 * rounding).all()


@PRODUCTS
def test_gelu_and_its_gradient_reach_their_limits_and_keep_infinity_and_nan(product):
    z = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, -20.0, -torch.inf, 1000.0, 0.0], device=DEVICE)
    wanted = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, 0.0, 0.0, 1000.0, 0.0], device=DEVICE)
    for dtype in (FP32, FP16) if product is linear else (BF16,):
        y = gelu_of(product, z.to(dtype))
        torch.testing.assert_close(y, wanted.to(dtype), rtol=0, atol=1e-6, equal_nan=True)
    z = torch.tensor([torch.nan, 1000.0, 20.0, 0.0, -20.0, -1000.0], dtype=FP16, device=DEVICE)
    ones = torch.ones(1, 1, dtype=FP16, device=DEVICE)
    dz, _ = linear_dgelu(dy=ones, weight=ones.expand(1, 6), z=z[None])
    wanted = torch.tensor([torch.nan, 1.0, 1.0, 0.5, 0.0, 0.0], dtype=FP16, device=DEVICE)
    torch.testing.assert_close(dz[0], wanted, rtol=0, atol=0, equal_nan=True)


@PRODUCTS
@pytest.mark.parametrize("tokens", [7, *(pytest.param(n, marks=KERNELS) for n in (1, 2, 127, 128, 129, 258))])
def test_every_row_meets_the_gate_of_its_own_image(tokens, product):
    batch, n = 2 + 300 // tokens, 184
    modulation = torch.arange(batch, device=DEVICE).float()[:, None] * 1000 + torch.arange(3 * n, device=DEVICE)
    x, weight = (torch.zeros(*size, 8, dtype=BF16, device=DEVICE) for size in ((batch, tokens), (n,)))
    inputs = {"x": x, "weight": weight, "bias": torch.ones(n, device=DEVICE)}
    residual = torch.zeros(batch, tokens, n, device=DEVICE)
    for gate in modulation[:, None].chunk(3, dim=-1)[::2]:
        y = product(**inputs, residual=residual, gate=gate)
        assert torch.equal(y, gate.expand_as(y))


@pytest.mark.slow
@pytest.mark.parametrize("n", [24, pytest.param(25, marks=KERNELS)])
def test_tensors_that_are_not_contiguous_are_read_as_they_lie(n):
    batch, tokens, k = 3, 6, 40
    values = Values(DEVICE, grad=False)
    bias, gate, wide = values(n, 2)[:, 0], values(n, batch).t(), values(batch, tokens, 2 * n)
    layouts = (wide[..., :n], wide[..., ::2], wide[..., 1 : n + 1], wide[:1, :, :n].expand(batch, -1, -1))
    for i, residual in enumerate((*layouts, values(batch, n, tokens).mT)):
        x, weight = values(batch, k, tokens).mT[:, :, i % 2 :], values(n, k).t()[i % 2 :].t()
        inputs = {"x": x, "weight": weight, "bias": bias, "residual": residual, "gate": gate}
        assert_accurate(linear, plain_linear, inputs | {"save_branch": True})
        dy = values(batch, k, tokens, dtype=FP16).mT
        for matrix in (values(k, n + i, dtype=FP16)[:, i:], values(n, k, dtype=FP16).t()):
            assert_accurate(linear_dgelu, plain_dgelu, {"dy": dy, "weight": matrix, "z": residual.to(FP16)})


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 112, 129])
def test_the_long_skip_crosses_from_x_to_skip_at_any_width(width):
    """64 ends with a step of the K loop, 112 within one, and 129 leaves rows that TMA cannot read."""
    inputs = SKIP.inputs((1, 9, width, 72), "bf16 with fp32 parameters", "not normed", device=DEVICE)
    assert_accurate(functools.partial(SKIP.call, "triton"), SKIP.reference, inputs)


def test_the_long_skip_has_an_output_width_of_its_own():
    values = Values(DEVICE)
    inputs = {"x": values(2, 5, 40), "skip": values(2, 5, 24), "weight": values(56, 64)}
    inputs |= values.named("bias norm_weight norm_bias", 56)
    assert_accurate(functools.partial(SKIP.call, "triton"), SKIP.reference, inputs)


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_mlp_keeps_nothing_where_there_will_be_no_gradient(backend, request):
    if backend == "cuda":
        request.getfixturevalue("gemms")
    x, y, fc1, bias1, fc2, bias2, gate = (
        EXAMPLES["mlp_residual"].inputs((2, 5, 24, 40), "bf16 with fp32 parameters", device=DEVICE, grad=False).values()
    )
    arguments = (x, y, fc1, fc1, bias1, fc2, fc2, bias2, gate.squeeze(1), False, backend)
    assert [tensor.numel() for tensor in torch.ops.epg_fast.mlp_residual(*arguments)[1:]] == [0, 0, 0]


def test_a_linear_has_no_second_derivative_that_would_be_wrong():
    h, weight = Values(DEVICE)(2, 5, 40, dtype=FP16), Values(DEVICE)(24, 40)
    (dh,) = torch.autograd.grad(ops.linear(h, weight).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


def products_with_operands():
    """(function of weights and of copies of them, weights)."""
    values = Values(DEVICE)
    x, h = (values(2, 5, width, dtype=FP16, grad=False) for width in (24, 40))
    vector, square, wide, norm = values(24), values(24, 24), values(24, 64), (values(24), values(24))

    def qkv(weights, operands):
        return ops.linear(x, weights[0], vector, operands[0])

    def proj(weights, operands):
        return ops.linear_residual_norm(x, x, weights[0], vector, *norm, backend="triton", operand=operands[0])[1]

    def mlp(weights, operands):
        return ops.mlp_residual(x, x, weights[0], vector, weights[1], vector, None, "triton", operands)

    def skip(weights, operands):
        return ops.skip_linear(x, h, weights[0], vector, *norm, backend="triton", operand=operands[0])

    weights = {qkv: [square], proj: [square], mlp: [square, square.detach().flip(0)], skip: [wide]}
    return [pytest.param(function, given, id=function.__name__) for function, given in weights.items()]


@pytest.mark.parametrize(("product", "weights"), products_with_operands())
def test_products_read_the_copy_of_their_weight_and_refuse_what_is_none(product, weights):
    copies = [weight.detach().half() for weight in weights]
    cast = product(weights, [None] * len(weights))
    assert torch.equal(product(weights, copies), cast)
    assert not torch.equal(product(weights, [copies[0] + 1, *copies[1:]]), cast)
    with pytest.raises(ValueError, match="an operand of shape .* in torch.float32 .*, wanted a copy of the weight in"):
        product(weights, [weights[0], *copies[1:]])
    with pytest.raises(ValueError, match=r"got an operand of shape \(2, .*leave it out"):
        product(weights, [copies[0][:2], *copies[1:]])


@pytest.mark.slow
@pytest.mark.usefixtures("gemms")
@pytest.mark.parametrize("name", ["linear_residual_norm", "mlp_residual", "skip_linear"])
def test_products_of_the_extension_take_what_a_network_has(name):
    """Autocast, float32 weights, biases that are not contiguous, and gate and modulation that are chunks of one."""
    example = EXAMPLES[name]
    inputs = example.inputs((2, 5, 40, 24), "fp32", device=DEVICE)
    chunks = iter(torch.randn(2, 1, 3 * inputs["x"].shape[-1], device=DEVICE).chunk(3, -1))

    def as_in_a_network(key, tensor):
        if key.endswith("bias") and "norm" not in key:
            return torch.stack([tensor, tensor], 1).bfloat16()[:, 0]
        return next(chunks) if key in ("gate", "shift", "scale") else tensor

    inputs = {key: leaves_of(functools.partial(as_in_a_network, key), {0: t})[0] for key, t in inputs.items()}

    def call(backend, **given):
        with torch.autocast(DEVICE, BF16):
            return example.call(backend, **given)

    assert_accurate(functools.partial(call, "cuda"), functools.partial(call, "plain"), inputs)


@needs_gemms
@pytest.mark.parametrize("save_branch", [False, True])
@pytest.mark.parametrize(("residual", "gate"), [(BF16, BF16), (FP32, BF16), (FP32, FP32), (FP32, None), (BF16, None)])
@pytest.mark.parametrize("shape", CUTLASS_SHAPES, ids=str)
def test_gate_and_residual_ride_on_the_product_of_the_extension(shape, residual, gate, save_branch):
    inputs = make_inputs(shape, BF16, residual, gate) | {"save_branch": save_branch}
    assert_accurate(cutlass_linear, plain_linear, inputs)


@needs_gemms
@pytest.mark.parametrize("shape", CUTLASS_SHAPES, ids=str)
def test_gelu_and_its_gradient_ride_on_the_products_of_the_extension(shape):
    inputs = make_inputs(shape, BF16) | {"gelu": True}
    assert_accurate(cutlass_linear, plain_linear, inputs | {"save_preactivation": True})
    assert torch.equal(cutlass_linear(**inputs), cutlass_linear(**inputs, save_preactivation=True)[0])
    inputs = make_dgelu_inputs(shape, BF16)
    kernel = lambda **given: linear_dgelu_cuda(*given.values())  # noqa: E731
    assert_accurate(kernel, plain_dgelu, inputs)
    assert_same_bits(run(kernel, inputs), run(kernel, inputs))
    dz = torch.empty_like(inputs["z"])
    torch.ops.epg_fast.linear_dgelu_out(dz, None, *inputs.values())
    assert torch.equal(dz, kernel(**inputs)[0])


@needs_gemms
@pytest.mark.parametrize("width", [8, 56, 64, 72, 128, 136])
@pytest.mark.parametrize("skip_width", [8, 64, 72])
def test_the_extension_meets_every_column_of_x_and_of_skip_once(width, skip_width):
    tokens, n = 300, 528
    x, skip = (torch.ones(1, tokens, size, device=DEVICE).bfloat16() for size in (width, skip_width))
    weight = torch.cat([torch.ones(n, width), torch.full((n, skip_width), 0.25)], 1).to(DEVICE, BF16)
    z = ops.skip_linear(x, skip, weight, torch.arange(n, device=DEVICE).bfloat16(), backend="cuda")
    wanted = (width + 0.25 * skip_width + torch.arange(n, device=DEVICE).bfloat16().float()).bfloat16()
    assert torch.equal(z, wanted.expand_as(z))


@needs_gemms
def test_products_of_the_extension_run_on_the_current_stream():
    inputs = make_inputs((16, 256, 64, 264), BF16, BF16)
    residual, x = inputs.pop("residual"), inputs.pop("x")
    for options in ({"gelu": True}, {"residual": residual}):
        expected = cutlass_linear(x=x, **inputs, **options)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            late = torch.zeros_like(x).copy_(x)
            y = cutlass_linear(x=late, **inputs, **options)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(y, expected)


def operators():
    """(operator of the extension, arguments that it takes, changes of its own that it does not take)."""
    x, weight, bias, residual, gate = make_inputs(SMALL, BF16, BF16, BF16).values()
    bias, y, z = bias.to(BF16), torch.empty_like(residual), torch.empty_like(residual)
    good = {"y": y, "z": z, "x": x, "weight": weight, "bias": bias}
    narrow = {"x": x[..., :36].contiguous(), "weight": weight[:, :36].contiguous()}
    yield "linear_gelu_out", good, [narrow, {"bias": bias.float()}, {"y": y.float()}, {"x": x[:0]}]

    good = {"out": y, "branch": z, "x": residual, "gate": gate, "h": x, "weight": weight, "bias": bias}
    changes = [{"x": residual.float()}, {"gate": torch.zeros(3, 25, dtype=BF16, device=DEVICE)[:, 1:]}]
    changes += [{"h": x.flatten(0, 1)}, {"h": x.float(), "weight": weight.float()}, {"bias": bias.float()}]
    yield "linear_gate_residual_out", good, [*changes, {"branch": z.float()}]

    dy, matrix, z = make_dgelu_inputs(SMALL, BF16).values()
    good = {"dz": torch.empty_like(z), "sums": torch.empty(1, 256, device=DEVICE), "dy": dy, "weight": matrix, "z": z}
    part = z[:, :20].contiguous()
    changes = [{"weight": matrix[:, :20].contiguous(), "z": part, "dz": part}, {"weight": matrix.t().contiguous()}]
    changes += [{"sums": torch.empty(*size, device=DEVICE)} for size in ((1, 24), (2, 256))]
    yield "linear_dgelu_out", good, [*changes, {"z": z[:, :16]}, {"z": z.float()}]

    good = EXAMPLES["skip_linear"].inputs((2, 5, 40, 24), "bf16", "not normed", device=DEVICE, grad=False)
    x, _, weight, bias = good.values()
    narrow = {"x": x[..., :36].contiguous(), "skip": torch.zeros(2, 5, 28, device=DEVICE).bfloat16()}
    changes = [narrow, {"weight": weight[:, :40].contiguous()}, {"bias": bias.float()}]
    yield "skip_linear_out", good | {"z": torch.empty_like(x)}, changes

    good = EXAMPLES["linear_fp8"].inputs((32, 48, 24), "bf16", device=DEVICE)
    narrow = {name: good[name][:, :40].contiguous() for name in ("x", "weight")}
    changes = [narrow, {"bias": good["bias"].float()}]
    yield "linear_fp8_out", good | {"y": torch.empty(32, 24, dtype=BF16, device=DEVICE)}, changes


@needs_gemms
def test_the_extension_itself_refuses_what_its_kernels_cannot_read():
    """Of any tensor another dtype or device, a row less, and rows that are not contiguous."""
    for operator, good, changes in operators():
        getattr(torch.ops.epg_fast, operator)(**good)
        for name, tensor in good.items():
            if isinstance(tensor, torch.Tensor):
                changes += [{name: tensor.half()}, {name: tensor.cpu()}, {name: tensor[:-1]}]
                swapped = tensor if tensor.dim() < 2 else tensor.transpose(0, 1).contiguous().transpose(0, 1)
                changes += [] if swapped.is_contiguous() else [{name: swapped}]
        for change in changes:
            with pytest.raises(RuntimeError, match=operator.removesuffix("_out")):
                getattr(torch.ops.epg_fast, operator)(**(good | change))
