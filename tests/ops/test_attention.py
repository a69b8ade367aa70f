import functools
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops.attention import SPEC, attention, attention_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_accurate,
    assert_compiles_into_one_graph,
    assert_repeatable,
    in_double,
    needs_triton,
    randn,
    run,
    shapes_of,
)
from tests.ops.tolerance import GRADIENT, assert_close_to_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = (2, 5, 2, 40)
KERNEL = functools.partial(attention, backend="triton")
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
poisoned = pytest.mark.usefixtures("poisoned_empty")


def make_inputs(shape, dtype=torch.float32):
    batch, length, heads, head_dim = shape
    return [randn(batch, length, 3, heads, head_dim, dtype=dtype)]


def make_grads(shape):
    return [randn(*shape, seed=5, requires_grad=False)]


@needs_triton
@poisoned
@every_dtype
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernel_is_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtype):
    assert_accurate(KERNEL, attention_ref, make_inputs(shape, dtype), make_grads(shape))


@needs_triton
@poisoned
@pytest.mark.parametrize("shape", [(1, 258, 1, 72), (1, 256, 1, 16), (1, 1, 3, 8), (1, 130, 1, 100)], ids=str)
def test_kernel_is_accurate_with_and_without_remaining_keys_and_columns(shape):
    assert_accurate(KERNEL, attention_ref, make_inputs(shape, torch.float16), make_grads(shape))


@needs_triton
@poisoned
@every_dtype
def test_kernel_reads_keys_from_memory_when_they_do_not_fit_beside_it(dtype, monkeypatch):
    from epg_kernels import attention as kernels

    assert kernels._streams(1026, 64, 2, 1000, torch.device("cpu"))
    assert not kernels._streams(258, 128, 2, 1000, torch.device("cpu"))
    monkeypatch.setattr(kernels, "_RESIDENT_BYTES", 0)
    shape = (1, 147, 1, 24)
    assert_accurate(KERNEL, attention_ref, make_inputs(shape, dtype), make_grads(shape))


@needs_triton
@poisoned
@every_dtype
def test_kernel_stays_accurate_when_the_gradient_of_queries_comes_from_many_blocks(dtype, monkeypatch):
    from epg_kernels import attention as kernels

    monkeypatch.setattr(kernels, "_bwd_config", lambda *_: kernels.Config(32, 16, 4))
    shape = (1, 147, 1, 24)
    assert_accurate(KERNEL, attention_ref, make_inputs(shape, dtype), make_grads(shape))


@needs_triton
@poisoned
def test_kernel_accepts_tensors_that_are_not_contiguous():
    batch, length, heads, head_dim = 3, 6, 2, 24
    sizes = (3, heads, head_dim)
    layouts = {
        "expanded": torch.randn(1, length, *sizes).expand(batch, *(-1,) * 4),
        "transposed": torch.randn(length, batch, *sizes).transpose(0, 1),
        "cropped": torch.randn(batch, length + 2, *sizes)[:, 2:],
        "every other": torch.randn(batch, length, 3, heads, 2 * head_dim)[..., ::2],
        "heads before tokens": torch.randn(batch, 3, heads, length, head_dim).permute(0, 3, 1, 2, 4),
        "not aligned": torch.randn(batch * length * 3 * heads * head_dim + 1)[1:].view(batch, length, *sizes),
    }
    grads = [torch.ones(()).expand(batch, length, heads, head_dim)]
    grads += [torch.randn(batch, heads, length, head_dim).transpose(1, 2)]
    grads += [torch.randn(batch, length, heads, 2 * head_dim)[..., ::2]] * 4
    for qkv, grad in zip(layouts.values(), grads, strict=True):
        assert_accurate(KERNEL, attention_ref, [qkv.to(DEVICE).requires_grad_()], [grad.to(DEVICE)])


@needs_triton
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_kernel_survives_scores_whose_exponentials_overflow(sign):
    shape = (1, 18, 1, 16)
    qkv = make_inputs(shape, torch.float16)[0].detach()
    qkv[:, :, :2] = qkv[:, :, :2].abs() * 10
    qkv[:, :, 1] *= sign
    inputs, grads = [qkv.requires_grad_()], make_grads(shape)
    assert_accurate(KERNEL, attention_ref, inputs, None)
    (actual,), (exact,) = run(KERNEL, inputs, grads)[1], run(attention_ref, in_double(inputs), grads)[1]
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-3 * exact.abs().max().item())


