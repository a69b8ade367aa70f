import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops.mlp_residual import SPEC, mlp_residual, mlp_residual_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
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


@needs_triton
@GATED
def test_kernel_repeats_its_bits_and_compiles_into_one_graph(gated):
    inputs = make_inputs(SMALL, DTYPES["bf16 on an fp32 residual"], gated)
    assert_repeatable(KERNEL, inputs, make_grads(SMALL))
    assert_compiles_into_one_graph(KERNEL, inputs, make_grads(SMALL))


@needs_triton
def test_flops_are_those_of_six_products_and_nothing_is_kept_without_a_gradient():
    inputs = make_inputs(SMALL)
    with FlopCounterMode(display=False) as counter:
        KERNEL(*inputs).sum().backward()
    assert counter.get_total_flops() == SPEC.flops(SMALL) + SPEC.flops(SMALL, True)
    detached = [tensor.detach() for tensor in inputs]
    kept = torch.ops.epg_fast.mlp_residual(*doubled(detached[:6]), detached[6].squeeze(1), False)[1:]
    assert [tensor.numel() for tensor in kept] == [0, 0, 0]


@needs_triton
@GATED
def test_operators_pass_opcheck(gated):
    *inputs, gate = make_inputs(SMALL, gated=gated)
    gate = None if gate is None else gate.detach().squeeze(1).requires_grad_()
    torch.library.opcheck(torch.ops.epg_fast.mlp_residual.default, (*doubled(inputs), gate, True))
    x, y, *parameters = (tensor.detach() for tensor in inputs)
    gate = None if gate is None else gate.detach()
    _, *kept = torch.ops.epg_fast.mlp_residual(*doubled([x, y, *parameters]), gate, True)
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(torch.ops.epg_fast.mlp_residual_bwd.default, (x, y, *kept, *parameters, gate, dtype))


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
    got, want = torch.ops.epg_fast.mlp_residual(*doubled(inputs[:6]), gate, True)[0], mlp_residual_ref(*inputs)
    grad, given = torch.randn(2, 5, 24).double(), [tensor for tensor in inputs if tensor is not None]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, given, grad), torch.autograd.grad(want, given, grad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cublas"}, "got backend='cublas', wanted one of plain, triton"),
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
