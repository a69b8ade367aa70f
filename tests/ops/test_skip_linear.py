import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import backends, extension
from epg_fast.ops.layer_norm_modulate import layer_norm_modulate_fp8
from epg_fast.ops.skip_linear import SPEC, skip_linear, skip_linear_ref, skip_norms_fp8
from tests.ops.kernel_checks import (
    DEVICE,
    GPU,
    assert_accurate,
    assert_capturable,
    assert_compiles_into_one_graph,
    assert_repeatable,
    comparable_fp8,
    needs_gemms,
    needs_triton,
    randn,
    run,
    shapes_of,
)

# dtypes of x, of skip, of weight, and of the other parameters
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16 with fp32 parameters": (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16 with fp32 skip": (torch.float16, torch.float32, torch.float16, torch.float32),
}
SMALL = (2, 5, 40, 24)
KERNEL = functools.partial(skip_linear, backend="triton")
# Backend "cuda": 16-bit dtypes, all widths multiples of 8
CUDA = functools.partial(skip_linear, backend="cuda")
CUDA_DTYPES = {name: dtypes for name, dtypes in DTYPES.items() if dtypes[0] == torch.bfloat16}
CUDA_SHAPES = [(3, 17, 40, 24), (1, 5, 72, 40), (1, 1, 8, 8)]
CUDA_SHAPES += [pytest.param(shape, marks=GPU) for shape in (*SPEC.shapes, (2, 130, 176, 64), (5, 258, 264, 8))]
NORMED = pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])


def make_inputs(shape, dtypes=DTYPES["fp32"], normed=True):
    batch, tokens, width, skip_width = shape
    x, skip = randn(batch, tokens, width, dtype=dtypes[0]), randn(batch, tokens, skip_width, dtype=dtypes[1])
    weight = randn(width, width + skip_width, dtype=dtypes[2], seed=1, requires_grad=False)
    vectors = [randn(width, dtype=dtypes[3], seed=seed) for seed in range(2, 5 if normed else 3)]
    return [x, skip, (weight * (width + skip_width) ** -0.5).requires_grad_(), *vectors]


def make_grads(shape):
    return [randn(*shape[:3], seed=5, requires_grad=False)]


def of_operator(inputs):
    """The public function's inputs as the operator takes them: the parameter, then the weight that products read."""
    return [*inputs[:3], inputs[2].detach(), *inputs[3:]]


def of_backward(inputs):
    """The operator's inputs as its backward pass takes them."""
    return [*inputs[:2], inputs[3], inputs[2].dtype, *inputs[4:]]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@NORMED
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, normed):
    assert_accurate(KERNEL, skip_linear_ref, make_inputs(shape, dtypes, normed), make_grads(shape))


@needs_triton
@pytest.mark.parametrize("width", [64, 112, 129])
def test_kernel_crosses_from_x_to_skip_at_any_width(width):
    """64 ends with a step of the K loop, 112 within one, and 129 leaves rows that TMA cannot read."""
    shape = (1, 9, width, 72)
    dtypes = DTYPES["bf16 with fp32 parameters"]
    assert_accurate(KERNEL, skip_linear_ref, make_inputs(shape, dtypes, normed=False), make_grads(shape))


@needs_triton
def test_kernel_takes_an_output_width_that_is_not_that_of_x():
    x, skip = randn(2, 5, 40), randn(2, 5, 24)
    inputs = [x, skip, randn(56, 64), *(randn(56, seed=seed) for seed in (1, 2, 3))]
    assert_accurate(KERNEL, skip_linear_ref, inputs, [randn(2, 5, 56, seed=4, requires_grad=False)])


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, tokens, width, skip_width = 3, 6, 40, 24
    expanded = torch.randn(1, tokens, width, device=DEVICE).expand(batch, -1, -1)
    transposed = torch.randn(batch, width, tokens, device=DEVICE).transpose(1, 2)
    cropped = torch.randn(batch, tokens + 2, width, device=DEVICE)[:, 2:]
    every_other = torch.randn(batch, tokens, 2 * width, device=DEVICE)[..., ::2]
    bias, norm_weight, norm_bias = torch.randn(width, 3, device=DEVICE).unbind(1)
    layouts = (expanded, transposed, cropped, every_other)
    for i, (x, other) in enumerate(zip(layouts, layouts[::-1], strict=True)):
        shape = (width, width + skip_width)
        weight = torch.randn(*shape[::-1], device=DEVICE).t() if i % 2 else torch.randn(shape, device=DEVICE)
        norm = (norm_weight, norm_bias) if i < 2 else ()
        inputs = [t.detach().requires_grad_() for t in (x, other[..., :skip_width], weight, bias, *norm)]
        assert_accurate(KERNEL, skip_linear_ref, inputs, [other])
        assert_accurate(KERNEL, skip_linear_ref, inputs, [torch.ones((), device=DEVICE).expand(x.shape)])


