"""From a network and labels to images: `SamplingEngine`, made once for many images, and `sample`, for a few."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from epg_fast.config import CHURN, GUIDANCE_INTERVAL, ScheduleConfig, check_sampler
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import EPGViT
from epg_fast.models.compilation import compile_denoising, compile_options
from epg_fast.ops import philox_normal_of
from epg_fast.plans import PLAIN, Case, Chosen, choose
from epg_fast.plans.plan import architecture
from epg_fast.runtime import float32_products
from epg_fast.sampling.outputs import quantize
from epg_fast.sampling.precision import available_precision, inference_network
from epg_fast.sampling.trajectory import SETTINGS, Trajectory

log = logging.getLogger("epg_fast")

_COMPILE = ("auto", "off", "blocks", "network")
_SHAPES = 64


class NotFinite(ValueError):
    """Images that have no colour."""


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

    `evaluations` is the number of network evaluations per image; `calls` are those of the networks, (noise level, 2 for
    a conditional and an unconditional evaluation, else 1); `guided`: whether any of them is guided; `chosen` is what
    computes; `precision`, `parameterization`, `normalization`, `compile` and `cuda_graphs` are what is done, and
    `model` is the network that is run.
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
        for network in networks:
            if not isinstance(network, EPGViT):
                got = type(network).__name__
                raise ValueError(f"sample: got a {got}, want an EPGViT (unwrap compiled or parallel models)")
        if model.in_chans != 3:
            raise ValueError(f"sample: the model has {model.in_chans} channels, want 3: red, green and blue")
        settings = {"sampler": sampler, "steps": steps, "guidance": guidance, "interval": interval, "clamp": clamp}
        _check_settings(networks, settings | sampler_options)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, want at least 1")
        self._schedule = _schedule(model.metadata, noise_schedule)
        self.parameterization = parameterization or model.metadata.get("parameterization") or "x0"
        self.normalization = normalization or model.metadata.get("normalization") or "imagenet"
        if weak is not None:
            self._check_weak(model, weak)

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
        self.model, self._networks, self._noise = networks[0], networks, philox_normal_of
        if self.compile != "off":
            for network in networks:
                compile_denoising(network, self.compile, self.chosen.options)
            self._noise = torch.compile(self._noise, **compile_options())
        self._lock = threading.Lock()
        self._graphs: weakref.WeakSet[GraphedFunction] = weakref.WeakSet()
        self._set(settings | sampler_options)
        if weak is None and guidance != 1 and not self.guided:
            log.warning("guidance %g does nothing: no noise level of %s lies in its interval", guidance, sampler)

    def with_settings(self, **settings) -> SamplingEngine:
        """Another engine over the same networks, with other `sampler`, `steps`, `guidance`, `interval`, `clamp`, churn.

        What is not given stays; churn goes with its sampler. Networks are neither copied nor cast, and the choice of
        what computes stays that for the batch of this engine: begin with a guided one if most are. Blocks or networks
        are compiled only for sizes of a batch that no engine of them has met, and guidance doubles that size. CUDA
        graphs are recorded for each engine, and go with it. Engines of the same networks take turns.
        Images are those of an engine that is made anew for these settings, with the same `ops`.
        Raises ValueError as the constructor does.
        """
        before = {k: v for k, v in self._settings.items() if "sampler" not in settings or k not in CHURN}
        _check_settings(self._networks, before | settings)
        other = copy.copy(self)
        other._set(before | settings)
        return other

    def _check_weak(self, model: EPGViT, weak: EPGViT) -> None:
        """Raise ValueError unless both are of the same images, and the output of both means the same."""
        pairs = {
            name: (getattr(weak, name), getattr(model, name)) for name in ("num_classes", "image_size", "in_chans")
        }
        for name in ("parameterization", "normalization"):
            pairs[name] = weak.metadata.get(name) or getattr(self, name), getattr(self, name)
        for name, (got, want) in pairs.items():
            if got != want:
                raise ValueError(f"autoguidance: the weaker model has {name} {got}, want {want} as the model has")
        if "noise" in weak.metadata and vars(_schedule(weak.metadata)) != vars(self._schedule):
            raise ValueError("autoguidance: the weaker model has another noise schedule than the model, want the same")

    def _set(self, settings: dict) -> None:
        """Make the trajectory of these settings, which have been checked."""
        self._settings = settings
        meaning = self._schedule, self.parameterization, self.normalization
        self._trajectory = Trajectory(self._networks, settings, *meaning, self.chosen.ops["steps"], self._noise)
        self.calls, self.evaluations = self._trajectory.calls, self._trajectory.evaluations
        self.guided = len(self._networks) > 1 or any(times > 1 for _, times in self.calls)
        self._recorded: dict[tuple[int, bool], GraphedFunction] = {}

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
        indices: Sequence[int] | None = None,
        seed: int = 0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images of the given classes: float32 [N, 3, H, W] in [0, 1], on the CPU. Arguments as in `stream`."""
        return torch.cat([images for _, images in self.stream(labels, indices, seed, noise)])

    def stream(
        self,
        labels: torch.Tensor | Sequence[int] | int,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        noise: torch.Tensor | None = None,
        as_uint8: bool = False,
    ) -> Iterator[tuple[slice, torch.Tensor | np.ndarray]]:
        """Images batch by batch, in order: (their places among the labels, float32 [B, 3, H, W] in [0, 1] on the CPU).

        labels: [N] class indices, or the number of images for an unconditional model. Image i starts from noise that
        depends on (seed, number of the image) only, so that the batch size does not matter; the numbers are `indices`
        [N], or 0, 1, ...; `noise` [N, 3, H, W] (unit variance) replaces the start. as_uint8: uint8 arrays
        [B, H, W, 3] instead. A GPU computes the next batch while the caller works on this one.
        Raises ValueError for labels out of range, negative numbers, noise of another shape, and for images with NaN
        where they have to become integers.
        """
        return self._stream(*self._inputs(labels, indices, seed, noise), as_uint8)

    def trajectory(
        self,
        labels: torch.Tensor | Sequence[int] | int,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[float, torch.Tensor]]:
        """(the images of a call, bit for bit; the clean estimates on the way to them, by shifted noise level).

        At most `batch_size` images, float32 [N, 3, H, W] in [0, 1] on the CPU, as are the estimates at each level. An
        estimate is what the sampler steps with: guided and clamped. Of a level that is evaluated twice, as Heun's are,
        it is the later one, at the corrected state; a level that is only arrived at has none. Levels are in the order
        of evaluation. Arguments and errors are those of `stream`. CUDA graphs are not used, whose images may differ in
        rounding.
        """
        inputs, seed = self._inputs(labels, indices, seed, noise)
        count, estimates = len(inputs[0]), {}
        if count > self.batch_size:
            raise ValueError(f"trajectory: got {count} images, want at most a batch of {self.batch_size}")
        numbers, *others = (_filled(x, self._size(count)).to(self.device) for x in inputs)
        with self._lock:
            images = self._compute(numbers, seed.to(self.device), *others, watch=estimates.__setitem__)
        return images[:count].cpu(), {sigma: seen[:count].cpu() for sigma, seen in estimates.items()}

    def _inputs(self, labels, indices, seed, noise) -> tuple[list[torch.Tensor], torch.Tensor]:
        """([numbers, labels, perhaps noise], seed [1]) of what a caller gave, which is checked."""
        y = _checked_labels(self.model, labels)
        numbers = torch.arange(len(y)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if len(numbers) != len(y) or (numbers < 0).any():
            raise ValueError(f"indices are {numbers.tolist()[:4]}..., want {len(y)} numbers, none of them negative")
        shape = (len(y), self.model.in_chans, self.model.image_size, self.model.image_size)
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, want {list(shape)}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, want 0 to 2^63 - 1")
        return [numbers, y, *([] if noise is None else [noise])], torch.tensor([int(seed)])

    def _stream(self, inputs: list[torch.Tensor], seed: torch.Tensor, as_uint8: bool):
        count, under_way = len(inputs[0]), []
        for start in range(0, count, self.batch_size):
            part = slice(start, min(start + self.batch_size, count))
            numbers, *others = (_filled(x[part], self._size(count)).to(self.device) for x in inputs)
            with self._lock:
                images = self._draw([numbers, seed.to(self.device), *others])[: part.stop - start]
                under_way.append(_fetch(part, images, as_uint8))
            if len(under_way) > images.is_cuda:
                yield under_way.pop(0)()
        for arrived in under_way:
            yield arrived()

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
            # shared with graphs that are still there: a pool that all have left takes no further one
            pool = next((graph.pool for graph in self._graphs), None) or torch.cuda.graph_pool_handle()
            try:
                self._recorded[key] = GraphedFunction(self._compute, inputs, pool)
                self._graphs.add(self._recorded[key])
            except RuntimeError as error:
                log.warning("no CUDA graphs: %s; launching kernels one by one", str(error).splitlines()[0])
                self.cuda_graphs = False
        return self._recorded[key](*inputs) if self.cuda_graphs else self._compute(*inputs)

    @torch.no_grad()
    def _compute(self, *inputs: torch.Tensor, watch: Callable | None = None) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(float32_products(tf32=self.precision == "tf32"))
            if self.precision not in ("fp32", "tf32"):
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.compile != "off":
                # every size of batch is compiled for itself, twice with guidance
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=_SHAPES))
            return self._trajectory(*inputs, watch=watch)


