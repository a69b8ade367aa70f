"""Squared error between a network's output in patch space and images, so that training never unpatchifies.

    r = scale * tokens + offset_scale * patchify(offset) - patchify(target)         each term and factor only if given
    d = sum of r^2 over an image
    loss = weight * d / (C H W)                              without huber_c: the weighted mean squared error
    loss = weight * d / sqrt(stopgrad(d) + huber_c^2)        with it: the pseudo-Huber weighting of SPEC 6

Source: SPEC 2, 5 and 6; Song & Dhariwal, "Improved Techniques for Training Consistency Models" (2023), for the Huber
constant. Denoising takes scale=None; the edm parameterisation scale=c_out, offset=x_sigma, offset_scale=c_skip.

Dtypes: any floating dtypes, mixed freely. Arithmetic and both results are float32 (float64 for float64 tokens).
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients.

Only tokens get a gradient: dtokens = 2 scale r dloss weight / (C H W), or / sqrt(d + huber_c^2).
"""

import math

import torch

from epg_fast.ops.backends import (
    accumulation_dtype,
    check_backend,
    require_triton,
)
from epg_fast.ops.checks import check_floating, check_shapes
from epg_fast.ops.registration import Backward, operation
from epg_fast.ops.spec import OpSpec


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, N, p*p*C]: patches in row-major order, features in the order (row, column, channel).

    The inverse of EPGViT.unpatchify. Raises ValueError if H or W is not a multiple of p.
    """
    batch, channels, height, width = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patchify: got an image of {height} x {width}, wanted multiples of the patch size {patch_size}; crop it "
            f"to {height // patch_size * patch_size} x {width // patch_size * patch_size}"
        )
    rows, columns = height // patch_size, width // patch_size
    x = image.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def patch_loss_ref(
    tokens, target, *, scale=None, offset=None, offset_scale=None, weight=None, huber_c=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`patch_loss` in plain PyTorch."""
    return _forward(tokens, target, scale, offset, offset_scale, weight, huber_c)


def _residual(tokens, target, scale, offset, offset_scale) -> torch.Tensor:
    acc_dtype = accumulation_dtype(tokens)
    residual = tokens.to(acc_dtype)
    if scale is not None:
        residual = _per_image(scale, acc_dtype) * residual
    if offset is not None:
        shift = _as_tokens(offset, tokens).to(acc_dtype)
        residual = residual + (shift if offset_scale is None else _per_image(offset_scale, acc_dtype) * shift)
    return residual - _as_tokens(target, tokens).to(acc_dtype)


