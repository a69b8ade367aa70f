import functools

import pytest
import torch

from epg_fast.ops.backends import interpreting
from epg_fast.ops.quantize_rows import SPEC, quantize_rows, quantize_rows_ref
from tests.ops.kernel_checks import (
    DEVICE,
    assert_compiles_into_one_graph,
    assert_repeatable,
    comparable_fp8,
    needs_triton,
    randn,
    shapes_of,
)

SMALL = (2, 5, 40, 24)
KERNEL = functools.partial(quantize_rows, backend="triton")
HALF = torch.float16 if interpreting() else torch.bfloat16  # to which the interpreter truncates
# whether there are a branch, its gate, a skip and a GELU
FORMS = {
    "attention's output": (False, False, False, False),
    "the MLP's middle": (False, False, False, True),
    "a long skip": (False, False, True, False),
    "a long skip after a decoder block": (True, True, True, False),
    "a block's end": (True, False, False, False),
}


def make_inputs(shape, form, dtype=torch.float32):
    """x, branch, gate, skip, gelu; rows of very different sizes."""
    batch, tokens, width, skip_width = shape
    branch, gate, skip, gelu = form

    def rows(width, seed):
        sizes = torch.logspace(-2, 2, tokens, device=DEVICE)[:, None]
        return (randn(batch, tokens, width, seed=seed, requires_grad=False) * sizes).to(dtype)

    return [
        rows(width, 0),
        rows(width, 1) if branch else None,
        randn(batch, width, dtype=dtype, seed=2, requires_grad=False) if gate else None,
        rows(skip_width or width, 3) if skip else None,
        gelu,
    ]


def in_bits(function):
    """Bytes in the place of FP8 numbers, which can be compared."""

    def call(*inputs):
        rows, scale = function(*inputs)
        return rows.view(torch.uint8), scale

    return call


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", shapes_of(SPEC), ids=str)
def test_the_kernel_gives_the_rows_of_the_reference(shape, dtype, form):
    inputs = make_inputs(shape, form, dtype)
    (rows, scale), (wanted, wanted_scale) = KERNEL(*inputs), quantize_rows_ref(*inputs)
    assert rows.dtype == torch.float8_e4m3fn and rows.shape == wanted.shape
    # GELU in 16 bits has a relative error of 1.5e-5
    torch.testing.assert_close(scale, wanted_scale, rtol=2e-5 if inputs[-1] else 1e-6, atol=0)
    exact = quantized_in_double(*inputs)
    # Every value that does not lie between two FP8 numbers, to within the errors of scale and GELU.
    lower, upper = ((exact * (1 + error)).float().to(torch.float8_e4m3fn) for error in (-1e-4, 1e-4))
    clear = (lower.float() == upper.float()) & comparable_fp8(upper)
    if inputs[-1] or interpreting():  # GELU's tail is a difference of numbers near 1; the interpreter floors subnormals
        clear &= exact.abs() >= 1
    assert torch.equal(rows.float()[clear], wanted.float()[clear])
    assert clear.sum() > 0.3 * clear.numel()


def quantized_in_double(x, branch, gate, skip, gelu):
    """z / row_scale, not rounded."""
    z = x if branch is None else (x.double() + branch.double() * (1 if gate is None else gate[:, None].double()))
    z = z.to(x.dtype).double()  # a sum is rounded once
    z = z * torch.special.ndtr(z) if gelu else z
    z = z if skip is None else torch.cat([z, skip.double()], -1)
    return z / z.abs().amax(-1, keepdim=True) * 448


