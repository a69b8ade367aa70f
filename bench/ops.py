"""Each operation against its alternatives, measured alike, on the inputs of tests/ops/examples.py.

    python -m bench.ops --output ops.json                         # everything that runs here
    python -m bench.ops --ops attention mlp_residual --main-shapes
    python -m bench.ops --without compile                         # nothing that has to be compiled

Variants of any operation are its kernels ("triton", "cuda", "extension"), "compile" (torch.compile of plain PyTorch)
and "eager" (plain PyTorch); to these come the libraries that a user would pick. A variant's result is checked before it
is timed: one that is wrong is not reported, and the exit code is 1.

On CUDA a CUDA graph holds one call per set of inputs, and the sets together exceed the L2 cache several times: each
call starts cold, and launches cost nothing. On a CPU one call is timed, at a reduced shape, with the threads that
PyTorch has. A row has the median and the 20th and 80th percentile of one call in microseconds, GB/s and TFLOP/s by the
operation's `SPEC`, the latter of its matrix products, and their shares of what a large copy and a large matrix product
reached in the same session.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.measure import large_copy, large_product, percentiles, rounds
from bench.results import Results, Row, header
from epg_fast import ops
from epg_fast.data.loading.views import AugmentedView, apply_view, center_crop
from tests.ops.examples import BF16, EXAMPLES, Example, Values
from tests.ops.kernel_checks import assert_accurate, gradients_like, map_tensors, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
COLD_BYTES = 512 << 20  # inputs touched before any is touched again: several times the L2 cache of an H200
ON_CPU = ("augment_view", "resized_crop")  # whose kernels are for the CPU


@dataclass(frozen=True)
class Rival:
    """A further variant: prepare(inputs) -> what `function` takes by name. Not checked where it computes otherwise."""

    function: Callable
    prepare: Callable[[dict], dict] = dict
    checked: bool = True


@dataclass(frozen=True)
class Measured:
    """dtypes, forms: of the example, by name. on_cpu: shapes for a machine without a GPU.

    traffic(shape, itemsize): bytes beside those of the `SPEC`. compiled: whether torch.compile takes plain PyTorch.
    """

    name: str
    dtypes: tuple[str, ...]
    on_cpu: tuple[tuple[int, ...], ...]
    forms: tuple[str | None, ...] = (None,)
    rivals: dict[str, Rival] = field(default_factory=dict)
    traffic: Callable[[tuple[int, ...], int], int] = lambda shape, itemsize: 0
    compiled: bool = True

    @property
    def example(self) -> Example:
        return EXAMPLES[self.name]


def _with_statistics(inputs: dict) -> dict:
    return inputs | {"statistics": ops.row_statistics(inputs["x"])}


def _norm_then_linear(x, norm_weight, norm_bias, weight, bias, shift, scale, gelu):
    backend = "triton" if CUDA else "plain"
    y = ops.layer_norm_modulate(x, norm_weight, norm_bias, shift, scale, backend=backend)
    z = F.linear(y, weight, bias.to(y.dtype))
    return F.gelu(z) if gelu else z


def _linear_in_16_bits(x, weight, bias, gelu=False, **_):
    z = F.linear(x, weight.bfloat16(), bias.bfloat16())
    return F.gelu(z) if gelu else z


def _in_16_bits(inputs: dict) -> dict:
    return map_tensors(torch.Tensor.bfloat16, inputs)


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _in_place(name: str, backend: str) -> Rival:
    return Rival(functools.partial(getattr(ops, f"{name}_"), backend=backend))


def _torch_adamw(inputs: dict) -> dict:
    """AdamW(fused=True), clipping and one average as PyTorch has them, without a check of the gradients' finiteness."""
    params = [p.clone().requires_grad_() for p in inputs["params"]]
    for p, grad in zip(params, inputs["grads"], strict=True):
        p.grad = grad.to(p.dtype)
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=inputs["betas"], fused=True, capturable=CUDA)
    return {"params": params, "optimizer": optimizer, "average": [p.detach().clone() for p in params]}


def _torch_adamw_step(params, optimizer, average):
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(average, params, 1e-4)
    return params[0]


def _pillow_views(x, sigma, **_):
    """Image by image, with Pillow's box filters in the place of the Gaussian."""
    jitter = (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2), ("hue", 0.08))
    view = AugmentedView((0, 0, x.shape[1], x.shape[1]), jitter, False, sigma[0].item(), True, True)
    views = [np.asarray(apply_view(Image.fromarray(image), x.shape[1], view)) for image in x.numpy()]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def _pillow_crops(images, size):
    return torch.from_numpy(np.stack([np.asarray(center_crop(image, size)) for image in images]))


def _pillow_images(inputs: dict) -> dict:
    return {"images": [Image.fromarray(image.numpy()) for image in inputs["images"]], "size": inputs["size"]}


