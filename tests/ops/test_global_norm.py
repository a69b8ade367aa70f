import math

import pytest
import torch

from epg_fast.ops.global_norm import SPEC, global_norm
from tests.ops.kernel_checks import CPU, DEVICE, GPU, make_tensors, needs_extension

FLOAT32_STEP = 2.0**-23


def exact_norm(tensors):
    return math.sqrt(math.fsum(t.double().square().sum().item() for t in tensors))


@needs_extension
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    "shape", [*SPEC.odd_shapes, *(pytest.param(s, marks=GPU) for s in ((349, 65_537), (5000, 4096)))], ids=str
)
def test_the_norm_is_the_float32_nearest_to_the_exact_one_or_its_neighbour(shape, dtypes):
    count, size = shape
    tensors = [t.to(dtypes[i % len(dtypes)]) for i, t in enumerate(make_tensors([(size,)] * count))]
    norm, found_inf = global_norm(tensors, backend="extension")
    assert norm.shape == found_inf.shape == () and norm.dtype == found_inf.dtype == torch.float32
    assert norm.item() == pytest.approx(exact_norm(tensors), rel=FLOAT32_STEP) and found_inf.item() == 0


@needs_extension
@pytest.mark.parametrize("backend", ["extension", "plain"])
def test_empty_tensors_and_zero_dimensions(backend):
    empty = torch.zeros(0, 3, device=DEVICE)
    tensors = [make_tensors([(40_000,)])[0], empty, torch.tensor(2.0, device=DEVICE)]
    assert global_norm(tensors, backend=backend)[0].item() == pytest.approx(exact_norm(tensors), rel=FLOAT32_STEP)
    for nothing in ([], [empty]):
        assert [t.item() for t in global_norm(nothing, backend=backend)] == [0, 0]


@needs_extension
@pytest.mark.parametrize("backend", ["extension", pytest.param("plain", marks=CPU)])
@pytest.mark.parametrize(("value", "found"), [(1e-30, 0), (5e17, 0), (1e18, 1), (1e30, 1)])
def test_squares_that_float32_cannot_hold_are_summed_and_reported(value, found, backend):
    """Adam keeps squares in float32: a gradient whose square overflows there must not reach it."""
    tensors = [torch.full((1000,), value, device=DEVICE), torch.full((1,), 1e-30, device=DEVICE)]
    norm, found_inf = global_norm(tensors, backend=backend)
    assert norm.item() == pytest.approx(value * math.sqrt(1000), rel=1e-6) and found_inf.item() == found


def test_the_reference_adds_up_millions_of_values():
    tensors = [torch.full((4_000_000,), 1e-4, device=DEVICE)]
    assert global_norm(tensors, backend="plain")[0].item() == pytest.approx(0.2, rel=1e-6)


@needs_extension
@pytest.mark.parametrize("backend", ["extension", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite_is_found(value, dtype, backend):
    for tensor, place in ((0, 0), (1, 16_384), (2, 9)):
        tensors = [t.to(dtype) for t in make_tensors([(7,), (20_001,), (10,)])]
        tensors[tensor][place] = value
        norm, found_inf = global_norm(tensors, backend=backend)
        assert found_inf.item() == 1 and not norm.isfinite()


@needs_extension
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), r"tensors\[1\] must be float32 or bfloat16"),
        (torch.zeros(4, dtype=torch.float16), r"tensors\[1\] must be float32 or bfloat16"),
        (torch.zeros(4, 4).t()[1:], r"tensors\[1\] must be contiguous"),
        (torch.zeros(4, device="meta"), r"got tensors\[1\] on meta and others on c.*, wanted one device"),
    ],
)
def test_a_wrong_tensor_is_named(wrong, message):
    wrong = wrong if wrong.is_meta else wrong.to(DEVICE)
    with pytest.raises((RuntimeError, ValueError), match=message):
        global_norm([torch.ones(4, device=DEVICE), wrong], backend="extension")


def test_the_default_takes_tensors_that_the_extension_does_not():
    tensors = [torch.ones(4, dtype=torch.float64, device=DEVICE), torch.ones(3, 2, device=DEVICE).t()]
    norm, found_inf = global_norm(tensors)
    assert norm.item() == pytest.approx(math.sqrt(10)) and found_inf.item() == 0
