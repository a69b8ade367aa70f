"""From a network and labels to images: `SamplingEngine`, made once for many images, and `sample`, for a few."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from epg_fast.config import GUIDANCE_INTERVAL, ScheduleConfig
from epg_fast.data import PixelNormalization
from epg_fast.diffusion import autoguided, guided
from epg_fast.models import EPGViT
from epg_fast.models.compilation import compile_denoising, compile_options
from epg_fast.plans import PLAIN, Case, Chosen, choose
from epg_fast.plans.plan import architecture
from epg_fast.runtime import float32_products
from epg_fast.sampling.graphs import GraphedFunction
from epg_fast.sampling.precision import available_precision, inference_network
from epg_fast.sampling.requests import (
    check_agreement,
    check_networks,
    checked_labels,
    clamp_bounds,
    image_numbers,
    sampler_arguments,
    schedule_of,
)
from epg_fast.sampling.trajectory import Trajectory
from epg_fast.sampling.writers import quantize

log = logging.getLogger("epg_fast")

_COMPILE = ("auto", "off", "blocks", "network")
PLANNED_STEPS = ("euler", "heun")
"""Samplers whose steps are a site."""
_SHAPES = 64


class SamplingEngine:
    """Draws images of one network with one sampler, batch after batch: `engine(labels)`, or `engine.stream(labels)`.

    model: EPGViT; its device is used, and it stays as it is. sampler, steps: see `epg_fast.diffusion.SAMPLERS`;
    `steps` noise levels. guidance: scale of interval guidance, 1 for none; with `weak`, a weaker model, the scale of
    autoguidance, 0 for none. interval: unshifted sigmas. parameterization, normalization, noise_schedule: None takes
    them from the checkpoint (`from_pretrained`), else x0, imagenet and the standard grid. clamp of the clean estimate:
    official ([-1, 1]), data (the true range), none. sampler_options: s_churn, s_min, s_max, s_noise of `edm_sde`.
    precision: fp32, tf32, bf16, fp16 or fp8 (`epg_fast.sampling.precision`); one that the device lacks gives way to the
    nearest, which is logged. compile: torch.compile of the transformer "blocks", of the whole "network", "off", or
    "auto": as the plan says, else blocks on a GPU. cuda_graphs: launch all evaluations of a batch as one CUDA graph;
    None: as the plan says, else on a GPU. With either, batches have one of a few sizes: the last one is filled up.
    ops: what computes at each site, see `epg_fast.plans.choose`; "auto" is the plan that `epg-fast tune` has made on
    this device for this network, precision and batch size; a function gets the `Case` and returns what is `Chosen`.
    None: as the network has it, and auto if that is plain.

    `evaluations` is the number of network evaluations per image; `chosen` is what computes; `precision`,
    `parameterization`, `normalization`, `compile` and `cuda_graphs` are what is done, and `model` is the network that
    is run.
    Weights that are changed later may or may not be seen: make another engine then. In fp32 and tf32 an autocast around
    a call is obeyed. Threads that call one engine take turns. The conditioning of all noise levels is kept at once.
    Raises ValueError for unknown names and options, too few steps, guidance without classes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        sampler: str = "heun",
        steps: int = 32,
        guidance: float = 1.0,
        interval: tuple[float, float] = GUIDANCE_INTERVAL,
        weak: torch.nn.Module | None = None,
        parameterization: str | None = None,
        normalization: str | None = None,
        noise_schedule: ScheduleConfig | None = None,
        clamp: str = "official",
        batch_size: int = 64,
        precision: str = "fp32",
        compile: str = "auto",
        cuda_graphs: bool | None = None,
        ops: str | Mapping[str, str] | Callable[[Case], Chosen] | None = None,
        **sampler_options,
    ):
        networks = [model] if weak is None else [model, weak]
        check_networks(networks, guidance)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, want at least 1")
        options = sampler_arguments(sampler, steps, sampler_options)
        metadata = getattr(model, "metadata", {})
        schedule = schedule_of(metadata, noise_schedule)
        self.parameterization = parameterization or metadata.get("parameterization") or "x0"
        self.normalization = normalization or metadata.get("normalization") or "imagenet"
        pixels = PixelNormalization(self.normalization)
        if weak is not None:
            check_agreement(weak, self.parameterization, self.normalization, schedule)

        def guide(denoiser, weak_denoiser=None):
            if weak_denoiser is not None:
                return autoguided(denoiser, weak_denoiser, guidance)
            return denoiser if guidance == 1.0 else guided(denoiser, guidance, interval, model.num_classes)

        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self.precision = available_precision(precision, self.device)
        self.chosen = self._choose(ops, model, guided=guidance != 1 and weak is None)
        self.compile, self.cuda_graphs = _ways(compile, cuda_graphs, self.chosen, self.device)
        if compile == "auto" and self.compile == "network" and any(network.has_hooks for network in networks):
            log.info("compile: blocks, not the network as planned: modules have hooks, which may not be traceable")
            self.compile = "blocks"
        # the networks themselves where that changes nothing in them
        as_they_are = self.compile == "off" and self.precision in ("fp32", "tf32")
        as_they_are &= all(network.ops == self.chosen.ops for network in networks)
        if not as_they_are or any(module.training for network in networks for module in network.modules()):
            networks = [inference_network(network, self.precision, self.chosen.ops) for network in networks]
        self.model = networks[0]
        if sampler in PLANNED_STEPS:
            options["steps_backend"] = self.chosen.ops["steps"]
        self._trajectory = Trajectory(
            networks,
            guide,
            schedule,
            self.parameterization,
            sampler,
            schedule.levels(1 if sampler == "onestep" else steps, model.image_size),
            pixels,
            options | {"clamp": clamp_bounds(clamp, pixels, self.device)},
        )
        self.evaluations = self._trajectory.evaluations
        if weak is None and guidance != 1 and not self._trajectory.guided:
            log.warning("guidance %g does nothing: no noise level of %s lies in its interval", guidance, sampler)
        if self.compile != "off":
            for network in networks:
                compile_denoising(network, self.compile, self.chosen.options)
            self._trajectory.noise = torch.compile(self._trajectory.noise, **compile_options())
        self._lock = threading.Lock()
        self._recorded: dict[tuple[int, bool], GraphedFunction] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.cuda_graphs else None

    def _choose(self, ops, model: EPGViT, guided: bool) -> Chosen:
        """What computes, which a line of the log explains unless the caller has said it."""
        if ops is None and model.ops != PLAIN:
            ops = model.ops
        case = Case("sample", architecture(model), self.precision, self.batch_size * (2 if guided else 1))
        chosen = ops(case) if callable(ops) else choose("auto" if ops is None else ops, case, self.device)
        if not isinstance(ops, Mapping):
            log.info("%s", chosen.why)
        return chosen

    def __call__(
        self,
        labels: torch.Tensor | Sequence[int] | int,
        *,
        seed: int = 0,
        first: int = 0,
        indices: Sequence[int] | None = None,
        noise: torch.Tensor | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Images of the given classes: float32 [N, 3, H, W] in [0, 1], on the CPU. Arguments as in `stream`."""
        parts = self.stream(labels, seed=seed, first=first, indices=indices, noise=noise, progress=progress)
        return torch.cat([images for _, images in parts])

    def stream(
        self,
        labels: torch.Tensor | Sequence[int] | int,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        *,
        first: int = 0,
        noise: torch.Tensor | None = None,
        as_uint8: bool = False,
        progress: bool = False,
    ) -> Iterator[tuple[slice, torch.Tensor | np.ndarray]]:
        """Images batch by batch, in order: (their places among the labels, float32 [B, 3, H, W] in [0, 1] on the CPU).

        labels: [N] class indices, or the number of images for an unconditional model. Image i starts from noise that
        depends on (seed, number of the image) only, so that the batch size does not matter; the numbers are `indices`
        [N], or first, first+1, ...; `noise` [N, 3, H, W] (unit variance) replaces the start. as_uint8: uint8 arrays
        [B, H, W, 3] instead. A GPU computes the next batch while the caller works on this one.
        Raises ValueError for labels out of range, negative numbers, noise of another shape, and for images with NaN
        where they have to become integers.
        """
        y = checked_labels(self.model, labels)
        numbers = image_numbers(indices, first, len(y))
        shape = (self.model.in_chans, self.model.image_size, self.model.image_size)
        if noise is not None and noise.shape != (len(y), *shape):
            raise ValueError(f"noise has shape {list(noise.shape)}, want {[len(y), *shape]}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, want 0 to 2^63 - 1")
        return self._stream(y, numbers, seed, noise, as_uint8, progress)

    def _stream(self, y, numbers, seed, noise, as_uint8, progress):
        size = self._size(len(y))
        seed = torch.tensor([int(seed)])
        under_way = None
        with tqdm(total=len(y), desc="sample", unit="image", disable=not progress) as bar:
            for start in range(0, len(y), self.batch_size):
                part = slice(start, min(start + self.batch_size, len(y)))
                inputs = [_filled(numbers[part], size), seed, _filled(y[part], size)]
                if noise is not None:
                    inputs.append(_filled(noise[part], size))
                with self._lock:
                    images = self._draw([x.to(self.device) for x in inputs])[: part.stop - start]
                    arriving = _Arriving(part, images, as_uint8)
                if under_way is not None:
                    yield under_way.result()
                under_way = arriving if images.is_cuda else None
                bar.update(part.stop - start)
                if under_way is None:
                    yield arriving.result()
            if under_way is not None:
                yield under_way.result()

    @property
    def fills_batches(self) -> bool:
        """Whether batches are filled up to one of a few sizes, so that few are compiled and recorded."""
        return self.compile != "off" or self.cuda_graphs

    def _size(self, count: int) -> int | None:
        """To how many images the batches of `count` images are filled up; None: not at all."""
        if not self.fills_batches:
            return None
        return min(self.batch_size, 1 << (count - 1).bit_length())

    def _draw(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Images [B, 3, H, W] on the device, which the next call may overwrite."""
        key = (len(inputs[0]), len(inputs) > 3)
        if self.cuda_graphs and key not in self._recorded:
            try:
                self._recorded[key] = GraphedFunction(self._compute, inputs, self._pool)
            except RuntimeError as error:
                log.warning("no CUDA graphs: %s; launching kernels one by one", str(error).splitlines()[0])
                self.cuda_graphs = False
        return self._recorded[key](*inputs) if self.cuda_graphs else self._compute(*inputs)

    @torch.no_grad()
    def _compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(float32_products(tf32=self.precision == "tf32"))
            if self.precision not in ("fp32", "tf32"):
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.compile != "off":
                # every size of batch is compiled for itself, twice with guidance
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=_SHAPES))
            return self._trajectory(*inputs)