def _as_tokens(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 3 else patchify(x, math.isqrt(tokens.shape[2] // x.shape[1]))


def _per_image(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).view(-1, 1, 1)


def _factor(squared_error, weight, huber_c, size: int) -> torch.Tensor | float:
    factor = 1 / size if huber_c is None else (squared_error + huber_c**2).rsqrt()
    return factor if weight is None else weight.to(squared_error.dtype) * factor


def _forward(tokens, target, scale, offset, offset_scale, weight, huber_c: float | None):
    residual = _residual(tokens, target, scale, offset, offset_scale)
    squared_error = residual.square().flatten(1).sum(1)
    factor = _factor(squared_error.detach(), weight, huber_c, residual.shape[1:].numel())
    return squared_error * factor, squared_error.detach()


def _backward(
    dloss, squared_error, tokens, target, scale, offset, offset_scale, weight, huber_c: float | None
) -> torch.Tensor:
    residual = _residual(tokens, target, scale, offset, offset_scale)
    factor = 2 * dloss * _factor(squared_error, weight, huber_c, residual.shape[1:].numel())
    factor = factor if scale is None else factor * scale.to(factor.dtype)
    return (_per_image(factor, factor.dtype) * residual).to(tokens.dtype)


_operation = operation(
    "patch_loss",
    _forward,
    "epg_kernels.patch_loss:patch_loss_fwd",
    "loss squared_error",
    Backward(_backward, "epg_kernels.patch_loss:patch_loss_bwd", "tokens"),
)


def patch_loss(
    tokens: torch.Tensor,
    target: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    offset_scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    huber_c: float | None = None,
    backend: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [B], squared_error [B]) of `scale * tokens + offset_scale * offset` against target, in patch space.

    tokens: [B, N, p*p*C], features in the order (row, column, channel); target: [B, C, H, W] or tokens' shape; offset:
    [B, C, H, W]; scale, offset_scale, weight: [B]. huber_c: positive, for the pseudo-Huber weighting, else the weighted
    mean. squared_error is the unweighted sum and carries no gradient; both are float32, float64 for float64 tokens.
    backend: "plain" (plain PyTorch, which torch.compile fuses), "triton" (the hand-written kernels).
    Raises ValueError for shapes that do not fit, for a gradient wanted of anything but tokens, and for a backend that
    cannot run here.
    """
    check_backend("patch_loss", backend, ("plain", "triton"))
    tensors = {"target": target, "scale": scale, "offset": offset, "offset_scale": offset_scale, "weight": weight}
    _check_shapes(tokens, **tensors)
    _check_gradients(**tensors)
    if huber_c is not None and not huber_c > 0:
        raise ValueError(f"patch_loss: got huber_c={huber_c}, wanted a positive number, or None for the mean")
    if backend != "triton":
        return patch_loss_ref(tokens, **tensors, huber_c=huber_c)
    require_triton("patch_loss", batched=True, tokens=tokens, **tensors)
    return _operation(tokens, target, scale, offset, offset_scale, weight, huber_c)


def _check_shapes(tokens, target, scale, offset, offset_scale, weight) -> None:
    if tokens.dim() != 3:
        raise ValueError(f"patch_loss: got tokens of shape {tuple(tokens.shape)}, wanted [B, N, p*p*C]")
    if target.dim() == 3 and target.shape != tokens.shape:
        raise ValueError(
            f"patch_loss: got target of shape {tuple(target.shape)}, wanted {list(tokens.shape)} like tokens, or "
            "an image [B, C, H, W]"
        )
    if target.dim() != 3:
        _check_image("target", target, tokens)
    if offset is not None:
        _check_image("offset", offset, tokens)
    if target.dim() == 4 and offset is not None and offset.shape != target.shape:
        raise ValueError(
            f"patch_loss: got offset of shape {tuple(offset.shape)}, wanted target's {tuple(target.shape)}"
        )
    if offset is None and offset_scale is not None:
        raise ValueError("patch_loss: got offset_scale without offset, wanted both, or neither")
    each = {"scale": scale, "offset_scale": offset_scale, "weight": weight}
    wanted = {name: (values, "B", ", one per image") for name, values in each.items()}
    check_shapes("patch_loss", {"B": tokens.shape[0]}, **wanted)


def _check_image(name: str, image: torch.Tensor, tokens: torch.Tensor) -> None:
    batch, patches, values = tokens.shape
    if image.dim() == 4 and image.shape[0] == batch:
        _, channels, height, width = image.shape
        patch = math.isqrt(int(values // channels)) if channels else 0
        fits = patch > 0 and patch**2 * channels == values and height % patch == 0 and width % patch == 0
        if fits and (height // patch) * (width // patch) == patches:
            return
    raise ValueError(
        f"patch_loss: got {name} of shape {tuple(image.shape)}, wanted [{batch}, C, H, W] that cuts into {patches} "
        f"patches of p * p * C = {values} values, like tokens"
    )


def _check_gradients(**tensors: torch.Tensor | None) -> None:
    check_floating("patch_loss", **tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"patch_loss: got {name} that requires a gradient, wanted it of tokens alone; detach() {name}"
            )


def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """Tokens and a float32 target are read, in the backward pass once more, which writes the tokens' gradient."""
    batch, channels, size, _ = shape
    pixels = batch * channels * size**2
    return pixels * ((2 if backward else 1) * itemsize + 4) + 2 * batch * 4


SPEC = OpSpec(
    name="patch_loss",
    shapes=((64, 3, 256, 16), (64, 3, 512, 32)),
    odd_shapes=((3, 3, 8, 4), (1, 1, 6, 3), (2, 3, 28, 14), (1, 1, 160, 16)),
    bytes=_bytes,
)
