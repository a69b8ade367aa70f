import functools

import pytest
import torch

from epg_fast.models.blocks import DecoderBlock
from epg_fast.ops.adaln_attention import SPEC, adaln_attention, adaln_attention_ref
from epg_fast.ops.backends import interpreting
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
from tests.ops.tolerance import FORWARD, GRADIENT

# dtypes of x, of the norms' parameters, and of all else
DTYPES = {
    "fp32": (torch.float32,) * 3,
    "bf16 with fp32 norms": (torch.bfloat16, torch.float32, torch.bfloat16),
    "fp16": (torch.float16,) * 3,
}
NAMES = (
    "x",
    "shift",
    "scale",
    "gate",
    "norm_weight",
    "norm_bias",
    "qkv_weight",
    "qkv_bias",
    "proj_weight",
    "proj_bias",
)
SMALL = (2, 5, 2, 20)
TRITON = functools.partial(adaln_attention, backend="triton")


def make_inputs(shape, dtypes=DTYPES["fp32"], next_norm=True):
    """The arguments in order, and those of the next norm."""
    batch, length, heads, dim = shape
    width = heads * dim
    x_dtype, norm_dtype, dtype = dtypes

    def matrix(rows, seed):
        return (randn(rows, width, seed=seed, requires_grad=False) / width**0.5).to(dtype).requires_grad_()

    inputs = [randn(batch, length, width, dtype=x_dtype)]
    inputs += [randn(batch, width, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    inputs += [randn(width, dtype=norm_dtype, seed=seed) for seed in (4, 5)]
    inputs += [matrix(3 * width, 6), randn(3 * width, dtype=dtype, seed=7)]
    inputs += [matrix(width, 8), randn(width, dtype=dtype, seed=9)]
    if next_norm:
        inputs += [randn(width, dtype=norm_dtype, seed=seed) for seed in (10, 11)]
        inputs += [randn(batch, width, dtype=dtype, seed=seed) for seed in (12, 13)]
    return inputs


def make_grads(shape, count=2):
    batch, length, heads, dim = shape
    return [randn(batch, length, heads * dim, seed=seed, requires_grad=False) for seed in range(20, 20 + count)]


def half_block(function, heads, **options):
    """A function of tensors alone: what follows the ten arguments is the next norm."""
    return lambda *inputs: function(*inputs[:10], heads, next_norm=tuple(inputs[10:]) or None, **options)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernels_are_as_accurate_as_pytorch_in_float32(shape):
    kernel, reference = (half_block(f, shape[2]) for f in (TRITON, adaln_attention_ref))
    assert_accurate(kernel, reference, make_inputs(shape), make_grads(shape))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_kernels_are_as_accurate_as_pytorch_in_the_same_dtypes(shape, dtypes):
    """In the mean: each part rounds what the next one reads, and the single worst of few values is chance."""
    if interpreting() and torch.bfloat16 in dtypes:
        pytest.skip("the interpreter truncates to bfloat16, and the parts add that up")
    inputs, grads = make_inputs(shape, dtypes), make_grads(shape)
    kernel, reference = (half_block(f, shape[2]) for f in (TRITON, adaln_attention_ref))
    actual, same_dtype = run(kernel, inputs, grads), run(reference, inputs, grads)
    exact = run(reference, in_double(inputs), grads)
    for factor, *parts in zip((FORWARD, GRADIENT), actual, same_dtype, exact, strict=True):
        for got, alike, wanted in zip(*parts, strict=True):
            assert got.dtype == alike.dtype
            error, allowed = ((tensor.double() - wanted).norm() / wanted.norm() for tensor in (got, alike))
            assert error <= factor * allowed + 1e-6


@needs_triton
def test_the_next_norm_can_be_left_out():
    kernel, reference = half_block(TRITON, 2), half_block(adaln_attention_ref, 2)
    assert_accurate(kernel, reference, make_inputs(SMALL, next_norm=False), make_grads(SMALL, 1))


@needs_triton
def test_kernels_repeat_their_results_bit_for_bit():
    shape = (2, 35, 1, 40)
    assert_repeatable(half_block(TRITON, 1), make_inputs(shape), make_grads(shape))


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_the_half_block_compiles_into_one_graph(backend):
    function = half_block(adaln_attention, 2, backend=backend)
    assert_compiles_into_one_graph(function, make_inputs(SMALL), make_grads(SMALL))


@needs_triton
@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
def test_it_is_the_first_half_of_a_decoder_block(backend):
    block = DecoderBlock(40, 24, 2, 4.0, True, None, 0.0, 0.0, 0.0, True).to(DEVICE).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = randn(2, 5, 40, dtype=torch.float64)
    shift, scale, gate, mlp_shift, mlp_scale, _ = modulation = randn(6, 2, 40, dtype=torch.float64).unbind(0)
    y = torch.nn.functional.layer_norm(x, (40,), block.norm1.weight, block.norm1.bias)
    y = y * (1 + scale[:, None]) + shift[:, None]
    q, k, v = (part.unflatten(2, (2, 20)).transpose(1, 2) for part in block.attn.qkv(y).chunk(3, dim=2))
    h = ((q @ k.mT * 20**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    wanted = x + gate[:, None] * block.attn.proj(h)
    y = torch.nn.functional.layer_norm(wanted, (40,), block.norm2.weight, block.norm2.bias)
    wanted_y = y * (1 + mlp_scale[:, None]) + mlp_shift[:, None]

    dtype = torch.float32 if backend == "triton" else torch.float64
    block, x, modulation = block.to(dtype), x.to(dtype), [tensor.to(dtype) for tensor in modulation]
    x_out, y = adaln_attention(
        x,
        *modulation[:3],
        block.norm1.weight,
        block.norm1.bias,
        block.attn.qkv.weight,
        block.attn.qkv.bias,
        block.attn.proj.weight,
        block.attn.proj.bias,
        2,
        next_norm=(block.norm2.weight, block.norm2.bias, *modulation[3:5]),
        backend=backend,
    )
    torch.testing.assert_close(x_out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), wanted_y, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_under_autocast_products_take_its_dtype_and_the_residual_keeps_its_own(backend):
    inputs = make_inputs(SMALL)
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cpu" else torch.bfloat16):
        x_out, y = half_block(adaln_attention, 2, backend=backend)(*inputs)
    exact = half_block(adaln_attention_ref, 2)(*[tensor.double() for tensor in inputs])
    assert (x_out.dtype, y.dtype) == (torch.float32, torch.float16 if DEVICE == "cpu" else torch.bfloat16)
    torch.testing.assert_close(x_out.double(), exact[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(y.double(), exact[1], rtol=0.1, atol=0.1)


def test_dropout_of_the_projection_is_drawn_from_the_random_state():
    inputs, function = make_inputs(SMALL, next_norm=False), half_block(adaln_attention, 2, proj_dropout=0.5)
    torch.manual_seed(3)
    first = function(*inputs)
    torch.manual_seed(3)
    assert torch.equal(function(*inputs), first)
    assert not torch.equal(function(*inputs), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of auto, triton, reference"),
        ({"x": torch.zeros(5, 40)}, r"got x of shape \(5, 40\), wanted \[B, L, D\]"),
        ({"gate": torch.zeros(40)}, r"got gate of shape \(40,\), wanted \[2, 40\] or \[2, 1, 40\]"),
        ({"shift": torch.zeros(3, 40)}, r"got shift of shape \(3, 40\)"),
        ({"qkv_weight": torch.zeros(40, 40)}, r"got qkv_weight of shape \(40, 40\), wanted \[120, 40\]"),
        ({"proj_bias": torch.zeros(41)}, r"got proj_bias of shape \(41,\), wanted \[40\]"),
        ({"num_heads": 3}, "got 3 heads, wanted a divisor of the width D=40"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(change, message):
    arguments = dict(zip(NAMES, make_inputs(SMALL), strict=False)) | {"num_heads": 2} | change
    with pytest.raises(ValueError, match=message):
        adaln_attention(**arguments)


def test_traffic_and_work_are_those_of_the_parts():
    shape = (2, 3, 2, 4)
    assert SPEC.bytes(shape, 2) > 6 * 2 * 3 * 8 * 2
    assert SPEC.flops(shape) > 8 * 2 * 3 * 8 * 8
    assert SPEC.flops(shape, backward=True) > SPEC.flops(shape)
