import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import backends, extension, linear, mlp_residual, skip_linear
from epg_fast.ops.linear_residual_norm import SPEC, linear_residual_norm, linear_residual_norm_ref
from tests.ops.kernel_checks import (
    DEVICE,
    GPU,
    assert_accurate,
    assert_capturable,
    assert_compiles_into_one_graph,
    assert_repeatable,
    needs_gemms,
    needs_triton,
    randn,
    shapes_of,
)

# dtypes of the residual, of h and its weight, of gate and modulation, and of the other parameters
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16 with fp32 parameters": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 on an fp32 residual": (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16, torch.float16, torch.float16),
}
SMALL = (2, 5, 40, 24)
KERNEL = functools.partial(linear_residual_norm, backend="triton")
# Backend "cuda": bfloat16, K and N multiples of 8
CUDA = functools.partial(linear_residual_norm, backend="cuda")
CUDA_SHAPES = [*SPEC.odd_shapes[:2], *(pytest.param(shape, marks=GPU) for shape in SPEC.shapes)]
FORMS = pytest.mark.parametrize("form", ["gated and modulated", "gated", "neither"])


def make_inputs(shape, dtypes=DTYPES["fp32"], form="gated and modulated"):
    """x, h, weight, bias, norm_weight, norm_bias, gate, shift, scale."""
    batch, tokens, k, n = shape
    residual, product, modulation, parameters = dtypes
    weight = randn(n, k, seed=1, requires_grad=False) * k**-0.5
    vectors = [randn(n, dtype=parameters, seed=seed) for seed in range(2, 5)]
    images = [randn(batch, 1, n, dtype=modulation, seed=seed) for seed in range(5, 8)]
    present = {"gated and modulated": 3, "gated": 1, "neither": 0}[form]
    images = images[:present] + [None] * (3 - present)
    x, h = randn(batch, tokens, n, dtype=residual), randn(batch, tokens, k, dtype=product, seed=9)
    return [x, h, weight.to(product).requires_grad_(), *vectors, *images]


def make_grads(shape):
    batch, tokens, _, n = shape
    return [randn(batch, tokens, n, seed=seed, requires_grad=False) for seed in (10, 11)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("dtypes", "form"),
    [
        *((dtypes, "gated and modulated") for dtypes in DTYPES),
        ("bf16 with fp32 parameters", "gated"),
        ("bf16 on an fp32 residual", "neither"),
    ],
)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, form):
    inputs = make_inputs(shape, DTYPES[dtypes], form)
    assert_accurate(KERNEL, linear_residual_norm_ref, inputs, make_grads(shape))


CUDA_FORMS = [
    ("bf16 with fp32 parameters", "gated and modulated"),
    ("bf16 on an fp32 residual", "gated and modulated"),
    ("bf16 with fp32 parameters", "gated"),
    ("bf16 on an fp32 residual", "neither"),
]


@pytest.mark.usefixtures("poisoned_empty", "gemms")
@pytest.mark.parametrize(("dtypes", "form"), CUDA_FORMS)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_product_of_the_extension_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, form):
    inputs = make_inputs(shape, DTYPES[dtypes], form)
    assert_accurate(CUDA, linear_residual_norm_ref, inputs, make_grads(shape))


@FORMS
@pytest.mark.usefixtures("poisoned_empty", "gemms")
@pytest.mark.skipif(DEVICE == "cuda", reason="only the formulas that stand for the products take float32")
def test_around_a_product_in_float32_nothing_is_rounded(form):
    def operator(x, h, weight, *others):
        images = [None if t is None else t.squeeze(1) for t in others[3:]]
        arguments = (x, h, weight, weight.detach(), *others[:3], *images, 1e-5, images[0] is not None, "cuda")
        return torch.ops.epg_fast.linear_residual_norm(*arguments)[:2]

    assert_accurate(operator, linear_residual_norm_ref, make_inputs(SMALL, form=form), make_grads(SMALL))


