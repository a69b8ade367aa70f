"""Registers an operation from its formulas: the operator, its fake, its gradient, its FLOPs and the way around it.

`operation` takes a function in plain PyTorch per direction and a kernel with the same arguments. What is made of them:

- The operators epg_fast::NAME and epg_fast::NAME_bwd. On a CPU they run the plain function, on a GPU, and in Triton's
  interpreter, the kernel; under either, autocast is off.
- Where a function returns None, its operator, which cannot, returns an empty tensor, and the caller gets None again.
- Their fakes: what the plain function returns on fake tensors, contiguous.
- Their FLOPs: those of the plain function's matrix products.
- The gradient, from the names of what the backward function takes: see `Backward`.
- Eager calls go to the kernel, or the plain function, without the dispatcher, which takes longer than a small kernel.
  Wherever something may look at operators (torch.compile, transforms, modes, subclasses) it gets to see them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from epg_fast.ops.backends import interpreting

Kernel = str | Callable
"""A function, or where it is, "module:function", to be imported when it is first called."""


@dataclass(frozen=True)
class Backward:
    """The backward pass of an operation; the names of what `plain` takes say what is saved.

    plain: takes inputs and results of the forward function by their names, `dNAME`, the gradient of a result,
    `NAME_dtype`, the dtype of an input, and `need_NAME`, whether an input needs a gradient; another name is None. A
    result without a `dNAME` has no gradient; a `dNAME` annotated as a tensor is zero where none arrives.
    gradients: the names of the inputs whose gradients `plain` returns, in its order.
    others: (those gradients, all that plain may take, both by name) -> gradients of other inputs, by name.
    only_with: inputs that are saved only where another one is given, by name.
    """

    plain: Callable
    kernel: Kernel
    gradients: str
    others: Callable[[dict, dict], dict] | None = None
    only_with: dict[str, str] = field(default_factory=dict)


def operation(
    name: str,
    plain: Callable,
    kernel: Kernel,
    returns: str,
    backward: Backward | None = None,
    in_triton: bool = True,
) -> Callable:
    """A function with plain's arguments, all by position, that runs `kernel` or `plain` as an operator or past it.

    Its attribute `backward` is such a function of the backward pass.

    plain: its annotations give the operator's schema; what has none is a tensor or None. returns: the names of its
    results. in_triton: whether Triton's interpreter can run the kernel.
    """
    results = returns.split()
    operator, run = _operator(name, plain, kernel, len(results), in_triton)
    parameters = _signature(plain).parameters
    function = gradients = None
    if backward is not None:
        given = backward.plain, backward.kernel, backward.gradients
        gradients = operation(f"{name}_bwd", *given, in_triton=in_triton)
        setup_context, differentiate = _gradient_formula(list(parameters), results, backward, gradients)
        operator.register_autograd(differentiate, setup_context=setup_context)
        function = _autograd_function(name, run, setup_context, differentiate)
    overload = operator._opoverload

    def call(*arguments):
        if not torch.compiler.is_compiling() and not _operators_are_watched(arguments):
            if not (torch.is_grad_enabled() and _any_requires_grad(arguments)):
                return run(*arguments)
            if function is not None:
                return function.apply(*arguments)
            # A second derivative, which the dispatcher refuses.
        return _none_for_empty(overload(*arguments))

    call.backward = gradients
    return call


def _operator(name: str, plain: Callable, kernel: Kernel, results: int, in_triton: bool):
    """The operator, and what it runs."""

    @functools.cache
    def launcher() -> Callable:
        if callable(kernel):
            return kernel
        module, function = kernel.split(":")
        return getattr(importlib.import_module(module), function)

    def launch(*arguments):
        with _without_autocast(arguments):
            return launcher()(*arguments)

    def compute(*arguments):
        with _without_autocast(arguments):
            made = plain(*arguments)
        if isinstance(made, torch.Tensor):
            return made.contiguous()
        return tuple(None if result is None else result.contiguous() for result in made)

    def run(*arguments):
        on_gpu = _first_tensor(arguments).is_cuda
        return (launch if on_gpu or (in_triton and interpreting()) else compute)(*arguments)

    def without_none(function: Callable) -> Callable:
        def returning_tensors(*arguments):
            made = function(*arguments)
            if isinstance(made, torch.Tensor):
                return made
            empty = _first_tensor(arguments).new_empty
            return tuple(empty(0) if result is None else result for result in made)

        return returning_tensors

    returned = torch.Tensor if results == 1 else tuple[(torch.Tensor,) * results]

    def prototype():
        return None

    prototype.__signature__ = _signature(plain).replace(return_annotation=returned)
    schema = torch.library.infer_schema(prototype, mutates_args=())
    options = {"mutates_args": (), "device_types": "cpu", "schema": schema}
    operator = torch.library.custom_op(f"epg_fast::{name}", without_none(run), **options)
    operator.register_kernel("cuda")(without_none(launch))
    operator.register_fake(without_none(_fake(compute)))
    register_flop_formula(operator._opoverload.overloadpacket, get_raw=True)(_flop_formula(plain))
    return operator, run


def _signature(plain: Callable) -> inspect.Signature:
    """Without defaults: the dispatcher would leave out arguments that have them."""
    signature, none = inspect.signature(plain, eval_str=True), inspect.Parameter.empty
    annotations = (
        (p, torch.Tensor | None if p.annotation is none else p.annotation) for p in signature.parameters.values()
    )
    return signature.replace(parameters=[p.replace(annotation=kind, default=none) for p, kind in annotations])


def _once_for_each(function: Callable) -> Callable:
    """What the function returns, computed once for arguments like these: a network asks for it hundreds of times."""
    found: dict[tuple, object] = {}

    def remembered(*arguments):
        key = tuple(map(_description, arguments))
        if None in key:
            return function(*arguments)
        if key not in found:
            found[key] = function(*arguments)
        return found[key]

    return remembered


def _fake(compute: Callable) -> Callable:
    @_once_for_each
    def described(*arguments):
        made = compute(*arguments)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(None if result is None else (result.shape, result.dtype) for result in made)

    def fake(*arguments):
        empty = _first_tensor(arguments).new_empty
        made = tuple(None if told is None else empty(told[0], dtype=told[1]) for told in described(*arguments))
        return made if len(made) > 1 else made[0]

    return fake


def _description(argument) -> tuple | None:
    """What the results' shapes and dtypes follow from; None for what has symbols instead of numbers in it."""
    if not isinstance(argument, torch.Tensor):
        return None if isinstance(argument, _SYMBOLS) else ("", repr(argument))
    sizes = *argument.shape, *argument.stride()
    return None if any(isinstance(size, _SYMBOLS) for size in sizes) else (argument.dtype, argument.device, sizes)


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _flop_formula(plain: Callable) -> Callable:
    @_once_for_each
    def count(*arguments) -> int:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(*map(_without_values, arguments))
        return counter.get_total_flops()

    return lambda *arguments, out_val=None: count(*arguments)