@needs_triton
def test_kernel_takes_the_scale_asked_for():
    scaled = [functools.partial(function, scale=0.5) for function in (KERNEL, attention_ref)]
    assert_accurate(*scaled, make_inputs(SMALL), make_grads(SMALL))
    assert not torch.allclose(KERNEL(*make_inputs(SMALL)), scaled[0](*make_inputs(SMALL)))


@needs_triton
def test_kernel_repeats_its_results_bit_for_bit():
    shape = (2, 147, 2, 40)
    assert_repeatable(KERNEL, make_inputs(shape, torch.float16), make_grads(shape))


@needs_triton
def test_operators_pass_opcheck():
    (qkv,) = make_inputs(SMALL)
    torch.library.opcheck(torch.ops.epg_fast.attention.default, (qkv, 0.3))
    out, lse = torch.ops.epg_fast.attention(qkv.detach(), 0.3)
    arguments = (torch.randn_like(out), qkv.detach(), out, lse, 0.3)
    torch.library.opcheck(torch.ops.epg_fast.attention_bwd.default, arguments)


@needs_triton
@every_dtype
def test_kernel_compiles_into_one_graph(dtype):
    assert_compiles_into_one_graph(KERNEL, make_inputs(SMALL, dtype), make_grads(SMALL))


@needs_triton
def test_kernel_follows_the_precision_that_pytorch_is_told_to_use():
    from epg_kernels.attention import _precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _precision(torch.zeros(1)) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert _precision(torch.zeros(1)) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@every_dtype
def test_operator_on_the_cpu_is_the_reference(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qkv = make_inputs(SMALL, dtype)[0].detach().cpu().requires_grad_()
    grads = [torch.randn(SMALL)]
    (out,), (dqkv,) = run(lambda x: torch.ops.epg_fast.attention(x, 40**-0.5)[0], [qkv], grads)
    (wanted,), (wanted_dqkv,) = run(attention_ref, [qkv], grads)
    assert torch.equal(out, wanted)
    exact = run(attention_ref, in_double([qkv]), grads)[1][0]
    assert_close_to_reference(dqkv, wanted_dqkv, exact, factor=GRADIENT)


@pytest.mark.parametrize("backend", ["plain", "math"])
def test_attention_is_multi_head_attention_between_its_projections(backend):
    batch, length, heads, head_dim = 2, 7, 3, 4
    module = nn.MultiheadAttention(heads * head_dim, heads, bias=False, batch_first=True).to(DEVICE, torch.float64)
    x = randn(batch, length, heads * head_dim, dtype=torch.float64)
    wanted = module(x, x, x, need_weights=False)[0]
    qkv = F.linear(x, module.in_proj_weight).view(batch, length, 3, heads, head_dim)
    actual = module.out_proj(attention(qkv, backend=backend).flatten(2))
    torch.testing.assert_close(actual, wanted)
    wrt = (x, module.in_proj_weight)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wrt) for y in (actual, wanted)))


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "math", "triton"])
def test_output_is_contiguous_so_that_heads_flatten_without_a_copy(backend):
    assert attention(*make_inputs(SMALL), backend=backend).is_contiguous()


def test_reference_gradients_are_right_in_float64():
    inputs = make_inputs((2, 3, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(functools.partial(attention_ref, scale=0.7), inputs)


def test_reference_compiles_into_one_graph(inductor):
    inputs, grads = make_inputs(SMALL, torch.bfloat16), make_grads(SMALL)
    actual, eager = run(torch.compile(attention_ref, fullgraph=True), inputs, grads), run(attention_ref, inputs, grads)
    exact = run(attention_ref, in_double(inputs), grads)
    for values in zip((*actual[0], *actual[1]), (*eager[0], *eager[1]), (*exact[0], *exact[1]), strict=True):
        assert_close_to_reference(*values, factor=GRADIENT)


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "math", "triton"])
def test_autocast_gives_what_the_operands_in_its_dtype_give(backend):
    (qkv,) = make_inputs(SMALL)
    with torch.autocast(DEVICE, torch.bfloat16):
        under_autocast = attention(qkv, backend=backend)
    assert under_autocast.dtype == torch.bfloat16
    assert torch.equal(under_autocast, attention(qkv.bfloat16(), backend=backend))


