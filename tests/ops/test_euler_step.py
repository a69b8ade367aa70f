import pytest
import torch

from epg_fast.ops import extension
from epg_fast.ops.euler_step import SPEC, euler_step, euler_step_, euler_step_ref
from tests.ops.extension_checks import DEVICE, make_tensors, needs_extension, shapes
from tests.ops.tolerance import assert_close_to_reference

CLAMPS = [None, (-1.0, 1.0)]
BOTH = pytest.mark.parametrize("function", [euler_step, euler_step_])


def make_inputs(shape, seed=0):
    return make_tensors([shape] * 2, seed)


@needs_extension
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
@pytest.mark.parametrize("shape", shapes(SPEC), ids=str)
def test_extension_is_as_accurate_as_pytorch(shape, clamp):
    x, denoised = make_inputs(shape)
    actual = euler_step(x, denoised, 1.7, 0.3, clamp, backend="extension")
    same_dtype = euler_step_ref(x, denoised, 1.7, 0.3, clamp)
    assert_close_to_reference(actual, same_dtype, euler_step_ref(x.double(), denoised.double(), 1.7, 0.3, clamp))
    if DEVICE == "cpu":
        assert torch.equal(actual, same_dtype)

    before = denoised.clone()
    assert euler_step_(x, denoised, 1.7, 0.3, clamp, backend="extension") is x
    assert torch.equal(x, actual) and torch.equal(denoised, before)


@needs_extension
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_extension_accepts_pointers_that_are_not_16_byte_aligned(offset):
    x, denoised = make_inputs(1000)
    x, denoised = x[offset:], denoised[offset:]
    exact = euler_step_ref(x.double(), denoised.double(), 2.0, 1.0)
    assert_close_to_reference(
        euler_step(x, denoised, 2.0, 1.0, backend="extension"), euler_step_ref(x, denoised, 2.0, 1.0), exact
    )


@needs_extension
def test_extension_splits_a_large_tensor_over_threads_without_a_seam():
    x, denoised = make_inputs(200_003)
    exact = euler_step_ref(x.double(), denoised.double(), 0.9, 0.2, (-1.0, 1.0))
    actual = euler_step(x, denoised, 0.9, 0.2, (-1.0, 1.0), backend="extension")
    assert_close_to_reference(actual, euler_step_ref(x, denoised, 0.9, 0.2, (-1.0, 1.0)), exact)


@needs_extension
def test_extension_passes_nan_on_and_leaves_its_inputs_alone():
    x, denoised = make_inputs(16)
    denoised[3] = float("nan")
    before = x.clone(), denoised.clone()
    out = euler_step(x, denoised, 1.0, 0.5, (-1.0, 1.0), backend="extension")
    assert out.isnan().nonzero().tolist() == [[3]]
    torch.testing.assert_close((x, denoised), before, rtol=0, atol=0, equal_nan=True)


@needs_extension
def test_operator_can_write_over_its_inputs():
    x, denoised = make_inputs((3, 77))
    wanted = euler_step(x, denoised, 1.0, 0.5, backend="extension")
    over = denoised.clone()
    torch.ops.epg_fast.euler_step_out(over, x, over, 1.0, 0.5, None, None)
    assert torch.equal(over, wanted)
    torch.ops.epg_fast.euler_step_out(x, x, denoised, 1.0, 0.5, None, None)
    assert torch.equal(x, wanted)


@needs_extension
def test_the_estimate_may_be_the_state_itself():
    x, _ = make_inputs(33)
    wanted = euler_step(x, x, 1.0, 0.5, (-1.0, 1.0), backend="extension")
    assert torch.equal(euler_step_(x, x, 1.0, 0.5, (-1.0, 1.0), backend="extension"), wanted)


@needs_extension
def test_operator_accepts_an_empty_tensor():
    x = torch.empty(0, 3, device=DEVICE)
    assert euler_step(x, x, 1.0, 0.5, backend="extension").shape == (0, 3)
    assert euler_step_(x, x, 1.0, 0.5, backend="extension").shape == (0, 3)


@needs_extension
def test_autograd_notices_that_the_state_was_overwritten():
    x, denoised = make_inputs(5)
    weight = torch.ones(5, requires_grad=True, device=DEVICE)
    loss = (weight * x).sum()  # keeps x for the gradient of weight
    euler_step_(x, denoised, 1.0, 0.5, backend="extension")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
@pytest.mark.parametrize("name", ["euler_step_out", "euler_step_"])
def test_operators_pass_opcheck(name):
    x, denoised = make_inputs((2, 9))
    euler_step(x, denoised, 1.0, 0.5, backend="extension")
    out = [torch.empty_like(x)] if name == "euler_step_out" else []
    torch.library.opcheck(getattr(torch.ops.epg_fast, name).default, (*out, x, denoised, 1.0, 0.5, -1.0, 1.0))