def sample(
    model: torch.nn.Module,
    labels: torch.Tensor | Sequence[int] | int,
    *,
    seed: int = 0,
    first: int = 0,
    noise: torch.Tensor | None = None,
    progress: bool = False,
    compile: str = "off",
    cuda_graphs: bool | None = False,
    **options,
) -> torch.Tensor:
    """Images of the given classes: float32 [N, 3, H, W] in [0, 1], on the CPU.

    Arguments are those of `SamplingEngine` and of its `stream`. Nothing is compiled or recorded unless asked for: that
    takes longer than a few images. For many, or again and again, keep a `SamplingEngine`.
    """
    engine = SamplingEngine(model, compile=compile, cuda_graphs=cuda_graphs, **options)
    return engine(labels, seed=seed, first=first, noise=noise, progress=progress)


class _Arriving:
    """Images on their way to host memory, beside the batch after them."""

    def __init__(self, part: slice, images: torch.Tensor, as_uint8: bool):
        self.part, self.as_uint8 = part, as_uint8
        # not a number has no colour, and uint8 no place for it
        self.tensors = [quantize(images), images.isnan().any()] if as_uint8 else [images]
        self.event = None
        if images.is_cuda:
            self.tensors = [torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, True) for x in self.tensors]
            self.event = torch.cuda.current_stream(images.device).record_event()

    def result(self) -> tuple[slice, torch.Tensor | np.ndarray]:
        if self.event is not None:
            self.event.synchronize()
        if not self.as_uint8:
            return self.part, self.tensors[0]
        if self.tensors[1]:
            raise ValueError("images contain NaN: the model or the sampler diverged")
        return self.part, self.tensors[0].numpy()


def _ways(compile: str, cuda_graphs: bool | None, chosen: Chosen, device: torch.device) -> tuple[str, bool]:
    """(compile, whether CUDA graphs are used) on this device: as asked, else as chosen, else by the device."""
    if compile not in _COMPILE:
        raise ValueError(f"compile {compile!r}: want one of {', '.join(_COMPILE)}")
    cuda = device.type == "cuda"
    if cuda_graphs and not cuda:
        log.warning("no CUDA graphs: the network is on %s", device)
    if compile == "auto":
        compile = chosen.compile or ("blocks" if cuda else "off")
    if cuda_graphs is None:
        cuda_graphs = chosen.cuda_graphs
    return compile, cuda and cuda_graphs is not False


def _filled(part: torch.Tensor, size: int | None) -> torch.Tensor:
    """[B, ...] -> [size, ...], the last row repeated."""
    missing = 0 if size is None else size - len(part)
    return part if missing <= 0 else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
