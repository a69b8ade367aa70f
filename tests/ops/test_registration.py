"""Whether an eager call takes the operator or goes past it, nobody can tell but by the clock."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.ops import attention, layer_norm_modulate, mlp_residual, skip_linear
from epg_fast.ops.registration import Backward, operation
from tests.ops.kernel_checks import needs_triton, randn

pytestmark = needs_triton
SHAPES = {
    "layer_norm_modulate": ((2, 3, 8), (8,), (8,), (2, 8), (2, 8)),
    "attention": ((1, 5, 3, 2, 16),),
    "skip_linear": ((2, 3, 8), (2, 3, 8), (8, 16), (8,), (8,), (8,)),
    "mlp_residual": ((2, 3, 8), (2, 3, 8), (16, 8), (16,), (8, 16), (8,), (2, 8)),
}
CALLS = {
    "layer_norm_modulate": layer_norm_modulate,
    "attention": attention,
    "skip_linear": skip_linear,
    "mlp_residual": mlp_residual,
}
EACH = pytest.mark.parametrize("name", CALLS)


def make_inputs(name):
    return [randn(*shape, seed=seed) for seed, shape in enumerate(SHAPES[name])]


def call(name, inputs):
    return CALLS[name](*inputs, backend="triton")


def forward_and_backward(name, inputs):
    y = call(name, inputs)
    return y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y))


class SeenByDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


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
    past = forward_and_backward(name, inputs)
    with SeenByDispatch() as mode:
        through = forward_and_backward(name, inputs)
    assert {f"epg_fast::{name}", f"epg_fast::{name}_bwd"} <= set(mode.seen)
    for a, b in zip(past, through, strict=True):
        assert torch.equal(a, b)


@EACH
def test_an_eager_call_does_not_reach_the_dispatcher(name):
    with torch.autograd.profiler.profile() as profile:
        forward_and_backward(name, make_inputs(name))
    assert not [event.name for event in profile.function_events if event.name.startswith("epg_fast::")]


@EACH
def test_whoever_looks_at_operators_sees_them(name):
    inputs = make_inputs(name)
    with SeenByFunction() as mode, torch.no_grad():
        call(name, inputs)
    assert any(name in seen for seen in mode.seen)
    with FlopCounterMode(display=False) as counter:
        forward_and_backward(name, inputs)
    assert bool(counter.get_total_flops()) == (name != "layer_norm_modulate")
    with FakeTensorMode() as mode:
        fakes = [torch.empty(tensor.shape) for tensor in inputs]
        assert call(name, fakes).shape == call(name, [torch.empty(tensor.shape) for tensor in inputs]).shape


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
    inputs = [tensor.detach() for tensor in make_inputs("attention")]
    assert torch.equal(call("attention", [Wrapped(inputs[0])]), call("attention", inputs))
    assert "epg_fast::attention" in Wrapped.seen


def test_a_negated_view_is_read_as_what_it_stands_for():
    qkv = torch.complex(*randn(2, 1, 5, 3, 2, 16, requires_grad=False)).conj().imag
    assert qkv.is_neg()
    assert torch.equal(call("attention", [qkv]), call("attention", [qkv.resolve_neg()]))


@pytest.mark.parametrize("mode", [torch.enable_grad, SeenByDispatch], ids=["past", "through"])
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
def test_a_second_derivative_is_refused(mode, loss):
    inputs = make_inputs("layer_norm_modulate")
    with mode():
        (dx,) = torch.autograd.grad(loss(call("layer_norm_modulate", inputs)), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula|not differentiable|does not require grad"):
            torch.autograd.grad(dx.square().sum(), inputs[:1])


def _product(
    x: torch.Tensor, y: torch.Tensor | None, power: float, save: bool = True
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


@pytest.mark.parametrize("mode", [torch.enable_grad, SeenByDispatch], ids=["past", "through"])
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2)], ids=str)
def test_gradients_follow_from_the_names_of_what_the_backward_function_takes(mode, used):
    x, y = (randn(2, 3, seed=seed).double().detach().requires_grad_() for seed in (0, 1))
    with mode():
        made = planted(x, y, 3.0)
        got = torch.autograd.grad(sum(made[i].sum() for i in used), (x, y), allow_unused=True)
        assert made[1].requires_grad is False
    wanted = torch.autograd.grad(sum(((x * y) ** 3, None, y + 1)[i].sum() for i in used), (x, y), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(x) if b is None else b)


@pytest.mark.parametrize("mode", [torch.enable_grad, SeenByDispatch], ids=["past", "through"])
def test_none_comes_back_as_none(mode):
    x = randn(2, 3, requires_grad=False)
    with mode():
        assert planted(x, None, 2.0, False)[1:] == (None, None)
        assert torch.equal(planted(x, None, 2.0)[1], x.abs())
