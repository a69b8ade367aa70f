"""Image to token sequence as an implicit GEMM, forward and backward: patches are read straight from the image.

Rows are the patches of all images, the reduction runs over (channel, row, column) of a patch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from epg_kernels._launch import matmul_precision


@dataclass(frozen=True)
class Config:
    block_rows: int
    block_columns: int
    block_inner: int  # of the reduction
    num_warps: int
    num_stages: int


# Wide tiles read each pixel E/256 times, all but once from the L2 cache.
WIDE = Config(128, 256, 64, 8, 3)
# Fewer patches than this leave most of an H200's 132 multiprocessors without a wide tile.
FEW_ROWS = 4096
NARROW = Config(64, 64, 64, 4, 3)
TF32 = Config(128, 128, 32, 8, 3)
IEEE = Config(64, 64, 16, 4, 2)  # no tensor cores: operands and sums live in registers

PROGRAMS = 132  # one per multiprocessor of an H200: how the weight's gradient splits its rows
MAX_SPLITS = 8  # more partial sums would cost as much traffic as the tokens


def config_for(dtype: torch.dtype, precision: str, rows: int, device: torch.device) -> Config:
    if dtype == torch.float32:
        return IEEE if precision == "ieee" else TF32
    return WIDE if rows >= FEW_ROWS and _wide_fits(device) else NARROW


def _wide_fits(device: torch.device) -> bool:
    """Three stages of wide tiles take 160 KiB of shared memory, of which consumer GPUs have 99."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024


