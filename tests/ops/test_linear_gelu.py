import functools
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import backends, extension
from epg_fast.ops.linear_gelu import SPEC, linear_gelu, linear_gelu_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_capturable,
    assert_compiles_into_one_graph,
    assert_repeatable,
    native_operator_on_cpu,
    needs_gemms,
    needs_triton,
    pretend_gemms_run,
    randn,
    run,
    shapes_of,
)

# dtypes of x, of weight, and of bias
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16 with fp32 parameters": (torch.bfloat16, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16 with fp32 bias": (torch.float16, torch.float16, torch.float32),
}
SMALL = (5, 40, 24)
KERNEL = functools.partial(linear_gelu, backend="triton")

# Backend "cuda": 16-bit dtypes, K and N multiples of 8
CUDA = functools.partial(linear_gelu, backend="cuda")
CUDA_DTYPES = {name: dtypes for name, dtypes in DTYPES.items() if dtypes[0] == torch.bfloat16}
CUDA_SHAPES = [*SPEC.shapes, (5, 40, 24), (129, 64, 264), (300, 72, 8), (1, 8, 8), (2000, 136, 520)]
SCHEMA = "linear_gelu_out(Tensor(a!) y, Tensor(b!)? z, Tensor x, Tensor weight, Tensor bias) -> ()"


def make_inputs(shape, dtypes=DTYPES["fp32"]):
    rows, k, n = shape
    x, weight = randn(rows, k, dtype=dtypes[0]), randn(n, k, dtype=dtypes[1], seed=1, requires_grad=False)
    return [x, (weight * k**-0.5).requires_grad_(), randn(n, dtype=dtypes[2], seed=2)]


def make_grads(shape):
    return [randn(shape[0], shape[2], seed=3, requires_grad=False)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes):
    assert_accurate(KERNEL, linear_gelu_ref, make_inputs(shape, dtypes), make_grads(shape))


@needs_triton
def test_kernel_multiplies_float32_as_pytorch_is_told_to():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert_accurate(KERNEL, linear_gelu_ref, make_inputs((33, 72, 160)), make_grads((33, 72, 160)))
    finally:
        torch.set_float32_matmul_precision(precision)


@needs_triton
def test_kernel_covers_every_tile_of_a_tall_result():
    shape = (1100, 16, 264)  # 9 x 3 tiles: a full group of rows, and one of a single row
    assert_accurate(KERNEL, linear_gelu_ref, make_inputs(shape), make_grads(shape))


@needs_triton
def test_gelu_in_16_bits_is_wrong_only_by_its_last_rounding_far_into_the_tail():
    x = torch.linspace(-5.5, 8, 2000, dtype=torch.float16, device=DEVICE)
    y = KERNEL(x[:, None], torch.ones_like(x[:1, None]), torch.zeros_like(x[:1]))[:, 0].double()
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
    rounding = exact.abs().clamp_min(torch.finfo(torch.float16).tiny) * torch.finfo(torch.float16).eps / 2
    assert ((y - exact).abs() <= 1.05 * rounding).all()


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # infinity times the zeros of the padding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu_keeps_infinity_and_nan_and_reaches_its_limits(dtype):
    x = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, -20.0], dtype=dtype, device=DEVICE)
    y = KERNEL(x[:, None], torch.ones_like(x[:1, None]), torch.zeros_like(x[:1]))[:, 0]
    wanted = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, 0.0], dtype=dtype, device=DEVICE)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, tokens, k, n = 3, 6, 40, 24
    expanded = torch.randn(1, tokens, k, device=DEVICE).expand(batch, -1, -1)
    transposed = torch.randn(batch, k, tokens, device=DEVICE).transpose(1, 2)
    cropped = torch.randn(batch, tokens + 2, k, device=DEVICE)[:, 2:]
    every_other = torch.randn(batch, tokens, 2 * k, device=DEVICE)[..., ::2]
    narrow = torch.randn(batch, tokens, k + 1, device=DEVICE)[..., 1:]  # rows that TMA cannot read
    bias = torch.randn(n, 2, device=DEVICE)[:, 0]
    grads = [layout[..., :n] for layout in (every_other, cropped, narrow, transposed, expanded)]
    for i, (x, dy) in enumerate(zip((expanded, transposed, cropped, every_other, narrow), grads, strict=True)):
        weight = torch.randn(k, n, device=DEVICE).t() if i % 2 else torch.randn(n, k, device=DEVICE)
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        assert_accurate(KERNEL, linear_gelu_ref, inputs, [dy])
    assert_accurate(KERNEL, linear_gelu_ref, inputs, [torch.ones((), device=DEVICE).expand(batch, tokens, n)])


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    shape = (300, 40, 24)
    assert_repeatable(KERNEL, make_inputs(shape), make_grads(shape))