LIBRARIES = ("flash", "cudnn", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4")
MEASURED = (
    Measured("layer_norm_modulate", ("bf16 with fp32 parameters", "fp32"), ((2, 258, 768),)),
    Measured("gate_residual_norm_modulate", ("bf16 with fp32 parameters",), ((2, 258, 768),)),
    Measured("linear_residual_norm", ("bf16 with fp32 parameters",), ((1, 66, 768, 768),)),
    Measured(
        "norm_linear",
        ("bf16 with fp32 parameters",),
        ((1, 66, 768, 2304),),
        rivals={
            "triton": Rival(functools.partial(ops.norm_linear, backend="triton"), _with_statistics),
            "norm, then a library's linear": Rival(_norm_then_linear),
        },
    ),
    Measured("mlp_residual", ("bf16 with fp32 parameters",), ((1, 66, 768, 3072),)),
    Measured("skip_linear", ("bf16",), ((1, 66, 768, 768),)),
    Measured(
        "attention",
        ("bf16", "fp16"),
        ((1, 258, 2, 72),),
        rivals={name: Rival(functools.partial(ops.attention, backend=name)) for name in LIBRARIES},
    ),
    Measured("patch_embed", ("bf16",), ((2, 3, 64, 16, 256),)),
    Measured("patch_loss", ("bf16 tokens, fp32 images", "fp32"), ((2, 3, 16, 8),), ("denoising",)),
    Measured(
        "patch_loss",
        ("bf16 tokens, fp32 images", "fp32"),
        ((2, 3, 16, 8),),
        ("consistency",),
        # the target is in tokens, and an offset joins it
        traffic=lambda shape, itemsize: shape[0] * shape[1] * shape[2] ** 2 * itemsize,
    ),
    Measured("timestep_condition", ("fp32",), ((64, 768),)),
    Measured("quantize_rows", ("bf16",), ((2, 258, 768, 768),)),
    Measured(
        "linear_fp8",
        ("bf16",),
        ((66, 768, 3072),),
        ("linear", "gelu"),
        rivals={
            "scaled_mm": Rival(functools.partial(ops.linear_fp8, backend="scaled_mm"), checked=False),
            "16-bit linear": Rival(_linear_in_16_bits, _in_16_bits, checked=False),
        },
    ),
    Measured("linear_fp8_fused", ("bf16",), ((1, 66, 768, 768, 768),)),
    Measured(
        "linear_fp8_dynamic",
        ("bf16",),
        ((66, 768, 3072),),
        rivals={
            "scaled_mm": Rival(_compiled(ops.linear_fp8_dynamic), checked=False),
            "16-bit linear": Rival(_compiled(_linear_in_16_bits), checked=False),
        },
    ),
    *(
        Measured(name, ("fp32",), ((4, 3, 256, 256),), rivals={"extension, in place": _in_place(name, "extension")})
        for name in ("euler_step", "heun_step")
    ),
    Measured("global_norm", ("fp32",), ((20, 300_000), (500, 33))),
    Measured(
        "fused_adamw_ema",
        ("fp32", "bf16"),
        ((20, 300_000), (500, 33)),
        rivals={"torch": Rival(_torch_adamw_step, _torch_adamw, checked=False)},
        traffic=lambda shape, itemsize: itemsize * torch.Size(shape).numel(),  # the norm of the gradients
        compiled=False,
    ),
    Measured(
        "augment_view",
        ("uint8",),
        ((8, 256, 256, 3),),
        rivals={"pillow": Rival(_pillow_views, checked=False)},
        compiled=False,
    ),
    Measured(
        "resized_crop",
        ("uint8",),
        ((4, 375, 500, 256), (4, 512, 512, 256)),
        rivals={"pillow": Rival(_pillow_crops, _pillow_images)},
        compiled=False,
    ),
)


def variants_of(measured: Measured) -> dict[str, Rival]:
    """By name; those that cannot run here are still among them."""
    example = measured.example
    found = {name: Rival(functools.partial(_call, example, name)) for name in example.backends}
    eager = example.reference_function or functools.partial(_call, example, "plain")
    # Compiled, the sum that quantize_rows rounds to bfloat16 stays in float32.
    compiled = Rival(_compiled(eager), checked=measured.name != "quantize_rows")
    compiled = {"compile": compiled} if measured.compiled else {}
    return found | measured.rivals | compiled | {"eager": Rival(eager)}


def _call(example: Example, backend: str, **inputs):
    return example.function(**inputs, backend=backend)


@dataclass(frozen=True)
class Case:
    """What all variants of an operation compute, in one direction."""

    measured: Measured
    shape: tuple[int, ...]
    dtypes: str
    form: str | None
    backward: bool

    @property
    def example(self) -> Example:
        return self.measured.example

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return ", ".join([str(list(self.shape)), direction, *([self.form] if self.form else [])])

    def inputs(self, seed: int) -> dict:
        form = next(iter(self.example.forms)) if self.form is None else self.form
        if self.example.name == "quantize_rows" and not self.shape[-1]:
            form = "the MLP's middle"
        device = "cpu" if self.example.name in ON_CPU else DEVICE.type
        values = Values(device, seed, self.example.differentiable and self.backward)
        return self.example.make(values, self.shape, self._dtypes(), **self.example.forms[form])

    def work(self) -> tuple[int, int]:
        """(bytes, operations of matrix products)."""
        spec, itemsize = self.example.spec, min((dtype.itemsize for dtype in self._dtypes()), default=1)
        passes = ((), (True,))[: 1 + self.backward]
        more = self.measured.traffic(self.shape, itemsize) * len(passes)
        moved = more + sum(spec.bytes(self.shape, itemsize, *b) for b in passes)
        return moved, sum(spec.flops(self.shape, *b) for b in passes)

    def missing(self, variant: str) -> str | None:
        """Why a variant cannot be measured here, if it does not refuse itself."""
        name = self.example.name
        if variant == "triton" and not CUDA:
            return "needs a CUDA device; the interpreter's speed says nothing"
        if variant == "compile" and name == "global_norm" and self.shape[0] > 1000:
            return "thousands of tensors take minutes to compile"
        if name == "fused_adamw_ema" and variant == "torch" and self.dtypes != "fp32":
            return "takes gradients in the parameters' dtype only"
        if name == "fused_adamw_ema" and variant == "eager" and CUDA:
            return "reads found_inf on the host, which no CUDA graph holds"
        return None

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        found = self.example.dtypes
        return found.get(self.dtypes) or (BF16,) * len(next(iter(found.values())))  # the tests leave out bfloat16


def cases(names: list[str], main_shapes: bool) -> Iterator[Case]:
    for measured in (m for m in MEASURED if m.name in names):
        shapes = measured.example.spec.shapes if CUDA and measured.name not in ON_CPU else measured.on_cpu
        directions = (False, True)[: 1 + measured.example.differentiable]
        for each in itertools.product(
            shapes[:1] if main_shapes else shapes, measured.dtypes, measured.forms, directions
        ):
            yield Case(measured, *each)


def check(rival: Rival, example: Example, inputs: dict) -> None:
    """Raises AssertionError where the variant is less accurate than `tests.ops.kernel_checks` allows."""

    def function(**given):
        # What is written in place is not what is compared with.
        return rival.function(**rival.prepare(given if example.differentiable else map_tensors(torch.clone, given)))

    assert_accurate(function, example.reference, inputs)


def seconds_of(rival: Rival, sets: list[dict], backward: bool) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile) of one call."""
    prepared = [rival.prepare(inputs) for inputs in sets]
    outputs = run(rival.function, prepared[0])[0] if backward else ()
    grads = [grad.to(o.dtype) for grad, o in zip(gradients_like(outputs), outputs, strict=True)] if backward else None

    def step():
        with torch.set_grad_enabled(backward):
            for inputs in prepared:
                run(rival.function, inputs, grads) if backward else rival.function(**inputs)

    for _ in range(3):
        step()
    found = rounds(_captured(step) if CUDA else step, DEVICE, 0.0, least=50 if CUDA else 10)
    return tuple(seconds / len(sets) for seconds in percentiles(found))


def _captured(step: Callable) -> Callable:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def measure(case: Case, variant: str, rival: Rival, copy: float, product: float) -> Row:
    """Raises AssertionError for a result that is wrong, ValueError or RuntimeError where the variant cannot run.

    copy: bytes/s of a large copy; product: FLOP/s of a large product.
    """
    if reason := case.missing(variant):
        raise ValueError(reason)
    if rival.checked:
        check(rival, case.example, case.inputs(0))
    traffic, flops = case.work()
    sets = [case.inputs(seed) for seed in range(max(1, COLD_BYTES // traffic) if CUDA else 1)]
    p20, median, p80 = seconds_of(rival, sets, case.backward)
    details = {"gbps": traffic / median / 1e9, "percent_of_copy": 100 * traffic / median / copy}
    details |= {"tflops": flops / median / 1e12, "percent_of_gemm": 100 * flops / median / product}
    times = {"median": 1e6 * median, "p20": 1e6 * p20, "p80": 1e6 * p80}
    return Row(case.example.name, variant, str(case), case.dtypes, "us", details=details, **times)


def main(arguments: list[str] | None = None) -> int:
    names = list(dict.fromkeys(measured.name for measured in MEASURED))
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file, whole after every row (default: none)")
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="OP", help="only these operations")
    parser.add_argument("--variants", nargs="+", help='only these, e.g. "triton", "compile", "eager"')
    parser.add_argument("--without", nargs="+", default=(), metavar="VARIANT", help="all but these")
    parser.add_argument("--main-shapes", action="store_true", help="only the first shape of each operation")
    options = parser.parse_args(arguments)
    results, code = Results(options.output, header()) if options.output else None, 0
    ceilings = large_copy(DEVICE), large_product(DEVICE)
    for case in cases(options.ops, options.main_shapes):
        torch.compiler.reset()  # or the shapes before would count as recompilations
        for variant, rival in variants_of(case.measured).items():
            if variant in options.without or variant not in (options.variants or [variant]):
                continue
            try:
                row = measure(case, variant, rival, *ceilings)
                said = row.value
                if results:
                    results.add(row)
            except (AssertionError, RuntimeError, ValueError) as error:
                code = 1 if isinstance(error, AssertionError) else code
                said = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{case.example.name}, {case}, {case.dtypes}, {variant}: {said}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
