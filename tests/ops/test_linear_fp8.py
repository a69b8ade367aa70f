import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import extension
from epg_fast.ops.fp8 import cpu_has_row_scales
from epg_fast.ops.layer_norm_modulate import layer_norm_modulate_fp8
from epg_fast.ops.linear_fp8 import SPEC, linear_fp8, linear_fp8_ref
from epg_fast.ops.quantize_rows import quantize_rows_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_capturable,
    assert_compiles_into_one_graph,
    assert_repeatable,
    native_operator_on_cpu,
    needs_gemms,
    pretend_gemms_run,
    randn,
)

SMALL = (5, 48, 24)
CUDA = functools.partial(linear_fp8, backend="cuda")
SCALED_MM = functools.partial(linear_fp8, backend="scaled_mm")
SCHEMA = (
    "linear_fp8_out(Tensor(a!) y, Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor bias, bool gelu)"
    " -> ()"
)
WITH_AND_WITHOUT_GELU = pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])


def make_inputs(shape, dtype=torch.bfloat16):
    """x, x_scale, weight, weight_scale, bias; rows of very different sizes."""
    rows, k, n = shape
    x = randn(rows, k, requires_grad=False) * torch.logspace(-3, 2, rows, device=DEVICE)[:, None]
    weight = randn(n, k, seed=1, requires_grad=False) * torch.logspace(-2, 1, n, device=DEVICE)[:, None] * k**-0.5
    return [*quantize_rows_ref(x), *quantize_rows_ref(weight), randn(n, dtype=dtype, seed=2, requires_grad=False)]


@needs_gemms
@pytest.mark.usefixtures("poisoned_empty")
@WITH_AND_WITHOUT_GELU
@pytest.mark.parametrize("shape", [*SPEC.shapes, *SPEC.odd_shapes], ids=str)
def test_cuda_kernel_is_as_accurate_as_the_reference(shape, gelu):
    kernel, reference = (functools.partial(function, gelu=gelu) for function in (CUDA, linear_fp8_ref))
    assert_accurate(kernel, reference, make_inputs(shape), None)


@needs_gemms
def test_cuda_kernel_multiplies_each_row_and_column_by_its_own_scale():
    rows, k, n = 300, 16, 264
    x, weight = torch.zeros(rows, k, device=DEVICE), torch.zeros(n, k, device=DEVICE)
    x[:, 0], weight[:, 0] = 1, 1
    x_scale, weight_scale = 2.0 ** (torch.arange(rows) % 13 - 6), 2.0 ** (torch.arange(n) % 11 - 5)
    bias = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    y = CUDA(x, x_scale.to(DEVICE), weight, weight_scale.to(DEVICE), bias)
    assert torch.equal(y.float().cpu(), torch.outer(x_scale, weight_scale))


@needs_gemms
def test_cuda_kernel_repeats_its_results_is_capturable_and_compiles_into_one_graph():
    inputs = make_inputs((1100, 144, 264))
    assert_repeatable(CUDA, inputs, None)
    assert_compiles_into_one_graph(CUDA, inputs, None)
    others = make_inputs((1100, 144, 264))
    others[1], others[3], others[4] = others[1] * 2, others[3].flip(0), others[4] + 1
    assert_capturable(CUDA, inputs, others)


@needs_gemms
def test_the_extension_itself_refuses_what_its_kernel_cannot_read():
    x, x_scale, weight, weight_scale, bias = make_inputs((32, 48, 24))
    good = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale, "bias": bias, "gelu": False}
    good["y"] = torch.empty(32, 24, dtype=bias.dtype, device=DEVICE)
    for change in (
        {"x": x.t().contiguous().t()},
        {"x": x[:, :40].contiguous(), "weight": weight[:, :40].contiguous()},
        {"x": x.half(), "weight": weight.half()},
        {"x_scale": x_scale[:8]},
        {"x_scale": x_scale.half()},
        {"weight_scale": weight_scale.cpu()},
        {"bias": bias.float()},
        {"y": good["y"][:8]},
    ):
        with pytest.raises(RuntimeError, match="linear_fp8"):
            torch.ops.epg_fast.linear_fp8_out(**(good | change))


@WITH_AND_WITHOUT_GELU
def test_reference_is_the_product_of_the_dequantised_operands(gelu):
    x, x_scale, weight, weight_scale, bias = (tensor.double() for tensor in make_inputs(SMALL))
    z = torch.einsum("mk,nk,m,n->mn", x, weight, x_scale, weight_scale) + bias
    wanted = z * torch.special.ndtr(z) if gelu else z
    y = linear_fp8_ref(x, x_scale, weight, weight_scale, bias, gelu)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert linear_fp8(*make_inputs(SMALL, torch.float16), gelu).dtype == torch.float16


def test_it_takes_the_rows_that_the_norm_quantises():
    tokens = torch.randn(2, 17, 48)
    norm = (torch.ones(48), torch.zeros(48))
    rows, scale = layer_norm_modulate_fp8(tokens, *norm)
    weight, bias = torch.randn(24, 48) * 48**-0.5, torch.randn(24)
    y = linear_fp8(rows, scale, *quantize_rows_ref(weight), bias, gelu=True)
    wanted = F.gelu(F.linear(F.layer_norm(tokens, (48,)), weight, bias))
    assert (y - wanted).abs().max() < 0.05 * wanted.abs().max()  # e4m3 keeps three bits behind the leading one


