"""What is particular to matrix products: tiles, what rides in their epilogues and loads, and what they refuse."""

import functools
import itertools

import pytest
import torch

from epg_fast import ops
from tests.ops.examples import BF16, EXAMPLES, FP16, FP32, Values
from tests.ops.kernel_checks import (
    DEVICE,
    GEMMS,
    assert_accurate,
    assert_backend_accurate,
    leaves_of,
    needs_gemms,
    needs_triton,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_empty")]
# Images, tokens, and two widths. In the last 10 x 3 tiles: a full group of rows of tiles, and one that is not.
SHAPES = [(2, 130, 72, 136), (5, 1, 17, 40), (1, 33, 16, 11), (9, 129, 16, 264)]
# For the extension, whose widths are multiples of 8.
CUTLASS_SHAPES = [(3, 17, 40, 24), (2, 1, 8, 8), (5, 130, 64, 184), (9, 258, 72, 176), (1, 2000, 64, 528)]
BY_CUTLASS = ("linear_residual_norm", "mlp_residual", "skip_linear")
SKIP = EXAMPLES["skip_linear"]
KERNELS = pytest.mark.kernels
PRODUCTS = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=GEMMS)])


def zeros(*size, dtype=FP32):
    return torch.zeros(size, dtype=dtype, device=DEVICE)


# Index of the dtypes, and multiprocessors: with a single one no product has too few tiles for large ones, in 16 bits.
FP32_TILES, FEW_TILES, LARGE_TILES = (0, 132), (1, 132), (1, 1)
NAMES = ("linear_residual", "norm_linear", "mlp_residual")
GRID = [*itertools.product(NAMES, SHAPES[:-1], (FP32_TILES, FEW_TILES, LARGE_TILES))]
GRID += [(name, SHAPES[-1], LARGE_TILES) for name in NAMES]


@pytest.mark.parametrize(
    ("name", "shape", "tiles"),
    [
        *((name, (2, 130, 40, 136), LARGE_TILES) for name in NAMES[:2]),
        *(pytest.param(*case, marks=KERNELS) for case in GRID),
    ],
    ids=str,
)
def test_a_product_is_accurate_whatever_its_tiles_hold_of_images(name, shape, tiles, monkeypatch):
    """Gate, residual and GELU ride on it, the gradient through GELU with sums of its columns; a norm in the loads."""
    monkeypatch.setattr("epg_kernels._matmul.MULTIPROCESSORS", tiles[1])
    example = EXAMPLES[name]
    assert_backend_accurate(example, "triton", example.inputs(shape, list(example.dtypes)[tiles[0]]))


@needs_gemms
@pytest.mark.parametrize("dtypes", [0, 1])
@pytest.mark.parametrize("shape", CUTLASS_SHAPES, ids=str)
@pytest.mark.parametrize(("name", "form"), [(name, form) for name in BY_CUTLASS for form in EXAMPLES[name].forms])
def test_a_product_of_the_extension_is_accurate_whatever_its_tiles_hold(name, form, shape, dtypes):
    example = EXAMPLES[name]
    assert_backend_accurate(example, "cuda", example.inputs(shape, example.cuda_dtypes[dtypes], form))


def test_float32_is_multiplied_as_pytorch_is_told_to():
    precision, mlp, embed = torch.get_float32_matmul_precision(), EXAMPLES["mlp_residual"], EXAMPLES["patch_embed"]
    torch.set_float32_matmul_precision("high")
    try:
        assert_backend_accurate(mlp, "triton", mlp.inputs((3, 17, 40, 24), "fp32"))
        inputs = embed.inputs((2, 3, 8, 4, 24), "fp32")
        tokens = [embed.call(backend, **inputs) for backend in ("triton", "plain")]
        torch.testing.assert_close(*tokens, rtol=1e-2, atol=1e-2)
    finally:
        torch.set_float32_matmul_precision(precision)