@pytest.mark.usefixtures("gemms")
@FORMS
def test_product_of_the_extension_compiles_into_one_graph_and_takes_what_a_network_has(form):
    """Autocast, a float32 weight, a bias that is not contiguous, and gate and modulation that are chunks of one."""
    x, h, weight, bias, *norm = make_inputs(SMALL, form="neither")[:6]
    bias = torch.stack([bias, bias], 1).detach().bfloat16()[:, 0].requires_grad_()
    chunks = randn(2, 1, 6 * 24, seed=8, requires_grad=False).chunk(6, -1)[2:5]
    present = {"gated and modulated": 3, "gated": 1, "neither": 0}[form]
    images = [chunk.requires_grad_() for chunk in chunks[:present]] + [None] * (3 - present)

    def call(*inputs, backend="cuda"):
        with torch.autocast(DEVICE, torch.bfloat16):
            return linear_residual_norm(*inputs, backend=backend)

    inputs = [x, h, weight, bias, *norm, *images]
    assert_compiles_into_one_graph(call, inputs, make_grads(SMALL))
    assert_accurate(call, functools.partial(call, backend="plain"), inputs, make_grads(SMALL))


@needs_gemms
def test_product_of_the_extension_repeats_its_bits_and_can_be_captured():
    shape = (5, 258, 64, 528)
    inputs = make_inputs(shape, DTYPES["bf16 with fp32 parameters"])
    assert_repeatable(CUDA, inputs, make_grads(shape))
    inputs = [tensor.detach() for tensor in inputs]
    assert_capturable(CUDA, inputs, [tensor + 1 for tensor in inputs])


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, tokens, width = 3, 6, 24
    expanded = torch.randn(1, tokens, width, device=DEVICE).expand(batch, -1, -1)
    transposed = torch.randn(batch, width, tokens, device=DEVICE).transpose(1, 2)
    gate, shift, scale = torch.randn(batch, 3 * width, device=DEVICE).chunk(3, 1)
    weight, (bias, a, b) = torch.randn(width, width, device=DEVICE).t(), torch.randn(width, 3, device=DEVICE).unbind(1)
    for x, h in ((expanded, transposed), (transposed, expanded)):
        tensors = (x, h, weight, bias, a, b, gate, shift, scale)
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        assert_accurate(KERNEL, linear_residual_norm_ref, inputs, [h, torch.ones((), device=DEVICE).expand(x.shape)])


