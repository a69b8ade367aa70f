"""The matrix products that several operations' Triton kernels share, with what rides in their epilogues."""

import functools

import pytest
import torch
import torch.nn.functional as F

from epg_fast.ops.mlp_residual import linear_dgelu_cuda
from tests.ops.kernel_checks import (
    DEVICE,
    GEMMS,
    GPU,
    assert_accurate,
    assert_repeatable,
    needs_gemms,
    needs_triton,
    randn,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_empty")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Images, tokens, widths of x and skip, width of the result; the first row is EPG-XL's at batch 64, for GPUs.
SHAPES = [
    pytest.param((64, 258, 6336, 0, 1584), marks=GPU),
    (3, 17, 40, 0, 24),
    (2, 130, 72, 24, 136),
    (5, 1, 17, 0, 40),
    (1, 33, 16, 0, 11),
    (9, 129, 16, 0, 264),  # 10 x 3 tiles: a full group of rows of tiles, and one that is not
]
# For the extension, whose widths are multiples of 8; the last two are EPG-XL's, in tiles of both widths.
CUTLASS_SHAPES = [
    *((3, 17, 40, 0, 24), (2, 1, 8, 0, 8), (5, 130, 64, 0, 184), (9, 258, 72, 0, 176), (1, 2000, 64, 0, 528)),
    *((64, 258, 6336, 0, 1584), (64, 258, 3072, 0, 768)),
]
DGELU_SHAPES = [
    pytest.param((16512, 1584, 6336), marks=GPU),
    (51, 40, 24),
    (260, 72, 136),
    (5, 17, 40),
    (33, 16, 11),
    (1161, 16, 264),
]


def linear(*args, **kwargs):
    """Imported late: Triton is optional."""
    from epg_kernels._matmul import linear

    y, z = linear(*args, **kwargs)
    return y if z is None else (y, z)


def cutlass_linear(x, skip, weight, bias, residual=None, gate=None, gelu=False, tokens=None, **save):
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


def linear_ref(x, skip, weight, bias, residual=None, gate=None, gelu=False, save_preactivation=False, **_):
    x = x if skip is None else torch.cat([x, skip], dim=-1)
    z = F.linear(x, weight, bias.to(x.dtype))
    y = F.gelu(z) if gelu else z
    y = y if gate is None else gate.reshape(gate.shape[0], 1, -1) * y
    y = y if residual is None else (residual + y).to(residual.dtype)
    return (y, z) if save_preactivation else y


def linear_dgelu(dy, weight, z):
    from epg_kernels._matmul import linear_dgelu

    return linear_dgelu(dy, weight, z)


def linear_dgelu_ref(dy, weight, z):
    dz = torch.ops.aten.gelu_backward(dy @ weight, z)
    return dz, dz.flatten(0, -2).sum(0, dtype=torch.promote_types(dz.dtype, FP32))


def make_inputs(shape, dtype=FP32, residual=None, gate=None):
    """x, skip, weight, bias, residual and gate, the last two in the dtypes given or None."""
    batch, tokens, width, skip_width, n = shape
    values = functools.partial(randn, requires_grad=False)
    weight = (values(n, width + skip_width, seed=1) * (width + skip_width) ** -0.5).to(dtype)
    return [
        values(batch, tokens, width, dtype=dtype),
        values(batch, tokens, skip_width, dtype=dtype, seed=2) if skip_width else None,
        weight,
        values(n, seed=3),
        values(batch, tokens, n, dtype=residual, seed=4) if residual else None,
        values(batch, n, dtype=gate, seed=5) if gate else None,
    ]


def assert_linear_accurate(inputs, product=linear, **options):
    def kernel(x, skip, weight, bias, residual, gate):
        return product(x, skip, weight, bias, residual=residual, gate=gate, **options)

    def reference(*tensors):
        save = options.get("save_preactivation", False) or options.get("save_branch", False)
        return linear_ref(*tensors, gelu=options.get("gelu", False), save_preactivation=save)

    assert_accurate(kernel, reference, inputs, None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "residual", "gate"),
    [
        (FP32, FP32, FP32),
        (BF16, BF16, BF16),
        (BF16, FP32, BF16),  # under autocast, whose residual is float32 until the first long skip
        (BF16, FP32, None),
        (FP16, FP16, FP32),
        (FP16, BF16, FP16),
        (FP16, None, FP16),
    ],
    ids=str,
)
def test_gate_and_residual_ride_on_the_product_as_accurately_as_pytorch_adds_them(shape, dtype, residual, gate):
    inputs = make_inputs(shape, dtype, residual, gate)
    assert_linear_accurate(inputs, tokens=shape[1])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_branch_that_the_gate_scales_is_saved_in_the_dtype_of_the_product(shape, dtype):
    assert_linear_accurate(make_inputs(shape, dtype, FP32, dtype), save_branch=True)


