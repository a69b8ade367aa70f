"""What is particular to attention: long rows of keys, scores that overflow, dropout, layouts of packed heads."""

import functools

import pytest
import torch

from epg_fast.ops import attention
from tests.ops.examples import EXAMPLES
from tests.ops.kernel_checks import DEVICE, assert_accurate, in_double, leaves_of, needs_triton, run

EXAMPLE = EXAMPLES["attention"]
KERNEL = functools.partial(EXAMPLE.call, "triton")
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", ["fp32", *(pytest.param(d, marks=pytest.mark.kernels) for d in ("bf16", "fp16"))]
)
poisoned = pytest.mark.usefixtures("poisoned_empty")


def make(shape, dtype="fp32", **options):
    return EXAMPLE.inputs(shape, dtype, device=DEVICE) | options


@needs_triton
@poisoned
@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(1, 258, 1, 72), (1, 256, 1, 16), (1, 1, 3, 8), (1, 130, 1, 100)], ids=str)
def test_kernel_is_accurate_with_and_without_remaining_keys_and_columns(shape):
    assert_accurate(KERNEL, EXAMPLE.reference, make(shape, "fp16"))


@needs_triton
@poisoned
@pytest.mark.slow
@EVERY_DTYPE
def test_kernel_reads_keys_from_memory_when_they_do_not_fit_beside_it(dtype, monkeypatch):
    from epg_kernels import attention as kernels

    assert kernels._streams(1026, 64, 2, 1000, torch.device("cpu"))
    assert not kernels._streams(258, 128, 2, 1000, torch.device("cpu"))
    monkeypatch.setattr(kernels, "_RESIDENT_BYTES", 0)
    assert_accurate(KERNEL, EXAMPLE.reference, make((1, 147, 1, 24), dtype))


@needs_triton
@poisoned
@pytest.mark.slow
@EVERY_DTYPE
def test_kernel_stays_accurate_when_the_gradient_of_queries_comes_from_many_blocks(dtype, monkeypatch):
    from epg_kernels import attention as kernels

    monkeypatch.setattr(kernels, "_bwd_config", lambda *_: kernels.Config(32, 16, 4))
    assert_accurate(KERNEL, EXAMPLE.reference, make((1, 80, 1, 24), dtype))


@needs_triton
@poisoned
@pytest.mark.slow
def test_a_program_that_takes_several_heads_computes_each_as_if_alone(monkeypatch):
    from epg_kernels import attention as kernels

    inputs, gradients = make((3, 18, 1, 16), "fp16"), []
    for programs in (2, 3):  # of three heads; with three, each program has one
        monkeypatch.setattr(kernels, "_resident_programs", lambda _, programs=programs: programs)
        gradients.append(run(KERNEL, inputs)[1][0])
    assert torch.equal(*gradients)


@needs_triton
@poisoned
def test_heads_may_lie_before_tokens():
    batch, length, heads, head_dim = 2, 6, 2, 24
    qkv = make((batch, length, heads, head_dim))["qkv"]
    inputs = leaves_of(lambda t: t.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4), {"qkv": qkv})
    grad = torch.randn(batch, heads, length, head_dim, device=DEVICE).transpose(1, 2)
    assert_accurate(KERNEL, EXAMPLE.reference, inputs, [grad])


@needs_triton
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_kernel_survives_scores_whose_exponentials_overflow(sign):
    qkv = make((1, 18, 1, 16), "fp16")["qkv"].detach()
    qkv[:, :, :2] = qkv[:, :, :2].abs() * 10
    qkv[:, :, 1] *= sign
    assert_accurate(KERNEL, EXAMPLE.reference, {"qkv": qkv})
    inputs = {"qkv": qkv.requires_grad_()}
    (actual,), (exact,) = run(KERNEL, inputs)[1], run(EXAMPLE.reference, in_double(inputs))[1]
    # The weights and their gradient are rounded to float16, and large ones cancel.
    allowed = 4 * torch.finfo(torch.float16).eps * exact.abs().max().item()
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=allowed)


@needs_triton
def test_kernel_follows_the_precision_that_pytorch_is_told_to_use():
    from epg_kernels.attention import _precision

    before = torch.get_float32_matmul_precision()
    try:
        for told, wanted in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(told)
            assert _precision(torch.zeros(1)) == wanted
    finally:
        torch.set_float32_matmul_precision(before)


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "math", "triton"])
def test_output_is_contiguous_and_under_autocast_that_of_the_cast_operands(backend):
    inputs = make((2, 5, 2, 40))
    with torch.autocast(DEVICE, torch.bfloat16):
        under_autocast = attention(**inputs, backend=backend)
    assert under_autocast.is_contiguous() and under_autocast.dtype == torch.bfloat16
    assert torch.equal(under_autocast, attention(inputs["qkv"].bfloat16(), backend=backend))


def test_dropout_drops_attention_weights_with_sdpa():
    qkv = make((2, 17, 2, 8))["qkv"].detach()
    dropped, kept = attention(qkv, dropout_p=0.5), attention(qkv)
    assert not torch.allclose(dropped, kept)
    several = torch.stack([attention(qkv, dropout_p=0.5) for _ in range(100)])
    assert (several.mean(0) - kept).abs().mean() < 0.2 * (dropped - kept).abs().mean()


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_kernels_that_a_cpu_lacks_are_refused_by_name(backend):
    with pytest.raises(ValueError, match=f"wanted a CUDA device for backend='{backend}'"):
        attention(torch.ones(1, 2, 3, 1, 8), backend=backend)