@needs_triton
@pytest.mark.parametrize("frozen", [(1,), (2, 3), (6,), (0, 1, 2, 3, 4, 5, 7, 8)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen):
    inputs = make_inputs(SMALL)
    for i in frozen:
        inputs[i].requires_grad_(False)
    assert_accurate(KERNEL, linear_residual_norm_ref, inputs, make_grads(SMALL))
    with FlopCounterMode(display=False) as counter:
        sum(out.sum() for out in KERNEL(*inputs)).backward()
    products = 1 + inputs[1].requires_grad + inputs[2].requires_grad
    assert counter.get_total_flops() == products * SPEC.flops(SMALL)


@needs_triton
@pytest.mark.parametrize("used", [0, 1])
def test_either_result_alone_has_its_gradient(used):
    inputs = make_inputs(SMALL)
    wanted = inputs if used else [*inputs[:4], inputs[6]]
    got, want = (
        torch.autograd.grad(f(*inputs)[used].square().sum(), wanted) for f in (KERNEL, linear_residual_norm_ref)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_triton
@FORMS
def test_kernel_repeats_its_bits_and_compiles_into_one_graph(form):
    inputs = make_inputs(SMALL, DTYPES["bf16 on an fp32 residual"], form)
    assert_repeatable(KERNEL, inputs, make_grads(SMALL))
    assert_compiles_into_one_graph(KERNEL, inputs, make_grads(SMALL))


@needs_triton
@FORMS
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_operators_pass_opcheck(backend, form, request):
    if backend == "cuda":
        request.getfixturevalue("gemms")
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    *inputs, gate, shift, scale = make_inputs(SMALL, (dtype,) * 4, form)
    images = [None if t is None else t.detach().squeeze(1).requires_grad_() for t in (gate, shift, scale)]
    saving = gate is not None
    inputs = [*inputs[:3], inputs[2].detach(), *inputs[3:]]
    arguments = (*inputs, *images, 1e-5, saving, backend)
    torch.library.opcheck(torch.ops.epg_fast.linear_residual_norm.default, arguments)
    x, h, parameter, weight, bias, *norm = (tensor.detach() for tensor in inputs)
    gate, *modulation = (None if t is None else t.detach() for t in images)
    x_out, y, branch, *statistics = torch.ops.epg_fast.linear_residual_norm(
        x, h, parameter, weight, bias, *norm, gate, *modulation, 1e-5, saving, backend
    )
    saved = (x_out, branch, h, weight, torch.float64, bias, gate, *norm, *modulation, *statistics)
    for needed in ([True] * 3, [False, True, False]):
        torch.library.opcheck(torch.ops.epg_fast.linear_residual_norm_bwd.default, (x, y, *saved, *needed))


@needs_triton
def test_under_autocast_products_are_16_bit_and_the_weight_s_gradient_is_float32():
    inputs = make_inputs(SMALL)
    results = []
    for backend in ("triton", "plain"):
        with torch.autocast(DEVICE, torch.float16):
            x_out, y = linear_residual_norm(*inputs, backend=backend)
        assert (x_out.dtype, y.dtype) == (torch.float32, torch.float16)
        grads = [grad.to(out.dtype) for grad, out in zip(make_grads(SMALL), (x_out, y), strict=True)]
        results.append(torch.autograd.grad((x_out, y), inputs, grads))
    for got, want, tensor in zip(*results, inputs, strict=True):
        assert got.dtype == tensor.dtype
        # sums of at most 10 x 40 products, each rounded to 11 bits
        torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * want.abs().max().item())


@FORMS
def test_operator_on_the_cpu_is_the_reference_and_right_in_float64(monkeypatch, form):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [None if t is None else t.detach().cpu().double().requires_grad_() for t in make_inputs(SMALL, form=form)]
    *others, gate, shift, scale = inputs
    images = [None if tensor is None else tensor.squeeze(1) for tensor in (gate, shift, scale)]
    others = [*others[:3], others[2].detach(), *others[3:]]
    got = torch.ops.epg_fast.linear_residual_norm(*others, *images, 1e-5, gate is not None, "triton")[:2]
    want = linear_residual_norm_ref(*inputs)
    grads, given = [torch.randn(2, 5, 24).double() for _ in range(2)], [t for t in inputs if t is not None]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, given, grads), torch.autograd.grad(want, given, grads))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cublas"}, "got backend='cublas', wanted one of plain, triton, cuda"),
        ({"h": torch.zeros(2, 5, 39)}, r"got h of shape \(2, 5, 39\) and weight of shape \(24, 40\), wanted"),
        ({"x": torch.zeros(2, 4, 24)}, r"got x of shape \(2, 4, 24\), wanted \[2, 5, 24\]"),
        ({"bias": torch.zeros(40)}, r"got bias of shape \(40,\), wanted \[24\]"),
        ({"gate": torch.zeros(1, 24)}, r"got gate of shape \(1, 24\), wanted \[2, 24\] or \[2, 1, 24\]"),
        ({"scale": None}, "got no scale, wanted both shift and scale, or neither"),
        ({"h": torch.zeros(2, 5, 40).int()}, "got h in torch.int32, wanted a floating dtype"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    names = ("x", "h", "weight", "bias", "norm_weight", "norm_bias", "gate", "shift", "scale")
    arguments = dict(zip(names, (tensor.detach().cpu() for tensor in make_inputs(SMALL)), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_residual_norm(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 5, 40)}, "got h in torch.float32, wanted one of torch.bfloat16 for backend='cuda'"),
        ({"x": torch.zeros(2, 5, 24).half()}, "got x in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"weight": torch.zeros(40, 24).bfloat16().t()}, "got weight.*wanted it contiguous"),
        ({"gate": torch.zeros(2, 25)[:, :24]}, r"got gate with strides \(25, 1\), wanted contiguous rows"),
        ({}, "but the extension is not built"),
    ],
)
def test_backend_cuda_refuses_what_its_kernel_cannot_read(monkeypatch, change, message):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    names = ("x", "h", "weight", "bias", "norm_weight", "norm_bias", "gate", "shift", "scale")
    inputs = make_inputs(SMALL, DTYPES["bf16 with fp32 parameters"])
    arguments = dict(zip(names, (tensor.detach().cpu() for tensor in inputs), strict=True))
    with pytest.raises(ValueError, match=message):
        CUDA(**(arguments | change))
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="whose norm is Triton's, which is not installed"):
        CUDA(**arguments)