def with_next_norm(function, modulated=True):
    """`function` of x, skip, weight, bias, both norms' parameters and the second one's shift and scale."""
    return lambda *inputs: function(*inputs[:6], next_norm=inputs[6:] if modulated else (*inputs[6:], None, None))


def make_inputs_of_two_norms(shape, dtypes, modulated=True):
    batch, _, width, _ = shape
    inputs = make_inputs(shape, dtypes) + [randn(width, dtype=dtypes[3], seed=seed) for seed in (6, 7)]
    return inputs + [randn(batch, 1, width, dtype=dtypes[0], seed=seed) for seed in (8, 9)] * modulated


def grads_of_two_norms(shape):
    return [*make_grads(shape), randn(*shape[:3], seed=10, requires_grad=False)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("dtypes", "modulated"), [*((dtypes, True) for dtypes in DTYPES), ("bf16", False)])
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_the_next_norm_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, modulated):
    dtypes = DTYPES[dtypes]
    kernel, reference = (with_next_norm(function, modulated) for function in (KERNEL, skip_linear_ref))
    assert_accurate(kernel, reference, make_inputs_of_two_norms(shape, dtypes, modulated), grads_of_two_norms(shape))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
def test_both_norms_alone_with_the_second_in_fp8_are_a_norm_and_layer_norm_modulate_fp8_of_it(modulated):
    _, _, _, _, *norms = (t.detach() for t in make_inputs_of_two_norms(SMALL, DTYPES["fp32"], modulated))
    norm, after = norms[:2], (*norms[2:], *([] if modulated else [None, None]))
    z = randn(*SMALL[:3], requires_grad=False)
    y, rows, scale = skip_norms_fp8(z, *norm, after, backend="triton")
    torch.testing.assert_close(y, F.layer_norm(z, z.shape[-1:], *norm), rtol=1e-5, atol=1e-5)
    wanted, wanted_scale = layer_norm_modulate_fp8(y, *after)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
    rows, wanted = (tensor.float()[comparable_fp8(wanted)] for tensor in (rows, wanted))
    # A float32 rounding can move a value across the boundary between two neighbouring FP8 numbers.
    assert (rows != wanted).sum() <= 2
    torch.testing.assert_close(rows, wanted, rtol=0.13, atol=2**-9)
    torch.library.opcheck(torch.ops.epg_fast.skip_norms_fp8.default, (z, *norm, *after, 1e-5))


