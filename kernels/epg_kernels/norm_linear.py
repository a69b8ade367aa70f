"""A linear layer of a norm, which its product computes as it loads; the product's cases stand beside it."""

import torch

from epg_kernels._matmul import Norm, linear


def norm_linear_fwd(
    x, statistics, norm_weight, norm_bias, weight, bias, shift, scale, eps: float, gelu: bool
) -> torch.Tensor:
    """act(norm(x) @ weight^T + bias), in weight's dtype."""
    norm = Norm(statistics.contiguous(), norm_weight, norm_bias, shift, scale, eps)
    return linear(x, None, weight, bias, gelu=gelu, tokens=x.shape[1], norm=norm, dependent=True)[0]
