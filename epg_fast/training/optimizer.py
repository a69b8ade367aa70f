"""AdamW with clipping and the EMA of the weights as one update; the learning rate's factor.

Two backends compute the same update of the same moments:
    fused   one pass over memory in the C++/CUDA extension (`epg_fast.ops.fused_adamw_ema_`)
    torch   torch.optim.AdamW(fused=True), torch.nn.utils' clipping and one foreach call per EMA
Neither reads anything on the host.

Of sharded parameters (`epg_fast.training.parallel`) a rank updates its shards and their EMA; only the sum of squares of
the gradients and whether one is not finite are exchanged.

`WeightCopies` are copies in 16 bits of the large weights, which the products of an update read instead of casting the
weights in the forward pass and wherever they are computed again. A copy holds the numbers that autocast would make, so
that no result depends on it. `fused` writes them in the pass that updates the weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from epg_fast.config import OptimizerConfig
from epg_fast.models.encoder import ViTEncoder
from epg_fast.models.fused import linears_with_operands
from epg_fast.ops import extension_status, fused_adamw_ema_, global_norm
from epg_fast.ops.extension import require_extension
from epg_fast.training.parallel import is_sharded, local, split_as

log = logging.getLogger("epg_fast")

_MOMENTS = ("exp_avg", "exp_avg_sq")


def lr_factor(
    step: int,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    min_scale: float = 0.0,
    milestones: tuple[int, int] = (400_000, 500_000),
) -> float:
    """Factor of the learning rate for the update at `step` (0-based: with a warm-up the very first update has 0).

    warmup-cosine: step/warmup, then a cosine to `min_scale`; warmup-step: step/warmup, then 1, 0.3 after the first
    milestone and 0.08 after the second; constant: 1. As in the released code, negative warmup_steps mean 1 throughout.
    """
    if warmup_steps < 0 or schedule == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "warmup-step":
        return 1.0 if step <= milestones[0] else 0.3 if step <= milestones[1] else 0.08
    if schedule != "warmup-cosine":
        raise ValueError(f"learning-rate schedule {schedule!r}: want warmup-cosine, warmup-step or constant")
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return max(0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0, min_scale)


def make_optimizer(
    network: torch.nn.Module,
    config: OptimizerConfig,
    emas: Sequence[torch.nn.Module] = (),
    copies: WeightCopies | None = None,
    planned: str | None = None,
) -> Optimizer:
    """The optimiser of `network`'s trainable parameters with the backend that `config.backend` names.

    emas: copies of `network` on its device, whose parameters follow it. copies: of the weights of `network` and of the
    first EMA, in 16 bits; `fused` keeps them up to date, the others leave them. planned: the backend of a plan's site
    "optimizer".
    `auto` is what is planned, else `fused` on a CPU and `torch` on a GPU; where that cannot run it is `torch`, and the
    log says why. Raises ValueError for a named backend that cannot run here, saying what is missing.
    """
    backend = config.backend if config.backend != "auto" else _chosen(network, emas, planned)
    return (FusedOptimizer if backend == "fused" else Optimizer)(network, config, emas, copies)


def _chosen(network: torch.nn.Module, emas: Sequence[torch.nn.Module], planned: str | None) -> str:
    on_cpu = next(network.parameters()).device.type == "cpu"
    backend = {None: "fused" if on_cpu else "torch", "plain": "torch"}.get(planned, planned)
    why = "as planned" if planned else "one pass in the C++ extension" if on_cpu else "no plan says more"
    obstacle = None
    if backend == "fused":
        available, reason = extension_status()
        obstacle = _fused_obstacle(network, emas) if available else f"the extension is {reason}"
    backend, why = ("torch", obstacle) if obstacle else (backend, why)
    log.info("optimiser: %s (%s)", backend, why)
    return backend


def _fused_obstacle(network: torch.nn.Module, emas: Sequence[torch.nn.Module]) -> str | None:
    """Why the fused update cannot run on these networks, None where it can."""
    if len(emas) > 4:
        return f"got {len(emas)} EMA, the fused update keeps 4 at most"
    device = next(network.parameters()).device
    for module in (network, *emas):
        for name, p in module.named_parameters():
            if p.dtype != torch.float32 or not p.is_contiguous() or p.device != device:
                got = f"{name} is {p.dtype} with strides {p.stride()} on {p.device}"
                return f"{got}, the fused update takes contiguous torch.float32 on {device}"
    return None


class Optimizer:
    """The `torch` backend, and what the others share: the groups, the moments, the pairs of weights and EMA."""

    _norm_backend = "plain"

    def __init__(
        self,
        network: torch.nn.Module,
        config: OptimizerConfig,
        emas: Sequence[torch.nn.Module] = (),
        copies: WeightCopies | None = None,
    ):
        groups, whole = _groups(network, config), dict(network.named_parameters())
        own = {name: whole[name] for group in groups for name in group["names"]}
        own |= {name: torch.nn.Parameter(local(p)) for name, p in own.items() if is_sharded(p)}
        for group in groups:
            group["params"] = [own[name] for name in group["names"]]
        self._names, self._parameters = list(own), list(own.values())
        self._shards = [(whole[name], p) for name, p in own.items() if p is not whole[name]]
        # Frozen parameters never differ from their EMA. Buffers are left alone, as officially.
        followers = [dict(ema.named_parameters()) for ema in emas]
        self.emas = [[local(follower[name]) for name in own] for follower in followers]
        self._adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
        self.param_groups: list[dict] = self._adamw.param_groups
        """Groups of parameters with their `names`, `lr` and `weight_decay`."""
        self._steps = torch.zeros(len(own), device=self._parameters[0].device)
        self._moments = {moment: [torch.zeros_like(p) for p in self._parameters] for moment in _MOMENTS}
        for parameter, *state in zip(self._parameters, self._steps.unbind(), *self._moments.values(), strict=True):
            self._adamw.state[parameter] = dict(zip(("step", *_MOMENTS), state, strict=True))
        self._max_norm = math.inf
        self._decays = [0.0] * len(emas)
        self._peak_lr = self.lr = config.lr

    def schedule(self, lr_factor: float = 1.0, max_norm: float | None = None, decays: Sequence[float] = ()) -> None:
        """Set what the next update uses: factor of the learning rate, limit of the gradients' norm, decays of the EMA.

        Raises ValueError when there is not one decay for each EMA.
        """
        if len(decays) != len(self.emas):
            raise ValueError(f"got {len(decays)} decays for {len(self.emas)} EMA, wanted one for each")
        self._max_norm, self._decays = math.inf if max_norm is None else max_norm, list(decays)
        self.lr = self._peak_lr * lr_factor
        for group in self.param_groups:
            group["lr"] = self.lr

    @torch.no_grad()
    def step(self, grad_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the parameters from their gradients, then the EMA: (norm of the gradients, found_inf), both [].

        grad_scale: [], what the loss was multiplied by. The norm is that before clipping, without the scale. Where a
        gradient is not finite, found_inf is 1 and nothing has changed, EMA and step counts included. The gradients are
        free for reuse afterwards: their values are not kept. Raises ValueError for a parameter without a gradient.
        """
        grads = self._gradients()
        norm, found_inf = self._over_ranks(*global_norm(grads, backend=self._norm_backend))
        self._update(grads, norm, found_inf, grad_scale)
        return norm if grad_scale is None else norm / grad_scale, found_inf

    def _gradients(self) -> list[torch.Tensor]:
        for parameter, shard in self._shards:  # the rest works on plain tensors, without DTensor
            shard.grad = None if parameter.grad is None else local(parameter.grad)
        for name, p in zip(self._names, self._parameters, strict=True):
            if p.grad is None:
                raise ValueError(
                    f"step: got no gradient on {name}, wanted one on every trainable parameter; call backward on a "
                    "loss that depends on it, or freeze it"
                )
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)  # fused updates pair values as they lie in memory
        return [p.grad for p in self._parameters]

    def _over_ranks(self, norm: torch.Tensor, found_inf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The global norm and found_inf, both [], from those of this rank's gradients if they are sharded."""
        if not self._shards:
            return norm, found_inf
        sums = torch.stack([norm.double().square(), found_inf.double()])
        torch.distributed.all_reduce(sums)
        norm = sums[0].sqrt().to(norm.dtype)
        return norm, ((sums[1] > 0) | ~norm.square().isfinite()).to(found_inf.dtype)

    def _update(self, grads, norm: torch.Tensor, found_inf: torch.Tensor, grad_scale: torch.Tensor | None) -> None:
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
            norm = norm / grad_scale
        if self._max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, norm)
        # torch's own protocol with its gradient scaler: where this is 1, the kernel changes nothing
        self._adamw.found_inf = found_inf
        self._adamw.step()
        torch.autograd.graph.increment_version(self._parameters)  # which torch's kernel does not
        for ema, decay in zip(self.emas, self._decays, strict=True):
            weight = torch.where(found_inf > 0, 0.0, torch.full_like(found_inf, 1 - decay, dtype=torch.float64))
            weights = {dtype: weight.to(dtype) for dtype in {tensor.dtype for tensor in ema}}
            torch._foreach_lerp_(ema, self._parameters, [weights[tensor.dtype] for tensor in ema])

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for parameter in (*self._parameters, *(parameter for parameter, _ in self._shards)):
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`exp_avg/<parameter>` and `exp_avg_sq/<parameter>`, sharded as the parameter is, and `step`, [parameters].

        The same for every backend. The tensors are the live ones: to load a state is to copy into them.
        """
        whole = {shard: parameter for parameter, shard in self._shards}
        found = {"step": self._steps}
        for moment, values in self._moments.items():
            for name, p, value in zip(self._names, self._parameters, values, strict=True):
                found[f"{moment}/{name}"] = split_as(value, whole[p]) if p in whole else value
        return found


class FusedOptimizer(Optimizer):
    """The `fused` backend: two calls into the extension per step; `step` can be captured in a CUDA graph."""

    _norm_backend = "extension"

    def __init__(self, network, config, emas=(), copies=None):
        device = next(network.parameters()).device
        require_extension("optimiser 'fused'", torch.empty(0, device=device), remedy="--optimizer.backend torch")
        if obstacle := _fused_obstacle(network, emas):
            raise ValueError(f"optimiser 'fused': {obstacle}; choose --optimizer.backend torch")
        super().__init__(network, config, emas)
        self._weight_copies = WeightCopies((), None) if copies is None else copies
        self._copies = [self._weight_copies.get(p) for p in self._parameters]
        self._ema_copies = [self._weight_copies.get(tensor) for ema in self.emas[:1] for tensor in ema]
        self._betas, self._eps = config.betas, config.eps

        # What changes from step to step is on the device, at addresses that stay.
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        self._weight_decays = torch.tensor(decays, dtype=torch.float64, device=device)
        self._lrs = torch.full_like(self._weight_decays, self.lr)
        self._max_norm_on_device = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._ema_weights = torch.ones(len(emas), dtype=torch.float64, device=device)

    def schedule(self, lr_factor=1.0, max_norm=None, decays=()):
        super().schedule(lr_factor, max_norm, decays)
        self._lrs.fill_(self.lr)
        self._max_norm_on_device.fill_(self._max_norm)
        for weight, decay in zip(self._ema_weights, self._decays, strict=True):
            weight.fill_(1 - decay)

    def _update(self, grads, norm, found_inf, grad_scale):
        fused_adamw_ema_(
            self._parameters,
            grads,
            *self._moments.values(),
            steps=self._steps,
            lrs=self._lrs,
            weight_decays=self._weight_decays,
            norm=norm,
            found_inf=found_inf,
            max_norm=self._max_norm_on_device,
            grad_scale=grad_scale,
            emas=self.emas,
            ema_weights=self._ema_weights,
            copies=self._copies,
            ema_copies=self._ema_copies,
            betas=self._betas,
            eps=self._eps,
            backend="extension",
        )
        self._weight_copies.updated([*self._parameters, *(tensor for ema in self.emas[:1] for tensor in ema)])


def _groups(network: torch.nn.Module, config: OptimizerConfig) -> list[dict]:
    """Names of the trainable parameters by weight decay."""
    groups: dict[float, list[str]] = {}
    exempt = set() if config.decay_tokens else network.no_weight_decay()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(0.0 if name in exempt else config.weight_decay, []).append(name)
    return [{"names": names, "weight_decay": decay, "lr": config.lr} for decay, names in groups.items()]


class WeightCopies:
    """The copies of the `networks`' weights in `dtype`; none at all if that is None.

    Which weights: those of `linears_with_operands`. Sharded weights (fsdp) have none, and are cast once they are whole.
    When they are used: inside `in_use` alone, which is around the gradients of an update. Every other call of a network
    casts, and no copy of a network or checkpoint holds copies of weights.
    When they are written: by the fused optimiser; by `in_use`, in one foreach call, where a weight is not what it was
    then. PyTorch counts the changes of a tensor in place, but for writes through `weight.data`.
    torch.compile takes them as inputs that keep their addresses, which CUDA graphs read in place. A block that is
    computed again in the backward pass finds them there, and DistributedDataParallel does not see them.
    """

    def __init__(self, networks: Iterable[ViTEncoder], dtype: torch.dtype | None):
        self._linears: list[torch.nn.Linear] = []
        self._copies: list[torch.Tensor] = []
        self._operands: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
        for network in networks if dtype else ():
            for module, name, linears in linears_with_operands(network):
                weights = [linear.weight for linear in linears]
                if any(weight.dtype in (dtype, torch.float64) or is_sharded(weight) for weight in weights):
                    continue
                rows = [len(weight) for weight in weights]
                operand = weights[0].new_empty(sum(rows), weights[0].shape[1], dtype=dtype, requires_grad=False)
                if operand.is_cuda:
                    torch._dynamo.mark_static_address(operand, guard=False)
                self._linears += linears
                self._copies += operand.split(rows)
                self._operands.setdefault(module, {})[name] = operand
        self._written: list[tuple[torch.Tensor, int] | None] = [None] * len(self._copies)
        """Per copy, the weight that it was made of and how often that had been changed then."""
        self._places = {linear.weight: i for i, linear in enumerate(self._linears)}

    def get(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The copy of a weight, if it has one."""
        place = self._places.get(weight)
        return None if place is None else self._copies[place]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the products of the networks read the copies of the weights as they are now."""
        self.refresh()
        for module, operands in self._operands.items():
            module.operands = operands
        try:
            yield
        finally:
            for module in self._operands:
                del module.operands

    @torch.no_grad()
    def refresh(self) -> None:
        """Make those copies anew whose weights have changed since."""
        stale = [i for i, linear in enumerate(self._linears) if not _is(self._written[i], linear.weight)]
        if stale:
            weights = [self._linears[i].weight for i in stale]
            torch._foreach_copy_([self._copies[i] for i in stale], weights)
            for i, weight in zip(stale, weights, strict=True):
                self._written[i] = weight, weight._version

    def updated(self, weights: Iterable[torch.Tensor]) -> None:
        """Take note that one call has changed `weights` and written their copies, if these were right before."""
        for weight in weights:
            place = self._places.get(weight)
            if place is not None:
                right = _is(self._written[place], weight, changes=1)
                self._written[place] = (weight, weight._version) if right else None


def _is(written: tuple[torch.Tensor, int] | None, weight: torch.Tensor, changes: int = 0) -> bool:
    """Whether `written` is `weight` as it was so many changes ago."""
    return written is not None and written[0] is weight and weight._version == written[1] + changes
