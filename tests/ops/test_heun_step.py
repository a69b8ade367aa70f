import functools

import pytest
import torch

from epg_fast.ops import euler_step
from epg_fast.ops.heun_step import SPEC, heun_step, heun_step_, heun_step_ref
from tests.ops.extension_checks import DEVICE, make_tensors, needs_extension, shapes
from tests.ops.tolerance import assert_close_to_reference

CLAMPS = [None, (-1.0, 1.0), (None, 0.5)]
STEP = {"sigma": 1.7, "sigma_next": 0.3}
BOTH = pytest.mark.parametrize("function", [heun_step, heun_step_])


def make_inputs(shape, seed=0):
    return make_tensors([shape] * 3, seed)


def doubled(tensors):
    return [tensor.double() for tensor in tensors]


def test_reference_follows_the_formula_in_its_order():
    x, denoised, denoised_next = make_inputs((2, 3, 8, 8))
    d = (x - denoised.clamp(-1, 1)) / 3.0
    ahead = x + (1.25 - 3.0) * d
    d_next = (ahead - denoised_next.clamp(-1, 1)) / 1.25
    actual = heun_step(x, denoised, denoised_next, 3.0, 1.25, clamp=(-1.0, 1.0))
    assert torch.equal(actual, x + (1.25 - 3.0) * (d + d_next) / 2)


def test_a_step_is_the_trapezoidal_rule_along_the_euler_step():
    # In float64 and with the slopes' definition only: x' = x + dt (f(x, sigma) + f(euler, sigma_next)) / 2.
    x, denoised, denoised_next = doubled(make_inputs((4, 5)))
    ahead = euler_step(x, denoised, **STEP)
    slopes = (x - denoised) / 1.7 + (ahead - denoised_next) / 0.3
    torch.testing.assert_close(heun_step(x, denoised, denoised_next, **STEP), x + (0.3 - 1.7) / 2 * slopes)


def test_data_at_one_point_is_reached_exactly():
    # The ODE's path to a fixed clean image is a straight line, on which Heun's method makes no error.
    noise, image = doubled(make_inputs((3, 7))[:2])
    torch.testing.assert_close(heun_step(image + 1.7 * noise, image, image, **STEP), image + 0.3 * noise)


def test_reference_has_gradients_and_any_floating_dtype():
    inputs = [tensor.requires_grad_() for tensor in doubled(make_inputs((2, 3)))]
    assert torch.autograd.gradcheck(functools.partial(heun_step, **STEP), inputs)
    assert heun_step(*(tensor.bfloat16() for tensor in inputs), **STEP).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reference_in_place_is_the_reference(dtype):
    x, denoised, denoised_next = (tensor.to(dtype) for tensor in make_inputs((3, 5)))
    wanted = heun_step_ref(x, denoised, denoised_next, **STEP)
    assert heun_step_(x, denoised, denoised_next, **STEP) is x
    assert torch.equal(x, wanted)


@needs_extension
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
@pytest.mark.parametrize("shape", shapes(SPEC), ids=str)
def test_extension_is_as_accurate_as_pytorch(shape, clamp):
    x, denoised, denoised_next = inputs = make_inputs(shape)
    before = [tensor.clone() for tensor in inputs]
    actual = heun_step(*inputs, **STEP, clamp=clamp, backend="extension")
    same_dtype = heun_step_ref(*inputs, **STEP, clamp=clamp)
    assert_close_to_reference(actual, same_dtype, heun_step_ref(*doubled(inputs), **STEP, clamp=clamp))
    if DEVICE == "cpu":
        assert torch.equal(actual, same_dtype)
    assert all(map(torch.equal, inputs, before))

    assert heun_step_(x, denoised, denoised_next, **STEP, clamp=clamp, backend="extension") is x
    assert torch.equal(x, actual)
    assert torch.equal(denoised, before[1]) and torch.equal(denoised_next, before[2])