def test_the_norms_in_fp8_on_the_cpu_are_the_reference_and_have_no_gradient(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    norms = [tensor.cpu() for tensor in make_inputs_of_two_norms(SMALL, DTYPES["fp32"])[4:]]
    z = torch.randn(SMALL[:3])
    with pytest.raises(ValueError, match="skip_norms_fp8: got a tensor that requires a gradient"):
        skip_norms_fp8(z, *norms[:2], norms[2:])
    with torch.no_grad():
        given = *norms[:4], *(tensor.squeeze(1) for tensor in norms[4:])
        got = torch.ops.epg_fast.skip_norms_fp8(z, *given, 1e-5)
        torch.testing.assert_close(got, skip_norms_fp8(z, *norms[:2], norms[2:]))
    with pytest.raises(ValueError, match=r"skip_norms_fp8: got x of shape \(5, 40\), wanted"):
        skip_norms_fp8(z[0], *norms[:2], norms[2:])


@needs_triton
def test_the_next_norm_passes_opcheck_repeats_its_bits_and_compiles_into_one_graph():
    dtypes = DTYPES["bf16 with fp32 parameters"]
    inputs, grads = make_inputs_of_two_norms(SMALL, dtypes), grads_of_two_norms(SMALL)
    assert_repeatable(with_next_norm(KERNEL), inputs, grads)
    assert_compiles_into_one_graph(with_next_norm(KERNEL), inputs, grads)
    inputs = make_inputs_of_two_norms(SMALL, DTYPES["fp32"])
    inputs = of_operator([*inputs[:8], *(tensor.detach().squeeze(1).requires_grad_() for tensor in inputs[8:])])
    torch.library.opcheck(torch.ops.epg_fast.skip_linear.default, (*inputs, 1e-5))
    detached = [tensor.detach() for tensor in inputs]
    _, _, *saved = torch.ops.epg_fast.skip_linear(*detached, 1e-5)
    arguments = (*grads, *of_backward(detached), *saved, *[True] * 4)
    torch.library.opcheck(torch.ops.epg_fast.skip_linear_bwd.default, arguments)


@needs_triton
def test_either_result_of_two_norms_alone_has_its_gradient():
    inputs = make_inputs_of_two_norms(SMALL, DTYPES["fp32"])
    for used in (0, 1):
        wanted = inputs if used else inputs[:6]
        got, want = (
            torch.autograd.grad(with_next_norm(function)(*inputs)[used].square().sum(), wanted)
            for function in (KERNEL, skip_linear_ref)
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    shape = (2, 150, 40, 24)
    assert_repeatable(KERNEL, make_inputs(shape), make_grads(shape))


@needs_triton
@NORMED
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen, normed):
    inputs = make_inputs(SMALL, normed=normed)
    for i in frozen:
        inputs[i].requires_grad_(False)
    assert_accurate(KERNEL, skip_linear_ref, inputs, make_grads(SMALL))
    with FlopCounterMode(display=False) as counter:
        KERNEL(*inputs).sum().backward()
    batch, tokens, width, skip_width = SMALL
    needs_x, needs_skip, needs_weight = (tensor.requires_grad for tensor in inputs[:3])
    columns = width * (1 + needs_x + needs_weight) + skip_width * (1 + needs_skip + needs_weight)
    assert counter.get_total_flops() == 2 * batch * tokens * width * columns


@needs_triton
@NORMED
def test_operators_pass_opcheck(normed):
    inputs = of_operator(make_inputs(SMALL, normed=normed))
    arguments = (*inputs, *([None] * 4 if normed else [None] * 6))
    torch.library.opcheck(torch.ops.epg_fast.skip_linear.default, (*arguments, 1e-5))
    detached = [None if tensor is None else tensor.detach() for tensor in arguments]
    y, _, *saved = torch.ops.epg_fast.skip_linear(*detached, 1e-5)
    for needed in ([True, True, True, True], [True, False, False, True]):
        torch.library.opcheck(
            torch.ops.epg_fast.skip_linear_bwd.default,
            (torch.randn_like(y), None, *of_backward(detached), *saved, *needed),
        )


@needs_triton
@NORMED
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_compiles_into_one_graph(dtypes, normed):
    assert_compiles_into_one_graph(KERNEL, make_inputs(SMALL, dtypes, normed), make_grads(SMALL))


@needs_triton
@NORMED
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_autocast_treats_it_as_a_linear_layer_and_a_norm(backend, normed):
    linear = nn.Linear(64, 40).to(DEVICE)
    norm = nn.LayerNorm(40).to(DEVICE)
    x, skip = randn(2, 5, 40), randn(2, 5, 24, dtype=torch.bfloat16)
    parameters = [linear.weight, linear.bias, *(norm.parameters() if normed else [])]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = skip_linear(x, skip, *parameters, backend=backend)
        wanted = linear(torch.cat([x, skip], dim=-1))
    assert y.dtype == wanted.dtype == torch.bfloat16
    if normed:
        wanted = norm(wanted.float()).to(y.dtype)
    # A product that rounds the other way moves a value by one step of bfloat16, and the norm of it by a little more.
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    dy = randn(*y.shape, dtype=y.dtype, seed=9, requires_grad=False)
    grads = torch.autograd.grad(y, (x, skip, *parameters), dy)
    wanted_grads = torch.autograd.grad(wanted, (x, skip, *parameters), dy)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == wanted_grad.dtype
        torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=2e-2 * wanted_grad.abs().max().item())


@NORMED
def test_operator_on_the_cpu_is_the_reference(monkeypatch, normed):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL, normed=normed)]
    dy = torch.randn(SMALL[:3])
    arguments = (*of_operator(inputs), *([None] * 4 if normed else [None] * 6))
    y = torch.ops.epg_fast.skip_linear(*arguments, 1e-5)[0]
    (reference,), reference_gradients = run(skip_linear_ref, inputs, [dy])
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), reference_gradients)


