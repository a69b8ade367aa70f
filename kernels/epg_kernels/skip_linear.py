"""Linear layer over a long skip connection, and the LayerNorm after it; its backward pass."""

import torch

from epg_kernels import AotCase
from epg_kernels._column_sums import column_sums, first_stage_case, second_stage_case
from epg_kernels._matmul import BY_POINTERS, BY_POINTERS_TF32, BY_TMA, BY_TMA_TF32, IEEE, linear, linear_case, rows_of
from epg_kernels.layer_norm_modulate import layer_norm_modulate_bwd, layer_norm_modulate_fwd


def skip_linear_fwd(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns y [B, L, N] and, for the backward pass of the norm, z [B, L, N], mean and rstd [B, L] (None without it).

    x: [B, L, D], skip: [B, L, E], weight: [N, D + E], all in one dtype; bias, norm_weight, norm_bias: [N].
    """
    z, _ = linear(x, skip, weight, bias)
    if norm_weight is None:
        return z, None, None, None
    y, mean, rstd = layer_norm_modulate_fwd(z, norm_weight, norm_bias, None, None, eps)
    return y, z, mean, rstd


def skip_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    z: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    need_x: bool,
    need_skip: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Returns dx, dskip, dweight, dbias (None where not needed), dnorm_weight, dnorm_bias (None without the norm)."""
    dnorm_weight = dnorm_bias = None
    dz = dy
    if norm_weight is not None:
        dz, dnorm_weight, dnorm_bias, _, _ = layer_norm_modulate_bwd(
            dy, z, norm_weight, norm_bias, None, None, mean, rstd
        )
    dz, split = rows_of(dz), x.shape[-1]
    # Nothing is left to fuse into these products, and cuBLAS sets their ceiling.
    dx = torch.mm(dz, weight[:, :split]).view(x.shape) if need_x else None
    dskip = torch.mm(dz, weight[:, split:]).view(skip.shape) if need_skip else None
    dweight = None
    if need_weight:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        torch.mm(dz.t(), rows_of(x), out=dweight[:, :split])
        torch.mm(dz.t(), rows_of(skip), out=dweight[:, split:])
    dbias = column_sums(dz, bias.dtype) if need_bias else None
    return dx, dskip, dweight, dbias, dnorm_weight, dnorm_bias


def aot_cases() -> list[AotCase]:
    """The presets' widths through TMA; one width of every other configuration."""
    presets = ((768, 768), (1024, 1024), (1584, 768), (1920, 768), (2688, 768))
    cases = [linear_case(BY_TMA, width, width, skip, "bf16", gelu=False) for width, skip in presets]
    return [
        *cases,
        linear_case(BY_TMA_TF32, 1584, 1584, 768, "fp32", gelu=False),
        linear_case(BY_POINTERS, 1584, 1584, 768, "bf16", gelu=False),
        linear_case(BY_POINTERS_TF32, 1584, 1584, 768, "fp32", gelu=False),
        linear_case(IEEE, 1584, 1584, 768, "fp32", gelu=False, precision="ieee"),
        first_stage_case(1584, "bf16"),
        second_stage_case(1584),
    ]
