"""AdamW, weight averages and 16-bit copies of the weights, for all tensors of a model, in one pass over memory.

For tensor i with gradient g, where nothing below happens if found_inf is not 0:

    g = g / grad_scale * min(1, max_norm / (norm / grad_scale + 1e-6))
    step_i = step_i + 1
    exp_avg = exp_avg + (1 - beta1) (g - exp_avg)
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    param = (1 - lr_i weight_decay_i) param
            - lr_i / (1 - beta1^step_i) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step_i)) + eps)
    ema_k = ema_k + ema_weight_k (param - ema_k)        for each average k
    copy = round(param), ema_copy = round(ema_0)        to bfloat16 or float16

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2, as torch.optim.AdamW computes
it; clipping as torch.nn.utils.clip_grad_norm_; ema_weight is 1 - decay.

What changes from step to step is in tensors on the device of the parameters, and none is read on the host: a captured
CUDA graph stays right when they are written to.
Dtypes: extension: params, moments and averages float32, grads float32 or bfloat16 (also mixed), copies all bfloat16 or
all float16; steps, norm, found_inf and grad_scale float32; lrs, weight_decays, ema_weights and max_norm float64.
reference: any floating dtypes.
Error: each value within a few float32 roundings of the formula, as torch's fused AdamW; coefficients are computed in
float64. An average with weight 1 equals the parameter, with weight 0 it stays as it is, bit for bit.
"""

import math
from collections.abc import Sequence

import torch

from epg_fast.ops.backends import check_backend
from epg_fast.ops.extension import require_extension, require_one_device
from epg_fast.ops.spec import OpSpec

_OP = "fused_adamw_ema_"
Tensors = Sequence[torch.Tensor]
Copies = Sequence[torch.Tensor | None]


@torch.no_grad()
def fused_adamw_ema_ref(
    params, grads, exp_avgs, exp_avg_sqs, *, steps, lrs, weight_decays, norm, found_inf, max_norm, grad_scale=None,
    emas=(), ema_weights=None, copies=(), ema_copies=(), betas=(0.9, 0.999), eps=1e-8,
) -> None:  # fmt: skip
    """The formula in plain PyTorch, tensor by tensor, in the parameters' dtype; reads `found_inf` on the host."""
    if found_inf:
        return
    scale = 1.0 if grad_scale is None else grad_scale.double()
    factor = (max_norm / (norm.double() / scale + 1e-6)).clamp(max=1.0) / scale
    steps += 1
    beta1, beta2 = betas
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        grad = grad.to(param.dtype) * factor.to(param.dtype)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step, lr = steps[i].double(), lrs[i]
        denominator = (exp_avg_sq / (1 - beta2**step).to(param.dtype)).sqrt_().add_(eps)
        param *= (1 - lr * weight_decays[i]).to(param.dtype)
        param -= (lr / (1 - beta1**step)).to(param.dtype) * exp_avg / denominator
        for k, averages in enumerate(emas):
            averages[i].lerp_(param, ema_weights[k].to(param.dtype))
        for made, value in ((copies, param), (ema_copies, emas[0][i] if emas else None)):
            if made and made[i] is not None:
                made[i].copy_(value)


