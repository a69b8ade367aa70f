"""Precisions of sampling: what becomes of the weights and of matrix products, and what that does to the images.

fp32    weights as they are; float32 products in float32.
tf32    the same weights; products of float32 operands rounded to TF32 (10 bits behind the point), summed in float32.
bf16    weights, but the affine ones of LayerNorm, and tokens in bfloat16; LayerNorm, softmax and sums in float32.
fp16    the same in float16.
fp8     as bf16, and the large linears of the blocks multiply float8_e4m3fn: weights with a scale per output channel,
        activations with a scale per token. First and last layers and the adaLN projections stay in bfloat16.
The state of the sampler, noise levels and guidance are in float32 with any of them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

from epg_fast.models import EPGViT
from epg_fast.models.blocks import LayerNorm
from epg_fast.models.fused_fp8 import use_fp8
from epg_fast.ops import linear_fp8, quantize_rows_ref
from epg_fast.ops.fp8 import product_backend, product_refusal

log = logging.getLogger("epg_fast")

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def available_precision(precision: str, device: torch.device) -> str:
    """`precision`, or the nearest one that `device` computes, which a line of the log explains.

    Raises ValueError for a name that is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: want one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        log.warning("precision tf32: %s has no TF32 products; computing in fp32", _name(device))
        return "fp32"
    if precision == "fp8" and device.type == "cuda":
        refusal = _fp8_refusal(device)
        if refusal:
            log.warning("precision fp8: got %s, wanted a GPU that multiplies FP8; computing in bf16", refusal)
            return "bf16"
    if precision == "fp8" and device.type != "cuda":
        scaled = product_backend(device) == "scaled_mm"
        how = "PyTorch's FP8 product" if scaled else "float32 products of the rounded values"
        log.warning("precision fp8: on a CPU with %s, which shows its numbers and is not faster than fp32", how)
    return precision


@torch.no_grad()
def inference_network(model: EPGViT, precision: str, ops: Mapping[str, str] | None = None) -> EPGViT:
    """A network of its own, in eval mode, with `model`'s weights cast once; it shares those that keep their dtype.

    Modules of any kind come along with their hooks, which are called as in `model`. Raises ValueError for a module
    whose `forward` is another object's, and when fp8 finds no linear to convert.
    """
    dtype = _DTYPES.get(precision)
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    cast = _Cast(dtype, {id(p) for norm in norms for p in norm.parameters()})
    network = _twin(model, cast, {})
    if ops is not None and ops != network.ops:
        network.use_ops(ops)
    if precision == "fp8":
        log.info("%s", use_fp8(network, model))
    if dtype is not None:
        with torch.autocast(network.pos_embed.device.type, enabled=False):
            network.join_projection()
    return network


class _Cast:
    """Tensors of the twin network, one for each of the network's. kept: ids of those that keep their dtype."""

    def __init__(self, dtype: torch.dtype | None, kept: set[int]):
        self._dtype, self._kept, self._made = dtype, kept, {}

    def __call__(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or id(tensor) in self._made:
            return self._made.get(id(tensor))
        data = tensor.detach()
        if self._dtype is not None and id(tensor) not in self._kept and data.is_floating_point():
            data = data.to(self._dtype)
        made = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
        self._made[id(tensor)] = made
        return made


def _twin(module: nn.Module | None, cast: _Cast, made: dict[int, nn.Module]) -> nn.Module | None:
    """The module again, with tensors of its own. Not copy.deepcopy: hooks may hold what belongs to the caller."""
    if module is None or id(module) in made:
        return made.get(id(module))
    twin = made[id(module)] = type(module).__new__(type(module))
    twin.__dict__.update(vars(module))
    if "forward" in vars(module):
        forward = module.forward
        if getattr(forward, "__self__", None) is not module:
            raise ValueError(
                f"a {type(module).__name__} has a forward that belongs to something else, which would not see other "
                "weights; want precision fp32 and compile off"
            )
        twin.__dict__["forward"] = forward.__func__.__get__(twin)
    for name in ("_parameters", "_buffers"):
        twin.__dict__[name] = {key: cast(tensor) for key, tensor in vars(module)[name].items()}
    children = vars(module)["_modules"].items()
    twin.__dict__["_modules"] = {key: _twin(child, cast, made) for key, child in children}
    twin.__dict__.update(training=False, _compiled_call_impl=None)
    return twin


def _trial(device: torch.device) -> bool:
    rows, scale = quantize_rows_ref(torch.ones(32, 64, device=device))
    bias = torch.zeros(32, dtype=torch.bfloat16, device=device)
    return bool((linear_fp8(rows, scale, rows, scale, bias, backend="scaled_mm") == 64).all())


@functools.cache
def _fp8_refusal(device: torch.device) -> str | None:
    return product_refusal(device, (9, 0), _trial)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"


def image_error(images: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """How far images are from those of a reference: [N, 3, H, W] in [0, 1] each.

    relative_l2: norm of the difference over the norm of the reference. psnr_db: -10 log10 of the mean squared
    difference. Source: the usual definitions, with a peak of 1. Raises ValueError for other shapes.
    """
    if images.shape != reference.shape:
        raise ValueError(f"image_error: got shapes {list(images.shape)} and {list(reference.shape)}, want the same")
    images, reference = images.double(), reference.double()
    squared = F.mse_loss(images, reference).item()
    psnr = -10 * math.log10(squared) if squared else math.inf
    error, size = (images - reference).norm().item(), reference.norm().item()
    return {"relative_l2": error / size if size else (math.inf if error else 0.0), "psnr_db": psnr}
