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

import copy
import logging
import math
from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

from epg_fast.models import EPGViT
from epg_fast.models.blocks import LayerNorm
from epg_fast.models.fp8 import Fp8Linear, refusal
from epg_fast.models.fused_fp8 import quantize
from epg_fast.ops.fp8 import product_backend

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
        found = refusal(device, (9, 0))
        if found:
            log.warning("precision fp8: got %s, wanted a GPU that multiplies FP8; computing in bf16", found)
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
    network = _copy(model)
    if ops is not None and ops != network.ops:
        network.use_ops(ops)
    if precision == "fp8":
        log.info("%s", quantize(network))
    dtype = _DTYPES.get(precision)
    if dtype is not None:
        for module in network.modules():
            if not isinstance(module, (LayerNorm, Fp8Linear)):
                module._apply(lambda x: x.to(dtype) if x.is_floating_point() else x, recurse=False)
        with torch.autocast(network.pos_embed.device.type, enabled=False):
            network.join_projection()
    return network


def _copy(model: EPGViT) -> EPGViT:
    """The network again, in eval mode, with the same tensors as parameters of its own and the same hooks."""
    shared = {}
    for module in model.modules():
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            raise ValueError(
                f"a {type(module).__name__} has a forward that belongs to something else, which would not see other "
                "weights; want precision fp32 and compile off"
            )
        for tensor in (*vars(module).values(), *module._buffers.values(), *module._parameters.values()):
            if isinstance(tensor, nn.Parameter):
                shared[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
            elif isinstance(tensor, torch.Tensor):
                shared[id(tensor)] = tensor.detach()
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        shared |= {id(hook): hook for hook in hooks}  # which may hold what belongs to the caller
    return copy.deepcopy(model, shared).eval()


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
