import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import backends, extension
from epg_fast.ops.mlp_residual import SPEC, mlp_residual, mlp_residual_ref
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

# dtypes of the residual, of y and the weights, of the gate, and of the biases
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32, torch.float32),
    "bf16 with fp32 biases": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 on an fp32 residual": (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16, torch.float16, torch.float16),
}
SMALL = (2, 5, 24, 40)
KERNEL = functools.partial(mlp_residual, backend="triton")
# Backend "cuda": bfloat16, all widths multiples of 8. More rows and columns than one row of the sums is for.
CUDA = functools.partial(mlp_residual, backend="cuda")
CUDA_SHAPES = [*SPEC.odd_shapes[:2], (2, 70, 24, 264), *(pytest.param(shape, marks=GPU) for shape in SPEC.shapes)]
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])


def make_inputs(shape, dtypes=DTYPES["fp32"], gated=True):
    """x, y, fc1's weight and bias, fc2's, gate."""
    batch, tokens, width, hidden = shape
    residual, product, gate, biases = dtypes
    sizes = ((hidden, width), (width, hidden))
    weights = [randn(*size, seed=i, requires_grad=False) * size[1] ** -0.5 for i, size in enumerate(sizes, 1)]
    weights = [weight.to(product).requires_grad_() for weight in weights]
    return [
        randn(batch, tokens, width, dtype=residual),
        randn(batch, tokens, width, dtype=product, seed=3),
        weights[0],
        randn(hidden, dtype=biases, seed=4),
        weights[1],
        randn(width, dtype=biases, seed=5),
        randn(batch, 1, width, dtype=gate, seed=6) if gated else None,
    ]


def doubled(inputs):
    """The operator's arguments: each weight as the parameter and as what products read."""
    x, y, fc1, fc1_bias, fc2, fc2_bias = inputs
    return x, y, fc1, fc1.detach(), fc1_bias, fc2, fc2.detach(), fc2_bias


def make_grads(shape):
    return [randn(*shape[:3], seed=7, requires_grad=False)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("dtypes", "gated"), [*((dtypes, True) for dtypes in DTYPES), ("bf16 on an fp32 residual", False)]
)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, gated):
    assert_accurate(KERNEL, mlp_residual_ref, make_inputs(shape, DTYPES[dtypes], gated), make_grads(shape))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_accepts_tensors_that_are_not_contiguous_and_more_tokens_than_a_program_walks_over():
    batch, tokens, width = 2, 70, 24
    x = torch.randn(1, tokens, width, device=DEVICE).expand(batch, -1, -1)
    y = torch.randn(batch, width, tokens, device=DEVICE).transpose(1, 2)
    fc1, fc2 = torch.randn(width, 40, device=DEVICE).t() / 5, torch.randn(40, width, device=DEVICE).t() / 6
    bias1, bias2, gate = torch.randn(40), torch.randn(width, 2)[:, 0], torch.randn(batch, 2 * width)[:, width:]
    vectors = [vector.to(DEVICE) for vector in (bias1, bias2, gate)]
    inputs = [t.detach().requires_grad_() for t in (x, y, fc1, vectors[0], fc2, *vectors[1:])]
    for grad in (y, torch.ones((), device=DEVICE).expand(y.shape)):
        assert_accurate(KERNEL, mlp_residual_ref, inputs, [grad])


@pytest.mark.usefixtures("poisoned_empty", "gemms")
@pytest.mark.parametrize(
    ("dtypes", "gated"),
    [("bf16 with fp32 biases", True), ("bf16 on an fp32 residual", True), ("bf16 on an fp32 residual", False)],
)
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_products_of_the_extension_are_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes, gated):
    assert_accurate(CUDA, mlp_residual_ref, make_inputs(shape, DTYPES[dtypes], gated), make_grads(shape))


@GATED
@pytest.mark.usefixtures("poisoned_empty", "gemms")
@pytest.mark.skipif(DEVICE == "cuda", reason="only the formulas that stand for the products take float32")
def test_around_products_in_float32_nothing_is_rounded(gated):
    def operator(*inputs):
        gate = None if inputs[6] is None else inputs[6].squeeze(1)
        return torch.ops.epg_fast.mlp_residual(*doubled(inputs[:6]), gate, True, "cuda")[0]

    shape = CUDA_SHAPES[2]
    assert_accurate(operator, mlp_residual_ref, make_inputs(shape, gated=gated), make_grads(shape))


@pytest.mark.usefixtures("gemms")
@GATED
def test_products_of_the_extension_compile_into_one_graph_and_take_what_a_network_has(gated):
    """Autocast, float32 weights, biases that are not contiguous, and a gate that is a chunk of the modulation."""
    x, y, fc1, fc1_bias, fc2, fc2_bias, _ = make_inputs(SMALL, gated=False)
    fc1_bias, fc2_bias = (
        torch.stack([b, b], 1).detach().bfloat16()[:, 0].requires_grad_() for b in (fc1_bias, fc2_bias)
    )
    gate = randn(2, 1, 6 * 24, seed=8, requires_grad=False).chunk(6, -1)[4].requires_grad_() if gated else None

    def call(*inputs, backend="cuda"):
        with torch.autocast(DEVICE, torch.bfloat16):
            return mlp_residual(*inputs, backend=backend)

    inputs = [x, y, fc1, fc1_bias, fc2, fc2_bias, gate]
    assert_compiles_into_one_graph(call, inputs, make_grads(SMALL))
    assert_accurate(call, functools.partial(call, backend="plain"), inputs, make_grads(SMALL))