def test_gelu_comes_before_the_gate_and_what_entered_it_is_saved():
    assert_linear_accurate(make_inputs(SHAPES[2], FP16, FP16, FP16), gelu=True, save_preactivation=True)


@needs_gemms
@pytest.mark.parametrize("save_branch", [False, True])
@pytest.mark.parametrize(("residual", "gate"), [(BF16, BF16), (FP32, BF16), (FP32, FP32), (FP32, None), (BF16, None)])
@pytest.mark.parametrize("shape", CUTLASS_SHAPES, ids=str)
def test_gate_and_residual_ride_on_the_product_of_the_extension(shape, residual, gate, save_branch):
    inputs = make_inputs(shape, BF16, residual, gate)
    assert_linear_accurate(inputs, cutlass_linear, save_branch=save_branch)


@needs_gemms
@pytest.mark.parametrize("shape", CUTLASS_SHAPES, ids=str)
def test_gelu_rides_on_the_product_of_the_extension_which_stores_what_enters_it_if_that_is_wanted(shape):
    inputs = make_inputs(shape, BF16)
    assert_linear_accurate(inputs, cutlass_linear, gelu=True, save_preactivation=True)
    kernel = functools.partial(cutlass_linear, *inputs, gelu=True)
    assert torch.equal(kernel(), kernel(save_preactivation=True)[0])


def gelu_of(product, z):
    """z comes in by the bias: infinity does not meet the zeros of the other operands."""
    x, weight = (torch.zeros(*size, 8, dtype=z.dtype, device=DEVICE) for size in ((2,), (len(z),)))
    return product(x, None, weight, z, gelu=True)[1]


@PRODUCTS
def test_gelu_in_16_bits_is_wrong_only_by_its_last_rounding_far_into_the_tail(product):
    dtype = FP16 if product is linear else BF16
    z = torch.linspace(-5.5, 8, 2000, dtype=dtype, device=DEVICE)
    y, exact = gelu_of(product, z).double(), 0.5 * z.double() * torch.special.erfc(-z.double() * 0.5**0.5)
    rounding = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps / 2
    assert ((y - exact).abs() <= 1.05 * rounding).all()


@PRODUCTS
def test_gelu_keeps_infinity_and_nan_and_reaches_its_limits(product):
    z = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, -20.0, -torch.inf, 1000.0, 0.0], device=DEVICE)
    wanted = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, 0.0, 0.0, 1000.0, 0.0], device=DEVICE)
    for dtype in (FP32, FP16) if product is linear else (BF16,):
        y = gelu_of(product, z.to(dtype))
        torch.testing.assert_close(y, wanted.to(dtype), rtol=0, atol=1e-6, equal_nan=True)


@PRODUCTS
@pytest.mark.parametrize("tokens", [1, 2, 7, 127, 128, 129, 258])
def test_every_row_meets_the_gate_of_its_own_image(tokens, product):
    batch, n = 2 + 300 // tokens, 184
    modulation = torch.arange(batch, device=DEVICE).float()[:, None] * 1000 + torch.arange(3 * n, device=DEVICE)
    x, weight = (torch.zeros(*size, 8, dtype=BF16, device=DEVICE) for size in ((batch, tokens), (n,)))
    residual = torch.zeros(batch, tokens, n, device=DEVICE)
    for gate in modulation[:, None].chunk(3, dim=-1):
        y = product(x, None, weight, torch.ones(n, device=DEVICE), residual=residual, gate=gate, tokens=tokens)
        assert torch.equal(y, gate.expand_as(y))