@torch.no_grad()
def fused_adamw_ema_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    steps: torch.Tensor,
    lrs: torch.Tensor,
    weight_decays: torch.Tensor,
    norm: torch.Tensor,
    found_inf: torch.Tensor,
    max_norm: torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    emas: Sequence[Tensors] = (),
    ema_weights: torch.Tensor | None = None,
    copies: Copies = (),
    ema_copies: Copies = (),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    backend: str = "plain",
) -> None:
    """Update params, exp_avgs, exp_avg_sqs, steps, emas and copies in place, or none of them if found_inf is not 0.

    params, grads, exp_avgs, exp_avg_sqs: N tensors each, of equal shapes place by place. steps, lrs, weight_decays:
    [N], steps counted so far; a weight decay of 0 exempts a tensor. norm, found_inf: as `global_norm(grads)` returns
    them. max_norm: [], limit of the norm, inf for none. grad_scale: [], what the loss was multiplied by; None for 1.
    emas: up to 4 averages, each N tensors, with ema_weights: [K], 1 - decay. copies, ema_copies: of params and of the
    first average, N tensors in bfloat16 or in float16, or none; None in the place of one that is not wanted.
    backend: "plain" (plain PyTorch) or "extension" (one pass in C++ or CUDA).
    Raises ValueError for a backend that cannot run here and for lists whose lengths do not fit, and RuntimeError that
    names the tensor for a wrong shape, dtype, device or memory layout; nothing has been changed then.
    """
    check_backend(_OP, backend, ("extension", "plain"))
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{_OP}: got betas={tuple(betas)}, wanted two values in [0, 1)")
    if ema_weights is None:
        ema_weights = torch.empty(0, dtype=torch.float64, device=steps.device)
    flat_emas = [tensor for average in emas for tensor in average]
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_lengths(params, emas, ema_weights, **lists, copies=copies, ema_copies=ema_copies)
    scalars = {"steps": steps, "lrs": lrs, "weight_decays": weight_decays, "ema_weights": ema_weights}
    scalars |= {"norm": norm, "found_inf": found_inf, "max_norm": max_norm, "grad_scale": grad_scale}
    if backend == "plain":
        _check_shapes_and_dtypes(params, **lists, emas=flat_emas, copies=copies, ema_copies=ema_copies)
        extras = {"emas": emas, "copies": copies, "ema_copies": ema_copies}
        return fused_adamw_ema_ref(params, **lists, **scalars, **extras, betas=betas, eps=eps)
    lists = {"params": params, **lists, "emas": flat_emas}
    made = [copy for copy in (*copies, *ema_copies) if copy is not None]
    named = {name: [tensor] for name, tensor in scalars.items() if tensor is not None}
    require_one_device(_OP, steps, **lists, copies=made, **named)
    require_extension(_OP, steps)
    joined = _joined(params, copies, ema_copies, made)
    torch.ops.epg_fast.fused_adamw_ema_(*map(list, lists.values()), joined, *scalars.values(), *betas, eps)
    if not torch.compiler.is_compiling():
        # Autograd counts writes, to notice a backward pass that needs what was overwritten.
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *flat_emas, *made, steps])
    return None


def _joined(params: Tensors, copies: Copies, ema_copies: Copies, made: list[torch.Tensor]) -> list[torch.Tensor]:
    """The operator's one list of copies: the parameters', then the average's; an empty tensor for None."""
    if not made:
        return []
    absent = made[0].new_empty(0)
    wanted = [*(copies or [None] * len(params)), *ema_copies]
    return [absent if copy is None else copy for copy in wanted]


_OF_PARAMETERS_DTYPE = ("exp_avgs", "exp_avg_sqs", "emas")


def _check_shapes_and_dtypes(params, **lists) -> None:
    """What would stop the reference half-way."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            k, place = divmod(i, len(params))
            param, where = params[place], f"{name}[{k}][{place}]" if name == "emas" else f"{name}[{i}]"
            if tensor is None:
                continue
            if tensor.shape != param.shape:
                raise ValueError(f"{_OP}: got {where} of shape {tuple(tensor.shape)}, wanted {tuple(param.shape)}")
            if name in _OF_PARAMETERS_DTYPE and tensor.dtype != param.dtype:
                raise ValueError(f"{_OP}: got {where} in {tensor.dtype}, wanted {param.dtype} as the parameter")


def _check_lengths(params, emas, ema_weights, **lists) -> None:
    for name, tensors in lists.items():
        if len(tensors) != len(params) and not (name.endswith("copies") and not tensors):
            raise ValueError(f"{_OP}: got {len(tensors)} {name} for {len(params)} params, wanted one for each")
    if lists["ema_copies"] and not emas:
        raise ValueError(f"{_OP}: got ema_copies and no emas, wanted an average; leave out ema_copies")
    if len(emas) != ema_weights.numel():
        raise ValueError(f"{_OP}: got {len(emas)} emas and {ema_weights.numel()} ema_weights, wanted one for each")
    for k, average in enumerate(emas):
        if len(average) != len(params):
            raise ValueError(f"{_OP}: got {len(average)} tensors in emas[{k}] for {len(params)} params, wanted as many")


# The real lists of tensors are uneven: EPG-XL has 583 million parameters in 349 tensors.
SPEC = OpSpec(
    name="fused_adamw_ema",
    shapes=((349, 1_670_447), (5000, 4096)),
    odd_shapes=((3, 17), (1, 1), (2, 16_385), (100, 7)),
    # Of (tensors, values in each), with one average: four float32 values are read and written, the gradient is read.
    bytes=lambda shape, itemsize: (4 * 4 + itemsize + 4 * 4) * math.prod(shape),
)