@needs_extension
@pytest.mark.parametrize("offsets", [(1, 1, 1), (0, 1, 2), (3, 0, 0)], ids=str)
def test_extension_accepts_pointers_that_are_not_16_byte_aligned(offsets):
    inputs = [tensor[offset : offset + 995] for tensor, offset in zip(make_inputs(1000), offsets, strict=True)]
    same_dtype, exact = heun_step_ref(*inputs, **STEP), heun_step_ref(*doubled(inputs), **STEP)
    assert_close_to_reference(heun_step(*inputs, **STEP, backend="extension"), same_dtype, exact)
    assert_close_to_reference(heun_step_(*inputs, **STEP, backend="extension"), same_dtype, exact)


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_extension_splits_a_large_tensor_over_threads_without_a_seam(threads):
    inputs, before = make_inputs(200_003), torch.get_num_threads()
    same_dtype, exact = heun_step_ref(*inputs, **STEP), heun_step_ref(*doubled(inputs), **STEP)
    torch.set_num_threads(threads)
    try:
        actual = heun_step_(*inputs, **STEP, backend="extension")
    finally:
        torch.set_num_threads(before)
    assert_close_to_reference(actual, same_dtype, exact)


@needs_extension
def test_extension_passes_nan_on():
    for i in range(3):
        inputs = make_inputs(40)
        inputs[i][3] = float("nan")
        out = heun_step(*inputs, **STEP, clamp=(-1.0, 1.0), backend="extension")
        assert out.isnan().nonzero().tolist() == [[3]]


@needs_extension
@pytest.mark.parametrize("which", [1, 2])
def test_an_estimate_may_be_the_state_itself(which):
    inputs = make_inputs(33)
    inputs[which] = inputs[0]
    wanted = heun_step(*inputs, **STEP, backend="extension")
    assert torch.equal(heun_step_(*inputs, **STEP, backend="extension"), wanted)


@needs_extension
def test_an_empty_tensor_stays_empty():
    x = torch.empty(0, 3, device=DEVICE)
    assert heun_step_(x, x, x, **STEP, backend="extension").shape == (0, 3)


@needs_extension
def test_autograd_notices_that_the_state_was_overwritten():
    x, denoised, denoised_next = make_inputs(5)
    weight = torch.ones(5, requires_grad=True, device=DEVICE)
    loss = (weight * x).sum()  # keeps x for the gradient of weight
    heun_step_(x, denoised, denoised_next, **STEP, backend="extension")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
def test_inference_mode_is_accepted():
    with torch.inference_mode():
        inputs = make_inputs(5)
        wanted = heun_step(*inputs, **STEP)
        torch.testing.assert_close(heun_step_(*inputs, **STEP, backend="extension"), wanted)


@needs_extension
@pytest.mark.parametrize("name", ["heun_step_out", "heun_step_"])
def test_operators_pass_opcheck(name):
    inputs = make_inputs((2, 9))
    heun_step(*inputs, **STEP, backend="extension")
    out = [torch.empty_like(inputs[0])] if name == "heun_step_out" else []
    torch.library.opcheck(getattr(torch.ops.epg_fast, name).default, (*out, *inputs, 1.0, 0.5, -1.0, 1.0))


@needs_extension
@BOTH
@pytest.mark.parametrize("clamp", CLAMPS[:2], ids=str)
def test_extension_compiles_into_one_graph(clamp, function):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for sigma in (1.7, 0.9, 0.6):
        arguments = {"sigma": sigma, "sigma_next": sigma / 3, "clamp": clamp, "backend": "extension"}
        wanted = heun_step(*make_inputs((2, 9)), **arguments)
        inputs = make_inputs((2, 9))
        actual = compiled(*inputs, **arguments)
        assert torch.equal(actual, wanted)
        assert torch.equal(inputs[0], wanted) == (function is heun_step_)


@needs_extension
@pytest.mark.slow
def test_inductor_gives_the_same_bits_around_the_step_in_place(inductor):
    def twice(x, denoised, denoised_next):
        x = x * 2
        heun_step_(x, denoised, denoised_next, **STEP, backend="extension")
        return x + heun_step(x, denoised, denoised_next, 0.3, 0.1, backend="extension")

    inputs = make_inputs((2, 9))
    torch.compiler.reset()
    assert torch.equal(torch.compile(twice, fullgraph=True)(*inputs), twice(*inputs))


BUFFER = torch.zeros(8, device=DEVICE)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(5)}, "out has size 5 in dimension 0, x has 4"),
        ({"denoised": torch.zeros(4, 1)}, "denoised has 2 dimensions, x has 1"),
        ({"denoised_next": torch.zeros(4, dtype=torch.float64)}, "denoised_next must be float32"),
        ({"x": torch.zeros(8)[::2]}, "x must be contiguous"),
        ({"sigma": 0.0}, "sigma must not be 0"),
        ({"sigma_next": 0.0}, "sigma_next must not be 0"),
        ({"out": BUFFER[:4], "x": BUFFER[1:5]}, "out is written and must not overlap part of x"),
        ({"out": BUFFER[:4], "denoised_next": BUFFER[3:7]}, "must not overlap part of denoised_next"),
    ],
)
def test_operator_refuses_what_it_cannot_compute(change, message):
    names = ("out", "x", "denoised", "denoised_next")
    arguments = {name: torch.zeros(4) for name in names} | {"sigma": 1.0, "sigma_next": 0.5} | change
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.epg_fast.heun_step_out(**arguments, lo=None, hi=None)


