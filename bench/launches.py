"""What the networks launch of the package's Triton kernels, recorded where there is no GPU.

The launchers run as they do on a GPU, on tensors of the networks' sizes whose memory nobody touches. Triton is shown a
driver of the wanted architecture, and what it would compile is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from epg_kernels import (
    _column_sums,
    _launch,
    _matmul,
    _norm_modulate,
    attention,
    linear_fp8_fused,
    mlp_residual,
    patch_embed,
    patch_loss,
    quantize_rows,
    timestep_embedding,
)

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
IMAGES, TOKENS = 64, 258
WIDTHS = {768: 768, 1024: 1024, 1584: 768, 1920: 768, 2688: 768}
"""Of the presets' decoders, and of their encoders."""

_ANY_WIDTH = ("_norm_modulate_bwd_batch_kernel", "_norm_modulate_bwd_parameter_kernel")
"""Kernels that cost the same at every width: each is compiled for one."""

Calls = Iterator[tuple[str, Callable[[], object]]]
"""(what it says in the table, what launches)."""


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would compile it. note: what calls it."""

    note: str
    source: ASTSource
    options: Any
    target: GPUTarget

    @property
    def dtype(self) -> str:
        """Of what the first pointer, or descriptor, points to."""
        types = (kind.removeprefix("tensordesc<") for kind in self.source.signature.values() if kind[0] in "*t")
        return next(types).lstrip("*").partition("[")[0]

    def compile(self) -> CompiledKernel:
        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


class _Driver:
    """What Triton asks of a GPU's driver before it compiles; the GPU's number is its architecture."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def recorded(arch: int, names: list[str] | None = None) -> list[Launch]:
    """All that `CALLS` launches on a GPU of this architecture (90: sm_90), each once; names: keys of `CALLS`."""
    found: dict[tuple, Launch] = {}
    note = ""

    def keep(kernel, key, signature, device, constexprs, options, attrs, warmup):
        source = ASTSource(kernel, signature, constexprs, attrs)
        key = str(signature) if kernel.fn.__name__ in _ANY_WIDTH else key
        found.setdefault((kernel, key), Launch(note, source, options, GPUTarget("cuda", arch, 32)))

    triton.runtime.driver.set_active(_Driver(arch))
    with patch.object(JITFunction, "_do_compile", keep), patch.object(_launch, "WITHOUT_GPU", divmod(arch, 10)):
        for name in CALLS if names is None else names:
            for note, call in CALLS[name]():  # noqa: B007 (`keep` reads it)
                if arch > 88 or "fp8" not in note:  # FP8 conversion instructions came with sm_89
                    call()
    return list(found.values())


