import functools
import importlib

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import extension
from epg_fast.ops.linear_gate_residual import SPEC, linear_gate_residual, linear_gate_residual_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_capturable,
    assert_compiles_into_one_graph,
    assert_repeatable,
    in_double,
    native_operator_on_cpu,
    needs_gemms,
    pretend_gemms_run,
    randn,
    run,
)

# dtypes of x, of gate, of h and weight, and of bias
DTYPES = {
    "bf16": (torch.bfloat16,) * 4,
    "bf16 with fp32 residual": (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 with fp32 residual and gate": (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
}
FP32 = (torch.float32,) * 4
SMALL = (3, 17, 40, 24)
SHAPES = [*SPEC.shapes, *SPEC.odd_shapes, (9, 258, 72, 176), (1, 2000, 64, 528)]
CUDA = functools.partial(linear_gate_residual, backend="cuda")
SCHEMA = (
    "linear_gate_residual_out(Tensor(a!) out, Tensor(b!)? branch, Tensor x, Tensor? gate, Tensor h, Tensor weight, "
    "Tensor bias) -> ()"
)


def make_inputs(shape, dtypes=FP32):
    batch, tokens, k, n = shape
    residual, gate, product, bias = dtypes
    weight = randn(n, k, seed=3, requires_grad=False) * k**-0.5
    return [
        randn(batch, tokens, n, dtype=residual),
        randn(batch, n, dtype=gate, seed=1),
        randn(batch, tokens, k, dtype=product, seed=2),
        weight.to(product).requires_grad_(),
        randn(n, dtype=bias, seed=4),
    ]


def make_grads(shape):
    return [randn(shape[0], shape[1], shape[3], seed=5, requires_grad=False)]


@needs_gemms
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes):
    assert_accurate(CUDA, linear_gate_residual_ref, make_inputs(shape, dtypes), make_grads(shape))


@needs_gemms
@pytest.mark.parametrize("tokens", [1, 2, 7, 127, 128, 129, 258])
def test_every_row_meets_the_gate_of_its_own_sample(tokens):
    batch, k, n = 2 + 600 // tokens, 8, 184
    gate = torch.arange(batch, device=DEVICE).float()[:, None] * 1000 + torch.arange(n, device=DEVICE)
    x = torch.zeros(batch, tokens, n, device=DEVICE)
    h, weight = (torch.zeros(*size, k, device=DEVICE).bfloat16() for size in ((batch, tokens), (n,)))
    out = CUDA(x, gate, h, weight, torch.ones(n, device=DEVICE))
    assert torch.equal(out, gate[:, None].expand_as(out))


@needs_gemms
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_gate_may_be_a_chunk_of_the_modulation(dtypes):
    inputs = [tensor.detach() for tensor in make_inputs((5, 130, 64, 184), dtypes)]
    modulation = torch.randn(5, 1, 6 * 184, device=DEVICE).to(dtypes[1])
    for gate in modulation.chunk(6, dim=-1):
        inputs[1] = gate
        assert_accurate(CUDA, linear_gate_residual_ref, inputs, None)


@needs_gemms
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_kernel_without_a_gate_and_with_the_branch_that_training_keeps(shape, dtypes):
    def kernel(x, gate, h, weight, bias):
        out, branch = torch.empty_like(x), torch.empty(*x.shape, dtype=h.dtype, device=DEVICE)
        torch.ops.epg_fast.linear_gate_residual_out(out, branch, x, gate, h, weight, bias.to(h.dtype))
        return out, branch

    def reference(x, gate, h, weight, bias):
        branch = torch.nn.functional.linear(h, weight, bias.to(h.dtype))
        return (x + (branch if gate is None else gate[:, None] * branch)).to(x.dtype), branch

    inputs = [tensor.detach() for tensor in make_inputs(shape, dtypes)]
    assert_accurate(kernel, reference, inputs, None)
    without_gate = [inputs[0], None, *inputs[2:]]
    assert_accurate(kernel, reference, without_gate, None)
    out = torch.empty_like(inputs[0])
    torch.ops.epg_fast.linear_gate_residual_out(out, None, *without_gate[:4], inputs[4].to(inputs[2].dtype))
    assert torch.equal(out, kernel(*without_gate)[0])


