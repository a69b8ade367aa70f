"""Image to token sequence as an implicit GEMM, forward and backward: patches are read straight from the image.

Rows are the patches of all images, the reduction runs over (channel, row, column) of a patch. Normalisation, noise and
input scaling come first, in an elementwise kernel that writes the network's input in the dtype of the product. In the
GEMM's prologue every tile of columns would repeat them, and the noise's ten rounds of integer products, forward and
backward; here they run once, and views that share a sample's noise share its drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from epg_kernels import AotCase
from epg_kernels._launch import matmul_precision, unit_stride


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
PIXELS = 1024  # per program of the elementwise kernel, and per image that it walks over
COLUMNS = 256  # of the summing kernels
BATCH_TILE = 8  # images whose gradients are loaded at a time
ROW_TILE = 16  # rows loaded at a time for the bias's gradient


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
def _of_channel(channel, values: tl.constexpr, C: tl.constexpr):
    out = tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(C):
        out = tl.where(channel == c, values[c], out)
    return out


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's bfloat16 product is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _patch_embed_fwd_kernel(
    pixels,
    weight,
    bias,
    position,
    tokens,
    rows,
    stride_pixels,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    K: tl.constexpr = C * P * P
    N: tl.constexpr = (H // P) * (W // P)
    TILES: tl.constexpr = tl.cdiv(E, BLOCK_COLUMNS)  # neighbours in time read the same pixels
    batch, patch, live = _patches(tl.program_id(0) // TILES * BLOCK_ROWS, rows, N, BLOCK_ROWS)
    first = tl.program_id(0) % TILES * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    source = pixels + batch * stride_pixels + _corner(patch, W, P)
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
    if position is not None:
        acc += tl.load(position + token[:, None] * E + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _patch_embed_prefix_kernel(
    prefix,
    position,
    tokens,
    length,
    stride_prefix_batch,
    stride_prefix_token,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < E
    source = prefix + batch * stride_prefix_batch + token * stride_prefix_token
    values = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    if position is not None:
        values += tl.load(position + token * E + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(tokens + (batch * length + token) * E + column, values.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def _box_muller(first, second):
    """Two standard normals from two words; sine and cosine without the local memory of the library's."""
    logarithm = tl.log((first.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    radius = tl.sqrt(tl.maximum(-2.0 * logarithm, 0.0))  # near 1 an approximate logarithm can be positive
    turns = second.to(tl.float32) * 2.3283064365386963e-10
    quarter = (4.0 * turns + 0.5).to(tl.int32)
    x = (turns - 0.25 * quarter.to(tl.float32)) * 6.283185307179586
    z = x * x
    sine = x + x * z * (-0.16666654611 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = quarter % 2 == 1
    sine, cosine = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    sine = tl.where(quarter % 4 >= 2, -sine, sine)
    cosine = tl.where((quarter + 1) % 4 >= 2, -cosine, cosine)
    return radius * cosine, radius * sine


@triton.jit
def _patch_embed_pixels_kernel(
    image,
    noise,
    seed,
    first_sample,
    sigma,
    c_in,
    pixels,
    batch,
    noise_batch,
    stride_image,
    stride_noise,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    FACTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    VIEWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c_in * (image * FACTOR + SHIFT + sigma * noise) of the VIEWS images that share one sample number."""
    shared = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if seed is not None:
        quad = (tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        sample = tl.load(first_sample) + shared
        zero = tl.zeros([BLOCK // 4], tl.uint32)
        low, high = zero + (sample & 0xFFFFFFFF).to(tl.uint32), zero + (sample >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(seed), quad, low, high, zero)
        n0, n1 = _box_muller(w0, w1)
        n2, n3 = _box_muller(w2, w3)
        normals = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])
    for view in range(VIEWS):
        index = (view * noise_batch + shared).to(tl.int64)
        live = index < batch
        inside = (element < C * PLANE) & live
        values = tl.load(image + index * stride_image + element, mask=inside, other=0).to(tl.float32)
        if FACTOR is not None:
            values = values * _of_channel(element // PLANE, FACTOR, C) + _of_channel(element // PLANE, SHIFT, C)
        if noise is not None:
            normals = tl.load(noise + index * stride_noise + element, mask=inside, other=0.0).to(tl.float32)
        if sigma is not None:
            values += tl.load(sigma + index, mask=live, other=0.0).to(tl.float32) * normals
        if c_in is not None:
            values *= tl.load(c_in + index, mask=live, other=0.0).to(tl.float32)
        tl.store(pixels + index * (C * PLANE) + element, values.to(pixels.dtype.element_ty), mask=inside)


@triton.jit
def _patch_embed_bwd_weight_kernel(
    dtokens,
    pixels,
    partial,
    rows,
    stride_dtokens_batch,
    stride_dtokens_token,
    stride_pixels,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
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
        row = dtokens + batch * stride_dtokens_batch + (T + patch) * stride_dtokens_token
        dy = tl.load(row[:, None] + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        row = pixels + batch * stride_pixels + _corner(patch, W, P)
        x = tl.load(row[:, None] + offset, mask=live[:, None] & (k < K)[None, :], other=0.0)
        acc = _dot(tl.trans(dy.to(x.dtype)), x, acc, PRECISION, UPCAST)
    out = (split.to(tl.int64) * E + e)[:, None] * K + k[None, :]
    tl.store(partial + out, acc, mask=(e < E)[:, None] & (k < K)[None, :])


@triton.jit
def _patch_embed_bwd_image_kernel(
    dtokens,
    weight,
    c_in,
    dimage,
    rows,
    stride_dtokens_batch,
    stride_dtokens_token,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dtokens @ weight, scattered into the image: patches do not overlap and cover it."""
    K: tl.constexpr = C * P * P
    N: tl.constexpr = (H // P) * (W // P)
    TILES: tl.constexpr = tl.cdiv(K, BLOCK_COLUMNS)
    batch, patch, live = _patches(tl.program_id(0) // TILES * BLOCK_ROWS, rows, N, BLOCK_ROWS)
    k = tl.program_id(0) % TILES * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    source = dtokens + batch * stride_dtokens_batch + (T + patch) * stride_dtokens_token
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, E, BLOCK_INNER):
        e = start + tl.arange(0, BLOCK_INNER)
        dy = tl.load(source[:, None] + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        w = tl.load(weight + e[:, None] * K + k[None, :], mask=(e < E)[:, None] & (k < K)[None, :], other=0.0)
        acc = _dot(dy.to(w.dtype), w, acc, PRECISION, UPCAST)
    if c_in is not None:
        acc *= tl.load(c_in + batch, mask=live, other=0.0).to(tl.float32)[:, None]
    if FACTOR is not None:
        acc *= _of_channel(k // (P * P), FACTOR, C)[None, :]
    out = dimage + batch * (C * H * W) + _corner(patch, W, P)
    tl.store(
        out[:, None] + _offset(k, H * W, W, P)[None, :],
        acc.to(dimage.dtype.element_ty),
        mask=live[:, None] & (k < K)[None, :],
    )


@triton.jit
def _patch_embed_bwd_sum_kernel(
    values,
    out,
    leading,
    width,
    stride_leading,
    stride_row,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row, column] = sum over the leading dimension, in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(TILES):
        index = tile * TILE + tl.arange(0, TILE)
        source = (index.to(tl.int64) * stride_leading + row * stride_row)[:, None] + column[None, :]
        inside = (index < leading)[:, None] & (column < width)[None, :]
        total += tl.load(values + source, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def patch_embed_fwd(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor | None,
    prefix: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    first_sample: torch.Tensor | None,
    noise_batch: int,
    sigma: torch.Tensor | None,
    c_in: torch.Tensor | None,
    factor: Sequence[float] | None,
    shift: Sequence[float] | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens [B, T+N, E] in `dtype` and, for the backward pass, the network's input in weight's dtype, or
    the image itself if that is its input.

    image, noise: [B, C, H, W]; weight: [E, C, p, p]; bias: [E]; position: [T+N, E]; prefix: [B, T, E]; sigma, c_in:
    [B]; seed, first_sample: one int64 each; factor, shift: one number per channel, for image * factor + shift.
    """
    extras = 0 if prefix is None else prefix.shape[1]
    dims, rows = _dimensions(image.shape, weight)
    length, width = extras + rows // image.shape[0], dims["E"]
    position = _contiguous(position)
    tokens = torch.empty((image.shape[0], length, width), dtype=dtype, device=image.device)
    with torch.cuda.device_of(image):
        pixels = _pixels(image, noise, seed, first_sample, noise_batch, sigma, c_in, factor, shift, weight.dtype)
        config = config_for(weight.dtype, matmul_precision(), rows, weight.device)
        _patch_embed_fwd_kernel[(triton.cdiv(rows, config.block_rows) * triton.cdiv(width, config.block_columns),)](
            pixels,
            weight.contiguous(),
            bias.contiguous(),
            position,
            tokens,
            rows,
            pixels.stride(0),
            T=extras,
            **dims,
            **_tiles(config, weight.dtype),
        )
        if extras:
            prefix = unit_stride(prefix)
            _patch_embed_prefix_kernel[(extras, image.shape[0], triton.cdiv(width, COLUMNS))](
                prefix, position, tokens, length, prefix.stride(0), prefix.stride(1), E=width, BLOCK=COLUMNS
            )
    return tokens, pixels


def _pixels(image, noise, seed, first_sample, noise_batch, sigma, c_in, factor, shift, dtype) -> torch.Tensor:
    image, noise, sigma, c_in = _packed(image), _packed(noise), _contiguous(sigma), _contiguous(c_in)
    if image.dtype == dtype and factor is None and sigma is None and c_in is None:
        return image
    batch, channels, height, width = image.shape
    pixels = torch.empty(image.shape, dtype=dtype, device=image.device)
    _patch_embed_pixels_kernel[(triton.cdiv(channels * height * width, PIXELS), noise_batch)](
        image,
        noise,
        seed,
        first_sample,
        sigma,
        c_in,
        pixels,
        batch,
        noise_batch,
        image.stride(0),
        0 if noise is None else noise.stride(0),
        C=channels,
        PLANE=height * width,
        FACTOR=None if factor is None else tuple(factor),
        SHIFT=None if factor is None else tuple(shift),
        VIEWS=triton.cdiv(batch, noise_batch),
        BLOCK=PIXELS,
    )
    return pixels


def patch_embed_bwd(
    dtokens: torch.Tensor,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    c_in: torch.Tensor | None,
    factor: Sequence[float] | None,
    image_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns dimage in image_dtype, dweight in weight's dtype, and in float32 dbias and dposition [T+N, E].

    needs: which of the four are wanted; the others are None, but that dbias brings dposition. dtokens: [B, T+N, E];
    pixels: what the forward pass returned; the rest as there.
    """
    needs_image, needs_weight, needs_bias, needs_position = needs
    dtokens, pixels = unit_stride(dtokens), _packed(pixels)
    batch, length, width = dtokens.shape
    dimage = dweight = dbias = dposition = None
    with torch.cuda.device_of(dtokens):
        if needs_image:
            dimage = _image_gradient(dtokens, pixels.shape, weight.contiguous(), _contiguous(c_in), factor, image_dtype)
        if needs_weight:
            dweight = _weight_gradient(dtokens, pixels, weight)
        if needs_bias or needs_position:
            dposition = torch.empty((length, width), dtype=torch.float32, device=dtokens.device)
            _sum(dtokens, dposition, batch, (dtokens.stride(0), dtokens.stride(1)), BATCH_TILE, COLUMNS)
        if needs_bias:
            patches = _dimensions(pixels.shape, weight)[1] // batch
            dbias = torch.empty((1, width), dtype=torch.float32, device=dtokens.device)
            _sum(dposition[length - patches :], dbias, patches, (width, 0), ROW_TILE, COLUMNS // 4)
            dbias = dbias[0]
    return dimage, dweight, dbias, dposition


def _image_gradient(dtokens, shape, weight, c_in, factor, dtype) -> torch.Tensor:
    dims, rows = _dimensions(shape, weight)
    config = config_for(weight.dtype, matmul_precision(), rows, weight.device)
    tiles = triton.cdiv(rows, config.block_rows) * triton.cdiv(weight[0].numel(), config.block_columns)
    dimage = torch.empty(shape, dtype=dtype, device=dtokens.device)
    _patch_embed_bwd_image_kernel[(tiles,)](
        dtokens,
        weight,
        c_in,
        dimage,
        rows,
        dtokens.stride(0),
        dtokens.stride(1),
        T=dtokens.shape[1] - rows // shape[0],
        **dims,
        FACTOR=None if factor is None else tuple(factor),
        **_tiles(config, weight.dtype),
    )
    return dimage


def _weight_gradient(dtokens, pixels, weight) -> torch.Tensor:
    dims, rows = _dimensions(pixels.shape, weight)
    width, values = weight.shape[0], weight[0].numel()
    config = config_for(weight.dtype, matmul_precision(), rows, weight.device)
    tiles = triton.cdiv(width, config.block_rows) * triton.cdiv(values, config.block_columns)
    blocks = triton.cdiv(rows, config.block_inner)
    steps = triton.cdiv(blocks, _splits(tiles))
    splits = triton.cdiv(blocks, steps)
    partial = torch.empty((splits, width, values), dtype=torch.float32, device=weight.device)
    _patch_embed_bwd_weight_kernel[(tiles, splits)](
        dtokens,
        pixels,
        partial,
        rows,
        dtokens.stride(0),
        dtokens.stride(1),
        pixels.stride(0),
        T=dtokens.shape[1] - rows // pixels.shape[0],
        **dims,
        STEPS=steps,
        **_tiles(config, weight.dtype),
    )
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _sum(partial, dweight.view(1, -1), splits, (width * values, 0), BATCH_TILE, COLUMNS)
    return dweight


def _splits(tiles: int) -> int:
    """Into how many partial sums: the fewest with the fullest last round of programs over the multiprocessors."""
    return max(range(1, MAX_SPLITS + 1), key=lambda splits: tiles * splits / triton.cdiv(tiles * splits, PROGRAMS))


def _sum(values, out, leading: int, strides: tuple[int, int], tile: int, block: int) -> None:
    """out [rows, width] = sum of `leading` slices of values; strides: of the leading dimension and of the rows."""
    rows, width = out.shape
    _patch_embed_bwd_sum_kernel[(rows, triton.cdiv(width, block))](
        values, out, leading, width, *strides, TILES=triton.cdiv(leading, tile), TILE=tile, BLOCK=block
    )


def _dimensions(shape: Sequence[int], weight: torch.Tensor) -> tuple[dict[str, int], int]:
    """What the kernels know of the sizes at compile time, and how many patches all images have."""
    batch, channels, height, width = shape
    patch = weight.shape[-1]
    dims = {"C": channels, "H": height, "W": width, "P": patch, "E": weight.shape[0]}
    return dims, batch * (height // patch) * (width // patch)


def _tiles(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_INNER": config.block_inner,
        "PRECISION": matmul_precision(),
        "UPCAST": dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _packed(image: torch.Tensor | None) -> torch.Tensor | None:
    """Each image contiguous; the batch may be expanded or sliced."""
    return image if image is None or image[0].is_contiguous() else image.contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def aot_cases() -> list[AotCase]:
    """The products at the presets' sizes and once in every configuration; the other kernels once per dtype."""
    sizes = {"E=768 p=16": (256, 16, 768), "E=1024 p=16": (256, 16, 1024), "E=768 p=32": (512, 32, 768)}
    cases = [case for name, size in sizes.items() for case in _product_cases(name, size, WIDE, "bf16")]
    name, size = next(iter(sizes.items()))
    cases += _product_cases(name, size, NARROW, "bf16")
    cases += _product_cases(name, size, TF32, "fp32", precision="tf32")
    cases += _product_cases(name, size, IEEE, "fp32")
    cases += [_pixels_case("fp32", drawn=True), _pixels_case("u8", drawn=True), _pixels_case("fp32", drawn=False)]
    return [*cases, _prefix_case(), _sum_case()]


def _product_cases(name, size, config, dtype, precision="ieee") -> list[AotCase]:
    """All three products; tokens are float32, as a float32 position embedding makes them."""
    side, patch, width = size
    tiles = _tiles(config, torch.float32) | {"PRECISION": precision}
    constexprs = {"T": 2, "C": 3, "H": side, "W": side, "P": patch, "E": width, "FACTOR": None, "STEPS": 37, **tiles}
    strides = {"stride_dtokens_batch": "i32", "stride_dtokens_token": "i32"}
    pixels, weight, dtokens = {"pixels": f"*{dtype}"}, {"weight": f"*{dtype}"}, {"dtokens": "*fp32"}
    parameters = {"bias": "*fp32", "position": "*fp32", "tokens": "*fp32"}
    signatures = {
        _patch_embed_fwd_kernel: pixels | weight | parameters | {"stride_pixels": "i32"},
        _patch_embed_bwd_weight_kernel: dtokens | pixels | {"partial": "*fp32", "stride_pixels": "i32"} | strides,
        _patch_embed_bwd_image_kernel: dtokens | weight | {"c_in": "*fp32", "dimage": "*fp32"} | strides,
    }
    return [
        AotCase(
            kernel=kernel,
            signature=signature | {"rows": "i32"},
            constexprs={name: value for name, value in constexprs.items() if name in kernel.arg_names},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            shape=f"{name} {config.block_rows}x{config.block_columns}",
            dtype=precision if dtype == "fp32" else dtype,
            gemm=dtype != "fp32",
            divisible_by_16=(*signature, "rows"),
        )
        for kernel, signature in signatures.items()
    ]


def _pixels_case(image: str, drawn: bool) -> AotCase:
    noise = {"seed": "*i64", "first_sample": "*i64"} if drawn else {"noise": "*fp32"}
    pointers = {"image": f"*{image}", **noise, "sigma": "*fp32", "c_in": "*fp32", "pixels": "*bf16"}
    counts = {"batch": "i32", "noise_batch": "i32", "stride_image": "i32", "stride_noise": "i32"}
    absent = {"noise": None} if drawn else {"seed": None, "first_sample": None}
    channel = (1.0, 1.0, 1.0) if image == "u8" else None
    return AotCase(
        kernel=_patch_embed_pixels_kernel,
        signature=pointers | counts,
        constexprs={
            "C": 3,
            "PLANE": 256**2,
            "FACTOR": channel,
            "SHIFT": channel,
            "VIEWS": 3,
            "BLOCK": PIXELS,
            **absent,
        },
        num_warps=4,
        shape=f"{image} image, {'drawn' if drawn else 'fp32'} noise",
        dtype="bf16",
        divisible_by_16=(*pointers, "stride_image", "stride_noise"),
    )


def _prefix_case() -> AotCase:
    pointers = {"prefix": "*bf16", "position": "*fp32", "tokens": "*fp32"}
    strides = {"length": "i32", "stride_prefix_batch": "i32", "stride_prefix_token": "i32"}
    return AotCase(
        kernel=_patch_embed_prefix_kernel,
        signature=pointers | strides,
        constexprs={"E": 768, "BLOCK": COLUMNS},
        num_warps=4,
        shape="E=768",
        dtype="bf16",
        vectorized=False,
        divisible_by_16=(*pointers, "stride_prefix_batch", "stride_prefix_token"),
    )


def _sum_case() -> AotCase:
    signature = {"values": "*fp32", "out": "*fp32", "width": "i32", "stride_leading": "i32", "stride_row": "i32"}
    return AotCase(
        kernel=_patch_embed_bwd_sum_kernel,
        signature=signature | {"leading": "i32"},
        constexprs={"TILES": 8, "TILE": BATCH_TILE, "BLOCK": COLUMNS},
        num_warps=4,
        shape=f"{BATCH_TILE}x{COLUMNS}",
        dtype="fp32",
        divisible_by_16=tuple(signature),
    )
