"""Squared error between tokens in patch space and images, forward and backward.

One row is one line of pixels of a patch: P * C values, contiguous in the tokens in the order (column, channel), and C
runs of P pixels in an image. Both are read along their own runs; a gather within the row, by shuffles in a warp, brings
the pixels into the tokens' order. Each program sums its rows; a second kernel adds up an image's sums in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from epg_kernels._launch import strides, unit_stride

VALUES = 4096  # loaded at a time by the four warps of a program: four 16-byte accesses of bf16 per lane
STEPS = 4  # such tiles per program: at batch 64 there are then 8 programs or more per multiprocessor of an H200


@triton.jit
def _residual(
    tokens, target, scale, offset, offset_scale, batch, row,
    stride_tokens_batch, stride_tokens_token, stride_target_batch, stride_target_token, stride_offset,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, TARGET_IS_IMAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Residual [ROWS, BLOCK], where each of its values lies, in tokens of K = P * P * C values, and whether it exists.

    Rows are counted over (row of patches, line in the patch, patch in the row): line by line in an image.
    """
    GRID: tl.constexpr = W // P
    value = tl.arange(0, BLOCK)
    inside = (row < H * GRID)[:, None] & (value < P * C)[None, :]
    patch = row // (P * GRID) * GRID + row % GRID
    line = (row // GRID % P * (P * C))[:, None] + value[None, :]
    source = tokens + batch * stride_tokens_batch + patch[:, None] * stride_tokens_token
    residual = tl.load(source + line, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        residual *= tl.load(scale + batch).to(tl.float32)

    pixel = (row * P)[:, None] + (value // P * (H * W) + value % P)[None, :]
    pixels = tl.zeros([ROWS, BLOCK], tl.float32)
    if offset is not None:
        pixels = tl.load(offset + batch * stride_offset + pixel, mask=inside, other=0.0).to(tl.float32)
        if offset_scale is not None:
            pixels *= tl.load(offset_scale + batch).to(tl.float32)
    if TARGET_IS_IMAGE:
        pixels -= tl.load(target + batch * stride_target_batch + pixel, mask=inside, other=0.0).to(tl.float32)
    else:
        source = target + batch * stride_target_batch + patch[:, None] * stride_target_token
        residual -= tl.load(source + line, mask=inside, other=0.0).to(tl.float32)
    if TARGET_IS_IMAGE or offset is not None:
        order = tl.broadcast_to((value % C * P + value // C)[None, :], [ROWS, BLOCK])
        residual += tl.gather(pixels, order, 1)
    return residual, patch[:, None] * (P * P * C) + line, inside


@triton.jit
def _patch_loss_fwd_kernel(
    tokens, target, scale, offset, offset_scale, partial,
    stride_tokens_batch, stride_tokens_token, stride_target_batch, stride_target_token, stride_offset,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, TARGET_IS_IMAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        residual, _, inside = _residual(
            tokens, target, scale, offset, offset_scale, batch, row,
            stride_tokens_batch, stride_tokens_token, stride_target_batch, stride_target_token, stride_offset,
            C, H, W, P, TARGET_IS_IMAGE, ROWS, BLOCK,
        )  # fmt: skip
        total += tl.where(inside, residual * residual, 0.0)
    tl.store(partial + batch * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


@triton.jit
def _factor(squared_error, weight, batch, SIZE: tl.constexpr, HUBER: tl.constexpr):
    """What the squared error of one image is multiplied with: weight over the number of values or the Huber norm."""
    factor = 1.0 / SIZE if HUBER is None else 1.0 / tl.sqrt_rn(squared_error + HUBER * HUBER)
    return factor if weight is None else factor * tl.load(weight + batch).to(tl.float32)


@triton.jit
def _patch_loss_fwd_sum_kernel(
    partial, weight, loss, squared_error, chunks,
    SIZE: tl.constexpr, HUBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partial + batch * chunks + chunk, mask=chunk < chunks, other=0.0))
    tl.store(squared_error + batch, total)
    tl.store(loss + batch, total * _factor(total, weight, batch, SIZE, HUBER))


@triton.jit
def _patch_loss_bwd_kernel(
    dloss, squared_error, weight, tokens, target, scale, offset, offset_scale, dtokens,
    stride_tokens_batch, stride_tokens_token, stride_target_batch, stride_target_token, stride_offset,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, HUBER: tl.constexpr,
    TARGET_IS_IMAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    factor = 2.0 * tl.load(dloss + batch) * _factor(tl.load(squared_error + batch), weight, batch, SIZE, HUBER)
    if scale is not None:
        factor *= tl.load(scale + batch).to(tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        residual, place, inside = _residual(
            tokens, target, scale, offset, offset_scale, batch, row,
            stride_tokens_batch, stride_tokens_token, stride_target_batch, stride_target_token, stride_offset,
            C, H, W, P, TARGET_IS_IMAGE, ROWS, BLOCK,
        )  # fmt: skip
        gradient = (factor * residual).to(dtokens.dtype.element_ty)
        tl.store(dtokens + batch * (C * H * W) + place, gradient, mask=inside)


class _Launch(NamedTuple):
    """What both passes need to run over the rows."""

    tensors: tuple[torch.Tensor | None, ...]  # tokens, target, scale, offset, offset_scale
    strides: tuple[int, ...]
    constexprs: dict[str, Any]
    size: int  # values per image
    grid: tuple[int, int]


def _launch(tokens, target, scale, offset, offset_scale) -> _Launch:
    tokens, offset = unit_stride(tokens), _packed(offset)
    target = _packed(target) if target.dim() == 4 else unit_stride(target)
    image = offset if offset is not None else target
    # Without an image any layout will do: each token is one line of one patch.
    _, channels, height, width = image.shape if image.dim() == 4 else (0, tokens.shape[2], 1, tokens.shape[1])
    patch = 1 if image.dim() == 3 else round((tokens.shape[2] // channels) ** 0.5)
    block, lines = triton.next_power_of_2(patch * channels), height * (width // patch)
    rows = min(max(1, VALUES // block), triton.next_power_of_2(lines))
    constexprs = {"C": channels, "H": height, "W": width, "P": patch, "TARGET_IS_IMAGE": target.dim() == 4}
    return _Launch(
        tensors=(tokens, target, _contiguous(scale), offset, _contiguous(offset_scale)),
        strides=(*tokens.stride()[:2], *target.stride()[:2], *strides(offset)),
        constexprs=constexprs | {"ROWS": rows, "BLOCK": block, "STEPS": STEPS},
        size=channels * height * width,
        grid=(triton.cdiv(lines, rows * STEPS), tokens.shape[0]),
    )


def patch_loss_fwd(
    tokens, target, scale, offset, offset_scale, weight, huber_c: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, squared error) of each image, [B] in float32."""
    launch = _launch(tokens, target, scale, offset, offset_scale)
    chunks, batch = launch.grid
    partial, loss, squared_error = (
        torch.empty(shape, dtype=torch.float32, device=tokens.device) for shape in ((batch, chunks), (batch,), (batch,))
    )
    with torch.cuda.device_of(tokens):
        _patch_loss_fwd_kernel[launch.grid](*launch.tensors, partial, *launch.strides, **launch.constexprs)
        _patch_loss_fwd_sum_kernel[(batch,)](
            partial, _contiguous(weight), loss, squared_error, chunks,
            SIZE=launch.size, HUBER=huber_c, BLOCK=triton.next_power_of_2(chunks),
        )  # fmt: skip
    return loss, squared_error


def patch_loss_bwd(
    dloss, squared_error, tokens, target, scale, offset, offset_scale, weight, huber_c: float | None
) -> torch.Tensor:
    """dtokens in tokens' dtype."""
    launch = _launch(tokens, target, scale, offset, offset_scale)
    dtokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _patch_loss_bwd_kernel[launch.grid](
            dloss.contiguous(), squared_error, _contiguous(weight), *launch.tensors, dtokens, *launch.strides,
            SIZE=launch.size, HUBER=huber_c, **launch.constexprs,
        )  # fmt: skip
    return dtokens


def _packed(image: torch.Tensor | None) -> torch.Tensor | None:
    """Each image contiguous; the batch may be expanded or sliced."""
    return image if image is None or image[0].is_contiguous() else image.contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
