"""The sampler's steps in C++ and CUDA: the same bits as in PyTorch on a CPU, in place or not."""

import pytest
import torch

from epg_fast import ops
from tests.ops.kernel_checks import DEVICE, assert_close_to_reference, needs_extension

STEPS = {"euler_step": ("denoised",), "heun_step": ("denoised", "denoised_next")}
EACH = pytest.mark.parametrize("name", STEPS)
LEVELS = (1.7, 0.3)


def make(name, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    count = 1 + len(STEPS[name])
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(count)]


@needs_extension
@EACH
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0), (None, 0.5)], ids=str)
def test_in_place_or_not_a_step_has_the_bits_of_pytorch(name, clamp):
    step, inputs = getattr(ops, name), make(name, 5, 3, 7, 11)
    before, (x, *estimates) = [tensor.clone() for tensor in inputs], inputs
    actual, same_dtype = step(*inputs, *LEVELS, clamp, backend="extension"), step(*inputs, *LEVELS, clamp)
    assert_close_to_reference(actual, same_dtype, step(*(t.double() for t in inputs), *LEVELS, clamp))
    assert DEVICE != "cpu" or torch.equal(actual, same_dtype)
    assert all(map(torch.equal, inputs, before))
    assert getattr(ops, f"{name}_")(*inputs, *LEVELS, clamp, backend="extension") is x
    assert torch.equal(x, actual) and all(map(torch.equal, estimates, before[1:]))


@needs_extension
@EACH
def test_nan_is_passed_on(name):
    for i in range(1 + len(STEPS[name])):
        inputs = make(name, 40)
        inputs[i][3] = float("nan")
        out = getattr(ops, name)(*inputs, *LEVELS, clamp=(-1.0, 1.0), backend="extension")
        assert out.isnan().nonzero().tolist() == [[3]]


@needs_extension
@EACH
def test_an_estimate_may_be_the_state_itself_and_the_operator_may_write_over_either(name):
    for i in range(1, 1 + len(STEPS[name])):
        inputs = make(name, 33)
        inputs[i] = inputs[0]
        wanted = getattr(ops, name)(*inputs, *LEVELS, backend="extension")
        assert torch.equal(getattr(ops, f"{name}_")(*inputs, *LEVELS, backend="extension"), wanted)
        inputs = make(name, 33)
        wanted = getattr(ops, name)(*inputs, *LEVELS, backend="extension")
        getattr(torch.ops.epg_fast, f"{name}_out")(inputs[i], *inputs, *LEVELS, None, None)
        assert torch.equal(inputs[i], wanted)


@needs_extension
@EACH
def test_an_empty_tensor_stays_empty_and_inference_mode_is_accepted(name):
    with torch.inference_mode():
        for size in (0, 5):
            inputs = make(name, size, 3)
            wanted = getattr(ops, name)(*inputs, *LEVELS)
            torch.testing.assert_close(getattr(ops, f"{name}_")(*inputs, *LEVELS, backend="extension"), wanted)


@needs_extension
@EACH
def test_autograd_notices_that_the_state_was_overwritten(name):
    inputs = make(name, 5)
    weight = torch.ones(5, requires_grad=True, device=DEVICE)
    loss = (weight * inputs[0]).sum()  # keeps the state for the gradient of weight
    getattr(ops, f"{name}_")(*inputs, *LEVELS, backend="extension")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
@EACH
def test_operator_in_place_passes_opcheck(name):
    inputs = make(name, 2, 9)
    getattr(ops, name)(*inputs, *LEVELS, backend="extension")
    torch.library.opcheck(getattr(torch.ops.epg_fast, f"{name}_").default, (*inputs, 1.0, 0.5, -1.0, 1.0))


@needs_extension
@pytest.mark.slow
def test_compiled_the_steps_have_the_same_bits_at_any_level(inductor):
    def twice(x, denoised, denoised_next, sigma):
        x = ops.euler_step_(x * 2, denoised, 2 * sigma, sigma, (-1.0, 1.0), backend="extension")
        ops.heun_step_(x, denoised, denoised_next, sigma, sigma / 3, backend="extension")
        return x + ops.heun_step(x, denoised, denoised_next, sigma / 3, sigma / 9, backend="extension")

    torch.compiler.reset()
    compiled = torch.compile(twice, fullgraph=True)
    for sigma in (1.7, 0.9, 0.6):
        inputs = make("heun_step", 2, 9)
        assert torch.equal(compiled(*inputs, sigma), twice(*inputs, sigma))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_in_plain_pytorch_in_place_is_the_same_and_any_floating_dtype_is_taken(name, dtype):
    inputs = make(name, 3, 5, dtype=dtype)
    wanted = getattr(ops, name)(*inputs, *LEVELS)
    assert wanted.dtype == dtype and getattr(ops, f"{name}_")(*inputs, *LEVELS) is inputs[0]
    assert torch.equal(inputs[0], wanted)


BUFFER = torch.zeros(8, device=DEVICE)
MISTAKES = [
    ({"out": torch.zeros(5)}, "out has size 5 in dimension 0, x has 4"),
    ({"denoised": torch.zeros(4, 1)}, "denoised has 2 dimensions, x has 1"),
    ({"denoised": torch.zeros(4, dtype=torch.float64)}, "denoised must be float32"),
    ({"x": torch.zeros(8)[::2]}, "x must be contiguous"),
    ({"sigma": 0.0}, "sigma must not be 0"),
    ({"out": BUFFER[:4], "x": BUFFER[1:5]}, "out is written and must not overlap part of x"),
    ({"out": BUFFER[4:], "denoised": BUFFER[1:5]}, "out is written and must not overlap part of denoised"),
]
OF_HEUN = [
    ({"sigma_next": 0.0}, "sigma_next must not be 0"),
    ({"out": BUFFER[:4], "denoised_next": BUFFER[3:7]}, "must not overlap part of denoised_next"),
]


@needs_extension
@EACH
def test_operator_refuses_what_it_cannot_compute(name):
    good = {argument: torch.zeros(4, device=DEVICE) for argument in ("out", "x", *STEPS[name])}
    good |= {"sigma": 1.0, "sigma_next": 0.5, "lo": None, "hi": None}
    for change, message in MISTAKES + OF_HEUN * (name == "heun_step"):
        change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.epg_fast, f"{name}_out")(**good | change)