@needs_extension
@BOTH
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_extension_compiles_into_one_graph(clamp, function):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for sigma in (1.0, 0.9, 0.6):
        x, denoised = make_inputs((2, 9))
        wanted = euler_step(x, denoised, sigma, sigma / 2, clamp, backend="extension")
        assert torch.equal(compiled(x, denoised, sigma, sigma / 2, clamp, backend="extension"), wanted)
        assert torch.equal(x, wanted) == (function is euler_step_)


BUFFER = torch.zeros(8, device=DEVICE)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(5)}, "out has size 5 in dimension 0, x has 4"),
        ({"out": torch.zeros(4, 1)}, "out has 2 dimensions, x has 1"),
        ({"denoised": torch.zeros(4, dtype=torch.float64)}, "denoised must be float32"),
        ({"x": torch.zeros(8)[::2]}, "x must be contiguous"),
        ({"sigma": 0.0}, "sigma must not be 0"),
        ({"out": BUFFER[:4], "x": BUFFER[1:5]}, "out is written and must not overlap part of x"),
        ({"out": BUFFER[4:], "denoised": BUFFER[1:5]}, "out is written and must not overlap part of denoised"),
    ],
)
def test_operator_refuses_what_it_cannot_compute(change, message):
    arguments = {name: torch.zeros(4) for name in ("out", "x", "denoised")} | {"sigma": 1.0} | change
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.epg_fast.euler_step_out(**arguments, sigma_next=0.5, lo=None, hi=None)


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "got backend='triton', wanted one of plain, extension"),
        ({"denoised": torch.zeros(5)}, r"got denoised of shape \(5,\), wanted \(4,\) as x"),
        ({"sigma": 0.0}, "got sigma=0, wanted a level above 0"),
        (
            {"x": torch.zeros(4).half(), "denoised": torch.zeros(4).half()},
            "got x in torch.float16, wanted torch.float32",
        ),
        ({"denoised": torch.zeros(8)[::2]}, r"got denoised with strides \(2,\), wanted it contiguous"),
        ({"x": torch.zeros(4, requires_grad=True)}, "got x that requires a gradient"),
        ({"denoised": torch.zeros(4, device="meta")}, "got denoised on meta and x on cpu, wanted one device"),
        ({"clamp": (torch.zeros(1), 1.0)}, "wanted two numbers for backend='extension'"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(function, change, message):
    arguments = {"x": torch.zeros(4), "denoised": torch.zeros(4), "sigma": 1.0, "sigma_next": 0.5} | change
    with pytest.raises(ValueError, match=message):
        function(**({"backend": "extension"} | arguments))


@pytest.mark.parametrize("backend", ["plain", "extension"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, requires_grad=True)}, "got x that requires a gradient.*use euler_step$"),
        ({"denoised": torch.zeros(4).double()}, "got denoised in torch.float64, wanted torch.float32 as x"),
        ({"denoised": torch.zeros(4, device="meta")}, "got denoised on meta and x on cpu"),
    ],
)
def test_a_state_that_cannot_be_overwritten_is_refused_on_every_backend(backend, change, message):
    arguments = {"x": torch.zeros(4), "denoised": torch.zeros(4), "sigma": 1.0, "sigma_next": 0.5} | change
    with pytest.raises(ValueError, match=message):
        euler_step_(**arguments, backend=backend)


@needs_extension
def test_an_estimate_that_overlaps_a_part_of_the_state_is_refused():
    with pytest.raises(ValueError, match=r"got x that overlaps part of denoised.*pass denoised.clone\(\)"):
        euler_step_(BUFFER[:4], BUFFER[2:6], 1.0, 0.5, backend="extension")


def test_a_missing_extension_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(extension, "_CHOSEN", None)
    extension.extension_status.cache_clear()
    available, reason = extension.extension_status()
    try:
        assert not available
        assert reason.startswith("not built") and "\n" not in reason
        with pytest.raises(ValueError, match="not built.*pip install.*backend='plain'"):
            euler_step(torch.zeros(4), torch.zeros(4), 1.0, 0.5, backend="extension")
    finally:
        extension.extension_status.cache_clear()


def test_reference_follows_the_formula_in_its_order():
    x, denoised = make_inputs((2, 3, 8, 8))
    d = (x - denoised.clamp(-1, 1)) / 3.0
    assert torch.equal(euler_step(x, denoised, 3.0, 1.25, clamp=(-1.0, 1.0)), x + d * (1.25 - 3.0))
    torch.testing.assert_close(euler_step(x, denoised, 3.0, 0.0), denoised)


def test_reference_in_place_is_the_reference():
    x, denoised = make_inputs((3, 5))
    wanted = euler_step_ref(x, denoised, 3.0, 1.25, (-1.0, 1.0))
    assert euler_step_(x, denoised, 3.0, 1.25, (-1.0, 1.0)) is x
    assert torch.equal(x, wanted)


def test_reference_has_gradients_and_any_floating_dtype():
    x, denoised = (tensor.double().requires_grad_() for tensor in make_inputs((2, 3)))
    assert torch.autograd.gradcheck(lambda a, b: euler_step(a, b, 2.0, 1.0), (x, denoised))
    assert euler_step(x.bfloat16(), denoised.bfloat16(), 2.0, 1.0).dtype == torch.bfloat16