@pytest.mark.parametrize("n", [24, 25])
def test_tensors_that_are_not_contiguous_are_read_as_they_lie(n):
    batch, tokens, k = 3, 6, 40
    bias, gate = torch.randn(n, 2, device=DEVICE)[:, 0], torch.randn(n, batch, device=DEVICE).t()
    wide = torch.randn(batch, tokens, 2 * n, device=DEVICE)
    residuals = (wide[..., :n], wide[..., ::2], wide[..., 1 : n + 1], wide[:1, :, :n].expand(batch, -1, -1))
    for i, residual in enumerate((*residuals, torch.randn(batch, n, tokens, device=DEVICE).transpose(1, 2))):
        x = torch.randn(batch, k, tokens, device=DEVICE).transpose(1, 2)[:, :, i % 2 :]
        weight = torch.randn(x.shape[-1], n, device=DEVICE).t()
        assert_linear_accurate([x, None, weight, bias, residual, gate], save_branch=True)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", DGELU_SHAPES, ids=str)
def test_gradient_through_gelu_rides_on_the_product_with_the_sums_of_its_columns(shape, dtype):
    assert_accurate(linear_dgelu, linear_dgelu_ref, make_dgelu_inputs(shape, dtype), None)


def test_gradient_through_gelu_multiplies_float32_as_pytorch_is_told_to():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert_accurate(linear_dgelu, linear_dgelu_ref, make_dgelu_inputs(DGELU_SHAPES[2]), None)
        assert_linear_accurate(make_inputs(SHAPES[2], FP32, FP32, FP32), save_branch=True)
    finally:
        torch.set_float32_matmul_precision(precision)


