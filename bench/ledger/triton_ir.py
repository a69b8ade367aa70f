"""What a launch of one of the package's Triton kernels reads and writes, from the code that Triton makes of it.

Triton's first intermediate code, for the very arguments of the launch, has no branch left that they rule out. From each
pointer argument the values are followed that are computed from it, to loads and stores. How much of a tensor is
touched: all of it, or, where no access stands in a loop, at most what all programs touch together.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_LOADS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather")
_STORES = ("tt.store", "tt.descriptor_store", "tt.descriptor_scatter", "tt.descriptor_reduce")
_ATOMICS = ("tt.atomic_rmw", "tt.atomic_cas")
_VALUE = re.compile(r"%[\w.$-]+")


@dataclass
class Accesses:
    """Per argument, elements that one program loads and stores; infinite in a loop. products: whether it has any."""

    loaded: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stored: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    products: bool = False


class Source(BaseException):
    """In the place of a compilation: what would have been compiled. No Exception, which a launcher may catch."""

    def __init__(self, source, options):
        super().__init__("not compiled")
        self.source, self.options = source, options
        self.arguments: dict[str, Any] = {}
        """Of the launch; of tensors the shapes."""


def specialised(run: Callable, kernel, args: tuple, kwargs: dict[str, Any]) -> Source:
    """What Triton compiles for a launch. run: JITFunction's own."""
    try:
        run(kernel, *args, grid=(1,), warmup=True, **kwargs)
    except Source as found:
        return found.with_traceback(None)  # whose frames hold the launch's tensors
    raise RuntimeError(f"{kernel.fn.__name__}: Triton did not come to compile it")


def instead_of_compiling(kernel, key, signature, device, constexprs, options, attrs, warmup):
    """In the place of JITFunction._do_compile."""
    raise Source(kernel.ASTSource(kernel, signature, constexprs, attrs), options)


def accesses(launch: Source) -> Accesses:
    """Of one program."""
    source = launch.source
    key = source.hash()
    if key not in _SEEN:
        pointers = [name for name, kind in source.signature.items() if str(kind).startswith(("*", "tensordesc"))]
        _SEEN[key] = read(_intermediate_code(source, launch.options), pointers)
    return _SEEN[key]


_SEEN: dict[str, Accesses] = {}


def _intermediate_code(source, options) -> str:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, helpers, backend.get_module_map(), context)
    return str(backend.make_ttir(module, {}, options, 90))


def read(code: str, pointers: list[str]) -> Accesses:
    """Of Triton's first intermediate code, one function with everything inlined.

    pointers: names of the arguments that are pointers or descriptors, in order; the code may call them otherwise.
    """
    found, origins, regions = Accesses(), {}, []

    def of(names) -> frozenset[str]:
        return frozenset().union(*(origins.get(name, frozenset()) for name in names))

    for line in code.splitlines():
        text = line.strip()
        if text.startswith("tt.func"):
            arguments = re.findall(r"(%[\w.$-]+): !tt\.(?:ptr|tensordesc)<", text)
            origins |= {argument: frozenset([name]) for argument, name in zip(arguments, pointers, strict=True)}
            continue
        if text.startswith("}"):
            if regions and "{" not in text:
                regions.pop()
            continue
        left, equals, right = text.partition(" = ")
        results = _VALUE.findall(left) if equals and left.startswith("%") else []
        operation = re.search(r"\b(?:tt|scf|arith|math)\.\w+", right if results else text)
        name = operation[0] if operation else ""
        operands = _VALUE.findall(right if results else text)
        if name in _LOADS or name in _STORES or name in _ATOMICS:
            many = math.inf if any(loops for _, loops in regions) else _elements(text)
            for argument in of(operands[:1]):
                if name not in _STORES:
                    found.loaded[argument] += many
                if name not in _LOADS:
                    found.stored[argument] += many
            continue
        if name.startswith("tt.dot"):
            found.products = True
            continue
        if name == "scf.yield":
            for result in regions[-1][0] if regions else ():
                origins[result] = of([result, *operands])
            continue
        for result in results:
            origins[result] = of(operands)
        inner = re.findall(r"(%[\w.$-]+) = (%[\w.$-]+)", right if name == "scf.for" else "")
        for carried, start in inner:
            origins[carried] = of([start])
        if text.rsplit(" loc(", 1)[0].endswith("{"):
            regions.append(([*results, *(carried for carried, _ in inner)], name in ("scf.for", "scf.while")))
    return found


def _elements(text: str) -> int:
    """Of the last tensor in a line, whose types come last: what is loaded or stored; 1 for a number."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return math.prod(map(int, shapes[-1].split("x")[:-1])) if shapes else 1