def sample(
    model: torch.nn.Module,
    labels: torch.Tensor | Sequence[int] | int,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    noise: torch.Tensor | None = None,
    compile: str = "off",
    cuda_graphs: bool | None = False,
    **options,
) -> torch.Tensor:
    """Images of the given classes: float32 [N, 3, H, W] in [0, 1], on the CPU.

    Arguments are those of `SamplingEngine` and of its `stream`. Nothing is compiled or recorded unless asked for: that
    takes longer than a few images. For many, or again and again, keep a `SamplingEngine`.
    """
    engine = SamplingEngine(model, compile=compile, cuda_graphs=cuda_graphs, **options)
    return engine(labels, seed=seed, indices=indices, noise=noise)


def _fetch(part: slice, images: torch.Tensor, as_uint8: bool) -> Callable[[], tuple[slice, torch.Tensor | np.ndarray]]:
    """Start to bring images to host memory, beside the batch after them; returns what waits for them."""
    # not a number has no colour, and uint8 no place for it
    tensors, event = [quantize(images), images.isnan().any()] if as_uint8 else [images], None
    if images.is_cuda:
        tensors = [torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, True) for x in tensors]
        event = torch.cuda.current_stream(images.device).record_event()

    def arrived():
        if event is not None:
            event.synchronize()
        if as_uint8 and tensors[1]:
            raise NotFinite("images contain NaN: the model or the sampler diverged")
        return part, tensors[0].numpy() if as_uint8 else tensors[0]

    return arrived


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


