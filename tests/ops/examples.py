"""Example inputs of every operation, described once: the tests check them, the benchmarks measure them.

An example knows how to call an operation, what else gives the same, and how to make inputs of a shape, of dtypes and of
one of its forms (with a gate, without, ...). Inputs are arguments by name.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from epg_fast import ops
from epg_fast.ops.spec import OpSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Values:
    """Standard normal values of any shape on one device."""

    def __init__(self, device: str = "cpu", seed: int = 0, grad: bool = True):
        self.device, self.grad = device, grad
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int, dtype: torch.dtype = FP32, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
        values = torch.randn(size, generator=self.generator, device=self.device)
        values = values if scale == 1 else values * scale
        return values.to(dtype).requires_grad_(grad and self.grad)

    def named(self, names: str, *size: int, **options) -> dict[str, torch.Tensor]:
        """Tensors of one shape by their names, which spaces separate."""
        return {name: self(*size, **options) for name in names.split()}

    def sized_rows(self, *size: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        """Without a gradient, rows from a hundredth to a hundred times as large."""
        sizes = torch.logspace(-2, 2, size[-2], device=self.device)[:, None]
        return (self(*size, grad=False) * sizes).to(dtype)

    def bytes(self, *size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, generator=self.generator, device=self.device, dtype=torch.uint8)


@dataclass(frozen=True)
class Example:
    """An operation's public function and how it is called.

    make(values, shape, dtypes, **form) -> arguments by name. dtypes: what `make` takes, by name; the first is float32
    throughout, the second has bfloat16 if the operation takes it. forms: further arguments of `make`; the first is the
    full one. backends: other than "plain". cuda_dtypes: those of `dtypes` that backend "cuda" takes. reference: gives
    the result to be compared with; by default backend "plain".
    """

    name: str
    function: Callable
    spec: OpSpec
    make: Callable[..., dict]
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=lambda: {"fp32": (FP32,)})
    forms: dict[str, dict] = field(default_factory=lambda: {"full": {}})
    backends: tuple[str, ...] = ("triton",)
    cuda_dtypes: tuple[str, ...] = ()
    reference_function: Callable | None = None
    differentiable: bool = True
    in_place: bool = False
    device: str = DEVICE

    def call(self, backend: str, **inputs):
        if self.in_place:
            inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)
        return self.function(**inputs, backend=backend)

    def by(self, backend: str) -> Callable:
        return functools.partial(self.call, backend)

    def reference(self, **inputs):
        if self.reference_function is None:
            return self.call("plain", **inputs)
        return self.reference_function(**inputs)

    def inputs(self, shape=None, dtypes: str | None = None, form: str | None = None, *, device=None, seed=0, grad=True):
        """By default of the first odd shape, dtypes and form."""
        values = Values(device or self.device, seed, grad and self.differentiable)
        shape, dtypes = shape or self.spec.odd_shapes[0], self.dtypes[dtypes or next(iter(self.dtypes))]
        return self.make(values, shape, dtypes, **self.forms[form or next(iter(self.forms))])


EXAMPLES: dict[str, Example] = {}


def example(function: Callable, spec: str | None = None, name: str | None = None, **more) -> Callable:
    """Adds the operation whose inputs the decorated function makes.

    spec: the file of the operation whose `SPEC` it is, name: what it is called, if not as the function.
    """
    name = name or function.__name__
    module = importlib.import_module(f"epg_fast.ops.{spec or name}")

    def add(make: Callable) -> Callable:
        EXAMPLES[name] = Example(name, function, module.SPEC, make, **more)
        return make

    return add


without_gradient = functools.partial(example, differentiable=False)
of_extension = functools.partial(without_gradient, backends=("extension",))
by_products = functools.partial(example, backends=("triton", "cuda"))

_NORM_DTYPES = {
    "fp32": (FP32, FP32, FP32),
    "bf16 with fp32 parameters": (BF16, FP32, BF16),
    "bf16": (BF16, BF16, BF16),
    "fp16 with fp32 modulation": (FP16, FP32, FP32),
    "fp64": (FP64, FP64, FP64),
}
_STREAM_DTYPES = {
    "fp32": (FP32, FP32, FP32, FP32),
    "bf16 with fp32 parameters": (BF16, BF16, FP32, BF16),
    "fp32 stream with a bf16 branch": (FP32, BF16, FP32, FP32),
    "fp16": (FP16, FP16, FP16, FP16),
    "fp64": (FP64, FP64, FP64, FP64),
}
_GATED = {
    "gated and modulated": {},
    "gated": {"modulated": False},
    "modulated": {"gated": False},
    "neither": {"gated": False, "modulated": False},
}
_MODULATED = {"modulated": {}, "plain": {"modulated": False}}
_PRODUCT_DTYPES = {
    "fp32": (FP32, FP32, FP32, FP32),
    "bf16 with fp32 parameters": (BF16, BF16, BF16, FP32),
    "bf16 on an fp32 residual": (FP32, BF16, FP32, FP32),
    "fp16": (FP16, FP16, FP16, FP16),
}
_CUDA_DTYPES = ("bf16 with fp32 parameters", "bf16 on an fp32 residual")
_SKIP_DTYPES = {
    "fp32": (FP32, FP32, FP32, FP32),
    "bf16 with fp32 parameters": (BF16, BF16, FP32, FP32),
    "bf16": (BF16, BF16, BF16, BF16),
    "fp16 with fp32 skip": (FP16, FP32, FP16, FP32),
}
_ONE = {"fp32": (FP32,), "bf16": (BF16,), "fp16": (FP16,)}
_TIME_DTYPES = {name: dtypes * 2 for name, dtypes in _ONE.items()}
_FP8_DTYPES = {"fp32": (FP32,) * 4, "fp16": (FP16,) * 4}  # the interpreter truncates to bfloat16
_SCALES = {"full": {}, "of another scale": {"scale": 0.5}}


def _residual_norm(backend, **inputs):
    """An output that is an input, itself, would have no gradient."""
    x, y, copied = ops.residual_norm_modulate(**inputs, backend=backend)
    return 2 * x, y, 2 * copied


@example(ops.layer_norm_modulate, dtypes=_NORM_DTYPES, forms=_MODULATED | {"modulated, into fp16": {"out_dtype": FP16}})
@example(
    _residual_norm,
    spec="layer_norm_modulate",
    name="residual_norm_modulate",
    dtypes=_NORM_DTYPES,
    forms={"copied": {"out_dtype": FP16, "copy_dtype": FP16}, "not copied": {}},
)
@without_gradient(
    ops.layer_norm_modulate_fp8,
    spec="layer_norm_modulate",
    dtypes={name: dtypes[:3] for name, dtypes in _FP8_DTYPES.items()},
    forms=_MODULATED,
)
def _norm(values, shape, dtypes, modulated=True, **options):
    (batch, _, width), (x, parameters, modulation) = shape, dtypes
    made = {"x": values(*shape, dtype=x)} | values.named("weight bias", width, dtype=parameters)
    return made | values.named("shift scale" if modulated else "", batch, width, dtype=modulation) | options


@example(ops.gate_residual_norm_modulate, dtypes=_STREAM_DTYPES, forms=_GATED)
@without_gradient(
    ops.gate_residual_norm_modulate_fp8, spec="gate_residual_norm_modulate", dtypes=_FP8_DTYPES, forms=_GATED
)
def _gate_residual_norm(values, shape, dtypes, gated=True, modulated=True):
    (batch, _, width), (x, branch, parameters, modulation) = shape, dtypes
    gate = values(batch, 1, width, dtype=modulation) if gated else None
    made = {"x": values(*shape, dtype=x), "branch": values(*shape, dtype=branch), "gate": gate}
    return made | _norm(values, shape, (x, parameters, modulation), modulated)


@by_products(
    ops.linear_residual_norm,
    dtypes=_PRODUCT_DTYPES,
    forms={"gated and modulated": {}, "gated": {"present": 1}, "neither": {"present": 0}},
    cuda_dtypes=_CUDA_DTYPES,
)
def _linear_residual_norm(values, shape, dtypes, present=3):
    batch, tokens, k, n = shape
    residual, product, modulation, parameters = dtypes
    made = {"x": values(batch, tokens, n, dtype=residual), "h": values(batch, tokens, k, dtype=product)}
    made["weight"] = values(n, k, dtype=product, scale=k**-0.5)
    made |= values.named("bias norm_weight norm_bias", n, dtype=parameters)
    return made | {name: values(batch, 1, n, dtype=modulation) for name in ("gate", "shift", "scale")[:present]}


def _statistics_as_coarse_as_rows(backend, **inputs):
    x, statistics = ops.linear_residual(**inputs, backend=backend)
    return x, statistics.to(x.dtype)


@without_gradient(
    _statistics_as_coarse_as_rows,
    spec="linear_residual_norm",
    name="linear_residual",
    dtypes=_PRODUCT_DTYPES,
    forms={"gated": {}, "not gated": {"gated": False}},
)
def _linear_residual(values, shape, dtypes, gated=True):
    made = _linear_residual_norm(values, shape, dtypes, present=int(gated))
    return {name: made[name] for name in ("x", "h", "weight", "bias", "gate") if name in made}


def _norm_linear_of_its_statistics(backend, x, **inputs):
    return ops.norm_linear(x, ops.row_statistics(x), **inputs, backend=backend)


@without_gradient(
    _norm_linear_of_its_statistics,
    name="norm_linear",
    dtypes={name: (dtypes[1], *dtypes[1:]) for name, dtypes in _PRODUCT_DTYPES.items()},
    forms={"modulated, with GELU": {"gelu": True}, "plain": {"modulated": False}},
    reference_function=functools.partial(ops.norm_linear_ref, statistics=None),
)
def _norm_linear(values, shape, dtypes, modulated=True, **options):
    batch, tokens, width, columns = shape
    x, product, modulation, parameters = dtypes
    made = {"x": values(batch, tokens, width, dtype=x)}
    made |= values.named("norm_weight norm_bias", width, dtype=parameters)
    made |= {"weight": values(columns, width, dtype=product, scale=width**-0.5)}
    if modulated:
        made |= {"bias": values(columns, dtype=parameters)}
        made |= values.named("shift scale", batch, 1, width, dtype=modulation)
    return made | options


@by_products(
    ops.skip_linear,
    dtypes=_SKIP_DTYPES,
    forms={
        "normed": {},
        "not normed": {"normed": False},
        "two norms": {"then": True},
        "two norms, not modulated": {"then": False},
    },
    cuda_dtypes=("bf16 with fp32 parameters", "bf16"),
)
def _skip_linear(values, shape, dtypes, normed=True, then=None):
    """then: whether the next norm, if there is one, is modulated."""
    batch, tokens, width, skip_width = shape
    x, skip, weight, parameters = dtypes
    made = {"x": values(batch, tokens, width, dtype=x), "skip": values(batch, tokens, skip_width, dtype=skip)}
    made["weight"] = values(width, width + skip_width, dtype=weight, scale=(width + skip_width) ** -0.5)
    made |= values.named("bias norm_weight norm_bias" if normed else "bias", width, dtype=parameters)
    if then is not None:
        modulation = [values(batch, 1, width, dtype=x) if then else None for _ in range(2)]
        made["next_norm"] = (*(values(width, dtype=parameters) for _ in range(2)), *modulation)
    return made


@without_gradient(ops.skip_norms_fp8, spec="skip_linear", dtypes=_FP8_DTYPES, forms=_MODULATED)
def _skip_norms(values, shape, dtypes, modulated=True):
    made = _skip_linear(values, (*shape[:3], 1), dtypes, then=modulated)
    z = values(*shape[:3], dtype=dtypes[0], grad=False)
    return {"z": z} | {name: made[name] for name in ("norm_weight", "norm_bias", "next_norm")}


@by_products(
    ops.mlp_residual,
    dtypes=_PRODUCT_DTYPES,
    forms={"gated": {}, "not gated": {"gated": False}},
    cuda_dtypes=_CUDA_DTYPES,
)
def _mlp_residual(values, shape, dtypes, gated=True):
    batch, tokens, width, hidden = shape
    residual, product, gate, biases = dtypes
    return {
        "x": values(batch, tokens, width, dtype=residual),
        "y": values(batch, tokens, width, dtype=product),
        "fc1_weight": values(hidden, width, dtype=product, scale=width**-0.5),
        "fc1_bias": values(hidden, dtype=biases),
        "fc2_weight": values(width, hidden, dtype=product, scale=hidden**-0.5),
        "fc2_bias": values(width, dtype=biases),
        "gate": values(batch, 1, width, dtype=gate) if gated else None,
    }


def _linear_of_casts(h, weight, bias=None):
    return F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))


@example(
    lambda backend, **inputs: ops.linear(**inputs),
    spec="linear_residual_norm",
    name="linear",
    dtypes={"fp16 with an fp32 weight": (FP16, FP32), "bf16 with an fp32 weight": (BF16, FP32)},
    forms={"biased": {}, "not biased": {"biased": False}},
    backends=("any",),
    reference_function=_linear_of_casts,
)
def _linear(values, shape, dtypes, biased=True):
    *rows, k, n = shape
    made = {"h": values(*rows, k, dtype=dtypes[0]), "weight": values(n, k, dtype=dtypes[1], scale=k**-0.5)}
    return made | values.named("bias" if biased else "", n, dtype=dtypes[1])


@example(ops.attention, dtypes=_ONE, forms=_SCALES, reference_function=ops.attention_ref)
def _attention(values, shape, dtypes, **options):
    batch, length, heads, head_dim = shape
    return {"qkv": values(batch, length, 3, heads, head_dim, dtype=dtypes[0])} | options


# In 16 bits the kernel rounds the softmax, which moves FP8 numbers: tests/ops/test_fp8.py.
@without_gradient(ops.attention_fp8, spec="attention", forms=_SCALES, reference_function=ops.attention_fp8_ref)
def _attention_fp8(values, shape, dtypes, **options):
    qkv = values(*shape[:2], 3, *shape[2:], dtype=dtypes[0], grad=False)
    parts = F.pad(qkv.flatten(2), (0, -3 * shape[2] * shape[3] % 128)).unflatten(-1, (-1, 128))
    return {"qkv": qkv, "largest": parts.abs().amax(-1).movedim(-1, 0).float()} | options


@example(
    ops.patch_embed,
    dtypes={
        "fp32": (FP32, FP32, FP32),
        "bf16": (BF16, BF16, BF16),
        "fp32 image, bf16 parameters": (FP32, BF16, FP32),
        "bf16 image, fp32 parameters": (BF16, FP32, FP32),
        "fp16 with fp32 position": (FP16, FP16, FP32),
    },
    forms={"square": {}, "wide behind one token": {"extras": 1, "aspect": 2}},
)
def _patch_embed(values, shape, dtypes, extras=2, aspect=1):
    batch, channels, size, patch, width = shape
    image, weight, tokens = dtypes
    length = extras + aspect * (size // patch) ** 2
    return {
        "image": values(batch, channels, size, aspect * size, dtype=image),
        "weight": values(width, channels, patch, patch, dtype=weight, scale=(patch * channels**0.5) ** -1),
        "bias": values(width, dtype=weight),
        "position": values(1, length, width, dtype=tokens),
        "prefix": values(batch, extras, width, dtype=tokens),
    }


@example(
    ops.patch_loss,
    dtypes={
        "fp32": (FP32, FP32),
        "bf16 tokens, fp32 images": (BF16, FP32),
        "bf16": (BF16, BF16),
        "fp16 tokens, fp32 images": (FP16, FP32),
    },
    forms={
        "consistency": {},
        "denoising": {"parametrization": "x0", "target": "image", "huber_c": None},
        "edm to an image, huber": {"target": "image"},
        "edm to tokens, mean": {"huber_c": None},
        "x0 to tokens, huber": {"parametrization": "x0"},
    },
)
def _patch_loss(values, shape, dtypes, parametrization="edm", target="tokens", huber_c=0.06):
    batch, channels, size, patch = shape
    token_dtype, image_dtype = dtypes
    tokens, image = (batch, (size // patch) ** 2, patch**2 * channels), (batch, channels, size, size)
    made = {"tokens": values(*tokens, dtype=token_dtype)}
    constant = functools.partial(values, grad=False)
    targets = {"image": (image, image_dtype), "tokens": (tokens, token_dtype)}
    made["target"] = constant(*targets[target][0], dtype=targets[target][1])
    if parametrization == "edm":
        made |= {"scale": constant(batch), "offset": constant(*image, dtype=image_dtype)}
        made["offset_scale"] = constant(batch)
    return made | {"weight": constant(batch).abs(), "huber_c": huber_c}


@example(ops.timestep_embedding, dtypes=_TIME_DTYPES)
@example(
    ops.timestep_condition,
    spec="timestep_embedding",
    dtypes=_TIME_DTYPES | {"fp16 with an fp32 label": (FP16, FP32)},
    forms={"with a label": {"labelled": True}, "without a label": {"labelled": False}},
)
def _time(values, shape, dtypes, labelled=None):
    """250 ln(sigma) of noise levels of the whole range, 0.002 to 640; several images have the same."""
    (batch, dim), (dtype, label) = shape, dtypes
    sigma = torch.exp(torch.linspace(math.log(0.002), math.log(640.0), max(2, batch // 4), dtype=FP64))
    sigma = sigma.repeat(batch)[:batch]
    t = (250 * sigma.log()).to(values.device, FP32).requires_grad_(values.grad)
    made = {"t": t, "dim": dim, "dtype": dtype}
    return made if labelled is None else made | {"label": values(batch, dim, dtype=label) if labelled else None}


@without_gradient(
    ops.quantize_rows,
    dtypes={name: dtypes[:1] for name, dtypes in _FP8_DTYPES.items()},
    forms={
        "a long skip after a decoder block": {},
        "a long skip": {"branch": False, "gate": False},
        "a block's end": {"gate": False, "skip": False},
        "the MLP's middle": {"branch": False, "gate": False, "skip": False, "gelu": True},
        "attention's output": {"branch": False, "gate": False, "skip": False},
    },
)
def _quantize_rows(values, shape, dtypes, branch=True, gate=True, skip=True, gelu=False):
    batch, tokens, width, skip_width = shape
    rows = functools.partial(values.sized_rows, batch, tokens, dtype=dtypes[0])
    return {
        "x": rows(width),
        "branch": rows(width) if branch else None,
        "gate": values(batch, width, dtype=dtypes[0], grad=False) if gate else None,
        "skip": rows(skip_width or width) if skip else None,
        "gelu": gelu,
    }


def _fp8(name, x, by_columns=False):
    """x in FP8 with its scales: of each row or of its columns by the 128."""
    if not by_columns:
        return dict(zip((name, f"{name}_scale"), ops.quantize_rows_ref(x), strict=True))
    parts = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    rows, scale = ops.quantize_rows_ref(parts * torch.logspace(-1, 1, parts.shape[-2], device=x.device)[:, None])
    return {name: rows.flatten(-2)[..., : x.shape[-1]].contiguous(), f"{name}_scale": scale.movedim(-1, 0).contiguous()}


@without_gradient(
    ops.linear_fp8,
    dtypes={"bf16": (BF16,)},
    forms={"linear": {}, "gelu": {"gelu": True}},
    backends=("cuda",),
    cuda_dtypes=("bf16",),
    reference_function=ops.linear_fp8_ref,
)
def _linear_fp8(values, shape, dtypes, gelu=False):
    rows, k, n = shape
    made = _fp8("x", values.sized_rows(rows, k)) | _fp8("weight", values.sized_rows(n, k) * k**-0.5)
    return made | {"bias": values(n, dtype=dtypes[0], grad=False), "gelu": gelu}


@without_gradient(
    ops.linear_fp8_fused,
    dtypes={name: dtypes[:3] for name, dtypes in _FP8_DTYPES.items()},
    forms={
        "all at once": {},
        "the MLP's first product": {"scales": "row", "skip": False, "gated": False, "returns": "rows"},
        "a block's end": {"skip": False, "gelu": False},
        "attention's projection": {"scales": "row", "skip": False, "gelu": False, "returns": "y"},
        "a long skip": {"gelu": False, "gated": False, "returns": "y"},
        "attention's first product": {"skip": False, "gelu": False, "gated": False, "returns": "largest"},
    },
    reference_function=ops.linear_fp8_fused_ref,
)
def _linear_fp8_fused(values, shape, dtypes, skip=True, scales="columns", gelu=True, gated=True, returns="both"):
    """scales: of x, of each row or of its columns by the 128; a skip has one for each row there and the other here."""
    batch, tokens, d, e, n = shape
    e = e if skip else 0
    bias, residual, gate = dtypes
    made = _fp8("x", values.sized_rows(batch, tokens, d), scales == "columns")
    made |= _fp8("weight", values(n, d + e, grad=False) * (d + e) ** -0.5)
    made |= {"bias": values(n, dtype=bias, grad=False)}
    made |= _fp8("skip", values.sized_rows(batch, tokens, e), scales != "columns") if e else {}
    if gated:
        made |= {"residual": values(batch, tokens, n, dtype=residual, grad=False)}
        made |= {"gate": values(batch, n, dtype=gate, grad=False)}
    return made | {"gelu": gelu, "returns": returns}


# Against its own rounding, in its own file; here for what measures it.
@example(ops.linear_fp8_dynamic, dtypes={"bf16": (BF16,)}, backends=())
def _linear_fp8_dynamic(values, shape, dtypes):
    rows, k, n = shape
    return {"x": values(rows, k, dtype=BF16), "weight": values(n, k, scale=k**-0.5), "bias": values(n), "dtype": BF16}


def _steps(names: str) -> dict[str, dict]:
    forms = {"clamped": {"clamp": (-1.0, 1.0)}, "free": {}, "clamped above": {"clamp": (None, 0.5)}}
    return {form: {"names": names} | more for form, more in forms.items()}


@of_extension(ops.euler_step, forms=_steps("x denoised"))
@of_extension(ops.heun_step, forms=_steps("x denoised denoised_next"))
def _step(values, shape, dtypes, names, clamp=None):
    return values.named(names, *shape, dtype=dtypes[0]) | {"sigma": 1.7, "sigma_next": 0.3, "clamp": clamp}


@of_extension(ops.global_norm, dtypes={"fp32": (FP32,), "bf16": (BF16,), "mixed": (FP32, BF16)})
def _global_norm(values, shape, dtypes):
    count, size = shape
    return {"tensors": [values(size, dtype=dtypes[i % len(dtypes)]) for i in range(count)]}


def adamw_step(*, grads, backend, **state):
    """A whole step: the norm of the gradients, then what it clips; the tensors that were written."""
    norm, found_inf = ops.global_norm(grads, backend=backend)
    ops.fused_adamw_ema_(grads=grads, norm=norm, found_inf=found_inf, backend=backend, **state)
    written = [*state["params"], *state["exp_avgs"], *state["exp_avg_sqs"], *sum(state["emas"], [])]
    return (*written, *state["copies"], *state["ema_copies"], state["steps"])


@of_extension(
    adamw_step,
    name="fused_adamw_ema",
    dtypes={"fp32": (FP32, FP32), "bf16": (FP32, BF16)},
    forms={"clipped": {}, "copied": {"averages": 2, "copies": True, "max_norm": math.inf}},
    in_place=True,
)
def _adamw(values, shape, dtypes, averages=1, copies=False, max_norm=0.5):
    count, size = shape
    params = [values(size, dtype=dtypes[0]) for _ in range(count)]
    number = functools.partial(torch.full, dtype=FP64, device=values.device)
    made = {
        "params": params,
        "grads": [values(size, dtype=dtypes[1]) for _ in range(count)],
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "steps": torch.zeros(count, device=values.device),
        "lrs": number((count,), 1e-4),
        "weight_decays": number((count,), 0.01),
        "max_norm": number((), max_norm),
        "emas": [[p.clone() for p in params] for _ in range(averages)],
        "ema_weights": number((averages,), 1e-4),
        "betas": (0.9, 0.99),
    }
    return made | {name: [p.to(BF16) for p in params] if copies else [] for name in ("copies", "ema_copies")}


@of_extension(ops.augment_view, dtypes={"uint8": ()}, device="cpu")
def _augment_view(values, shape, dtypes, sigma=2.0):
    batch, operation = shape[0], ops.JitterOperation
    order = (operation.BRIGHTNESS, operation.CONTRAST, operation.SATURATION, operation.HUE)
    on = torch.ones(batch, dtype=torch.bool)
    return {
        "x": values.bytes(*shape),
        "operations": torch.tensor(order, dtype=torch.int8).repeat(batch, 1),
        "values": torch.tensor((1.3, 0.7, 1.2, 0.08), dtype=FP64).repeat(batch, 1),
        "grayscale": ~on,
        "sigma": torch.full((batch,), sigma, dtype=FP64),
        "solarize": on,
        "flip": on,
    }


@of_extension(
    ops.resized_crop, dtypes={"uint8": ()}, device="cpu", forms={"bicubic": {}, "bilinear": {"filter": "bilinear"}}
)
def _resized_crop(values, shape, dtypes, filter="bicubic"):
    """ADM's centre crop, but of an image that may be smaller than the crop."""
    batch, height, width, size = shape
    halvings = max(0, (min(height, width) // size).bit_length() - 1)
    halved = width >> halvings, height >> halvings
    scale = size / min(halved)
    resized = torch.tensor([round(side * scale) for side in halved])
    return {
        "images": [values.bytes(height, width, 3) for _ in range(batch)],
        "halvings": torch.full((batch,), halvings),
        "boxes": torch.tensor([0, 0, *halved], dtype=FP64).repeat(batch, 1),
        "resized": resized.repeat(batch, 1),
        "offsets": ((resized - size) // 2).repeat(batch, 1),
        "size": size,
        "filter": filter,
    }