def gelu_of(z, backend):
    """z comes in by the bias: infinity does not meet the zeros of the other operands."""
    x, weight = zeros(1, 2, 8, dtype=z.dtype), zeros(len(z), 8, dtype=z.dtype)
    if backend == "triton":
        vector = zeros(8)
        return ops.norm_linear(x, ops.row_statistics(x), vector, vector, weight, z, gelu=True, backend="triton")[0, 1]
    y = torch.empty(1, 2, len(z), dtype=z.dtype, device=DEVICE)
    torch.ops.epg_fast.linear_gelu_out(y, None, x, weight, z)
    return y[0, 1]


@PRODUCTS
def test_gelu_in_16_bits_is_wrong_only_by_its_last_rounding_far_into_the_tail(backend):
    z = torch.linspace(-5.5, 8, 2000, dtype=FP16 if backend == "triton" else BF16, device=DEVICE)
    y, exact = gelu_of(z, backend).double(), 0.5 * z.double() * torch.special.erfc(-z.double() * 0.5**0.5)
    rounding = exact.abs().clamp_min(torch.finfo(z.dtype).tiny) * torch.finfo(z.dtype).eps / 2
    assert ((y - exact).abs() <= 1.05 * rounding).all()


@PRODUCTS
def test_gelu_and_its_gradient_reach_their_limits_and_keep_infinity_and_nan(backend):
    z = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, -20.0, -torch.inf, 1000.0, 0.0], device=DEVICE)
    wanted = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, 0.0, 0.0, 1000.0, 0.0], device=DEVICE)
    for dtype in (FP32, FP16) if backend == "triton" else (BF16,):
        y = gelu_of(z.to(dtype), backend)
        torch.testing.assert_close(y, wanted.to(dtype), rtol=0, atol=1e-6, equal_nan=True)
    dtype = FP16 if backend == "triton" else BF16
    z = torch.tensor([torch.nan, 1000.0, 20.0, 0.0, -20.0, -1000.0, 1000.0, 20.0], dtype=dtype, device=DEVICE)
    ones = torch.ones(8, 8, dtype=dtype, device=DEVICE)
    tokens = zeros(1, 1, 8, dtype=dtype)
    out = ops.mlp_residual(tokens, tokens, 0 * ones, z.requires_grad_(), ones, 0 * ones[0], backend=backend)
    (dz,) = torch.autograd.grad(out[0, 0, 0], z)
    wanted = torch.tensor([torch.nan, 1.0, 1.0, 0.5, 0.0, 0.0, 1.0, 1.0], dtype=dtype, device=DEVICE)
    torch.testing.assert_close(dz, wanted, rtol=0, atol=0, equal_nan=True)


@PRODUCTS
@pytest.mark.parametrize("tokens", [7, *(pytest.param(n, marks=KERNELS) for n in (1, 2, 127, 128, 129, 258))])
def test_every_row_meets_the_gate_of_its_own_image(tokens, backend):
    batch, n = 2 + 150 // tokens, 184
    modulation = torch.arange(batch, device=DEVICE).float()[:, None] * 1000 + torch.arange(3 * n, device=DEVICE)
    h, weight = zeros(batch, tokens, 8, dtype=BF16), zeros(n, 8, dtype=BF16)
    vector = torch.ones(n, device=DEVICE)
    for gate in modulation[:, None].chunk(3, dim=-1)[::2]:
        given = zeros(batch, tokens, n), h, weight, vector, vector, vector, gate
        x, _ = ops.linear_residual_norm(*given, backend=backend)
        assert torch.equal(x, gate.expand_as(x))


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 112, 129])
def test_the_long_skip_crosses_from_x_to_skip_at_any_width(width):
    """64 ends with a step of the K loop, 112 within one, and 129 leaves rows that TMA cannot read."""
    inputs = SKIP.inputs((1, 9, width, 72), "bf16 with fp32 parameters", "not normed")
    assert_backend_accurate(SKIP, "triton", inputs)