@needs_triton
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen):
    inputs = make_inputs(SMALL)
    for i in frozen:
        inputs[i].requires_grad_(False)
    assert_accurate(KERNEL, linear_gelu_ref, inputs, make_grads(SMALL))
    with FlopCounterMode(display=False) as counter:
        KERNEL(*inputs).sum().backward()
    rows, k, n = SMALL
    assert counter.get_total_flops() == 2 * rows * k * n * (1 + inputs[0].requires_grad + inputs[1].requires_grad)


@needs_triton
def test_sampling_does_not_write_what_only_training_reads(monkeypatch):
    import epg_kernels.linear_gelu as launchers

    saved = []
    forward = launchers.linear_gelu_fwd
    monkeypatch.setattr(launchers, "linear_gelu_fwd", lambda *args: saved.append(args[3]) or forward(*args))
    inputs = make_inputs(SMALL)
    y = KERNEL(*inputs)
    with torch.no_grad():
        assert torch.equal(KERNEL(*inputs), y)
    KERNEL(*(tensor.detach() for tensor in inputs))
    assert saved == [True, False, False]


@needs_triton
def test_operators_pass_opcheck():
    inputs = make_inputs(SMALL)
    torch.library.opcheck(torch.ops.epg_fast.linear_gelu.default, (*inputs, True))
    x, weight, bias = (tensor.detach() for tensor in inputs)
    torch.library.opcheck(torch.ops.epg_fast.linear_gelu.default, (x, weight, bias, False))
    dy = make_grads(SMALL)[0]
    for needed in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.epg_fast.linear_gelu_bwd.default, (dy, dy + 1, x, weight, bias, needed))


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernel_compiles_into_one_graph(dtypes):
    assert_compiles_into_one_graph(KERNEL, make_inputs(SMALL, dtypes), make_grads(SMALL))


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_autocast_treats_it_as_a_linear_layer(backend):
    linear = nn.Linear(40, 24).to(DEVICE)
    x = randn(3, 5, 40)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, wanted = linear_gelu(x, linear.weight, linear.bias, backend=backend), F.gelu(linear(x))
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-3)  # PyTorch also rounds z to bfloat16, a step of 2**-8
    grads = torch.autograd.grad(y.float().sum(), (x, linear.weight, linear.bias))
    wanted_grads = torch.autograd.grad(wanted.float().sum(), (x, linear.weight, linear.bias))
    torch.testing.assert_close(grads, wanted_grads, rtol=2e-2, atol=2e-2)


def test_operator_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL)]
    dy = torch.randn(SMALL[0], SMALL[2])
    y = torch.ops.epg_fast.linear_gelu(*inputs, True)[0]
    (reference,), reference_gradients = run(linear_gelu_ref, inputs, [dy])
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), reference_gradients)