@needs_triton
def test_the_kernel_reads_tensors_that_are_not_contiguous():
    x, branch, gate, skip, _ = make_inputs((3, 9, 40, 24), FORMS["a long skip after a decoder block"])
    parts = x[:, 2:], branch.flip(0)[:, 2:], gate.t().contiguous().t(), skip.transpose(1, 2).contiguous().mT[:, 2:]
    wanted = in_bits(KERNEL)(*(part.contiguous() for part in parts))
    torch.testing.assert_close(in_bits(KERNEL)(*parts), wanted, rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_it_passes_opcheck_repeats_its_bits_and_compiles_into_one_graph(form):
    inputs = make_inputs(SMALL, form)
    torch.library.opcheck(torch.ops.epg_fast.quantize_rows.default, inputs)
    assert_repeatable(in_bits(KERNEL), inputs[:4], None)
    assert_compiles_into_one_graph(in_bits(functools.partial(KERNEL, gelu=inputs[-1])), inputs[:4], None)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_operator_on_the_cpu_is_the_reference(form, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [value.cpu() if isinstance(value, torch.Tensor) else value for value in make_inputs(SMALL, form)]
    got = in_bits(torch.ops.epg_fast.quantize_rows)(*inputs)
    torch.testing.assert_close(got, in_bits(quantize_rows)(*inputs), rtol=0, atol=0)


def test_reference_is_the_formula_to_three_bits_behind_the_leading_one():
    x, branch, gate, skip, _ = (t.double() if torch.is_tensor(t) else t for t in make_inputs(SMALL, (True,) * 4))
    z = x + gate[:, None] * branch
    wanted = torch.cat([z * torch.special.ndtr(z), skip], -1)
    for gates in (gate, gate[:, None]):
        rows, scale = quantize_rows(x, branch, gates, skip, gelu=True)
        torch.testing.assert_close(scale, wanted.abs().amax(-1) / 448)
        restored = rows.double() * scale[..., None]
        assert ((restored - wanted).abs() <= wanted.abs() / 16 + scale[..., None] * 2**-10).all()


def test_a_row_of_zeros_stays_one_and_every_other_reaches_the_largest_number():
    y = torch.randn(1, 6, 400, dtype=torch.float64) * 10.0 ** torch.arange(-3, 3)[:, None]
    y[0, 2] = 0
    quantized, row_scale = quantize_rows_ref(y)
    restored = quantized.double() * row_scale[..., None]
    assert ((restored - y).abs() <= y.abs() / 16 + row_scale[..., None] * 2**-10).all()
    assert (quantized.float().abs().amax(-1) == torch.tensor([448.0, 448, 0, 448, 448, 448])).all()


@needs_triton
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_it_does_not_hide_nan(backend):
    if backend == "triton" and interpreting():
        pytest.skip("the interpreter converts NaN to a number")
    x = torch.ones(1, 2, 16, device=DEVICE)
    x[0, 0, 3] = float("nan")
    y = quantize_rows(x, gelu=True, backend=backend)[0].float()
    assert y[0, 0].isnan().any() and y[0, 1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "got backend='cuda', wanted one of plain, triton"),
        ({"x": torch.zeros(5, 40)}, r"got x of shape \(5, 40\), wanted \[B, L, D\]"),
        ({"branch": torch.zeros(2, 5, 41)}, r"got branch of shape \(2, 5, 41\), wanted \[2, 5, 40\]"),
        ({"gate": torch.zeros(40)}, r"got gate of shape \(40,\), wanted \[2, 40\] or \[2, 1, 40\]"),
        ({"branch": None}, "got a gate and no branch, wanted both, or no gate"),
        ({"skip": torch.zeros(2, 4, 24)}, r"got skip of shape \(2, 4, 24\), wanted \[2, 5, E\]"),
        ({"skip": torch.zeros(2, 5, 24).int()}, "got skip in torch.int32, wanted a floating dtype"),
        ({"x": torch.zeros(2, 5, 40, requires_grad=True)}, "requires a gradient, which FP8 output has not"),
        (
            {"x": torch.zeros(2, 5, 16_400), "branch": None, "gate": None, "backend": "triton"},
            "got x of width 16400, wanted at most 16384 for backend='triton'; use backend='plain'",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_was_got_and_wanted(change, message):
    arguments = {"x": torch.zeros(2, 5, 40), "branch": torch.zeros(2, 5, 40), "gate": torch.zeros(2, 40)}
    with pytest.raises(ValueError, match=message):
        quantize_rows(**arguments | {"skip": torch.zeros(2, 5, 24)} | change)


def test_traffic_model_counts_each_tensor_once():
    assert SPEC.bytes((2, 3, 8, 0), 2) == 6 * 8 * 2 + 6 * 8 + 6 * 4
    assert SPEC.bytes((2, 3, 8, 4), 2) == 2 * (6 * 8 * 2 + 2 * 8 + 6 * 4) + 6 * 12 + 6 * 4