def make_dgelu_inputs(shape, dtype=FP32):
    rows, width, n = shape
    weight = randn(width, n, seed=1, requires_grad=False) * width**-0.5
    tensors = (randn(rows, width, requires_grad=False), weight, randn(rows, n, seed=2, requires_grad=False) * 2)
    return [tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize("n", [24, 25])
def test_gradient_through_gelu_takes_tensors_that_are_not_contiguous(n):
    batch, tokens, k = 3, 6, 40
    wide = torch.randn(batch, tokens, 2 * n, device=DEVICE, dtype=FP16)
    zs = (wide[..., :n], wide[..., ::2], wide[..., 1 : n + 1], wide[:1, :, :n].expand(batch, -1, -1))
    for i, z in enumerate(zs):
        dy = torch.randn(batch, k, tokens, device=DEVICE).to(FP16).transpose(1, 2)
        weight = torch.randn(k, n + i, device=DEVICE).to(FP16)[:, i:]
        for matrix in (weight, weight.t().contiguous().t()):
            assert_accurate(linear_dgelu, linear_dgelu_ref, [dy, matrix, z], None)
    ones = torch.ones((), dtype=FP16, device=DEVICE).expand(batch, tokens, k)
    assert_accurate(linear_dgelu, linear_dgelu_ref, [ones, weight, z], None)


def test_gradient_through_gelu_reaches_its_limits_and_keeps_nan():
    z = torch.tensor([torch.nan, 1000.0, 20.0, 0.0, -20.0, -1000.0], dtype=FP16, device=DEVICE)
    ones = torch.ones(1, 1, dtype=FP16, device=DEVICE)
    wanted = torch.tensor([torch.nan, 1.0, 1.0, 0.5, 0.0, 0.0], dtype=FP16, device=DEVICE)
    dz, _ = linear_dgelu(ones, ones.expand(1, 6), z[None])
    torch.testing.assert_close(dz[0], wanted, rtol=0, atol=0, equal_nan=True)


def test_sums_that_nobody_needs_are_not_taken():
    from epg_kernels._matmul import linear_dgelu

    inputs = make_dgelu_inputs(DGELU_SHAPES[1])
    dz, sums = linear_dgelu(*inputs, sums=False)
    assert sums is None and torch.equal(dz, linear_dgelu(*inputs)[0])


def test_products_repeat_their_results_bit_for_bit():
    assert_repeatable(linear_dgelu, make_dgelu_inputs(DGELU_SHAPES[-1], FP16), None)
    x, _, weight, bias, residual, gate = make_inputs(SHAPES[-1], FP16, FP32, FP16)
    kernel = functools.partial(linear, residual=residual, gate=gate, save_branch=True)
    assert_repeatable(kernel, [x, None, weight, bias], None)


@needs_gemms
@pytest.mark.parametrize("shape", [(16512, 1584, 6336), *DGELU_SHAPES[1:3], DGELU_SHAPES[-1]], ids=str)
def test_gradient_through_gelu_rides_on_the_product_of_the_extension(shape):
    inputs = make_dgelu_inputs(shape, BF16)
    assert_accurate(linear_dgelu_cuda, linear_dgelu_ref, inputs, None)
    assert_repeatable(linear_dgelu_cuda, inputs, None)
    dz = torch.empty_like(inputs[2])
    torch.ops.epg_fast.linear_dgelu_out(dz, None, *inputs)
    assert torch.equal(dz, linear_dgelu_cuda(*inputs)[0])


@needs_gemms
def test_products_of_the_extension_run_on_the_current_stream():
    x, _, weight, bias, residual, _ = make_inputs((16, 256, 64, 0, 264), BF16, BF16)
    for options in ({"gelu": True}, {"residual": residual}):
        expected = cutlass_linear(x, None, weight, bias, **options)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            late = torch.zeros_like(x).copy_(x)
            y = cutlass_linear(late, None, weight, bias, **options)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(y, expected)


def refused_operands():
    """(operator of the extension, arguments that it takes, changes that it does not)."""
    x, _, weight, bias, residual, gate = make_inputs((3, 17, 40, 0, 24), BF16, BF16, BF16)
    y, bias = torch.empty_like(residual), bias.to(BF16)
    narrow = {"x": x[..., :36].contiguous(), "weight": weight[:, :36].contiguous()}
    yield (
        "linear_gelu_out",
        {"y": y, "z": None, "x": x, "weight": weight, "bias": bias},
        (
            {"x": x.transpose(0, 1).contiguous().transpose(0, 1)},
            narrow,
            {"weight": weight.half()},
            {"bias": bias.float()},
            {"y": y[:2]},
            {"z": y[:2]},
            {"y": y.float()},
            {"x": x[:0]},
            {"weight": weight.cpu()},
        ),
    )
    good = {"out": y, "branch": None, "x": residual, "gate": gate, "h": x, "weight": weight, "bias": bias}
    yield (
        "linear_gate_residual_out",
        good,
        (
            {"x": residual.transpose(0, 1).contiguous().transpose(0, 1)},
            {"x": residual.half()},
            {"x": residual.float()},
            {"gate": gate[:2]},
            {"gate": gate.t().contiguous().t()},
            {"gate": torch.zeros(3, 25, dtype=BF16, device=DEVICE)[:, 1:]},
            {"gate": gate.half()},
            {"h": x.flatten(0, 1)},
            {"h": x.float(), "weight": weight.float()},
            {"bias": bias.float()},
            {"out": y[:2]},
            {"branch": y[:2]},
            {"branch": y.float()},
            {"weight": weight.cpu()},
        ),
    )
    dy, weight, z = make_dgelu_inputs((51, 40, 24), BF16)
    sums = torch.empty(1, 256, device=DEVICE)
    yield (
        "linear_dgelu_out",
        {"dz": torch.empty_like(z), "sums": sums, "dy": dy, "weight": weight, "z": z},
        (
            {"dy": dy.half()},
            {"dy": dy[:50]},
            {"dy": dy.t().contiguous().t()},
            {"weight": weight.t().contiguous()},
            {"weight": weight.t().contiguous().t()},
            {"weight": weight.cpu()},
            {"weight": weight[:, :20].contiguous(), "z": z[:, :20].contiguous(), "dz": z[:, :20].contiguous()},
            {"z": z[:, :16]},
            {"z": z.float()},
            {"dz": z[:50].clone()},
            {"sums": torch.empty(1, 24, device=DEVICE)},
            {"sums": torch.empty(2, 256, device=DEVICE)},
            {"sums": sums.half()},
        ),
    )


@needs_gemms
def test_the_extension_itself_refuses_what_its_kernels_cannot_read():
    for name, good, changes in refused_operands():
        getattr(torch.ops.epg_fast, name)(**good)
        for change in changes:
            with pytest.raises(RuntimeError, match=name.removesuffix("_out")):
                getattr(torch.ops.epg_fast, name)(**(good | change))
