"""Counts the kernels of a call on tensors without memory: eager operators, compiled code, the package's launchers.

`Counter` is the mode such tensors live in. While it counts, each operator that would launch something is noted: those
that Python calls, and, for a region that torch.compile has compiled, what Inductor's code for it launches. Inductor
runs to its generated code, which is described and not loaded; the compiled region then returns empty tensors with the
strides that Inductor gave them. Operators of the package are followed into their CUDA launchers, whose results must
have the shapes, dtypes and strides of the operators' fake implementations.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from bench.ledger import triton_ir
from bench.ledger.cost import ATTENTION, COPIES, ELEMENTWISE, NORMS, OPTIMISER, PRODUCTS, REDUCTIONS, Kernel
from bench.results import ROOT


@dataclass
class Graph:
    """One compiled graph: what a call of it launches. check: its bytes as Inductor itself counts them."""

    kernels: list[Kernel]
    check: int


@dataclass
class _Frame:
    """Inside of one of the package's operators: tensors that its launcher has made and no kernel has written."""

    op: str
    kernels: list[Kernel] = field(default_factory=list)
    fresh: dict[int, torch.Tensor] = field(default_factory=dict)


class Counter(FakeTensorMode):
    """The mode of tensors without memory, and what has been counted in it.

    kernels: in order, with `phases` [(name, how many kernels before its end)]; problems: what should not be, and how
    often; graphs: all that were compiled.
    """

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.phases: list[tuple[str, int]] = []
        self.problems: Tally[str] = Tally()
        self.graphs: list[Graph] = []
        self.kind: str | None = None
        """Of everything that is noted, whatever it does: an optimiser's."""
        self.read: Iterator[float] = iter(())
        """What Python gets when it reads a value; 0 when these are all read."""
        self._counting = self._nested = False
        self._frames: list[_Frame] = []

    def __deepcopy__(self, memo) -> Counter:
        return self  # a copy of a tensor lives in the same mode

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Note what is launched inside. Compiling once more, or a break of a graph, is a problem."""
        before = len(self.graphs)
        with self._state(_counting=True):
            yield
        if len(self.graphs) > before:
            self.problems["compiled again in a second call"] += len(self.graphs) - before
        for reason, times in torch._dynamo.utils.counters["graph_break"].items():
            self.problems[f"graph break: {str(reason).strip().splitlines()[0][:160]}"] += times

    @contextlib.contextmanager
    def _state(self, **values: bool) -> Iterator[None]:
        """Set `_counting` or `_nested` (inside of what is noted already, or never) for a while."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Describe what torch.compile makes instead of loading it."""
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        with contextlib.ExitStack() as stack:
            for owner, name, made in (
                (GraphLowering, "compile_to_module", _describing(self)),
                (TritonKernel, "call_kernel", _noting_generated),
                (Scheduler, "codegen_extern_call", _noting_library),
                (JITFunction, "run", _launching(self)),
                (JITFunction, "_do_compile", triton_ir.instead_of_compiling),
            ):
                stack.enter_context(mock.patch.object(owner, name, made))
            yield

    def end(self, phase: str) -> None:
        self.phases.append((phase, len(self.kernels)))

    def of_phase(self, name: str) -> list[Kernel]:
        """Kernels of all phases of that name."""
        found, start = [], 0
        for phase, end in self.phases:
            found += self.kernels[start:end] if phase == name else []
            start = end
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and not self._nested:
            return self._value(args[0])
        if self._nested or not (self._counting or self._frames):
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self._state(_nested=True):
            out = super().__torch_dispatch__(func, types, args, kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _value(self, tensor: torch.Tensor) -> float | int:
        if self._counting and tensor.is_cuda:
            self.problems["host sync: a value of the GPU is read in Python"] += 1
        value = next(self.read, 0)
        return float(value) if tensor.dtype.is_floating_point else int(value)

    def _note(self, func, args, kwargs, out, by: str = "eager") -> None:
        if self._frames and _allocates(func):
            for tensor in _tensors(out):
                self._frames[-1].fresh[tensor.untyped_storage()._cdata] = tensor
            return
        self._add(self.called(func, args, kwargs, out, by))

    def _add(self, kernels: list[Kernel]) -> None:
        if self._frames:
            self._frames[-1].kernels += kernels
            return
        if self.kind:
            for kernel in kernels:
                kernel.kind = self.kind
        self.kernels += kernels

    def called(self, func, args, kwargs, out, by: str) -> list[Kernel]:
        """What a call of an operator launches. out: what its fake implementation returned."""
        name = func._schema.name
        if name.startswith("epg_fast::") and name in torch._library.custom_ops.OPDEFS:
            return self._inside(name, func, args, kwargs, out)
        kernel = _operator(func, args, kwargs, out, by, self.problems)
        return [] if kernel is None else [kernel]

    def _inside(self, name, func, args, kwargs, out) -> list[Kernel]:
        """Kernels of one of the package's operators, by its CUDA launcher."""
        launcher = torch._library.custom_ops.OPDEFS[name]._backend_fns["cuda"]
        schema = func._schema.arguments
        given = [
            args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(schema)
        ]
        frame = _Frame(name.removeprefix("epg_fast::"))
        self._frames.append(frame)
        try:
            with self._state(_nested=False), self:
                result = launcher(*given)
        finally:
            self._frames.pop()
        self._compare(name, result, out)
        formula = flop_registry.get(func.overloadpacket)
        own = [k for k in frame.kernels if k.by in ("ours", "extension") and k.kind in (PRODUCTS, ATTENTION)]
        if own and formula is None:
            self.problems[f"{name} has no FLOP formula: its products count as none"] += 1
        elif own:
            left = formula(*args, **kwargs, out_val=out) - sum(k.flops for k in frame.kernels)
            for kernel in own:
                kernel.flops += max(left, 0) // len(own)
        for kernel in frame.kernels:
            kernel.detail = f"{frame.op}: {kernel.detail}"
        return frame.kernels

    def _compare(self, name, result, out) -> None:
        for i, (got, told) in enumerate(zip(tree_leaves(result), tree_leaves(out), strict=False)):
            if isinstance(got, torch.Tensor) and isinstance(told, torch.Tensor) and got.numel() + told.numel():
                got, told = ((t.dtype, tuple(t.shape), t.stride()) for t in (got, told))
                if got != told:
                    self.problems[f"{name}, output {i}: the launcher returns {got}, its fake {told}"] += 1

    def launched(self, kernel: JITFunction, args, grid, kwargs) -> None:
        """A launch of one of the package's Triton kernels."""
        source = triton_ir.specialised(_RUN, kernel, args, kwargs)
        found = triton_ir.accesses(source)
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        programs = math.prod(grid(named) if callable(grid) else grid)
        tensors = {name: getattr(value, "base", value) for name, value in named.items()}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        source.arguments = named | {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        fresh = self._frames[-1].fresh if self._frames else {}
        read = written = 0
        for name, tensor in tensors.items():
            scratch = fresh.get(tensor.untyped_storage()._cdata) is not None
            stored, loaded = found.stored.get(name), found.loaded.get(name)
            if stored:
                written += _touched(tensor, programs * stored)
            if loaded and not (stored and scratch):  # what it wrote itself is read where it was written
                read += _touched(tensor, programs * loaded)
        for name in found.stored:
            fresh.pop(tensors[name].untyped_storage()._cdata, None)
        warps = source.options.num_warps
        op = self._frames[-1].op if self._frames else ""
        noted = Kernel(
            name=kernel.fn.__name__,
            kind=_kind_of_triton(kernel.fn.__name__, op, found.products),
            read=read,
            written=written,
            by="ours",
            detail=f"{programs} x {warps} warps; " + " ".join(f"{n}={_shape(t)}" for n, t in tensors.items()),
            source=source,
            fp8=any("float8" in str(t.dtype) for name, t in tensors.items() if found.loaded.get(name)),
        )
        self._add([noted])


_RUN = JITFunction.run


def _launching(counter: Counter) -> Callable:
    """In the place of JITFunction.run."""
    return lambda kernel, *args, grid, warmup=False, **kwargs: counter.launched(kernel, args, grid, kwargs)


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's different values: what is expanded is stored once."""
    if not tensor.numel():
        return 0
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


def _touched(tensor: torch.Tensor, elements: float) -> int:
    return int(min(_size(tensor), elements * tensor.itemsize))


def _shape(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
    return f"{dtype}{list(tensor.shape)}" + ("" if tensor.is_contiguous() else f"/{list(tensor.stride())}")


# ------------------------------------------------------------------------------------------- operators of PyTorch

_PRODUCTS = re.compile(r"^(mm|addmm|bmm|baddbmm|_scaled_mm\w*|_addmm_activation|convolution\w*|linear\w*|_int_mm)$")
_ATTENTION = re.compile(r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention")
_NORMS = re.compile(r"(layer|batch|rms|group)_norm")
_COPIES = re.compile(
    r"^(_?to_copy|clone|copy_?|cat|stack|fill_?|zero_|full\w*|zeros\w*|ones\w*|constant_pad_nd|slice_scatter|"
    r"contiguous|_reshape_copy|repeat|unfold_copy|lift|select_backward|slice_backward|expand_copy)$"
)
_VIEWS = re.compile(
    r"^(_?(unsafe_)?view|reshape|permute|transpose|t|slice|select|split\w*|unbind|expand|squeeze|unsqueeze|alias|"
    r"as_strided|detach|chunk|unsafe_split|_reshape_alias|flatten|scalar_tensor|iota|arange)$"
)
_REDUCTIONS = re.compile(
    r"^(sum|mean|amax|amin|max|min|argmin|argmax|norm|linalg_vector_norm|var_mean|var|logsumexp|_foreach_norm|all|any|"
    r"prod|std|embedding_dense_backward)$"
)
_OPTIMISER = re.compile(r"^(_fused_adam|_foreach_|fused_adamw|global_norm)")
_GATHERS = ("embedding", "index", "gather", "index_select")
_OVERWRITES = ("fill_", "zero_", "copy_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_")
_STEPS = 320, 65536, (110, 64, 48, 36, 30)  # of multi-tensor launches: blocks, values in a block, tensors by lists


def _allocates(func) -> bool:
    return func._schema.name.removeprefix("aten::").startswith(("empty", "new_empty"))


def kind_of_operator(name: str) -> str:
    """Of an operator, "aten::" or "epg_fast::" left out."""
    name = re.sub(r"_out$", "", name)
    if _ATTENTION.search(name):
        return ATTENTION
    for kind, pattern in ((OPTIMISER, _OPTIMISER), (PRODUCTS, _PRODUCTS), (COPIES, _COPIES), (REDUCTIONS, _REDUCTIONS)):
        if pattern.search(name):
            return kind
    if _NORMS.search(name):
        return NORMS
    return PRODUCTS if name.startswith(("skip_linear", "linear_")) else ELEMENTWISE


def _operator(func, args, kwargs, out, by: str, problems: Tally[str]) -> Kernel | None:
    """The kernel of an operator that is not followed further; None if it launches none."""
    schema, name = func._schema, func._schema.name.split("::")[1]
    if _allocates(func) or name in ("set_", "resize_", "_unsafe_view", "record_stream"):
        return None
    given = _tensors((args, kwargs))
    changed, overwritten = [], []
    for i, argument in enumerate(schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += _tensors(value)
            if (
                name.startswith(_OVERWRITES)
                or argument.kwarg_only
                or argument.name in ("out", "copies")
                or (name.endswith("_out") and not schema.returns)
            ):
                overwritten += _tensors(value)
    memory = {t.untyped_storage()._cdata for t in given}
    made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in memory]
    written = [t for t in (*changed, *made) if t.numel()]
    if not written or not any(t.is_cuda for t in (*given, *written)):
        return None
    hosts = [t for t in (*given, *written) if t.device.type == "cpu" and (t.dim() or name in ("copy_", "_to_copy"))]
    if hosts and not _asynchronous(args, kwargs, schema):
        way = "to the host" if any(t.device.type == "cpu" for t in written) else "from the host"
        problems[f"host sync: a copy {way} that waits: {name}"] += 1
    skipped = {id(t) for t in overwritten}
    read = [t for t in given if id(t) not in skipped]
    size = sum(map(_size, read))
    if name in _GATHERS:
        size = min(size, sum(map(_size, read[1:])) + sum(map(_size, written)))
    kernel = Kernel(
        name=f"{func}" if by == "eager" else f"{schema.name}".replace("aten::", "aten."),
        kind=kind_of_operator(name),
        read=size,
        written=sum(map(_size, written)),
        by="extension" if schema.name.startswith("epg_fast::") else by,
        detail="; ".join(map(_shape, given[:6])) + " -> " + "; ".join(map(_shape, written[:4])),
        launches=_launches(name, args, written),
    )
    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        kernel.flops = formula(*args, **kwargs, out_val=out)
    kernel.fp8 = any("float8" in str(t.dtype) for t in read)
    return kernel


def _asynchronous(args, kwargs, schema) -> bool:
    names = [argument.name for argument in schema.arguments]
    place = names.index("non_blocking") if "non_blocking" in names else None
    return bool(kwargs.get("non_blocking", args[place] if place is not None and place < len(args) else False))


def _launches(name: str, args, written: list[torch.Tensor]) -> int:
    """Of an operator on lists of tensors, as many as PyTorch's (or the extension's) launches take chunks."""
    lists = [
        value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor)
    ]
    if name == "global_norm_out":
        return 1 + math.ceil(len(lists[0]) / _table_rows(1))
    if name == "fused_adamw_ema_":
        emas = len(args[4]) // len(args[0])
        return 1 + math.ceil(len(args[0]) / _table_rows(6 + emas))
    if name == "convolution_backward":
        return len(written)
    if not name.startswith(("_foreach", "_fused")) or not lists:
        return 1
    blocks, chunk, rows = _STEPS
    return multi_tensor_launches([t.numel() for t in lists[0]], blocks, chunk, rows[min(len(lists), len(rows)) - 1])


def multi_tensor_launches(sizes: list[int], blocks: int, chunk: int, rows: int) -> int:
    """Launches that fill up with `rows` tensors or `blocks` chunks of them, whichever comes first."""
    launches = taken = tensors = 0
    for size in sizes:
        tensors += 1
        for last in range(math.ceil(size / chunk), 0, -1):
            taken += 1
            if taken == blocks or (tensors == rows and last == 1):
                launches, taken, tensors = launches + 1, 0, int(last > 1)
    return launches + (taken > 0)


@functools.cache
def _table_rows(lists: int) -> int:
    """Tensors in one launch of the extension's kernels for lists (tensor_list.cuh)."""
    source = (ROOT / "kernels" / "csrc" / "tensor_list.cuh").read_text()
    size = int(re.search(r"kTableBytes = (\d+)", source)[1])
    return (size - 32) // (8 * lists + 8 + 2 * 4 + 1)


# -------------------------------------------------------------------------------- kernels of the package's own


def _kind_of_triton(name: str, op: str, products: bool) -> str:
    if "attention" in name or (products and op.startswith("attention")):
        return ATTENTION
    if products:
        return PRODUCTS
    if "norm" in name:
        return NORMS
    return REDUCTIONS if re.search(r"sums?(_|$)", name) else ELEMENTWISE


# ------------------------------------------------------------------------------------------------ compiled code

_CALL_KERNEL, _EXTERN_CALL = TritonKernel.call_kernel, Scheduler.codegen_extern_call


def _events() -> list:
    """Of the graph that is being generated: generated kernels and library calls in order."""
    return V.graph.__dict__.setdefault("ledger_events", [])


def _noting_generated(self, name, *args, **kwargs):
    _events().append(_generated(self, name))
    _events().extend(_partial_sums(self))
    return _CALL_KERNEL(self, name, *args, **kwargs)


def _noting_library(self, scheduler_node):
    _events().append(scheduler_node.node)
    return _EXTERN_CALL(self, scheduler_node)


def _hint(number) -> int:
    return int(V.graph.sizevars.optimization_hint(number, fallback=0))


def _generated(kernel: TritonKernel, name: str) -> Kernel:
    """One of Inductor's Triton kernels, with the traffic of what its arguments are after all fusions."""
    nodes = [node for node in kernel.features.node_schedule if isinstance(node, BaseSchedulerNode)]
    written = {dep.name for node in nodes for dep in node.read_writes.writes}
    reads, writes = {}, {}
    for node in nodes:
        for dep in node.read_writes.reads:
            if dep.name not in written and _is_argument(kernel, dep.name):
                _note_access(reads, dep)
        for dep in node.read_writes.writes:
            if _is_argument(kernel, dep.name):
                _note_access(writes, dep)
                if dep.mode is not None:  # added to what is there
                    _note_access(reads, dep)
    workspaces = sum(_hint(ws.count) * ws.dtype.itemsize for ws in kernel.args.workspace_args)
    done = {str(fx.meta.get("original_aten", "")) for node in nodes for fx in _origins(node)} - {""}
    return Kernel(
        name=name,
        kind=_kind_of_generated(done, kernel.features.is_reduction()),
        read=_bytes(reads),
        written=_bytes(writes) + workspaces,
        by="generated",
        detail=" ".join(sorted(text.removeprefix("aten.").partition(".")[0] for text in done)),
    )


def _origins(node) -> list:
    return [fx for leaf in node.get_nodes() if leaf.node is not None for fx in getattr(leaf.node, "origins", ())]


def _kind_of_generated(operators: set[str], reduces: bool) -> str:
    names = {text.removeprefix("aten.").partition(".")[0] for text in operators}
    kinds = {kind_of_operator(name) for name in names if not _VIEWS.match(name)}
    if NORMS in kinds or "var_mean" in names:
        return NORMS
    if reduces:
        return REDUCTIONS
    return COPIES if kinds <= {COPIES} else ELEMENTWISE


def _real(name: str) -> str:
    return V.graph.scheduler.mutation_real_name.get(name, name)


def _is_argument(kernel: TritonKernel, name: str) -> bool:
    """Whether a buffer is one of the memory that the kernel is given, or stays inside it."""
    name, args = _real(name), kernel.args
    if name in kernel.removed_buffers or name in V.graph.removed_buffers:
        return False
    inner = (known.get(name) for known in (args.inplace_buffers, args.output_buffers, args.input_buffers))
    return any(found is not None and type(found).__name__ != "RemovedArg" for found in inner)


def _note_access(found: dict, dep) -> None:
    """found: buffer -> {which part: elements}; the same part, however its loops are written, once."""
    name = _real(dep.name)
    if isinstance(dep, MemoryDep):
        part = dep.normalize()
        found.setdefault(name, {})[str(part.index), part.size] = _hint(dep.get_numel())
    else:
        found.setdefault(name, {})[None] = _hint(V.graph.get_numel(name))


def _bytes(found: dict) -> int:
    return sum(
        min(_hint(V.graph.get_numel(name)), sum(parts.values())) * V.graph.get_dtype(name).itemsize
        for name, parts in found.items()
    )


def _partial_sums(kernel: TritonKernel) -> list[Kernel]:
    """Kernels of PyTorch by which Inductor's code adds up what a kernel left in its workspace."""
    partial = getattr(kernel, "saved_partial_accumulate", None) or []
    sizes = [_hint(ws.count) * ws.dtype.itemsize for ws in kernel.args.workspace_args]
    made = []
    for part in partial:
        dtype, values = V.graph.get_dtype(part.buffer_name), _hint(V.graph.get_numel(part.buffer_name))
        made.append(Kernel("aten.sum of a workspace", REDUCTIONS, sum(sizes) // len(partial), 4 * values, by="library"))
        if dtype != torch.float32:
            made.append(Kernel("aten._to_copy of its sum", COPIES, 4 * values, dtype.itemsize * values, by="library"))
    return made


def _describing(counter: Counter) -> Callable:
    """In the place of GraphLowering.compile_to_module: nothing is loaded."""

    def compile_to_module(graph: GraphLowering):
        graph.codegen()
        kernels = []
        with counter._state(_nested=True, _counting=False):
            for event in graph.__dict__.get("ledger_events", []):
                kernels += [event] if isinstance(event, Kernel) else _library(counter, event)
        counter.graphs.append(Graph(kernels, graph.count_bytes()[0]))
        for name, value in graph.graph_inputs.items():
            if isinstance(value, ir.TensorBox) and value.get_device().type == "cpu":
                counter.problems[f"CPU tensor in a compiled graph: {name} {list(map(str, value.get_size()))}"] += 1
        made_on_host = {b.get_name() for b in graph.buffers if b.get_device() and b.get_device().type == "cpu"}
        if made_on_host:
            counter.problems[f"computed on the CPU in a compiled graph: {len(made_on_host)} buffers"] += 1
        if graph.disable_cudagraphs_reason:
            counter.problems[f"no CUDA graphs: {graph.disable_cudagraphs_reason.strip().splitlines()[0]}"] += 1
        results = [_result(graph, out) for out in graph.graph_outputs]

        def call(args: list):
            inputs = list(args)
            args.clear()
            if counter._counting:
                counter._add([Kernel(**vars(kernel)) for kernel in kernels])
            with counter._state(_nested=True):
                return tuple(result(inputs) for result in results)

        return SimpleNamespace(call=call)  # in the place of Inductor's loaded code

    return compile_to_module


def _result(graph: GraphLowering, out) -> Callable[[list], object]:
    """A function of the graph's inputs that makes one of its results."""
    if isinstance(out, ir.NoneAsConstantBuffer):
        return lambda inputs: None
    if isinstance(out, (int, sympy.Expr, ir.ShapeAsConstantBuffer)):
        number = _hint(out.expr if isinstance(out, ir.ShapeAsConstantBuffer) else out)
        return lambda inputs: number
    layout = out.get_layout()
    size, stride = ([_hint(n) for n in numbers] for numbers in (layout.size, layout.stride))
    offset, dtype, device = _hint(layout.offset), layout.dtype, layout.device
    names, name = list(graph.graph_inputs), out.get_name()
    if name in names:
        place = names.index(name)
        return lambda inputs: inputs[place].as_strided(size, stride, offset)
    return lambda inputs: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _library(counter: Counter, node) -> list[Kernel]:
    """What a call of a library, or of an operator, in Inductor's code launches."""
    if isinstance(node, (ir.MultiOutput, ir.NopKernel)):
        return []
    func = node.op_overload
    with counter:
        if isinstance(node, ir.FallbackKernel):
            args, kwargs = node.unflatten_args(node.inputs, node.constant_args)
            args, kwargs = tree_map(_value_of, (args, {**kwargs, **node.kwargs}))
            out = func(*args, **kwargs)
            return counter.called(func, args, kwargs, out, "library")
        inputs = [_value_of(value) for value in node.inputs]
        result = _empty(node.get_layout())
    name = getattr(node, "python_kernel_name", None) or str(func)
    kernel = Kernel(
        name=str(name),
        kind=kind_of_operator(str(name).rpartition(".")[2]),
        read=sum(_size(t) for t in inputs if isinstance(t, torch.Tensor)),
        written=_size(result),
        by="library",
        detail="; ".join(_shape(t) for t in inputs if isinstance(t, torch.Tensor)) + f" -> {_shape(result)}",
    )
    if "addmm" in kernel.name:
        kernel.kind = PRODUCTS
    if kernel.kind == PRODUCTS:
        kernel.flops = 2 * result.numel() * _inner(kernel.name, inputs)
        kernel.fp8 = any("float8" in str(t.dtype) for t in inputs)
    return [kernel]


def _inner(name: str, inputs: list[torch.Tensor]) -> int:
    """Length of the sums of a product."""
    if "convolution" in name:
        return inputs[1][0].numel()
    return inputs[1 if "addmm" in name or "baddbmm" in name else 0].shape[-1]


def _value_of(value):
    if isinstance(value, (ir.NoneAsConstantBuffer, ir.GeneratorState)):
        return None
    if isinstance(value, ir.ShapeAsConstantBuffer):
        return _hint(value.expr)
    if isinstance(value, ir.IRNode):
        return _empty(value.get_layout())
    return _hint(value) if isinstance(value, sympy.Expr) else value


def _empty(layout) -> torch.Tensor:
    """A tensor without memory as Inductor has laid it out."""
    size, stride = ([_hint(n) for n in numbers] for numbers in (layout.size, layout.stride))
    offset = _hint(layout.offset)
    span = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
    return torch.empty(max(span, 1), dtype=layout.dtype, device=layout.device).as_strided(size, stride, offset)
