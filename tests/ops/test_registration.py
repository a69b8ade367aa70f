"""Whether an eager call takes the operator or goes past it, nobody can tell but by the clock."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from epg_fast.ops.registration import Backward, operation
from tests.ops.examples import EXAMPLES, Values
from tests.ops.kernel_checks import DEVICE, Operators, assert_same_bits, needs_triton, run, trained

pytestmark = needs_triton
SHAPES = {"layer_norm_modulate": (2, 3, 8), "attention": (1, 5, 2, 16)}
SHAPES |= {"skip_linear": (2, 3, 8, 8), "mlp_residual": (2, 3, 8, 16)}
EACH = pytest.mark.parametrize("name", SHAPES)
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, Operators], ids=["past", "through"])


def make_inputs(name):
    return EXAMPLES[name].inputs(SHAPES[name])


def call(name, inputs):
    return EXAMPLES[name].call("triton", **inputs)


class SeenByFunction(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@EACH
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernel", "plain"])
def test_past_the_operator_the_results_are_the_same_bit_for_bit(name, interpreted, monkeypatch):
    if not interpreted:
        monkeypatch.setattr("epg_fast.ops.registration.interpreting", lambda: False)
    inputs = make_inputs(name)
    with torch.autograd.profiler.profile() as profile:
        past = run(EXAMPLES[name].by("triton"), inputs)
    assert not [event.name for event in profile.function_events if event.name.startswith("epg_fast::")]
    with Operators() as mode:
        through = run(EXAMPLES[name].by("triton"), inputs)
    assert {f"epg_fast::{name}", f"epg_fast::{name}_bwd"} <= {operator.name() for operator, *_ in mode.calls}
    assert_same_bits(past, through)


@EACH
def test_whoever_looks_at_functions_sees_them(name):
    with SeenByFunction() as mode, torch.no_grad():
        call(name, make_inputs(name))
    assert any(name in seen for seen in mode.seen)


class Wrapped(torch.Tensor):
    """A subclass that notes the operators that it meets."""

    seen = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        args = [arg.tensor if isinstance(arg, Wrapped) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def test_a_tensor_of_another_kind_sees_them():
    qkv = make_inputs("attention")["qkv"].detach()
    assert torch.equal(call("attention", {"qkv": Wrapped(qkv)}), call("attention", {"qkv": qkv}))
    assert "epg_fast::attention" in Wrapped.seen


def test_a_negated_view_is_read_as_what_it_stands_for():
    qkv = torch.complex(*Values(DEVICE, grad=False)(2, 1, 5, 3, 2, 16)).conj().imag
    assert qkv.is_neg()
    assert torch.equal(call("attention", {"qkv": qkv}), call("attention", {"qkv": qkv.resolve_neg()}))


@MODES
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
def test_a_second_derivative_is_refused(mode, loss):
    inputs = make_inputs("layer_norm_modulate")
    x = trained(inputs)[:1]
    with mode():
        (dx,) = torch.autograd.grad(loss(call("layer_norm_modulate", inputs)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula|not differentiable|does not require grad"):
            torch.autograd.grad(dx.square().sum(), x)


def _product(
    x: torch.Tensor, y: torch.Tensor | None, power: float, save: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return (x if y is None else x * y) ** power, x.abs() if save else None, None if y is None else y + 1


def _product_bwd(
    dout: torch.Tensor,
    dnext: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor | None,
    size: torch.Tensor | None,
    power: float,
    x_dtype: torch.dtype,
    need_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    assert x_dtype == x.dtype and torch.equal(size, x.abs())
    inner = dout * power * (x if y is None else x * y) ** (power - 1)
    dx = (inner if y is None else inner * y).to(x_dtype) if need_x else None
    return dx, None if y is None else inner * x + (0 if dnext is None else dnext)


planted = operation("planted_product", _product, _product, "out size next", Backward(_product_bwd, _product_bwd, "x y"))


@MODES
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2)], ids=str)
def test_gradients_follow_from_the_names_of_what_the_backward_function_takes(mode, used):
    values = Values(DEVICE)
    x, y = (values(2, 3, dtype=torch.float64) for _ in range(2))
    with mode():
        made = planted(x, y, 3.0, True)
        got = torch.autograd.grad(sum(made[i].sum() for i in used), (x, y), allow_unused=True)
        assert made[1].requires_grad is False
    wanted = torch.autograd.grad(sum(((x * y) ** 3, None, y + 1)[i].sum() for i in used), (x, y), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(x) if b is None else b)


@MODES
def test_none_comes_back_as_none(mode):
    x = Values(DEVICE, grad=False)(2, 3)
    with mode():
        assert planted(x, None, 2.0, False)[1:] == (None, None)
        assert torch.equal(planted(x, None, 2.0, True)[1], x.abs())