def test_the_long_skip_has_an_output_width_of_its_own():
    values = Values(DEVICE)
    inputs = {"x": values(2, 5, 40), "skip": values(2, 5, 24), "weight": values(56, 64)}
    inputs |= values.named("bias norm_weight norm_bias", 56)
    assert_backend_accurate(SKIP, "triton", inputs)


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_mlp_keeps_nothing_where_there_will_be_no_gradient(backend, request):
    if backend == "cuda":
        request.getfixturevalue("gemms")
    x, y, fc1, bias1, fc2, bias2, gate = (
        EXAMPLES["mlp_residual"].inputs((2, 5, 24, 40), "bf16 with fp32 parameters", grad=False).values()
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
    inputs = example.inputs((2, 5, 40, 24), "fp32")
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
@pytest.mark.parametrize("name", BY_CUTLASS)
def test_products_of_the_extension_run_on_the_current_stream(name):
    example = EXAMPLES[name]
    inputs = example.inputs((16, 256, 64, 264), example.cuda_dtypes[0], grad=False)
    expected, stream, x = example.call("cuda", **inputs), torch.cuda.Stream(), inputs["x"]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        result = example.call("cuda", **inputs | {"x": torch.zeros_like(x).copy_(x)})
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def operators():
    """(operator of the extension, arguments that it takes, changes of its own that it does not take)."""
    inputs = EXAMPLES["mlp_residual"].inputs((3, 17, 40, 24), "bf16 with fp32 parameters", grad=False)
    x, weight, bias = inputs["y"], inputs["fc1_weight"], inputs["fc1_bias"].to(BF16)
    y, z, residual = Values(DEVICE, grad=False).named("y z residual", 3, 17, 24, dtype=BF16).values()
    good = {"y": y, "z": z, "x": x, "weight": weight, "bias": bias}
    narrow = {"x": x[..., :36].contiguous(), "weight": weight[:, :36].contiguous()}
    yield "linear_gelu_out", good, [narrow, {"bias": bias.float()}, {"y": y.float()}, {"x": x[:0]}]

    good = {"out": y, "branch": z, "x": residual, "gate": y[:, 0].contiguous(), "h": x, "weight": weight, "bias": bias}
    changes = [{"x": residual.float()}, {"gate": zeros(3, 25, dtype=BF16)[:, 1:]}, {"branch": z.float()}]
    changes += [{"h": x.flatten(0, 1)}, {"h": x.float(), "weight": weight.float()}, {"bias": bias.float()}]
    yield "linear_gate_residual_out", good, changes

    dy, weight, z, dz = x.flatten(0, 1), weight.t().contiguous(), z.flatten(0, 1), y.flatten(0, 1).clone()
    good = {"dz": dz, "sums": zeros(1, 256), "dy": dy, "weight": weight, "z": z}
    part = z[:, :20].contiguous()
    changes = [{"weight": weight[:, :20].contiguous(), "z": part, "dz": part}, {"weight": weight.t().contiguous()}]
    changes += [{"sums": zeros(1, 24)}, {"sums": zeros(2, 256)}, {"z": z[:, :16]}, {"z": z.float()}]
    yield "linear_dgelu_out", good, changes

    good = SKIP.inputs((2, 5, 40, 24), "bf16", "not normed", grad=False)
    x, _, weight, bias = good.values()
    narrow = {"x": x[..., :36].contiguous(), "skip": zeros(2, 5, 28, dtype=BF16)}
    changes = [narrow, {"weight": weight[:, :40].contiguous()}, {"bias": bias.float()}]
    yield "skip_linear_out", good | {"z": torch.empty_like(x)}, changes

    good = EXAMPLES["linear_fp8"].inputs((32, 48, 24), "bf16")
    narrow = {name: good[name][:, :40].contiguous() for name in ("x", "weight")}
    yield "linear_fp8_out", good | {"y": zeros(32, 24, dtype=BF16)}, [narrow, {"bias": good["bias"].float()}]


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