@needs_gemms
def test_cuda_kernel_repeats_its_results_is_capturable_and_compiles_into_one_graph():
    shape, dtypes = (5, 258, 64, 528), DTYPES["bf16"]
    assert_repeatable(CUDA, make_inputs(shape, dtypes), make_grads(shape))
    inputs = [tensor.detach() for tensor in make_inputs(shape, dtypes)]
    assert_capturable(CUDA, inputs, [tensor + 1 for tensor in inputs])
    assert_compiles_into_one_graph(CUDA, make_inputs(shape, dtypes), make_grads(shape))


@needs_gemms
def test_the_extension_itself_refuses_what_its_kernel_cannot_read():
    good = dict(zip(("x", "gate", "h", "weight", "bias"), make_inputs(SMALL, DTYPES["bf16"]), strict=True))
    good = {name: tensor.detach() for name, tensor in good.items()}
    good |= {"out": torch.empty_like(good["x"]), "branch": None}
    for change in (
        {"x": good["x"].transpose(0, 1).contiguous().transpose(0, 1)},
        {"x": good["x"].half()},
        {"x": good["x"].float()},
        {"gate": good["gate"][:2]},
        {"gate": good["gate"].t().contiguous().t()},
        {"gate": torch.zeros(3, 25, device=DEVICE).bfloat16()[:, 1:]},
        {"gate": good["gate"].half()},
        {"h": good["h"].flatten(0, 1)},
        {"h": good["h"].float(), "weight": good["weight"].float()},
        {"bias": good["bias"].float()},
        {"out": good["out"][:2]},
        {"branch": good["out"][:2]},
        {"branch": good["out"].float()},
        {"weight": good["weight"].cpu()},
    ):
        with pytest.raises(RuntimeError, match="linear_gate_residual"):
            torch.ops.epg_fast.linear_gate_residual_out(**(good | change))


def test_reference_is_the_formula():
    x, gate, h, weight, bias = in_double(make_inputs(SMALL))
    z = torch.einsum("blk,nk->bln", h, weight) + bias
    wanted = x + torch.einsum("bn,bln->bln", gate, z)
    torch.testing.assert_close(linear_gate_residual(x, gate, h, weight, bias), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear_gate_residual(x, gate[:, None], h, weight, bias), wanted, rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_right_in_float64():
    assert torch.autograd.gradcheck(linear_gate_residual_ref, in_double(make_inputs((2, 3, 4, 5))))


@pytest.mark.parametrize("dtypes", [FP32, *DTYPES.values()], ids=["fp32", *DTYPES])
def test_operator_on_the_cpu_and_its_backward_pass_are_as_accurate_as_the_reference(dtypes):
    operator = torch.ops.epg_fast.linear_gate_residual
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL, dtypes)]
    assert_accurate(operator, linear_gate_residual_ref, inputs, [tensor.cpu() for tensor in make_grads(SMALL)])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1, 2), (1, 3, 4)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen):
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL)]
    for i in frozen:
        inputs[i].requires_grad_(False)
    dout = torch.randn(SMALL[0], SMALL[1], SMALL[3])
    with FlopCounterMode(display=False) as counter:
        (out,), gradients = run(torch.ops.epg_fast.linear_gate_residual, inputs, [dout])
    batch, tokens, k, n = SMALL
    assert counter.get_total_flops() == 2 * batch * tokens * k * n * (1 + sum(i not in frozen for i in (1, 2, 3)))
    (expected,), wanted = run(linear_gate_residual_ref, inputs, [dout])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, wanted)


def test_operator_passes_opcheck_on_the_cpu():
    for dtypes in (FP32, DTYPES["bf16 with fp32 residual"]):
        inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL, dtypes)]
        torch.library.opcheck(torch.ops.epg_fast.linear_gate_residual.default, inputs)


def test_operator_compiles_into_one_graph_on_the_cpu():
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in make_inputs(SMALL)]
    assert_compiles_into_one_graph(torch.ops.epg_fast.linear_gate_residual, inputs, make_grads(SMALL))