def test_reference_is_a_linear_layer_then_exact_gelu():
    x, weight, bias = (tensor.double() for tensor in make_inputs(SMALL))
    z = torch.einsum("mk,nk->mn", x, weight) + bias
    torch.testing.assert_close(linear_gelu(x, weight, bias), z * torch.special.ndtr(z), rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_right_in_float64():
    inputs = [tensor.detach().double().requires_grad_() for tensor in make_inputs((3, 4, 5))]
    assert torch.autograd.gradcheck(linear_gelu_ref, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cublas"}, "got backend='cublas', wanted one of plain, triton, cuda"),
        ({"x": torch.zeros(40)}, r"got x of shape \(40,\) and weight of shape \(24, 40\), wanted \[..., K\]"),
        ({"x": torch.zeros(5, 39)}, r"got x of shape \(5, 39\).*with the same K"),
        ({"weight": torch.zeros(40)}, r"weight of shape \(40,\), wanted"),
        ({"bias": torch.zeros(40)}, r"got bias of shape \(40,\), wanted \[24\]"),
        ({"x": torch.zeros(5, 40, dtype=torch.int64)}, "got x in torch.int64, wanted a floating dtype"),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(change, message):
    arguments = {"x": torch.zeros(5, 40), "weight": torch.zeros(24, 40), "bias": torch.zeros(24)} | change
    with pytest.raises(ValueError, match=message):
        linear_gelu(**arguments)


@needs_triton
def test_float64_is_refused_by_the_kernel_and_says_what_to_do():
    inputs = [tensor.detach().double() for tensor in make_inputs(SMALL)]
    with pytest.raises(ValueError, match="got x in torch.float64.*use backend='plain'"):
        KERNEL(*inputs)


@needs_gemms
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", CUDA_DTYPES.values(), ids=CUDA_DTYPES)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cuda_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes):
    assert_accurate(CUDA, linear_gelu_ref, make_inputs(shape, dtypes), make_grads(shape))


@needs_gemms
def test_cuda_kernel_stores_the_value_before_gelu_for_the_backward_pass_alone():
    dtype = torch.bfloat16
    x, weight, bias = (tensor.detach() for tensor in make_inputs((300, 72, 264), (dtype, dtype, dtype)))
    y, z = torch.ops.epg_fast.linear_gelu(x, weight, bias, True, "cuda")
    exact = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(z.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    unsaved, nothing = torch.ops.epg_fast.linear_gelu(x, weight, bias, False, "cuda")
    assert torch.equal(unsaved, y) and nothing.numel() == 0


@needs_gemms
def test_gelu_of_the_cuda_kernel_is_wrong_only_by_its_last_rounding_far_into_the_tail():
    x = torch.linspace(-5.5, 8, 2000, dtype=torch.bfloat16, device=DEVICE)
    rows = F.pad(x[:, None], (0, 7))
    y = CUDA(rows, torch.eye(8, dtype=x.dtype, device=DEVICE), torch.zeros(8, dtype=x.dtype, device=DEVICE))[:, 0]
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
    rounding = exact.abs().clamp_min(torch.finfo(torch.bfloat16).tiny) * torch.finfo(torch.bfloat16).eps / 2
    assert ((y.double() - exact).abs() <= 1.05 * rounding).all()


@needs_gemms
def test_gelu_of_the_cuda_kernel_keeps_infinity_and_nan_and_reaches_its_limits():
    bias = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, -20.0, -torch.inf, 1.0, -1.0], dtype=torch.bfloat16)
    x = torch.zeros(3, 8, dtype=torch.bfloat16, device=DEVICE)
    y = CUDA(x, torch.zeros(8, 8, dtype=x.dtype, device=DEVICE), bias.to(DEVICE))[0, :6]
    wanted = torch.tensor([torch.inf, torch.nan, 1000.0, 0.0, 0.0, 0.0], dtype=x.dtype, device=DEVICE)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-6, equal_nan=True)


@needs_gemms
def test_cuda_kernel_repeats_its_results_is_capturable_and_compiles_into_one_graph():
    shape, dtypes = (1100, 64, 264), DTYPES["bf16"]
    assert_repeatable(CUDA, make_inputs(shape, dtypes), make_grads(shape))
    inputs = [tensor.detach() for tensor in make_inputs(shape, dtypes)]
    assert_capturable(CUDA, inputs, [tensor + 1 for tensor in inputs])
    assert_compiles_into_one_graph(CUDA, make_inputs(shape, dtypes), make_grads(shape))


@needs_gemms
def test_cuda_kernel_runs_on_the_current_stream():
    x, weight, bias = (tensor.detach() for tensor in make_inputs((4096, 64, 264), DTYPES["bf16"]))
    expected = CUDA(x, weight, bias)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late = torch.zeros_like(x).copy_(x)
        y = CUDA(late, weight, bias)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@needs_gemms
def test_the_extension_itself_refuses_what_its_kernel_cannot_read():
    x, weight, bias = (tensor.detach() for tensor in make_inputs((16, 40, 24), DTYPES["bf16"]))
    y = torch.empty(16, 24, dtype=x.dtype, device=DEVICE)
    out = torch.ops.epg_fast.linear_gelu_out
    for arguments in (
        (y, None, x.t().contiguous().t(), weight, bias),
        (y, None, x[:, :36].contiguous(), weight[:, :36].contiguous(), bias),
        (y, None, x, weight.half(), bias),
        (y, None, x, weight, bias.float()),
        (y[:8], None, x, weight, bias),
        (y, y[:8], x, weight, bias),
        (y.float(), None, x, weight, bias),
        (y, None, x[:0], weight, bias),
        (y, None, x, weight.cpu(), bias),
    ):
        with pytest.raises(RuntimeError, match="linear_gelu"):
            out(*arguments)