def _check_settings(networks: list[EPGViT], settings: dict) -> None:
    """Raise ValueError unless there is such a sampler, and such a guidance of these networks."""
    options = {name: value for name, value in settings.items() if name not in SETTINGS}
    check_sampler(settings["sampler"], settings["steps"], **options)
    guidance = settings["guidance"]
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}, want a finite number")
    if len(networks) == 1 and guidance != 1 and not networks[0].num_classes:
        raise ValueError(
            f"guidance is {guidance}, which needs a class-conditional network; this one is unconditional "
            "(num_classes=0): leave guidance at 1, or guide with a weaker model"
        )


def _schedule(metadata: Mapping, given: ScheduleConfig | None = None) -> NoiseSchedule:
    """The noise schedule that is given, else that of a checkpoint's metadata, else the standard one."""
    found = asdict(given) if given else metadata.get("noise", {})
    try:
        return NoiseSchedule(**found)
    except TypeError:
        raise ValueError(
            f"the checkpoint's noise schedule is {found!r}, want a mapping of sigma_min, sigma_max, rho and sigma_data"
        ) from None


def _checked_labels(model: EPGViT, labels: torch.Tensor | Sequence[int] | int) -> torch.Tensor:
    """Labels as int64 [N] on the CPU; for an unconditional model as many zeros. Raises ValueError for wrong ones."""
    number = isinstance(labels, (int, np.integer))
    if not model.num_classes:
        if not number or labels < 1:
            raise ValueError(f"this model is unconditional: pass the number of images (at least 1), got {labels}")
        return torch.zeros(operator.index(labels), dtype=torch.int64)
    given = torch.as_tensor([] if number else labels).flatten().cpu()
    y = given.long()
    wrong = given[(y < 0) | (y > model.num_classes) | (y != given)]
    if number or len(y) == 0 or len(wrong):
        got = f"label {wrong[0].item()}" if len(wrong) else f"the number {labels}" if number else "no labels"
        raise ValueError(f"got {got}, want labels in 0..{model.num_classes - 1} ({model.num_classes}: unconditional)")
    return y


class GraphedFunction:
    """`function(*inputs)` recorded once as a CUDA graph, and launched without Python or launches of kernels in between.

    function: of tensors to a tensor, without host synchronisation; it is called once to warm up (compilation, handles,
    workspaces) and once to be recorded. Calls take tensors of the shapes and dtypes of `inputs`; what they return is
    overwritten by the next call of any function with the same `pool` (`torch.cuda.graph_pool_handle()`).
    Raises RuntimeError when the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], pool):
        self.pool, self._inputs = pool, [x.clone() for x in inputs]
        self._device = self._inputs[0].device
        self._graph = torch.cuda.CUDAGraph()
        # what is recorded, and where it runs, follows the current device
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph, pool=pool):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._output