@needs_gemms
def test_products_of_the_extension_repeat_their_bits_and_can_be_captured():
    shape = (5, 258, 64, 264)
    inputs = make_inputs(shape, DTYPES["bf16 on an fp32 residual"])
    assert_repeatable(CUDA, inputs, make_grads(shape))
    inputs = [tensor.detach() for tensor in inputs]
    assert_capturable(CUDA, inputs, [tensor + 1 for tensor in inputs])


@needs_triton
@GATED
def test_kernel_repeats_its_bits_and_compiles_into_one_graph(gated):
    inputs = make_inputs(SMALL, DTYPES["bf16 on an fp32 residual"], gated)
    assert_repeatable(KERNEL, inputs, make_grads(SMALL))
    assert_compiles_into_one_graph(KERNEL, inputs, make_grads(SMALL))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_flops_are_those_of_six_products_and_nothing_is_kept_without_a_gradient(backend, request):
    if backend == "cuda":
        request.getfixturevalue("gemms")
    inputs = make_inputs(SMALL, DTYPES["bf16 with fp32 biases"])
    with FlopCounterMode(display=False) as counter:
        mlp_residual(*inputs, backend=backend).sum().backward()
    assert counter.get_total_flops() == SPEC.flops(SMALL) + SPEC.flops(SMALL, True)
    detached = [tensor.detach() for tensor in inputs]
    kept = torch.ops.epg_fast.mlp_residual(*doubled(detached[:6]), detached[6].squeeze(1), False, backend)[1:]
    assert [tensor.numel() for tensor in kept] == [0, 0, 0]


@needs_triton
@GATED
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_operators_pass_opcheck(backend, gated, request):
    if backend == "cuda":
        request.getfixturevalue("gemms")
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    *inputs, gate = make_inputs(SMALL, (dtype,) * 4, gated)
    gate = None if gate is None else gate.detach().squeeze(1).requires_grad_()
    torch.library.opcheck(torch.ops.epg_fast.mlp_residual.default, (*doubled(inputs), gate, True, backend))
    x, y, *parameters = (tensor.detach() for tensor in inputs)
    gate = None if gate is None else gate.detach()
    _, *kept = torch.ops.epg_fast.mlp_residual(*doubled([x, y, *parameters]), gate, True, backend)
    for dtype in (torch.float32, torch.float64):
        arguments = (x, y, *kept, *parameters, gate, dtype, backend)
        torch.library.opcheck(torch.ops.epg_fast.mlp_residual_bwd.default, arguments)


@needs_triton
def test_under_autocast_products_are_16_bit_and_the_weights_gradients_are_float32():
    inputs = make_inputs(SMALL)
    results = []
    for backend in ("triton", "plain"):
        with torch.autocast(DEVICE, torch.float16):
            x_out = mlp_residual(*inputs, backend=backend)
        assert x_out.dtype == torch.float32
        results.append(torch.autograd.grad(x_out, inputs, make_grads(SMALL)))
    for got, want, tensor in zip(*results, inputs, strict=True):
        assert got.dtype == tensor.dtype
        # sums of at most 10 x 40 products, each rounded to 11 bits
        torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * want.abs().max().item())


