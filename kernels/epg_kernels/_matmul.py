"""The matrix product of `linear_gelu` and `skip_linear`: epilogue(concat[x, skip] @ weight^T + bias).

One program computes one tile of the result, in an order that keeps what neighbours share in the L2 cache. The K loop
reads x and then skip, so the concatenation is never stored. Where the GPU has TMA and rows start at multiples of 16
bytes, operands come through it, and it pads ragged edges with zeros by itself; otherwise through masked pointers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from epg_kernels import AotCase
from epg_kernels._launch import matmul_precision


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool


# Two programs fit on a multiprocessor (96 KB of shared memory, 181 registers at most): the tensor cores work on one's
# tile while the other's epilogue runs. 128 x 256 tiles would read a quarter less from the L2 cache, but run alone.
BY_TMA = Config(128, 128, 64, num_warps=4, num_stages=3, tma=True)
BY_TMA_TF32 = Config(128, 128, 32, num_warps=4, num_stages=3, tma=True)
BY_POINTERS = Config(128, 128, 32, num_warps=8, num_stages=4, tma=False)
BY_POINTERS_TF32 = Config(128, 128, 32, num_warps=8, num_stages=3, tma=False)
IEEE = Config(128, 64, 16, num_warps=8, num_stages=2, tma=False)  # no tensor cores: operands live in registers

GROUP_M = 8  # rows of tiles whose programs follow each other column by column: they share weight in the L2 cache


def config_for(dtype: torch.dtype, precision: str, tma: bool) -> Config:
    if dtype != torch.float32:
        return BY_TMA if tma else BY_POINTERS
    if precision == "ieee":
        return IEEE
    return BY_TMA_TF32 if tma else BY_POINTERS_TF32


@triton.jit
def gaussian_tail(u, EXACT: tl.constexpr):
    """1 - Phi(u) for u >= 0; unless EXACT to a relative error of 1.5e-5 up to u = 7, where it is 1e-12."""
    if EXACT:
        tail = 0.5 - 0.5 * tl.erf(u * 0.7071067811865476)
    else:
        # A polynomial for its logarithm: a third of erf's instructions, and float16 rounds sixteen times as coarsely.
        p = -1.59717368e-06 * u + 5.63956733e-05
        p = p * u - 8.85859230e-04
        p = p * u + 8.31808749e-03
        p = p * u - 5.35469396e-02
        p = p * u - 4.58890226e-01
        p = p * u - 1.15109186e00
        tail = tl.exp2(p * u - 1.0)
    return tail


@triton.jit
def gelu(z, EXACT: tl.constexpr):
    """z Phi(z) = max(z, 0) - |z| (1 - Phi(|z|))."""
    u = tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)  # infinity times zero would be NaN
    return tl.maximum(z, 0.0) - u * gaussian_tail(u, EXACT)


@triton.jit
def _tile(source, row, column, stride, rows, columns, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """source[row : row + BLOCK_R, column : column + BLOCK_C], zeros beyond its edges."""
    if TMA:
        values = source.load([row, column])
    else:
        r, c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        values = tl.load(source + r[:, None].to(tl.int64) * stride + c[None, :], mask=mask, other=0.0)
    return values


@triton.jit
def _epilogue(
    acc,
    bias,
    y,
    z,
    row,
    column,
    M,
    N: tl.constexpr,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = y.dtype if TMA else y.dtype.element_ty
    columns = column + tl.arange(0, BLOCK_N)
    acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    out = acc
    if GELU:
        out = gelu(acc, dtype == tl.float32)
    if TMA:
        if z is not None:
            z.store([row, column], acc.to(dtype))
        y.store([row, column], out.to(dtype))
    else:
        rows = row + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
        if z is not None:
            tl.store(z + offsets, acc.to(dtype), mask=mask)
        tl.store(y + offsets, out.to(dtype), mask=mask)


@triton.jit
def _linear_fwd_kernel(
    x,
    skip,
    weight,
    bias,
    y,
    z,
    M,
    stride_x,
    stride_skip,
    stride_weight,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x [M, D] and skip [M, E] (None: E = 0), weight [N, D + E], y and z [M, N]: descriptors if TMA, else pointers."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS_X: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = STEPS_X + (E + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    first_m = tile // (GROUP_M * TILES_N) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    row = (first_m + tile % (GROUP_M * TILES_N) % group_m) * BLOCK_M
    column = tile % (GROUP_M * TILES_N) // group_m * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        source, stride, width = x, stride_x, D
        k = step * BLOCK_K
        k_weight = k
        # A choice of operands, not a second loop: loads stay ahead of products across the seam.
        if skip is not None:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
            if step >= STEPS_X:
                source, stride, width = skip, stride_skip, E
                k = (step - STEPS_X) * BLOCK_K
                k_weight = D + k
        a = _tile(source, row, k, stride, M, width, TMA, BLOCK_M, BLOCK_K)
        # Past x's last column, where the last step on x reads skip's columns of weight, a is zero.
        b = _tile(weight, column, k_weight, stride_weight, N, D + E, TMA, BLOCK_N, BLOCK_K)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    # In halves: half the shared memory and registers at a time.
    left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    _epilogue(left, bias, y, z, row, column, M, N, GELU, TMA, BLOCK_M, BLOCK_N // 2)
    _epilogue(right, bias, y, z, row, column + BLOCK_N // 2, M, N, GELU, TMA, BLOCK_M, BLOCK_N // 2)


def linear(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gelu: bool = False,
    save_preactivation: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns y = concat[x, skip] @ weight^T + bias, through GELU if `gelu`, and what entered it if that is saved.

    x: [..., D]; skip: [..., E] or None; weight: [N, D + E], all in one dtype; bias: [N]. Returns [..., N] in x's dtype.
    """
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if save_preactivation else None
    x, skip, weight = rows_of(x), rows_of(skip), rows_of(weight)
    matrices = (x, skip, weight, rows_of(y), rows_of(z))
    precision = matmul_precision()
    config = config_for(x.dtype, precision, _tma_reaches(*matrices))
    blocks = _blocks(config)
    if config.tma:
        matrices = [_descriptor(matrix, block) for matrix, block in zip(matrices, blocks, strict=True)]
    columns = weight.shape[0]
    with torch.cuda.device_of(x):
        _linear_fwd_kernel[(triton.cdiv(x.shape[0], config.block_m) * triton.cdiv(columns, config.block_n),)](
            *matrices[:3],
            bias.contiguous(),
            *matrices[3:],
            x.shape[0],
            x.stride(0),
            0 if skip is None else skip.stride(0),
            weight.stride(0),
            D=x.shape[1],
            E=0 if skip is None else skip.shape[1],
            **_constexprs(config, columns, gelu, precision),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y, z


def rows_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """[..., N] as [M, N] with unit stride in rows; copied only if it must be."""
    if tensor is None:
        return None
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _tma_reaches(*matrices: torch.Tensor | None) -> bool:
    """TMA came with Hopper; it reads and writes rows that start at multiples of 16 bytes and do not overlap."""
    present = [matrix for matrix in matrices if matrix is not None]
    device = present[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(
        matrix.numel() > 0
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.itemsize % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        for matrix in present
    )


def _descriptor(matrix: torch.Tensor | None, block: list[int]) -> TensorDescriptor | None:
    return None if matrix is None else TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block)


def _blocks(config: Config) -> list[list[int]]:
    """Blocks of x, skip, weight, y and z."""
    operand, result = [config.block_m, config.block_k], [config.block_m, config.block_n // 2]
    return [operand, operand, [config.block_n, config.block_k], result, result]


def _constexprs(config: Config, columns: int, gelu: bool, precision: str) -> dict:
    return {
        "N": columns,
        "GELU": gelu,
        "TMA": config.tma,
        "PRECISION": precision,
        "UPCAST": triton.knobs.runtime.interpret,  # the interpreter cannot multiply bfloat16
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
    }


def linear_case(
    config: Config,
    columns: int,
    x_width: int,
    skip_width: int,
    dtype: str,
    gelu: bool,
    save_preactivation: bool = False,
    precision: str = "tf32",
) -> AotCase:
    matrices = ["x", "weight", "y"] + ["skip"] * (skip_width > 0) + ["z"] * save_preactivation
    blocks = dict(zip(("x", "skip", "weight", "y", "z"), _blocks(config), strict=True))
    pointers = {"bias": "*fp32"}
    for name in matrices:
        rows, width = blocks[name]
        pointers[name] = f"tensordesc<{dtype}[{rows},{width}]>" if config.tma else f"*{dtype}"
    constexprs = {"D": x_width, "E": skip_width} | _constexprs(config, columns, gelu, precision) | {"UPCAST": False}
    absent = {name: None for name in ("skip", "z") if name not in matrices}
    strides = ("stride_x", "stride_skip", "stride_weight")
    path = "TMA" if config.tma else "pointers" if precision == "tf32" else "ieee"
    saved = " saving z" if save_preactivation else ""
    widths = f"{x_width}+{skip_width}" if skip_width else x_width
    return AotCase(
        kernel=_linear_fwd_kernel,
        signature=pointers | dict.fromkeys(("M", *strides), "i32"),
        constexprs=constexprs | absent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        shape=f"K={widths} N={columns} {path}{saved}",
        dtype=dtype,
        gemm=dtype != "fp32" or precision == "tf32",
        archs=(90, 100) if config.tma else (80, 90, 100),
        divisible_by_16=(*(name for name, kind in pointers.items() if kind.startswith("*")), *strides),
    )