def cuda_arguments():
    return [torch.zeros(5, 40).bfloat16(), torch.zeros(24, 40).bfloat16(), torch.zeros(24)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(5, 40).half()},
            "got x in torch.float16, wanted one of torch.bfloat16 for backend='cuda'",
        ),
        ({"bias": torch.zeros(24).double()}, "got bias in torch.float64.*backend='cuda'"),
        (
            {"x": torch.zeros(40, 5).bfloat16().t()},
            r"got x of shape \(5, 40\) with strides \(1, 5\).*call .contiguous\(\)",
        ),
        ({"weight": torch.zeros(24, 80).bfloat16()[:, ::2]}, "got weight.*wanted it contiguous"),
        ({"x": torch.zeros(0, 40).bfloat16()}, "got x.*wanted at least one value"),
        (
            {"x": torch.zeros(5, 36).bfloat16(), "weight": torch.zeros(24, 36).bfloat16()},
            "got x.*wanted a last dimension that is a multiple of 8 .*pad it",
        ),
        (
            {"weight": torch.zeros(20, 40).bfloat16(), "bias": torch.zeros(20)},
            "got a weight for 20 outputs, wanted a multiple of 8",
        ),
        (
            {"x": torch.zeros(201).bfloat16()[1:].view(5, 40)},
            "wanted it to start at a multiple of 16 bytes.*call .clone",
        ),
        ({"bias": torch.zeros(24, device="meta")}, "got bias.* on meta, wanted it on cpu"),
    ],
)
def test_backend_cuda_refuses_what_its_kernel_cannot_read(change, message):
    arguments = dict(zip(("x", "weight", "bias"), cuda_arguments(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        CUDA(**arguments)


def test_backend_cuda_refuses_transforms_that_would_not_see_its_derivative():
    x, weight, bias = cuda_arguments()
    with pytest.raises(ValueError, match="got a tensor inside torch.func.jvp or torch.func.grad"):
        torch.func.grad(lambda x: CUDA(x, weight, bias).sum())(x)


def test_backend_cuda_says_how_to_build_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built: run `pip install .`"))
    with pytest.raises(ValueError, match="got backend='cuda', but the extension is not built: run `pip install .`"):
        CUDA(*cuda_arguments())
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "CPU only"))
    monkeypatch.setattr(extension, "extension_has_gemms", lambda: False)
    with pytest.raises(
        ValueError, match="built without CUTLASS.*pip install --no-deps nvidia-cutlass.*TORCH_CUDA_ARCH_LIST"
    ):
        CUDA(*cuda_arguments())


@pytest.mark.parametrize("found", ["cpu", "Ampere"])
def test_backend_cuda_asks_for_a_hopper_gpu(monkeypatch, found):
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "CPU and CUDA"))
    monkeypatch.setattr(extension, "extension_has_gemms", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Ampere")
    device = torch.device("cpu" if found == "cpu" else "cuda")
    with pytest.raises(ValueError, match=f"tensors on {found}, wanted a GPU of compute capability 9.0"):
        extension.require_gemms("linear_gelu", device)


def test_training_with_backend_cuda_asks_for_triton_and_sampling_does_not(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    arguments = cuda_arguments()
    arguments[1].requires_grad_()
    with pytest.raises(ValueError, match="whose backward pass is Triton's, which is not installed"):
        CUDA(*arguments)
    with torch.no_grad(), pytest.raises(ValueError, match="the extension is not built"):
        CUDA(*arguments)


def test_operator_of_backend_cuda_passes_opcheck_on_the_cpu():
    x, weight, bias = (tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL))
    torch.library.opcheck(torch.ops.epg_fast.linear_gelu.default, (x, weight, bias, True, "cuda"))
    sampled = [tensor.detach() for tensor in (x, weight, bias)]
    torch.library.opcheck(torch.ops.epg_fast.linear_gelu.default, (*sampled, False, "cuda"))


@pytest.mark.parametrize("saving", [True, False])
def test_launcher_of_backend_cuda_hands_the_kernel_what_it_takes(saving):
    def kernel(y, z, x, weight, bias):
        assert bias.dtype == x.dtype and bias.is_contiguous()
        preactivation = F.linear(x, weight, bias)
        y.copy_(F.gelu(preactivation))
        if z is not None:
            z.copy_(preactivation)

    x, weight = torch.randn(3, 5, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    bias = torch.randn(24, 2)[:, 0]
    module = importlib.import_module("epg_fast.ops.linear_gelu")
    with native_operator_on_cpu(SCHEMA, kernel):
        y, z = module._forward_cuda(x, weight, bias, saving)
    torch.testing.assert_close(y, linear_gelu_ref(x, weight, bias))
    assert z.shape == ((3, 5, 24) if saving else (0,))


def test_backend_cuda_is_traced_into_one_graph(monkeypatch):
    pretend_gemms_run(monkeypatch, "linear_gelu")
    inputs = [tensor.detach().cpu().bfloat16().requires_grad_() for tensor in make_inputs(SMALL)]
    assert_compiles_into_one_graph(CUDA, inputs, [torch.randn(5, 24)])


def test_traffic_model_counts_each_tensor_once():
    rows, k, n = shape = (6, 8, 16)
    x, weight, y = rows * k * 2, n * k * 2, rows * n * 2
    assert SPEC.bytes(shape, 2) == x + weight + y + 4 * n
    assert SPEC.bytes(shape, 2, backward=True) == (1 + 3) * y + (y + weight + x) + (y + x + weight) + 4 * n
    assert SPEC.flops(shape, backward=True) == 2 * SPEC.flops(shape) == 4 * rows * k * n