def _without_values(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _gradient_formula(parameters: list[str], results: list[str], backward: Backward, gradients: Callable):
    """(setup_context, backward) as torch.library.register_autograd and torch.autograd.Function take them."""
    taken = _signature(backward.plain).parameters
    arriving = [f"d{name}" for name in results]
    always = [name for name in arriving if name in taken and taken[name].annotation is torch.Tensor]
    tensors = [n for n in taken if n in (*parameters, *results) and taken[n].annotation in _TENSORS]
    constants = [n for n in taken if n in parameters and n not in tensors]
    dtypes = [n for n in taken if n.endswith("_dtype") and n not in parameters]
    returned = backward.gradients.split()

    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        made = dict(zip(results, _none_for_empty(outputs), strict=True))
        given = dict(zip(parameters, inputs, strict=True)) | made
        kept = {n: given[n] for n in tensors}
        for name, other in backward.only_with.items():
            kept[name] = None if given[other] is None else kept[name]
        ctx.save_for_backward(*kept.values())
        ctx.values = {n: given[n] for n in constants}
        for name in dtypes:
            tensor = given[name.removesuffix("_dtype")]
            ctx.values[name] = None if tensor is None else tensor.dtype
        ctx.like = {f"d{n}": (made[n].shape, made[n].dtype) for n in results if f"d{n}" in always}
        without = [n for n, value in made.items() if f"d{n}" not in taken or value is None]
        ctx.mark_non_differentiable(
            *(o for n, o in zip(results, outputs, strict=True) if n in without and o is not None)
        )
        ctx.set_materialize_grads(False)

    def differentiate(ctx, *grads):
        given = dict(zip(arriving, grads, strict=True))
        if all(given[n] is None for n in arriving if n in taken):
            return (None,) * len(parameters)
        saved = ctx.saved_tensors
        given |= dict(zip(tensors, saved, strict=True)) | ctx.values
        for name in always:
            if given[name] is None:
                shape, dtype = ctx.like[name]
                given[name] = next(t for t in saved if t is not None).new_zeros(shape, dtype=dtype)
        given |= {f"need_{n}": needed for n, needed in zip(parameters, ctx.needs_input_grad, strict=True)}
        made = gradients(*(given.get(name) for name in taken))
        made = dict(zip(returned, made if isinstance(made, tuple) else (made,), strict=True))
        made |= backward.others(made, given) if backward.others else {}
        return tuple(made.get(name) for name in parameters)

    return setup_context, differentiate


_TENSORS = (torch.Tensor, torch.Tensor | None)


def _autograd_function(name: str, run: Callable, setup_context: Callable, differentiate: Callable) -> type:
    def forward(ctx, *arguments):
        output = run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(name, (torch.autograd.Function,), methods)


def _operators_are_watched(arguments: tuple) -> bool:
    """Whether a call has to go through the dispatcher: somebody may want to see its operator, or other than memory."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or any(isinstance(a, torch.Tensor) and not _is_plain(a) for a in arguments)
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in _PLAIN and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _any_requires_grad(arguments: tuple) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def _none_for_empty(made):
    if isinstance(made, torch.Tensor):
        return made
    return tuple(None if t is None or (t.dim() == 1 and t.shape[0] == 0) else t for t in made)


def _first_tensor(arguments: tuple) -> torch.Tensor:
    return next(argument for argument in arguments if isinstance(argument, torch.Tensor))


def _without_autocast(arguments: tuple):
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return torch.autocast(_first_tensor(arguments).device.type, enabled=False)
    return contextlib.nullcontext()