def _new(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


_new32, _new8 = partial(_new, dtype=FP32), partial(_new, dtype=FP8)


def _with_precision(name: str, call: Callable) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    call()
    torch.set_float32_matmul_precision(before)


def _norm(width: int, dtype=BF16, gated=False, twice=False, bias=False, fp8=False) -> tuple[str, Callable]:
    """Forward and, but in FP8, backward, with modulation; bias: of a linear layer before, which gets its gradient."""
    x, rows, each = _new(IMAGES, TOKENS, width, dtype=dtype), _new32(IMAGES, TOKENS), _new(IMAGES, width, dtype=dtype)
    parameter = _new32(width)
    branch = (x, each) if gated else (None, None)
    first = (parameter, parameter) if twice else None

    def call():
        norm = *branch, parameter, parameter, each, each
        _norm_modulate.launch_forward(x, *norm, 1e-5, FP8 if fp8 else None, first)
        if not fp8:
            more = {"first_norm": (*first, rows, rows) if twice else None, "linear_bias": parameter if bias else None}
            _norm_modulate.launch_backward(x, x if gated or twice else None, x, *norm, rows, rows, **more)

    return f"D={width}{' gated' * gated}{' twice' * twice}{' bias' * bias}{' fp8' * fp8}", call


def _norms() -> Calls:
    yield from (_norm(width) for width in (256, 512, *WIDTHS))
    yield from (_norm(width, fp8=True) for width in (768, 1584, 2688))
    yield _norm(1584, FP32)


def _gated_norms() -> Calls:
    yield from (_norm(1584, gated=True), _norm(1584, FP32, gated=True), _norm(1584, gated=True, fp8=True))


def _linear(
    k: int, n: int, dtype=BF16, precision="high", images=IMAGES, skip=0, residual=None, gated=False, norm=None,
    gelu=False, save=False, statistics=False,
) -> tuple[str, Callable]:  # fmt: skip
    """norm: "plain" or "modulated"; residual: its dtype."""
    rows, parameter, each = images * TOKENS, _new32(max(k, n)), _new(images, max(k, n), dtype=dtype)
    x = _new(images, TOKENS, k, dtype=dtype)
    more = {"gelu": gelu, "save_preactivation": save, "dependent": statistics or norm is not None}
    if residual:
        more["residual"] = _new(images, TOKENS, n, dtype=residual)
    if gated:
        more |= {"gate": each[:, :n], "tokens": TOKENS}
    if statistics:
        more["statistics"] = _new32(2, _matmul.parts_of(n), rows)
    if norm:
        modulation = (each[:, :k],) * 2 if norm == "modulated" else (None, None)
        given = _new32(2, _matmul.parts_of(k), rows), parameter[:k], parameter[:k], *modulation, 1e-5
        more |= {"norm": _matmul.Norm(*given), "tokens": TOKENS}
    operands = x, _new(images, TOKENS, skip, dtype=dtype) if skip else None, _new(n, k + skip, dtype=dtype)
    note = f"K={k}{f'+{skip}' if skip else ''} N={n} of {images}{' highest' * (precision == 'highest')}"
    note += " ragged" * (n % 8 > 0 or k % 8 > 0)
    note += f" on {str(residual)[6:]}" * bool(residual) + " gated" * gated + " saving" * save
    note += f" {norm} norm" * bool(norm) + " statistics" * statistics + " gelu" * gelu
    return note, partial(_with_precision, precision, partial(_matmul.linear, *operands, parameter[:n], **more))


def _dgelu(width: int, n: int, dtype=BF16, precision="high") -> tuple[str, Callable]:
    """The gradient through GELU, and the sums of its columns."""
    dy, z = (_new(IMAGES, TOKENS, columns, dtype=dtype) for columns in (width, n))
    call = partial(_matmul.linear_dgelu, dy, _new(width, n, dtype=dtype), z)
    note = f"K={width} N={n}{' highest' * (precision == 'highest')}{' ragged' * (n % 8 > 0)}"
    return note, partial(_with_precision, precision, call)


_KINDS = (("high", FP32), ("highest", FP32), ("high", FP16))
"""Beside bfloat16: one product each. "highest" takes no tensor cores."""


def _products() -> Calls:
    """With GELU or onto a residual, of norms, and backward. TMA does not reach ragged rows, of 1582 columns."""
    saving = {"gelu": True, "save": True}
    yield from (_linear(w, 4 * w, gelu=True, save=save) for w in (768, 1584, 2688) for save in (False, True))
    yield from (_linear(1584, 6336, dtype, precision, **saving) for precision, dtype in _KINDS)
    yield from (_linear(1582, 6334, dtype, **saving) for dtype in (BF16, FP32))
    yield from (_linear(4 * w, w, residual=BF16, gated=True, save=True) for w in (1584, 2688))
    yield _linear(1584, 1584, residual=BF16, gated=True)
    yield from (_linear(3072, 768, residual=FP32, gated=save, save=save) for save in (False, True))
    gated = {"residual": FP32, "gated": True, "save": True}
    yield from (_linear(6336, 1584, FP32, precision, **gated) for precision in ("high", "highest"))
    yield from (_linear(6334, 1582, dtype, **gated) for dtype in (BF16, FP32))

    modulated, onto = {"norm": "modulated", "gelu": True}, {"residual": BF16, "gated": True, "statistics": True}
    yield from (_linear(w, 4 * w, **modulated) for w in (768, 1584, 2688))
    yield from (_linear(w, 3 * w, images=images, norm="modulated") for w, images in ((1584, 1), (768, 2)))
    yield from (_linear(768, 3072, images=images, gelu=True, norm="plain") for images in (IMAGES, 1))
    yield from (_linear(4 * w, w, images=images, **onto) for w in (1584, 2688) for images in (IMAGES, 1))
    yield _linear(3072, 768, residual=BF16, statistics=True)
    yield from (_linear(1584, 6336, dtype, precision, **modulated) for precision, dtype in _KINDS)
    yield from (_linear(1582, 6334, dtype, **modulated) for dtype in (BF16, FP32))
    yield from (_linear(6334, 1582, **onto), _linear(6336, 1584, FP32, "highest", **onto | {"residual": FP32}))

    yield from (_dgelu(w, 4 * w) for w in (768, 1584, 2688))
    yield from (_dgelu(1584, 6336, dtype, precision) for precision, dtype in _KINDS)
    yield from (_dgelu(1582, 6334, dtype) for dtype in (BF16, FP32))


def _skips() -> Calls:
    """The long skip's product, the two norms after it, and the sums of its bias without one."""
    yield from (_linear(width, width, skip=skip) for width, skip in WIDTHS.items())
    yield from (_linear(1584, 1584, FP32, precision, skip=768) for precision in ("high", "highest"))
    yield from (_linear(1582, 1582, dtype, skip=768) for dtype in (BF16, FP32))
    yield from (_norm(width, twice=True, bias=True) for width in WIDTHS)
    yield from (_norm(width, twice=True, fp8=True) for width in (1584, 2688))
    yield "N=1584", partial(_column_sums.column_sums, _new(IMAGES * TOKENS, 1584), BF16)


def _fused_in_fp8() -> Calls:
    """What blocks of XL ask for, and the widest product."""

    def case(k, n, skip=0, parts=False, residual=False, gated=False, **more):
        shape, scale = (IMAGES, TOKENS), _new32(IMAGES, TOKENS)
        x_scale = _new32(-(-k // _matmul.PART // 2), *shape) if parts else scale
        operands = _new8(*shape, k), x_scale, _new8(n, k + skip), _new32(n), _new(n)
        more |= {"skip": _new8(*shape, skip), "skip_scale": _new32(-(-skip // 128), *shape)} if skip else {}
        more |= {"residual": _new(*shape, n)} if residual else {}
        more |= {"gate": _new(IMAGES, n)} if gated else {}
        note = (
            f"fp8 K={k}{f'+{skip}' if skip else ''} N={n}{' parts' * parts}{' residual' * residual}{' gated' * gated}"
        )
        return f"{note} {more.get('returns', 'y')}", partial(linear_fp8_fused.linear_fp8_fused, *operands, **more)

    yield from (case(w, 3 * w, returns="largest") for w in (768, 1584))
    yield from (case(w, 4 * w, gelu=True, returns="rows") for w in (768, 1584))
    yield from (case(w, w, residual=True, gated=w > 768) for w in (768, 1584))
    yield from (case(4 * w, w, parts=True, residual=True, gated=w > 768, returns="both") for w in (768, 1584, 2688))
    yield case(1584, 1584, 768, parts=True)


def _quantized() -> Calls:
    def case(width, gelu=False, skip=0, dtype=BF16):
        x, each = _new(IMAGES, TOKENS, width, dtype=dtype), _new(IMAGES, width, dtype=dtype)
        others = (x, each, _new(IMAGES, TOKENS, skip, dtype=dtype)) if skip else (None,) * 3
        note = f"fp8 D={width}{' gelu' * gelu}{f' gated skip={skip}' if skip else ''}"
        return note, partial(quantize_rows.quantize_rows_fwd, x, *others, gelu)

    yield from (case(width) for width in (768, 1584, 2688))
    yield from (case(4 * width, gelu=True) for width in (768, 1024, 1584, 2688))
    yield from (case(width, skip=WIDTHS[width]) for width in (768, 1024, 1584, 2688))
    yield case(6336, gelu=True, dtype=FP32)


def _halves() -> Calls:
    """The backward pass of a half's end: gate and bias."""
    for width in WIDTHS:
        grad, gate = _new(IMAGES, TOKENS, width), _new(IMAGES, width)
        yield f"D={width} gated", partial(mlp_residual.residual_bwd, grad, grad, gate, BF16, FP32)
    grad = _new32(IMAGES, TOKENS, 768)
    yield "D=768", partial(mlp_residual.residual_bwd, grad, None, None, BF16, FP32)


def _attention() -> Calls:
    """With one head a GPU's multiprocessors outnumber the programs; 1026 tokens do not fit in shared memory."""
    for heads, head_dim, dtype in ((12, 64, BF16), (22, 72, BF16), (16, 120, BF16), (21, 128, BF16), (22, 72, FP32)):
        shape = heads, head_dim
        qkv, out, lse = (_new(IMAGES, TOKENS, *s, dtype=dtype) for s in ((3, *shape), shape, (0,)))
        lse = _new32(IMAGES, heads, TOKENS)
        largest = _new32(-(-3 * heads * head_dim // attention.COLUMNS), IMAGES, TOKENS)
        yield f"d={head_dim}", partial(attention.attention_fwd, qkv, 1.0)
        yield f"d={head_dim}", partial(attention.attention_bwd, out, qkv, out, lse, 1.0)
        if dtype == BF16:
            long, one = _new(IMAGES, 1026, 3, *shape), slice(None, 1)
            yield f"d={head_dim} L=1026", partial(attention.attention_fwd, long, 1.0)
            yield f"d={head_dim} fp8", partial(attention.attention_fp8_fwd, qkv, largest, 1.0)
            given = out[one, :, one], qkv[one, :, :, one], out[one, :, one], lse[one, one]
            yield f"d={head_dim} one head", partial(attention.attention_bwd, *given, 1.0)


def _patches() -> Calls:
    def case(side, patch, width, images=IMAGES, dtype=BF16, precision="high"):
        length = 2 + (side // patch) ** 2
        image, weight = _new(images, 3, side, side, dtype=dtype), _new(width, 3, patch, patch, dtype=dtype)
        position, tokens = _new32(1, length, width), _new32(images, length, width)

        def call():
            patch_embed.patch_embed_fwd(image, weight, _new32(width), position, _new32(images, 2, width))
            patch_embed.patch_embed_bwd(tokens, image, weight, True, True)

        note = f"E={width} p={patch} of {images}{' highest' * (precision == 'highest')}"
        return note, partial(_with_precision, precision, call)

    yield from (case(*size) for size in ((256, 16, 768), (256, 16, 1024), (512, 32, 768), (256, 16, 768, 1)))
    yield from (case(256, 16, 768, dtype=FP32, precision=precision) for precision in ("high", "highest"))


def _losses() -> Calls:
    """Denoising (x0, to an image) and consistency (edm, to tokens, Huber)."""
    each, none = _new32(IMAGES), (None, None, None)
    for size, side in ((256, 16), (512, 32)):
        for dtype in (BF16, FP32):
            tokens = _new(IMAGES, (size // side) ** 2, side**2 * 3, dtype=dtype)
            image = _new32(IMAGES, 3, size, size)
            forms = {"x0": (image, *none, None, None), "edm": (tokens, each, image, each, each, 0.06)}
            for name, form in forms.items():

                def call(tokens=tokens, form=form):
                    patch_loss.patch_loss_fwd(tokens, *form)
                    patch_loss.patch_loss_bwd(each, each, tokens, *form)

                yield f"{size} px p={side} {name}", call


def _times() -> Calls:
    for dim, dtype in ((768, BF16), (1024, BF16), (768, FP32)):
        t, label = _new32(IMAGES), _new(IMAGES, dim, dtype=dtype)

        def call(t=t, label=label, dim=dim, dtype=dtype):
            timestep_embedding.timestep_embedding_fwd(t, label, dim, dtype, True)
            timestep_embedding.timestep_embedding_bwd(label, label, t, label, label)

        yield f"dim={dim}", call


CALLS: dict[str, Callable[[], Calls]] = {
    "attention": _attention,
    "gate_residual_norm_modulate": _gated_norms,
    "layer_norm_modulate": _norms,
    "linear_fp8_fused": _fused_in_fp8,
    "linear_residual_norm": lambda: (_norm(width, gated=True, bias=True) for width in WIDTHS),
    "mlp_residual": _halves,
    "norm_linear": _products,
    "patch_embed": _patches,
    "patch_loss": _losses,
    "quantize_rows": _quantized,
    "skip_linear": _skips,
    "timestep_embedding": _times,
}
"""By the kernel's file."""