def make_linear_inputs(biased, weight_dtype=torch.float32):
    """h in float16 and float32 parameters, as autocast meets them."""
    vectors = [randn(24, seed=2)] if biased else []
    return [randn(2, 5, 40, dtype=torch.float16), randn(24, 40, dtype=weight_dtype, seed=1), *vectors]


def linear_of_casts(h, weight, bias=None):
    return F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_a_linear_of_a_float32_weight_is_the_product_of_casts_and_casts_none_of_its_gradients(biased, frozen):
    inputs, grads = make_linear_inputs(biased), [randn(2, 5, 24, seed=3, requires_grad=False)]
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    assert_accurate(linear, linear_of_casts, inputs, grads)
    assert_compiles_into_one_graph(linear, inputs, grads)
    with FlopCounterMode(display=False) as counter:
        linear(*inputs).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 40 * 24 * (3 if frozen is None else 2)
    assert inputs[1].grad is None or inputs[1].grad.dtype == torch.float32


def test_a_linear_has_no_second_derivative_that_would_be_wrong():
    h, weight = make_linear_inputs(False)
    (dh,) = torch.autograd.grad(linear(h, weight).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


def test_the_gradient_of_a_weight_passes_opcheck():
    dy, h = (randn(7, width, dtype=torch.float16, requires_grad=False) for width in (24, 40))
    torch.library.opcheck(torch.ops.epg_fast.weight_gradient.default, (dy, h, torch.float32))


def products_with_operands():
    """(name, function of weights and of copies of them, weights)."""
    half = {"dtype": torch.float16, "requires_grad": False}
    x, h, vector, square, wide = (
        randn(2, 5, 24, **half),
        randn(2, 5, 40, **half),
        randn(24),
        randn(24, 24),
        randn(24, 64),
    )
    norm = randn(24, seed=1), randn(24, seed=2)

    def mlp(weights, operands):
        return mlp_residual(x, x, weights[0], vector, weights[1], vector, None, "triton", operands)

    def skip(weights, operands):
        return skip_linear(x, h, weights[0], vector, *norm, backend="triton", operand=operands[0])

    def proj(weights, operands):
        return linear_residual_norm(x, x, weights[0], vector, *norm, backend="triton", operand=operands[0])[1]

    def qkv(weights, operands):
        return linear(x, weights[0], vector, operands[0])

    weights = {qkv: [square], proj: [square], mlp: [square, square.detach().flip(0)], skip: [wide]}
    return [pytest.param(function, weights, id=function.__name__) for function, weights in weights.items()]


@needs_triton
@pytest.mark.parametrize(("product", "weights"), products_with_operands())
def test_products_read_the_copy_of_their_weight_and_refuse_what_is_none(product, weights):
    copies = [weight.detach().half() for weight in weights]
    cast = product(weights, [None] * len(weights))
    assert torch.equal(product(weights, copies), cast)
    assert not torch.equal(product(weights, [copies[0] + 1, *copies[1:]]), cast)
    with pytest.raises(
        ValueError, match="got an operand of shape .* in torch.float32 .*, wanted a copy of the weight in"
    ):
        product(weights, [weights[0], *copies[1:]])
    with pytest.raises(ValueError, match=r"got an operand of shape \(2, .*leave it out"):
        product(weights, [copies[0][:2], *copies[1:]])