def test_reference_is_two_products_and_a_norm():
    x, skip, weight, bias, norm_weight, norm_bias = (tensor.double() for tensor in make_inputs(SMALL))
    z = x @ weight[:, :40].t() + skip @ weight[:, 40:].t() + bias
    torch.testing.assert_close(skip_linear(x, skip, weight, bias), z)
    wanted = F.layer_norm(z, (40,), norm_weight, norm_bias, 0.1)
    torch.testing.assert_close(skip_linear(x, skip, weight, bias, norm_weight, norm_bias, 0.1), wanted)


@NORMED
def test_reference_gradients_are_right_in_float64(normed):
    inputs = [tensor.detach().double().requires_grad_() for tensor in make_inputs((2, 3, 4, 2), normed=normed)]
    assert torch.autograd.gradcheck(skip_linear_ref, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cublas"}, "got backend='cublas', wanted one of plain, triton, cuda"),
        ({"x": torch.zeros(5, 40)}, r"got x of shape \(5, 40\) and skip of shape \(2, 5, 24\), wanted \[B, L, D\] and"),
        ({"skip": torch.zeros(2, 4, 24)}, r"skip of shape \(2, 4, 24\).*with the same B and L"),
        ({"weight": torch.zeros(40, 63)}, r"got weight of shape \(40, 63\), wanted \[N, 64\].*\(40\).*skip \(24\)"),
        ({"bias": torch.zeros(24)}, r"got bias of shape \(24,\), wanted \[40\]"),
        ({"norm_weight": torch.zeros(24)}, r"got norm_weight of shape \(24,\), wanted \[40\]"),
        ({"norm_bias": None}, "got no norm_bias, wanted both norm_weight and norm_bias, or neither"),
        ({"skip": torch.zeros(2, 5, 24, dtype=torch.int64)}, "got skip in torch.int64, wanted a floating dtype"),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(change, message):
    arguments = {"x": torch.zeros(2, 5, 40), "skip": torch.zeros(2, 5, 24), "weight": torch.zeros(40, 64)}
    arguments |= {name: torch.zeros(40) for name in ("bias", "norm_weight", "norm_bias")} | change
    with pytest.raises(ValueError, match=message):
        skip_linear(**arguments)


@needs_triton
def test_float64_is_refused_by_the_kernel_and_says_what_to_do():
    inputs = [tensor.detach().double() for tensor in make_inputs(SMALL)]
    with pytest.raises(ValueError, match="got x in torch.float64.*use backend='plain'"):
        KERNEL(*inputs)


@pytest.mark.usefixtures("poisoned_empty", "gemms")
@NORMED
@pytest.mark.parametrize("dtypes", CUDA_DTYPES.values(), ids=CUDA_DTYPES)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cuda_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, normed):
    assert_accurate(CUDA, skip_linear_ref, make_inputs(shape, dtypes, normed), make_grads(shape))


@needs_gemms
@pytest.mark.parametrize("width", [8, 56, 64, 72, 128, 136])
@pytest.mark.parametrize("skip_width", [8, 64, 72])
def test_cuda_kernel_meets_every_column_of_x_and_of_skip_once(width, skip_width):
    tokens, n = 300, 528
    x, skip = (torch.ones(1, tokens, size, device=DEVICE).bfloat16() for size in (width, skip_width))
    weight = torch.cat([torch.ones(n, width), torch.full((n, skip_width), 0.25)], 1).to(DEVICE, torch.bfloat16)
    z = CUDA(x, skip, weight, torch.arange(n, device=DEVICE).bfloat16())
    wanted = (width + 0.25 * skip_width + torch.arange(n, device=DEVICE).bfloat16().float()).bfloat16()
    assert torch.equal(z, wanted.expand_as(z))


@needs_gemms
def test_cuda_kernel_repeats_its_results_is_capturable_and_compiles_into_one_graph():
    shape, dtypes = (5, 258, 264, 72), DTYPES["bf16"]
    assert_repeatable(CUDA, make_inputs(shape, dtypes), make_grads(shape))
    inputs = [tensor.detach() for tensor in make_inputs(shape, dtypes)]
    assert_capturable(CUDA, inputs, [tensor + 1 for tensor in inputs])
    assert_compiles_into_one_graph(CUDA, make_inputs(shape, dtypes), make_grads(shape))