@triton.jit
def _patches(start, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """Image, index in the image and existence of BLOCK patches, counted over all images of N patches."""
    row = start + tl.arange(0, BLOCK)
    return (row // N).to(tl.int64), row % N, row < rows


@triton.jit
def _corner(patch, W: tl.constexpr, P: tl.constexpr):
    """Where a patch starts in each channel of its image."""
    return patch // (W // P) * (P * W) + patch % (W // P) * P


@triton.jit
def _offset(k, PLANE: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Where value k of a patch, in the order (channel, row, column), lies relative to the patch's corner."""
    return k // (P * P) * PLANE + k // P % P * W + k % P


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's bfloat16 product is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _patch_embed_fwd_kernel(
    image, weight, bias, position, tokens, rows,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * P * P
    N: tl.constexpr = (H // P) * (W // P)
    TILES: tl.constexpr = tl.cdiv(E, BLOCK_COLUMNS)  # neighbours in time read the same pixels
    batch, patch, live = _patches(tl.program_id(0) // TILES * BLOCK_ROWS, rows, N, BLOCK_ROWS)
    first = tl.program_id(0) % TILES * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    source = image + batch * (C * H * W) + _corner(patch, W, P)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, K, BLOCK_INNER):
        k = start + tl.arange(0, BLOCK_INNER)
        inner = k < K
        x = tl.load(source[:, None] + _offset(k, H * W, W, P)[None, :], mask=live[:, None] & inner[None, :], other=0.0)
        w = tl.load(weight + column[None, :] * K + k[:, None], mask=(column < E)[None, :] & inner[:, None], other=0.0)
        acc = _dot(x, w, acc, PRECISION, UPCAST)

    # Half a tile at a time: the position embedding of a whole one would not fit into registers beside the sums.
    HALF: tl.constexpr = BLOCK_COLUMNS // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_ROWS, 2, HALF]), [0, 2, 1]))
    out = tokens + batch * ((T + N) * E) + (T + patch) * E
    column = first + tl.arange(0, HALF)
    _add_and_store(left, out, bias, position, T + patch, column, live, E)
    _add_and_store(right, out, bias, position, T + patch, column + HALF, live, E)


@triton.jit
def _add_and_store(acc, out, bias, position, token, column, live, E: tl.constexpr):
    inside = live[:, None] & (column < E)[None, :]
    acc += tl.load(bias + column, mask=column < E, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(position + token[:, None] * E + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _patch_embed_bwd_weight_kernel(
    dtokens, image, partial, rows,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dtokens^T @ patches over STEPS * BLOCK_INNER patches: one partial sum of the weight's gradient [E, K]."""
    K: tl.constexpr = C * P * P
    N: tl.constexpr = (H // P) * (W // P)
    TILES: tl.constexpr = tl.cdiv(K, BLOCK_COLUMNS)
    split = tl.program_id(1)
    e = tl.program_id(0) // TILES * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(0) % TILES * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offset = _offset(k, H * W, W, P)[None, :]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for step in range(STEPS):
        batch, patch, live = _patches((split * STEPS + step) * BLOCK_INNER, rows, N, BLOCK_INNER)
        row = dtokens + batch * ((T + N) * E) + (T + patch) * E
        dy = tl.load(row[:, None] + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        row = image + batch * (C * H * W) + _corner(patch, W, P)
        x = tl.load(row[:, None] + offset, mask=live[:, None] & (k < K)[None, :], other=0.0)
        acc = _dot(tl.trans(dy.to(x.dtype)), x, acc, PRECISION, UPCAST)
    out = (split.to(tl.int64) * E + e)[:, None] * K + k[None, :]
    tl.store(partial + out, acc, mask=(e < E)[:, None] & (k < K)[None, :])


@triton.jit
def _patch_embed_bwd_image_kernel(
    dtokens, weight, dimage, rows,
    T: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dtokens @ weight, scattered into the image: patches do not overlap and cover it."""
    K: tl.constexpr = C * P * P
    N: tl.constexpr = (H // P) * (W // P)
    TILES: tl.constexpr = tl.cdiv(K, BLOCK_COLUMNS)
    batch, patch, live = _patches(tl.program_id(0) // TILES * BLOCK_ROWS, rows, N, BLOCK_ROWS)
    k = tl.program_id(0) % TILES * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    source = dtokens + batch * ((T + N) * E) + (T + patch) * E
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, E, BLOCK_INNER):
        e = start + tl.arange(0, BLOCK_INNER)
        dy = tl.load(source[:, None] + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        w = tl.load(weight + e[:, None] * K + k[None, :], mask=(e < E)[:, None] & (k < K)[None, :], other=0.0)
        acc = _dot(dy.to(w.dtype), w, acc, PRECISION, UPCAST)
    out = dimage + batch * (C * H * W) + _corner(patch, W, P)
    tl.store(
        out[:, None] + _offset(k, H * W, W, P)[None, :],
        acc.to(dimage.dtype.element_ty),
        mask=live[:, None] & (k < K)[None, :],
    )


def patch_embed_fwd(image, weight, bias, position, prefix) -> torch.Tensor:
    """The tokens; weight is rounded to image's dtype."""
    rows, config, constants = _constants(image, weight, position.shape[1])
    tiles = triton.cdiv(rows, config.block_rows) * triton.cdiv(weight.shape[0], config.block_columns)
    dtype = torch.promote_types(torch.promote_types(image.dtype, prefix.dtype), position.dtype)
    tokens = torch.empty((image.shape[0], *position.shape[1:]), dtype=dtype, device=image.device)
    tensors = (image, weight.to(image.dtype), bias, position)
    image, weight, bias, position = (tensor.contiguous() for tensor in tensors)
    with torch.cuda.device_of(image):
        _patch_embed_fwd_kernel[(tiles,)](image, weight, bias, position, tokens, rows, **constants)
    extras = prefix.shape[1]
    torch.add(prefix, position[:, :extras], out=tokens[:, :extras])
    return tokens


def patch_embed_bwd(
    dtokens, image, weight, need_image: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of image and weight, None where not needed."""
    dtokens, image, weight = (tensor.contiguous() for tensor in (dtokens, image, weight))
    with torch.cuda.device_of(image):
        return (
            _image_gradient(dtokens, image, weight) if need_image else None,
            _weight_gradient(dtokens, image, weight) if need_weight else None,
        )


def _image_gradient(dtokens, image, weight) -> torch.Tensor:
    rows, config, constants = _constants(image, weight, dtokens.shape[1])
    tiles = triton.cdiv(rows, config.block_rows) * triton.cdiv(weight[0].numel(), config.block_columns)
    dimage = image.new_empty(image.shape)
    _patch_embed_bwd_image_kernel[(tiles,)](dtokens, weight.to(image.dtype), dimage, rows, **constants)
    return dimage


def _weight_gradient(dtokens, image, weight) -> torch.Tensor:
    rows, config, constants = _constants(image, weight, dtokens.shape[1])
    tiles = triton.cdiv(weight.shape[0], config.block_rows) * triton.cdiv(weight[0].numel(), config.block_columns)
    blocks = triton.cdiv(rows, config.block_inner)
    steps = triton.cdiv(blocks, _splits(tiles))
    splits = triton.cdiv(blocks, steps)
    partial = torch.empty((splits, *weight.shape), dtype=torch.float32, device=weight.device)
    _patch_embed_bwd_weight_kernel[(tiles, splits)](dtokens, image, partial, rows, STEPS=steps, **constants)
    return partial.sum(0).to(weight.dtype)


def _splits(tiles: int) -> int:
    """Into how many partial sums: the fewest with the fullest last round of programs over the multiprocessors."""
    return max(range(1, MAX_SPLITS + 1), key=lambda splits: tiles * splits / triton.cdiv(tiles * splits, PROGRAMS))


def _constants(image: torch.Tensor, weight: torch.Tensor, length: int) -> tuple[int, Config, dict[str, Any]]:
    """How many patches all images have, the tiles for them, and what the kernels know at compile time."""
    batch, channels, height, width = image.shape
    patch = weight.shape[-1]
    patches = (height // patch) * (width // patch)
    precision = matmul_precision()
    config = config_for(image.dtype, precision, batch * patches, image.device)
    constants = {"T": length - patches, "C": channels, "H": height, "W": width, "P": patch, "E": weight.shape[0]}
    constants |= {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
    constants |= {"BLOCK_INNER": config.block_inner, "PRECISION": precision}
    constants |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    constants["UPCAST"] = image.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return batch * patches, config, constants