@BOTH
@pytest.mark.parametrize("backend", ["plain", "extension"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoised": torch.zeros(5)}, r"got denoised of shape \(5,\), wanted \(4,\) as x"),
        ({"denoised_next": torch.zeros(5)}, r"got denoised_next of shape \(5,\), wanted \(4,\) as x"),
        ({"sigma": 0.0}, "got sigma=0, wanted a level above 0"),
        ({"sigma_next": 0.0}, "got sigma_next=0, wanted a level above 0"),
    ],
)
def test_a_mistake_is_answered_on_every_backend(function, backend, change, message):
    arguments = {name: torch.zeros(4) for name in ("x", "denoised", "denoised_next")} | STEP | change
    with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
        function(**arguments, backend=backend)


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "got backend='triton', wanted one of plain, extension"),
        ({"x": torch.zeros(4).half()} | dict.fromkeys(("denoised", "denoised_next"), torch.zeros(4).half()), "float16"),
        ({"denoised": torch.zeros(8)[::2]}, r"got denoised with strides \(2,\), wanted it contiguous"),
        ({"denoised_next": torch.zeros(4, requires_grad=True)}, "got denoised_next that requires a gradient"),
        ({"denoised": torch.zeros(4, device="meta")}, "got denoised on meta and x on cpu, wanted one device"),
        ({"clamp": (torch.zeros(1), 1.0)}, "wanted two numbers for backend='extension'"),
        ({"clamp": (float("nan"), 1.0)}, "wanted two numbers for backend='extension'"),
    ],
)
def test_a_mistake_is_answered_with_what_the_extension_wants(function, change, message):
    arguments = {name: torch.zeros(4) for name in ("x", "denoised", "denoised_next")} | STEP | change
    with pytest.raises(ValueError, match=message):
        function(**({"backend": "extension"} | arguments))


@pytest.mark.parametrize("backend", ["plain", "extension"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, requires_grad=True)}, "got x that requires a gradient.*use heun_step$"),
        ({"denoised": torch.zeros(4).double()}, "got denoised in torch.float64, wanted torch.float32 as x"),
        ({"denoised_next": torch.zeros(4, device="meta")}, "got denoised_next on meta and x on cpu"),
    ],
)
def test_a_state_that_cannot_be_overwritten_is_refused_on_every_backend(backend, change, message):
    arguments = {name: torch.zeros(4) for name in ("x", "denoised", "denoised_next")} | STEP | change
    with pytest.raises(ValueError, match=message):
        heun_step_(**arguments, backend=backend)


@needs_extension
@pytest.mark.parametrize("name", ["denoised", "denoised_next"])
def test_an_estimate_that_overlaps_a_part_of_the_state_is_refused(name):
    inputs = {"x": BUFFER[:4], "denoised": torch.zeros_like(BUFFER[:4]), "denoised_next": torch.zeros_like(BUFFER[:4])}
    inputs[name] = BUFFER[2:6]
    with pytest.raises(ValueError, match=rf"got x that overlaps part of {name}.*pass {name}.clone\(\)"):
        heun_step_(**inputs, **STEP, backend="extension")


@needs_extension
def test_forward_mode_derivatives_are_refused_not_lost():
    x, denoised = make_tensors([(4,), (4,)])
    tangent = torch.ones(4, device=DEVICE)

    def steps(x):
        return (
            lambda: euler_step(x, denoised, 2.0, 1.0, backend="extension"),
            lambda: heun_step(x, denoised, denoised, 2.0, 1.0, backend="extension"),
        )

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        for step in steps(dual):
            with pytest.raises(ValueError, match="got x with a tangent.*use backend='plain'"):
                step()
    for place in (0, 1):
        with pytest.raises(ValueError, match="inside torch.func.jvp or torch.func.grad"):
            torch.func.jvp(lambda x, place=place: steps(x)[place](), (x,), (tangent,))