@needs_gemms
def test_the_extension_itself_refuses_what_its_kernel_cannot_read():
    inputs = [tensor.detach() for tensor in make_inputs((2, 5, 40, 24), DTYPES["bf16"], normed=False)]
    good = dict(zip(("x", "skip", "weight", "bias"), inputs, strict=True))
    good["z"] = torch.empty_like(good["x"])
    narrow = {"x": good["x"][..., :36].contiguous(), "skip": torch.zeros(2, 5, 28, device=DEVICE).bfloat16()}
    for change in (
        narrow,
        {"x": good["x"].transpose(0, 1).contiguous().transpose(0, 1)},
        {"skip": good["skip"][:1]},
        {"skip": good["skip"].half()},
        {"weight": good["weight"][:, :40].contiguous()},
        {"weight": good["weight"].cpu()},
        {"bias": good["bias"].float()},
        {"z": good["z"][:1]},
    ):
        with pytest.raises(RuntimeError, match="skip_linear"):
            torch.ops.epg_fast.skip_linear_out(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 40).half()}, "got x in torch.float16, wanted one of torch.bfloat16 for"),
        ({"norm_bias": torch.zeros(40).double()}, "got norm_bias in torch.float64.*backend='cuda'"),
        ({"skip": torch.zeros(2, 24, 5).bfloat16().transpose(1, 2)}, "got skip.*wanted it contiguous"),
        (
            {"x": torch.zeros(2, 5, 36).bfloat16(), "skip": torch.zeros(2, 5, 28).bfloat16()},
            "got x.*wanted a last dimension that is a multiple of 8",
        ),
        ({}, "but the extension is not built"),
    ],
)
def test_backend_cuda_refuses_what_its_kernel_cannot_read(monkeypatch, change, message):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    arguments = {"x": torch.zeros(2, 5, 40).bfloat16(), "skip": torch.zeros(2, 5, 24).bfloat16()}
    arguments |= {"weight": torch.zeros(40, 64).bfloat16(), "bias": torch.zeros(40)}
    arguments |= {"norm_weight": torch.ones(40), "norm_bias": torch.zeros(40)}
    with pytest.raises(ValueError, match=message):
        CUDA(**(arguments | change))


def test_the_norm_after_backend_cuda_asks_for_triton(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    inputs = [tensor.detach() for tensor in make_inputs(SMALL, (torch.bfloat16,) * 4)]
    with pytest.raises(ValueError, match="backend='cuda', whose norm is Triton's, which is not installed"):
        CUDA(*inputs)
    with pytest.raises(ValueError, match="the extension is not built"):
        CUDA(*inputs[:4])
    with pytest.raises(ValueError, match="whose backward pass is Triton's"):
        CUDA(inputs[0].requires_grad_(), *inputs[1:4])


@pytest.mark.usefixtures("gemms")
def test_backend_cuda_passes_opcheck_and_compiles_into_one_graph():
    dtypes = DTYPES["bf16 with fp32 parameters"]
    inputs = make_inputs_of_two_norms(SMALL, dtypes)
    inputs[3] = torch.randn(40, 2, device=DEVICE)[:, 0].requires_grad_()
    assert_compiles_into_one_graph(with_next_norm(CUDA), inputs, grads_of_two_norms(SMALL))
    inputs = [tensor.to(torch.bfloat16) for tensor in make_inputs(SMALL, normed=False)]
    torch.library.opcheck(torch.ops.epg_fast.skip_linear.default, (*of_operator(inputs), *[None] * 6, 1e-5, "cuda"))


def test_traffic_model_counts_each_tensor_once():
    batch, tokens, width, skip_width = shape = (2, 3, 8, 4)
    rows = batch * tokens
    x, skip, weight = rows * width * 2, rows * skip_width * 2, width * (width + skip_width) * 2
    assert SPEC.bytes(shape, 2) == x + skip + weight + 3 * x + 3 * width * 4 + 2 * rows * 4
    norm, products = 3 * x, 3 * x + 2 * (x + skip + weight)
    assert SPEC.bytes(shape, 2, backward=True) == norm + products + 4 * width * 4 + 2 * rows * 4
    assert SPEC.flops(shape, backward=True) == 2 * SPEC.flops(shape) == 4 * rows * width * (width + skip_width)