@GATED
def test_operator_on_the_cpu_is_the_reference_and_right_in_float64(monkeypatch, gated):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [
        None if t is None else t.detach().cpu().double().requires_grad_() for t in make_inputs(SMALL, gated=gated)
    ]
    gate = None if inputs[-1] is None else inputs[-1].squeeze(1)
    got = torch.ops.epg_fast.mlp_residual(*doubled(inputs[:6]), gate, True, "triton")[0]
    want = mlp_residual_ref(*inputs)
    grad, given = torch.randn(2, 5, 24).double(), [tensor for tensor in inputs if tensor is not None]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, given, grad), torch.autograd.grad(want, given, grad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cublas"}, "got backend='cublas', wanted one of plain, triton, cuda"),
        ({"y": torch.zeros(2, 5, 23)}, r"got y of shape \(2, 5, 23\) and weight of shape \(40, 24\), wanted"),
        ({"x": torch.zeros(2, 4, 24)}, r"got x of shape \(2, 4, 24\), wanted \[2, 5, 24\]"),
        ({"fc2_weight": torch.zeros(24, 39)}, r"weight of shape \(24, 39\), wanted \[B, L, K\] and \[N, K\] with the"),
        ({"fc1_bias": torch.zeros(24)}, r"got bias of shape \(24,\), wanted \[40\]"),
        ({"gate": torch.zeros(1, 24)}, r"got gate of shape \(1, 24\), wanted \[2, 24\] or \[2, 1, 24\]"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    names = ("x", "y", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gate")
    arguments = dict(zip(names, (tensor.detach().cpu() for tensor in make_inputs(SMALL)), strict=True))
    with pytest.raises(ValueError, match=message):
        mlp_residual(**(arguments | change))


def cuda_arguments():
    names = ("x", "y", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gate")
    inputs = make_inputs(SMALL, DTYPES["bf16 with fp32 biases"])
    return dict(zip(names, (tensor.detach().cpu() for tensor in inputs), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"y": torch.zeros(2, 5, 24).half()},
            "got y in torch.float16, wanted one of torch.bfloat16 for backend='cuda'",
        ),
        ({"x": torch.zeros(2, 5, 24).half()}, "got x in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"gate": torch.zeros(2, 24).half()}, "got gate in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"fc1_bias": torch.zeros(40).double()}, "got fc1_bias in torch.float64.*backend='cuda'"),
        ({"y": torch.zeros(2, 24, 5).bfloat16().mT}, r"got y.*with strides \(120, 1, 5\).*call .contiguous\(\)"),
        ({"x": torch.zeros(5, 2, 24).transpose(0, 1)}, "got x.*wanted it contiguous"),
        ({"fc2_weight": torch.zeros(24, 80).bfloat16()[:, ::2]}, "got fc2_weight.*wanted it contiguous"),
        ({"fc1_weight": torch.zeros(24, 40).bfloat16().t()}, "got fc1_weight.*wanted it contiguous"),
        ({"gate": torch.zeros(24, 2).t()}, r"got gate with strides \(1, 2\), wanted contiguous rows"),
        ({"gate": torch.zeros(2, 26)[:, 1:25]}, "got gate.*start at even offsets"),
        (
            {"y": torch.zeros(2, 5, 20).bfloat16(), "fc1_weight": torch.zeros(40, 20).bfloat16()},
            "got y.*wanted a last dimension that is a multiple of 8 .*pad it",
        ),
        (
            {"fc1_weight": torch.zeros(36, 24).bfloat16(), "fc1_bias": torch.zeros(36)}
            | {"fc2_weight": torch.zeros(24, 36).bfloat16()},
            "got fc2_weight.*multiple of 8",
        ),
        (
            {"x": torch.zeros(2, 5, 20), "fc2_weight": torch.zeros(20, 40).bfloat16()}
            | {"fc2_bias": torch.zeros(20), "gate": None},
            "got a weight for 20 outputs, wanted a multiple of 8",
        ),
        ({"y": torch.zeros(241).bfloat16()[1:].view(2, 5, 24)}, "start at a multiple of 16 bytes.*call .clone"),
        ({"fc2_bias": torch.zeros(24, device="meta")}, "got fc2_bias.* on meta, wanted it on cpu"),
        (
            {"x": torch.zeros(2, 0, 24), "y": torch.zeros(2, 0, 24).bfloat16()},
            "got y.*wanted at least one value",
        ),
        ({}, "but the extension is not built"),
    ],
)
def test_backend_cuda_refuses_what_its_kernels_cannot_read(monkeypatch, change, message):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    with pytest.raises(ValueError, match=message) as caught:
        CUDA(**(cuda_arguments() | change))
    assert "\n" not in str(caught.value)


def test_backend_cuda_refuses_transforms_that_would_not_see_its_derivative():
    x, y, *others = cuda_arguments().values()
    with pytest.raises(ValueError, match="got a tensor inside torch.func.jvp or torch.func.grad"):
        torch.func.grad(lambda y: CUDA(x, y, *others).sum())(y)


def test_backend_cuda_says_how_to_build_what_it_needs(monkeypatch):
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "CPU only"))
    monkeypatch.setattr(extension, "extension_has_gemms", lambda: False)
    with pytest.raises(
        ValueError, match="built without CUTLASS.*pip install --no-deps nvidia-cutlass.*TORCH_CUDA_ARCH_LIST"
    ):
        CUDA(**cuda_arguments())


@pytest.mark.parametrize("found", ["cpu", "Ampere"])
def test_backend_cuda_asks_for_a_hopper_gpu(monkeypatch, found):
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "CPU and CUDA"))
    monkeypatch.setattr(extension, "extension_has_gemms", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Ampere")
    device = torch.device("cpu" if found == "cpu" else "cuda")
    with pytest.raises(ValueError, match=f"tensors on {found}, wanted a GPU of compute capability 9.0"):
        extension.require_gemms("mlp_residual", device)


def test_training_with_backend_cuda_asks_for_triton_and_sampling_does_not(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    arguments = cuda_arguments()
    arguments["fc1_weight"].requires_grad_()
    with pytest.raises(ValueError, match="whose backward pass is Triton's, which is not installed"):
        CUDA(**arguments)
    with torch.no_grad(), pytest.raises(ValueError, match="the extension is not built"):
        CUDA(**arguments)