def test_dropout_drops_attention_weights_with_sdpa():
    (qkv,) = make_inputs((4, 17, 2, 8))
    dropped, kept = attention(qkv, dropout_p=0.5), attention(qkv)
    assert not torch.allclose(dropped, kept)
    several = torch.stack([attention(qkv, dropout_p=0.5) for _ in range(400)])
    assert (several.mean(0) - kept).abs().mean() < 0.2 * (dropped - kept).abs().mean()


@needs_triton
def test_flops_are_two_products_forward_and_five_backward():
    qkv = torch.randn(2, 6, 3, 2, 8, device=DEVICE, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = KERNEL(qkv)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == SPEC.flops((2, 6, 2, 8)) == 4 * 2 * 2 * 6 * 6 * 8
    assert backward.get_total_flops() == SPEC.flops((2, 6, 2, 8), backward=True) == 10 * 2 * 2 * 6 * 6 * 8


def test_traffic_model_counts_each_tensor_once():
    values, rows = 2 * 6 * 2 * 8, 2 * 6 * 2
    assert SPEC.bytes((2, 6, 2, 8), 2) == (3 + 1) * values * 2 + rows * 4
    assert SPEC.bytes((2, 6, 2, 8), 2, backward=True) == (5 + 3) * values * 2 + rows * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, flash, cudnn, efficient, math, flash_attn"),
        ({"qkv": torch.zeros(2, 5, 240)}, r"got qkv of shape \(2, 5, 240\), wanted \[B, L, 3, H, d\].*\.view"),
        ({"qkv": torch.zeros(2, 5, 2, 2, 8)}, r"got qkv of shape \(2, 5, 2, 2, 8\), wanted \[B, L, 3, H, d\]"),
        ({"qkv": torch.zeros(0, 5, 3, 2, 8)}, r"got qkv of shape \(0, 5, 3, 2, 8\), wanted no empty dimension"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 8, dtype=torch.int64)}, "got qkv in torch.int64, wanted a floating dtype"),
        ({"scale": 0.0}, "got scale=0.0, wanted a positive number, or None"),
        ({"scale": float("nan")}, "got scale=nan, wanted a positive number, or None"),
        ({"dropout_p": 1.0}, "got dropout_p=1.0, wanted 0 <= dropout_p < 1"),
        ({"dropout_p": 0.1, "backend": "triton"}, "dropout_p=0.1 with backend='triton', wanted 0; use backend='plain'"),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_what_was_wanted(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{"qkv": torch.zeros(2, 5, 3, 2, 8)} | change)


def test_the_kernel_without_a_gpu_says_how_to_run_without_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu, wanted one on a CUDA device.*backend='plain'"):
        attention(torch.zeros(2, 5, 3, 2, 8), backend="triton")


@needs_triton
def test_what_the_kernel_does_not_compute_is_refused():
    with pytest.raises(ValueError, match="got qkv in torch.float64, wanted one of torch.float32"):
        attention(torch.zeros(2, 5, 3, 2, 8, dtype=torch.float64, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match="got head dimension d=136, wanted at most 128.*use backend='plain'"):
        attention(torch.zeros(1, 2, 3, 1, 136, device=DEVICE), backend="triton")


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_3", "flash_attn_4"])
def test_a_package_says_what_it_needs(backend, monkeypatch):
    module = importlib.import_module("epg_fast.ops.attention")
    monkeypatch.setattr(module, "installed", lambda package: False)
    with pytest.raises(ValueError, match=f"got backend='{backend}', but flash_attn.* is not installed; .*flash"):
        attention(torch.zeros(2, 5, 3, 2, 8), backend=backend)
    monkeypatch.setattr(module, "installed", lambda package: True)
    with pytest.raises(ValueError, match="got qkv in torch.float32 on .*, wanted bfloat16 or float16 on a CUDA device"):
        attention(torch.zeros(2, 5, 3, 2, 8, device=DEVICE), backend=backend)
