"""AdamW with its parameter groups, clipping and averaged weights as one update; the learning-rate factor.

Three backends compute the same update, and load each other's state:
    fused   one pass over memory in the C++/CUDA extension (`epg_fast.ops.fused_adamw_ema_`)
    torch   torch.optim.AdamW(fused=True), torch.nn.utils' clipping and one foreach call per average
    apex    NVIDIA's FusedAdam in place of torch's AdamW, where that package is installed
The first two read nothing on the host; apex has no other way to skip an update.

Of sharded parameters (`epg_fast.training.parallel`) a rank updates its parts and their averages; only the sum of
squares of the gradients and whether one is not finite are exchanged. apex does not take them.

`fused` also writes the 16-bit copies of weights that there are (`epg_fast.training.weight_copies`).
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from epg_fast.config import OptimizerConfig
from epg_fast.ops import extension_status, fused_adamw_ema_, global_norm
from epg_fast.ops.extension import require_extension
from epg_fast.training.parallel import is_sharded, local, split_as
from epg_fast.training.weight_copies import WeightCopies

log = logging.getLogger("epg_fast")


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
    averages: Sequence[torch.nn.Module] = (),
    copies: WeightCopies | None = None,
    planned: str | None = None,
) -> Optimizer:
    """The optimiser of `network`'s trainable parameters with the backend that `config.backend` names.

    averages: networks of the same structure on the same device, whose parameters follow `network`'s. copies: of the
    weights of `network` and of the first average, in 16 bits; `fused` keeps them up to date, the others leave them.
    planned: the backend of a plan's site "optimizer".
    `auto` is what is planned, else `fused` on a CPU and `torch` on a GPU; where the fused one cannot run it is `torch`.
    The log says which. Raises ValueError for a backend that cannot run here, saying what is missing.
    """
    return _BACKENDS[_backend(network, config.backend, averages, planned)](network, config, averages, copies)


def _backend(
    network: torch.nn.Module, wanted: str, averages: Sequence[torch.nn.Module], planned: str | None = None
) -> str:
    if wanted != "auto":
        return wanted
    chosen, why = {"plain": "torch"}.get(planned, planned), "as planned"
    if planned is None:
        chosen = "fused" if next(network.parameters()).device.type == "cpu" else "torch"
        why = "one pass in the C++ extension" if chosen == "fused" else "no plan says more"
    if chosen == "fused":
        available, reason = extension_status()
        obstacle = _fused_obstacle(network, averages) if available else f"the extension is {reason}"
        chosen, why = ("torch", obstacle) if obstacle else (chosen, why)
    if chosen == "apex" and any(map(is_sharded, network.parameters())):
        chosen, why = "torch", "apex, which is planned, does not take sharded parameters"
    log.info("optimiser: %s (%s)", chosen, why)
    return chosen


def _fused_obstacle(network: torch.nn.Module, averages: Sequence[torch.nn.Module]) -> str | None:
    """Why the fused update cannot run on these networks, None where it can."""
    if len(averages) > 4:
        return f"there are {len(averages)} averages, the fused update keeps 4 at most"
    device = next(network.parameters()).device
    for module in (network, *averages):
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                return f"{name} is {parameter.dtype}, the fused update takes torch.float32"
            if not parameter.is_contiguous():
                return f"{name} has strides {parameter.stride()}, the fused update takes contiguous parameters"
            if parameter.device != device:
                return f"{name} is on {parameter.device}, the fused update takes parameters on one device, {device}"
    return None


class Optimizer:
    """The `torch` backend, and what the others share: the groups, the pairs to average, the state in torch's layout."""

    def __init__(
        self,
        network: torch.nn.Module,
        config: OptimizerConfig,
        averages: Sequence[torch.nn.Module],
        copies: WeightCopies | None = None,
    ):
        own = {p: torch.nn.Parameter(local(p), p.requires_grad) if is_sharded(p) else p for p in network.parameters()}
        self._shards = [(parameter, part) for parameter, part in own.items() if is_sharded(parameter)]
        groups = _groups(network, config)
        for group in groups:
            group["params"] = [own[parameter] for parameter in group["params"]]
        self._adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
        for group in self._adamw.param_groups:
            for p in group["params"]:
                moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                self._adamw.state[p] = {"step": torch.zeros((), device=p.device)} | moments
        # Buffers are left alone, as officially.
        self._averages = [([local(p) for p in average.parameters()], list(own.values())) for average in averages]
        names = {own[parameter]: name for name, parameter in network.named_parameters()}
        self.names = [names[p] for group in groups for p in group["params"]]
        """Names of the parameters by their index in `state_dict`."""
        self._max_norm = math.inf
        self._decays = [0.0] * len(averages)
        self._lr = config.lr
        self.lr = config.lr
        """Learning rate of the groups without layer decay, at the next update."""

    def schedule(self, lr_factor: float = 1.0, max_norm: float | None = None, decays: Sequence[float] = ()) -> None:
        """Set what the next update uses: factor of all learning rates, limit of the gradients' norm, averages' decays.

        Raises ValueError when there is not one decay for each average.
        """
        if len(decays) != len(self._averages):
            raise ValueError(f"got {len(decays)} decays for {len(self._averages)} averages, wanted one for each")
        self._max_norm, self._decays = math.inf if max_norm is None else max_norm, list(decays)
        self.lr = self._lr * lr_factor
        for group in self._adamw.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor

    @torch.no_grad()
    def step(self, grad_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the parameters from their gradients, then the averages: (norm of the gradients, found_inf), both [].

        grad_scale: [], what the loss was multiplied by. The norm is that before clipping, without the scale. Where a
        gradient is not finite, found_inf is 1 and nothing has changed, averages and step counts included. The gradients
        are free for reuse afterwards: their values are not kept. Raises ValueError when no parameter has a gradient.
        """
        self._take_gradients()
        parameters = [p for group in self._adamw.param_groups for p in group["params"] if p.grad is not None]
        _require_gradients(parameters)
        for p in parameters:
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)  # torch's fused AdamW pairs values as they lie in memory
        grads = [p.grad for p in parameters]
        norm, found_inf = self._over_ranks(*global_norm(grads, backend="plain"))
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
            norm = norm / grad_scale
        if self._max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        self._adamw_step(found_inf)
        torch.autograd.graph.increment_version(parameters)  # which neither torch's fused kernel does nor apex's
        for (averages, sources), decay in zip(self._averages, self._decays, strict=True):
            weight = torch.where(found_inf > 0, 0.0, torch.full_like(found_inf, 1 - decay, dtype=torch.float64))
            weights = {dtype: weight.to(dtype) for dtype in {average.dtype for average in averages}}
            torch._foreach_lerp_(averages, sources, [weights[average.dtype] for average in averages])
        return norm, found_inf

    def _adamw_step(self, found_inf: torch.Tensor) -> None:
        # torch's own protocol with its gradient scaler: where this is 1, the kernel changes nothing
        self._adamw.found_inf = found_inf
        self._adamw.step()

    def _take_gradients(self) -> None:
        """Give the parts of sharded parameters their gradients; the rest works on plain tensors, without DTensor."""
        for parameter, part in self._shards:
            part.grad = None if parameter.grad is None else local(parameter.grad)

    def _over_ranks(self, norm: torch.Tensor, found_inf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The global norm and found_inf, both [], from those of this rank's gradients if they are sharded."""
        if not self._shards:
            return norm, found_inf
        sums = torch.stack([norm.double().square(), found_inf.double()])
        torch.distributed.all_reduce(sums)
        norm = sums[0].sqrt().to(norm.dtype)
        return norm, ((sums[1] > 0) | ~norm.square().isfinite()).to(found_inf.dtype)

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        self._adamw.zero_grad(set_to_none=True)
        for parameter, _ in self._shards:
            parameter.grad = None

    @property
    def param_groups(self) -> list[dict]:
        """Groups of parameters with their `lr`, `peak_lr` and `weight_decay`, as torch's optimisers have them."""
        return self._adamw.param_groups

    @property
    def state(self) -> dict:
        """Per parameter: `step`, `exp_avg` and `exp_avg_sq`, as torch.optim.AdamW names them."""
        return self._adamw.state

    def tensors(self) -> dict[str, torch.Tensor]:
        """<step, exp_avg or exp_avg_sq>/<parameter> -> the live tensor, split as its parameter: for checkpoints."""
        whole = {part: parameter for parameter, part in self._shards}
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {
            f"{key}/{name}": split_as(value, whole[p]) if p in whole and key != "step" else value
            for name, p in zip(self.names, parameters, strict=True)
            for key, value in self.state[p].items()
        }

    def state_dict(self) -> dict:
        """State in the layout of torch.optim.AdamW, whatever the backend; none for a parameter never updated."""
        state = self._adamw.state_dict()
        state["state"] = {i: values for i, values in state["state"].items() if values["step"] > 0}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Load what any backend's `state_dict` returned; learning rates, decays and betas stay the configuration's."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._adamw.param_groups]
        self._adamw.load_state_dict(state)
        for group, ours in zip(self._adamw.param_groups, groups, strict=True):
            group.update(ours)


@dataclass
class _Lists:
    """The fused update's arguments for the parameters that have a gradient."""

    places: list[int]
    index: slice | torch.Tensor
    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    emas: list[list[torch.Tensor]]
    copies: list[torch.Tensor | None]
    ema_copies: list[torch.Tensor | None]
    others: list[tuple[list[torch.Tensor], list[torch.Tensor]]]
    """Per average: the averages of parameters without a gradient, frozen ones too, and those parameters."""


class FusedOptimizer(Optimizer):
    """The `fused` backend: two calls into the extension per step; `step` can be captured in a CUDA graph."""

    def __init__(self, network, config, averages, copies=None):
        device = next(network.parameters()).device
        require_extension("optimiser 'fused'", torch.empty(0, device=device), remedy="--optimizer.backend torch")
        if obstacle := _fused_obstacle(network, averages):
            raise ValueError(f"optimiser 'fused': {obstacle}; choose --optimizer.backend torch")
        super().__init__(network, config, averages)
        self._copies = WeightCopies((), None) if copies is None else copies
        groups = self._adamw.param_groups
        self._parameters = [p for group in groups for p in group["params"]]
        self._betas, self._eps = config.betas, config.eps

        def per_parameter(key):
            values = [group[key] for group in groups for _ in group["params"]]
            return torch.tensor(values, dtype=torch.float64, device=device)

        self._peak_lrs, self._weight_decays = per_parameter("peak_lr"), per_parameter("weight_decay")
        self._lrs = self._peak_lrs.clone()
        self._steps = torch.zeros(len(self._parameters), device=device)
        self._max_norm_on_device = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._ema_weights = torch.ones(len(averages), dtype=torch.float64, device=device)
        self._adopt_state()

    def schedule(self, lr_factor=1.0, max_norm=None, decays=()):
        super().schedule(lr_factor, max_norm, decays)
        torch.mul(self._peak_lrs, lr_factor, out=self._lrs)
        self._max_norm_on_device.fill_(self._max_norm)
        for weight, decay in zip(self._ema_weights, self._decays, strict=True):
            weight.fill_(1 - decay)

    @torch.no_grad()
    def step(self, grad_scale=None):
        self._take_gradients()
        lists = self._lists_of([i for i, p in enumerate(self._parameters) if p.grad is not None])
        _require_gradients(lists.params)
        # A gradient has its parameter's layout unless someone set it by hand.
        grads = [p.grad.contiguous() for p in lists.params]
        norm, found_inf = self._over_ranks(*global_norm(grads, backend="extension"))
        steps = self._steps[lists.index]
        fused_adamw_ema_(
            lists.params,
            grads,
            lists.exp_avgs,
            lists.exp_avg_sqs,
            steps=steps,
            lrs=self._lrs[lists.index],
            weight_decays=self._weight_decays[lists.index],
            norm=norm,
            found_inf=found_inf,
            max_norm=self._max_norm_on_device,
            grad_scale=grad_scale,
            emas=lists.emas,
            ema_weights=self._ema_weights,
            copies=lists.copies,
            ema_copies=lists.ema_copies,
            betas=self._betas,
            eps=self._eps,
            backend="extension",
        )
        self._copies.updated([*lists.params, *itertools.chain(*lists.emas[:1])])
        if not isinstance(lists.index, slice):
            self._steps[lists.index] = steps
        for (averages, sources), weight in zip(lists.others, self._ema_weights, strict=True):
            for average, source in zip(averages, sources, strict=True):
                following = torch.lerp(average, source, weight.to(average.dtype))
                average.copy_(torch.where(found_inf > 0, average, following))
        return norm if grad_scale is None else norm / grad_scale, found_inf

    def _lists_of(self, places: list[int]) -> _Lists:
        """Arguments for the parameters at `places`, the same ones as a rule."""
        if self._lists is None or self._lists.places != places:
            params = [self._parameters[i] for i in places]
            every = len(places) == len(self._parameters)
            updated = set(params)
            follower = [dict(zip(sources, averages, strict=True)) for averages, sources in self._averages]
            emas = [[average[p] for p in params] for average in follower]
            rest = [[(a, p) for p, a in average.items() if p not in updated] for average in follower]
            self._lists = _Lists(
                places=places,
                index=slice(None) if every else torch.tensor(places, device=self._steps.device),
                params=params,
                exp_avgs=[self.state[p]["exp_avg"] for p in params],
                exp_avg_sqs=[self.state[p]["exp_avg_sq"] for p in params],
                emas=emas,
                copies=self._copies_of(params),
                ema_copies=self._copies_of(emas[0]) if emas else [],
                others=[([a for a, _ in pairs], [p for _, p in pairs]) for pairs in rest],
            )
        return self._lists

    def _copies_of(self, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Empty if there is none."""
        copies = [self._copies.get(weight) for weight in weights]
        return [] if all(copy is None for copy in copies) else copies

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._adopt_state()

    def _adopt_state(self) -> None:
        """Give every parameter moments, and keep all step counts in one tensor, of which the state holds views."""
        self._lists: _Lists | None = None
        for count, parameter in zip(self._steps.unbind(), self._parameters, strict=True):
            state = self._adamw.state[parameter]
            count.copy_(state.get("step", torch.zeros(())))
            state["step"] = count
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


class ApexOptimizer(Optimizer):
    """The `apex` backend: NVIDIA's FusedAdam does AdamW's part."""

    def __init__(self, network, config, averages, copies=None):
        if any(map(is_sharded, network.parameters())):
            raise ValueError("optimiser 'apex': does not take sharded parameters; choose --optimizer.backend torch")
        fused_adam = _apex_fused_adam()
        super().__init__(network, config, averages)
        groups = [dict(group) for group in self._adamw.param_groups]
        self._apex = fused_adam(groups, betas=config.betas, eps=config.eps, adam_w_mode=True)

    def _adamw_step(self, found_inf):
        for group, ours in zip(self._apex.param_groups, self._adamw.param_groups, strict=True):
            group["lr"] = ours["lr"]
        if not found_inf:  # read on the host: FusedAdam knows no other way
            self._apex.step()

    @property
    def state(self):
        return self._apex.state

    def state_dict(self):
        for group in self._apex.param_groups:
            for parameter in group["params"]:
                if parameter in self._apex.state:
                    moments = {name: self._apex.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
                    step = torch.tensor(float(group["step"]), device=parameter.device)
                    self._adamw.state[parameter] = {"step": step} | moments
        return super().state_dict()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._apex.state.clear()
        for group, ours in zip(self._apex.param_groups, self._adamw.param_groups, strict=True):
            known = [p for p in ours["params"] if p in self._adamw.state]
            steps = {int(self._adamw.state[p]["step"]) for p in known}
            if len(steps) > 1:
                raise ValueError(
                    f"the saved parameters have been updated {sorted(steps)} times, apex counts one number per group; "
                    "choose --optimizer.backend torch"
                )
            group["step"] = steps.pop() if steps else 0
            for parameter in known:
                saved = self._adamw.state[parameter]
                self._apex.state[parameter] = {name: saved[name] for name in ("exp_avg", "exp_avg_sq")}


_BACKENDS = {"fused": FusedOptimizer, "torch": Optimizer, "apex": ApexOptimizer}


def _require_gradients(parameters: list[torch.Tensor]) -> None:
    """Raise ValueError if no parameter has a gradient."""
    if not parameters:
        raise ValueError("step: got no gradient on any parameter, wanted some; call backward on the loss first")


def _apex_fused_adam() -> type:
    """NVIDIA's FusedAdam. A package of the same name on PyPI is something else, and is not imported."""
    remedy = "build NVIDIA's from https://github.com/NVIDIA/apex, or choose --optimizer.backend torch"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ValueError(
            f"optimiser 'apex': apex is not installed; {remedy} (`pip install apex` installs another package)"
        )
    folders = list(spec.submodule_search_locations or ())
    if not any(Path(folder, "optimizers", "fused_adam.py").is_file() for folder in folders):
        raise ValueError(f"optimiser 'apex': the package apex in {folders or spec.origin} is not NVIDIA's; {remedy}")
    try:
        import amp_C  # noqa: F401  (apex's compiled kernels; without them FusedAdam fails at its first step)
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            f"optimiser 'apex': NVIDIA's apex is installed without its kernels ({error}); {remedy}"
        ) from None
    return FusedAdam


def _groups(network: torch.nn.Module, config: OptimizerConfig) -> list[dict]:
    """Trainable parameters by weight decay and layer decay; each group carries `peak_lr`, the lr at factor 1."""
    groups: dict[tuple[float, float], list] = {}
    exempt = set() if config.decay_tokens else network.no_weight_decay()
    depth = len(network.blocks)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = (0.0 if name in exempt else config.weight_decay, config.layer_decay ** _depth_below(name, depth))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr": config.lr * factor, "peak_lr": config.lr * factor}
        for (decay, factor), params in groups.items()
    ]


def _depth_below(name: str, depth: int) -> int:
    """How many encoder blocks lie between a parameter and the encoder's end (0 for everything behind the encoder)."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return depth - int(block[1])
    return depth + 1 if re.match(r"patch_embed\.|pos_embed|cls_token|class_embed\.", name) else 0