@pytest.mark.skipif(
    torch.cuda.get_device_capability() < (9, 0) if DEVICE == "cuda" else not cpu_has_row_scales(),
    reason="needs compute capability 9.0, or on a CPU a PyTorch whose FP8 product takes a scale per row",
)
@WITH_AND_WITHOUT_GELU
@pytest.mark.parametrize("leading", [(33,), (3, 11)], ids=str)
def test_scaled_mm_computes_the_same(leading, gelu):
    x, x_scale, weight, weight_scale, bias = make_inputs((33, 64, 32))
    inputs = x.view(*leading, 64), x_scale.view(leading), weight, weight_scale, bias
    y = SCALED_MM(*inputs, gelu)
    wanted = linear_fp8_ref(*inputs, gelu)
    # One more rounding to bfloat16, before GELU; PyTorch may leave the sums to the tensor cores.
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)


def test_operator_passes_opcheck_on_the_cpu_and_counts_its_product():
    inputs = [tensor.cpu() for tensor in make_inputs(SMALL)]
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # the fourth multiplies FP8
    torch.library.opcheck(torch.ops.epg_fast.linear_fp8.default, (*inputs, True), test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        torch.ops.epg_fast.linear_fp8(*inputs, True)
    assert counter.get_total_flops() == SPEC.flops(SMALL)


def test_launcher_hands_the_kernel_what_it_takes():
    def kernel(y, x, x_scale, weight, weight_scale, bias, gelu):
        assert all(tensor.is_contiguous() for tensor in (x_scale, weight_scale, bias))
        y.copy_(linear_fp8_ref(x, x_scale, weight, weight_scale, bias, gelu))

    x, x_scale, weight, weight_scale, bias = (tensor.cpu() for tensor in make_inputs((6, 48, 24)))
    inputs = [x.view(2, 3, 48), x_scale.view(3, 2).t(), weight, weight_scale.expand(2, 24).t()[:, 0], bias]
    module = importlib.import_module("epg_fast.ops.linear_fp8")
    with native_operator_on_cpu(SCHEMA, kernel):
        y = module._forward_cuda(*inputs, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, linear_fp8_ref(*inputs, True))


BFLOAT16 = {"bias": torch.zeros(24).bfloat16()}


def arguments():
    fp8 = torch.float8_e4m3fn
    return {
        "x": torch.zeros(5, 48, dtype=fp8),
        "x_scale": torch.ones(5),
        "weight": torch.zeros(24, 48, dtype=fp8),
        "weight_scale": torch.ones(24),
        "bias": torch.zeros(24).half(),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "got backend='triton', wanted one of plain, cuda, scaled_mm"),
        ({"x": torch.zeros(5, 47)}, r"got x of shape \(5, 47\) and weight of shape \(24, 48\).*with the same K"),
        ({"x_scale": torch.ones(5, 1)}, r"got x_scale of shape \(5, 1\), wanted \[5\]"),
        ({"weight_scale": torch.ones(1)}, r"got weight_scale of shape \(1,\), wanted \[24\]"),
        ({"bias": torch.zeros(48)}, r"got bias of shape \(48,\), wanted \[24\]"),
        ({"x": torch.zeros(5, 48)}, "got x in torch.float32, wanted torch.float8_e4m3fn; quantise it"),
        ({"weight": torch.zeros(24, 48).half()}, "got weight in torch.float16, wanted torch.float8_e4m3fn"),
        ({"x_scale": torch.ones(5).double()}, "got x_scale in torch.float64, wanted torch.float32"),
        ({"bias": torch.zeros(24).int()}, "got bias in torch.int32, wanted a floating dtype"),
        ({"bias": torch.zeros(24, requires_grad=True)}, "requires a gradient, which FP8 output has not"),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(change, message):
    with pytest.raises(ValueError, match=message):
        linear_fp8(**(arguments() | change))


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("cuda", {}, "got bias in torch.float16, wanted one of torch.bfloat16 for backend='cuda'"),
        ("cuda", BFLOAT16 | {"x": torch.zeros(48, 5).to(torch.float8_e4m3fn).t()}, "got x.*wanted it contiguous"),
        (
            "cuda",
            BFLOAT16
            | {"x": torch.zeros(5, 40).to(torch.float8_e4m3fn), "weight": torch.zeros(24, 40).to(torch.float8_e4m3fn)},
            "got x.*a last dimension that is a multiple of 16",
        ),
        ("cuda", BFLOAT16, "but the extension is not built"),
        ("scaled_mm", {}, "got bias in torch.float16, wanted one of torch.bfloat16 for backend='scaled_mm'"),
        ("scaled_mm", BFLOAT16, "got N=24, wanted a multiple of 16"),
    ],
)
def test_a_backend_refuses_what_it_cannot_read(monkeypatch, backend, change, message):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    with pytest.raises(ValueError, match=message):
        linear_fp8(**(arguments() | change), backend=backend)


def test_an_older_pytorch_that_lacks_the_product_on_a_cpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.import_module("epg_fast.ops.fp8"), "cpu_has_row_scales", lambda: False)
    inputs = [tensor.cpu() for tensor in make_inputs((33, 64, 32))]
    with pytest.raises(ValueError, match="got torch .*one scale per tensor.*use backend='plain'"):
        SCALED_MM(*inputs)


def test_backend_cuda_is_traced_into_one_graph(monkeypatch):
    pretend_gemms_run(monkeypatch, "linear_fp8")
    assert_compiles_into_one_graph(CUDA, [tensor.cpu() for tensor in make_inputs(SMALL)], None)


def test_traffic_model_counts_each_tensor_once():
    rows, k, n = shape = (6, 16, 8)
    assert SPEC.bytes(shape, 2) == rows * k + n * k + 4 * rows + 4 * n + 2 * n + 2 * rows * n
    assert SPEC.flops(shape) == 2 * rows * k * n