def test_launcher_hands_the_kernel_what_it_takes():
    def kernel(out, branch, x, gate, h, weight, bias):
        assert branch is None and bias.dtype == h.dtype and bias.is_contiguous()
        out.copy_(linear_gate_residual_ref(x, gate, h, weight, bias))

    x, gate, h, weight, _ = (tensor.detach().cpu() for tensor in make_inputs(SMALL, DTYPES["bf16"]))
    bias = torch.randn(24, 2)[:, 0]
    module = importlib.import_module("epg_fast.ops.linear_gate_residual")
    with native_operator_on_cpu(SCHEMA, kernel):
        out = module._forward_cuda(x.float(), gate, h, weight, bias)
    torch.testing.assert_close(out, linear_gate_residual_ref(x.float(), gate, h, weight, bias))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_autocast_treats_it_as_a_linear_layer_and_keeps_the_dtype_of_the_residual(residual):
    linear = nn.Linear(40, 24).to(DEVICE)
    x, gate, h = (tensor.detach() for tensor in make_inputs(SMALL)[:3])
    x = x.to(residual)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = linear_gate_residual(x, gate, h, linear.weight, linear.bias)
        wanted = x + gate[:, None] * linear(h)
    assert out.dtype == residual
    torch.testing.assert_close(out, wanted.to(residual))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "got backend='triton', wanted one of plain, cuda"),
        ({"h": torch.zeros(3, 40)}, r"got h of shape \(3, 40\).*wanted \[B, L, K\]"),
        ({"h": torch.zeros(3, 17, 39)}, r"got h of shape \(3, 17, 39\).*with the same K"),
        ({"x": torch.zeros(3, 16, 24)}, r"got x of shape \(3, 16, 24\), wanted \[3, 17, 24\]"),
        ({"gate": torch.zeros(3, 17, 24)}, r"got gate of shape \(3, 17, 24\), wanted \[3, 24\] or \[3, 1, 24\]"),
        ({"bias": torch.zeros(40)}, r"got bias of shape \(40,\), wanted \[24\]"),
        ({"gate": torch.zeros(3, 24, dtype=torch.int64)}, "got gate in torch.int64, wanted a floating dtype"),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(change, message):
    with pytest.raises(ValueError, match=message):
        linear_gate_residual(**(arguments() | change))


def arguments(dtype=torch.float32):
    shapes = {"x": (3, 17, 24), "gate": (3, 24), "h": (3, 17, 40), "weight": (24, 40), "bias": (24,)}
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(3, 17, 40).half()}, "got h in torch.float16, wanted one of torch.bfloat16 for"),
        ({"x": torch.zeros(3, 17, 24).half()}, "got x in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"gate": torch.zeros(3, 24).half()}, "got gate in torch.float16, wanted one of torch.bfloat16, torch.float32"),
        ({"x": torch.zeros(17, 3, 24).transpose(0, 1)}, "got x.*wanted it contiguous"),
        ({"gate": torch.zeros(24, 3).t()}, r"got gate with strides \(1, 3\), wanted contiguous rows"),
        ({"gate": torch.zeros(3, 25)[:, :24]}, r"got gate with strides \(25, 1\), wanted contiguous rows"),
        ({"gate": torch.zeros(3, 26)[:, 1:25]}, "got gate.*start at even offsets"),
        ({"h": torch.zeros(3, 17, 80).bfloat16()[..., ::2]}, "got h.*wanted it contiguous"),
        ({}, "but the extension is not built"),
    ],
)
def test_backend_cuda_refuses_what_its_kernel_cannot_read(monkeypatch, change, message):
    monkeypatch.setattr(extension, "extension_status", lambda: (False, "not built"))
    with pytest.raises(ValueError, match=message):
        CUDA(**(arguments(torch.bfloat16) | change))


def test_backend_cuda_is_traced_into_one_graph(monkeypatch):
    pretend_gemms_run(monkeypatch, "linear_gate_residual")
    inputs = [tensor.detach().cpu().bfloat16().requires_grad_() for tensor in make_inputs(SMALL)]
    assert_compiles_into_one_graph(CUDA, inputs, [torch.randn(3, 17, 24)])


def test_traffic_model_counts_each_tensor_once():
    batch, tokens, k, n = shape = (2, 6, 8, 16)
    x, h, weight, gate, bias = batch * tokens * n, batch * tokens * k, n * k, batch * n, n
    assert SPEC.bytes(shape, 2) == 2 * (x + gate + h + weight + bias + x)
    dz, dh, dweight = x + gate + x + bias, x + weight + h, x + h + weight
    z, dgate = h + weight + bias + x, x + gate
    assert SPEC.bytes(shape, 2, backward=True) == 2 * (dz + dh + dweight + z + dgate)
    assert SPEC.flops(shape, backward=True) == 3 * SPEC.flops(shape) == 6 * batch * tokens * n * k
