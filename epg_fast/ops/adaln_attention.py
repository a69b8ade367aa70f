"""The attention half of a decoder block, gated residual included.

    h = LayerNorm(x) * (1 + scale) + shift
    h = attention(h qkv_weight^T + qkv_bias) proj_weight^T + proj_bias
    x_out = x + gate * h

and, as the next half-block begins with a norm of x_out, that norm with its modulation in the same pass if it is wanted.
Built from `layer_norm_modulate`, `attention` and `gate_residual_norm_modulate`; the projections are matrix products of
cuBLAS, whose operands the norms write in the dtype of the product.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero blocks.

Shapes: x: [B, L, D]; shift, scale, gate: [B, D] or [B, 1, D]; norm_weight, norm_bias: [D]; qkv_weight: [3D, D], rows in
the order q, k, v, each head by head; qkv_bias: [3D] or None; proj_weight: [D, D]; proj_bias: [D].
Dtypes: as in the three operations; under autocast the products and the attention run in its dtype.
Error: against a float64 evaluation at most 2x that of the reference in the same dtypes, 3x for gradients; in 16 bits,
where each part rounds what the next one reads, in the L2 norm.
"""

import torch
import torch.nn.functional as F

from epg_fast.ops.attention import SPEC as ATTENTION
from epg_fast.ops.attention import attention
from epg_fast.ops.backends import autocast_dtype, check_backend
from epg_fast.ops.gate_residual_norm_modulate import SPEC as GATE_RESIDUAL
from epg_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from epg_fast.ops.layer_norm_modulate import SPEC as LAYER_NORM
from epg_fast.ops.layer_norm_modulate import layer_norm_modulate, per_sample
from epg_fast.ops.spec import OpSpec

NextNorm = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def adaln_attention_ref(*arguments, **options) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`adaln_attention` in plain PyTorch: the references of its parts."""
    return adaln_attention(*arguments, **options, backend="reference")


def adaln_attention(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    num_heads: int,
    *,
    attention_scale: float | None = None,
    eps: float = 1e-5,
    attention_dropout: float = 0.0,
    proj_dropout: float = 0.0,
    next_norm: NextNorm | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x + gate * attention half-block of x: [B, L, D]; with next_norm also the modulated norm of the result.

    Shapes as in the module's docstring. attention_scale: of the scores, by default (D / num_heads)^-0.5.
    attention_dropout, proj_dropout: applied as given; pass 0 in evaluation. next_norm: weight, bias [D], shift, scale
    [B, D]: returns (x_out, LayerNorm(x_out) * (1 + scale) + shift), the second in the dtype of the next product.
    backend: "auto", "triton" or "reference", passed to the parts.
    Raises ValueError for shapes that do not fit and for a backend that cannot run here.
    """
    check_backend("adaln_attention", backend, ("auto", "triton", "reference"))
    _check_shapes(x, gate, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
    batch, length, width = x.shape
    product_dtype = autocast_dtype(x)
    h = layer_norm_modulate(x, norm_weight, norm_bias, shift, scale, eps, product_dtype, backend=backend)
    qkv = F.linear(h, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, width // num_heads)
    h = attention(qkv, attention_scale, attention_dropout, backend=backend).flatten(2)
    h = F.linear(h, proj_weight, proj_bias)
    if proj_dropout:
        h = F.dropout(h, proj_dropout)
    if next_norm is None:
        return (x + per_sample(gate).unsqueeze(1) * h).to(x.dtype)
    if len(next_norm) != 4:
        raise ValueError(f"adaln_attention: got next_norm of {len(next_norm)}, wanted (weight, bias, shift, scale)")
    weight, bias, shift, scale = next_norm
    return gate_residual_norm_modulate(x, h, gate, weight, bias, shift, scale, eps, product_dtype, backend=backend)


def _check_shapes(x, gate, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads) -> None:
    if x.dim() != 3:
        raise ValueError(f"adaln_attention: got x of shape {tuple(x.shape)}, wanted [B, L, D]")
    batch, _, width = x.shape
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"adaln_attention: got {num_heads} heads, wanted a divisor of the width D={width}")
    wanted = {
        "qkv_weight": (qkv_weight, (3 * width, width)),
        "qkv_bias": (qkv_bias, (3 * width,)),
        "proj_weight": (proj_weight, (width, width)),
        "proj_bias": (proj_bias, (width,)),
    }
    if gate.dim() not in (2, 3) or gate.shape[0] != batch or gate.shape[-1] != width or gate.numel() != batch * width:
        wanted_gate = f"[{batch}, {width}] or [{batch}, 1, {width}]"
        raise ValueError(f"adaln_attention: got gate of shape {tuple(gate.shape)}, wanted {wanted_gate}")
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"adaln_attention: got {name} of shape {tuple(tensor.shape)}, wanted {list(shape)}")


# A shape is (B, L, H, d); costs are those of the parts and of the two projections, next_norm included.
def _bytes(shape: tuple[int, int, int, int], itemsize: int, backward: bool = False) -> int:
    """The projections read their input and weight and write their output; backward reads and writes twice that."""
    batch, length, heads, dim = shape
    width = heads * dim
    rows = batch * length
    projections = (6 * rows * width + 4 * width * width) * itemsize * (2 if backward else 1)
    norms = sum(part.bytes((batch, length, width), itemsize, backward) for part in (LAYER_NORM, GATE_RESIDUAL))
    return projections + norms + ATTENTION.bytes(shape, itemsize, backward)


def _flops(shape: tuple[int, int, int, int], backward: bool = False) -> int:
    batch, length, heads, dim = shape
    width = heads * dim
    projections = 8 * batch * length * width * width * (2 if backward else 1)
    norms = sum(part.flops((batch, length, width), backward) for part in (LAYER_NORM, GATE_RESIDUAL))
    return projections + norms + ATTENTION.flops(shape, backward)


SPEC = OpSpec(
    name="adaln_attention",
    shapes=tuple(shape for shape in ATTENTION.shapes if shape[0] <= 64),
    odd_shapes=((1, 17, 2, 20), (3, 5, 1, 40), (2, 18, 1, 72)),
    bytes=_bytes,
    flops=_flops,
    built_from=("layer_norm_modulate", "attention", "gate_residual_norm_modulate"),
)
