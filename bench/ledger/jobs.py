"""What the ledger counts: jobs of sampling and training, each done in several ways.

The ways are the plain code (`bench.plain`) and the package's plain operations ("auto") under torch.compile, with what
a keen user would try, of which the best is the rival; and the package's kernels ("ours"), with compiled blocks, with
a compiled network and with the extension's products. Weights of the plain code are cast for sampling once, as anyone
would, and its optimiser is PyTorch's fused one with one foreach call for the average, not the loops that
`bench.plain` has.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from bench import parts, plain
from bench.ledger.cost import OPTIMISER
from bench.ledger.count import Counter
from bench.plain.sampling import Sampler
from epg_fast import SamplingEngine
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import create_model, preset_config
from epg_fast.models.compilation import compile_denoising
from epg_fast.plans import PLAIN, Chosen
from epg_fast.sampling.precision import inference_network
from epg_fast.training.compilation import compile_stage
from epg_fast.training.weight_copies import WeightCopies

GUIDANCE, INTERVAL = 2.5, (0.19, 1.61)
_XL, _G, _L = "epg_xl_16_256", "epg_g_16_256", "epg_l_16_256"


class NotCounted(Exception):
    """A job cannot be done this way; says why."""


@dataclass(frozen=True)
class Variant:
    """A way of doing jobs. code: "plain" (bench/plain), "auto" (ours, with PyTorch's operators) or "ours".

    how: what torch.compile gets.
    """

    name: str
    code: str
    how: str
    tuned: bool = False
    """With coordinate descent, and without fusing into templates."""
    attention: str | None = None
    """The only one of PyTorch's that is allowed."""
    optimizer: str = "fused"
    """Of the package, in whole updates: "fused" is the extension's, "torch" PyTorch's."""
    cutlass: bool = False
    """With the extension's products in the place of Triton's."""

    @property
    def ours(self) -> bool:
        return self.code == "ours"

    @property
    def ops(self) -> str:
        if self.cutlass:
            return "cuda"
        return "triton" if self.ours else "plain"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain-blocks", "plain", "blocks"),
        Variant("plain-network", "plain", "network"),
        Variant("plain-tuned", "plain", "network", tuned=True),
        Variant("plain-cudnn", "plain", "network", attention="CUDNN_ATTENTION"),
        Variant("auto-blocks", "auto", "blocks", optimizer="torch"),
        Variant("auto-network", "auto", "network", optimizer="torch"),
        Variant("ours-blocks", "ours", "blocks"),
        Variant("ours-network", "ours", "network"),
        Variant("ours-cuda", "ours", "blocks", cutlass=True),
    )
}


@dataclass(frozen=True)
class Job:
    """count: notes a job's kernels in a counter. counted: phases that make up the job; others are listed beside it."""

    name: str
    preset: str
    batch: int
    dtype: str
    counted: tuple[str, ...]
    count: Callable[[Counter, Job, Variant], None]
    least: Callable[[Job], parts.Job] | None = None
    """The job in the largest fusion there is, of `bench.parts`."""
    levels: int = 1

    @property
    def shape(self) -> str:
        return f"{self.preset}, batch {self.batch}" + (f", {self.levels} levels" if self.levels > 1 else "")


def _sampling_call(counter: Counter, job: Job, variant: Variant) -> None:
    """One call of the denoiser; the package computes what depends on level and label ahead of it."""
    if variant.code == "plain":
        network, (x, t, y) = _plain_generator(job, variant), _inputs(job, torch.float32)

        def step():
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                network(x, t, y)
            counter.end("call")
    else:
        network = inference_network(_generator(job, variant), job.dtype)
        x, t, y = _inputs(job, network.pos_embed.dtype)
        compile_denoising(network, variant.how)

        def step():
            with torch.no_grad():
                conditioning = network.conditioning(t, y)
                counter.end("conditioning")
                network.denoise(x, conditioning)
                counter.end("call")

    _second(counter, step)


def _images(counter: Counter, job: Job, variant: Variant) -> None:
    """A batch of images from labels: a trajectory with interval guidance, or one step."""
    heun = job.levels > 1
    if variant.code == "plain":
        sampler = Sampler(_plain_generator(job, variant), job.levels, torch.bfloat16, GUIDANCE, INTERVAL)
        noise, _, labels = _inputs(job, torch.float32)
        # the levels that guidance reads on the host, in order
        levels = NoiseSchedule().levels(job.levels, sampler.network.image_size)
        read = [level for pair in zip(levels, levels[1:], strict=False) for level in pair]

        def step():
            counter.read = iter(read)
            sampler(noise, labels)
            counter.end("images")
    else:
        # its trial product would find that a GPU which is not there multiplies wrongly, and take 16 bits
        with mock.patch("epg_fast.sampling.engine.available_precision", lambda precision, device: precision):
            engine = SamplingEngine(
                _generator(job, variant),
                sampler="heun" if heun else "onestep",
                steps=job.levels,
                guidance=GUIDANCE if heun else 1.0,
                interval=INTERVAL,
                parameterization="x0" if heun else "edm",
                batch_size=job.batch,
                precision=job.dtype,
                compile=variant.how,
                cuda_graphs=False,
            )
        labels = torch.empty(job.batch, dtype=torch.int64, device="cuda")
        seed = torch.empty(1, dtype=torch.int64, device="cuda")

        def step():
            engine._compute(labels, seed, labels)
            counter.end("images")

    _second(counter, step)


def _gradients(counter: Counter, job: Job, variant: Variant) -> None:
    """Forward and backward pass of the network alone, from a gradient of its output; the optimiser wrote the copies."""
    copies = WeightCopies((), None)
    if variant.code == "plain":
        network = _plain_generator(job, variant, train=True)
    else:
        network = _generator(job, variant).train()
        config = SimpleNamespace(cuda_graphs=False)
        stage = SimpleNamespace(
            chosen=Chosen(PLAIN),
            network=network,
            ema=None,
            name="finetune-diffusion",
            sharded=False,
            config=config,
        )
        compile_stage(stage, "network" if variant.how == "network" else "blocks")
        copies = WeightCopies([network], torch.bfloat16)
    x, t, y = _inputs(job, torch.float32)

    def step():
        network.zero_grad(set_to_none=True)
        with copies.in_use():
            with torch.autocast("cuda", torch.bfloat16):
                out = network(x, t, y)
            counter.end("forward")
            out.backward(torch.empty_like(out))
            counter.end("backward")

    _second(counter, step)


def _update(task: str, counter: Counter, job: Job, variant: Variant) -> None:
    """A whole update: forward and backward pass of the loss, clipping, AdamW, average."""
    from bench.train_jobs import OurTraining, PlainTraining, Problem

    with torch.device("cuda"):
        problem = Problem(task, job.preset, job.batch, torch.device("cuda", 0))
    if variant.code == "plain":
        with torch.device("cuda"):
            training = PlainTraining(problem, torch.bfloat16)
        for network in {training.trainer.network, training.trainer.average, training.perceptual} - {None}:
            _compile_plain(network, variant)
        _keen(training.trainer)
        optimise, update = training.trainer, training.step
    else:
        options = {"ops": variant.ops, "compile": variant.how, "precision": "bf16"}
        with torch.device("cuda"):
            training = OurTraining(problem, variant.optimizer, **options)
        optimise, update = training.state.optimizer, training.step

    def backward(loss, *args, **kwargs):
        counter.end("forward")
        _BACKWARD(loss, *args, **kwargs)
        counter.end("backward")
        counter.kind = OPTIMISER if variant.code == "plain" else None

    def step():
        with contextlib.ExitStack() as stack:
            stack.enter_context(_patched(torch.Tensor, "backward", backward))
            if variant.code != "plain":
                stack.enter_context(_patched(optimise, "step", partial(_as_optimiser, counter, optimise.step)))
            update()
        counter.kind = None
        counter.end("update")

    _second(counter, step)


_BACKWARD = torch.Tensor.backward


def _as_optimiser(counter: Counter, call: Callable, *args, **kwargs):
    counter.kind = OPTIMISER
    try:
        return call(*args, **kwargs)
    finally:
        counter.kind = None


def _keen(trainer: plain.Trainer) -> None:
    """PyTorch's fused AdamW and one foreach call for the average."""
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in trainer.optimizer.param_groups]
    first = trainer.optimizer.param_groups[0]
    trainer.optimizer = torch.optim.AdamW(groups, lr=first["lr"], betas=first["betas"], fused=True)

    @torch.no_grad()
    def update_average() -> None:
        averages, weights = list(trainer.average.parameters()), list(trainer.network.parameters())
        torch._foreach_lerp_(averages, weights, 1 - trainer.average_decay)

    trainer.update_average = update_average


def _second(counter: Counter, step: Callable[[], None]) -> None:
    """Count the second of two calls: the first compiles."""
    step()
    counter.phases.clear()
    counter.kernels.clear()
    with counter.counting():
        step()


def _generator(job: Job, variant: Variant) -> torch.nn.Module:
    with torch.device("cuda"):
        return create_model(job.preset).use_ops(variant.ops).eval()


def _plain_generator(job: Job, variant: Variant, train: bool = False) -> torch.nn.Module:
    if job.dtype == "fp8":
        raise NotCounted("the plain code has no FP8; auto-blocks and auto-network are PyTorch's")
    with torch.device("cuda"):
        network = plain.from_config(plain.PlainGenerator, preset_config(job.preset)).train(train)
    if not train:
        for module in network.modules():
            for name, weight in module.named_parameters(recurse=False):
                cast = weight.detach() if isinstance(module, torch.nn.LayerNorm) else weight.detach().bfloat16()
                setattr(module, name, torch.nn.Parameter(cast, requires_grad=False))
    _compile_plain(network, variant)
    return network


def _compile_plain(network: torch.nn.Module, variant: Variant) -> None:
    if variant.how == "network":
        network.compile(dynamic=False)
        return
    for block in [*network.blocks, *getattr(network, "decoder_blocks", ())]:
        block.compile(dynamic=False)


def _inputs(job: Job, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, time conditions and labels."""
    size = preset_config(job.preset)["image_size"]
    with torch.device("cuda"):
        images = torch.empty(job.batch, 3, size, size, dtype=dtype)
        return images, torch.empty(job.batch), torch.empty(job.batch, dtype=torch.int64)


@contextlib.contextmanager
def _patched(owner, name: str, value) -> Iterator[None]:
    own, before = vars(owner).get(name), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None and not isinstance(owner, type):
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """What PyTorch cannot do to tensors without memory, or with generators that would have some, left out."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor))
        stack.enter_context(_patched(torch.nn.Module, "to", lambda module, *_, **__: module))  # all are made there
        # which take their slow paths for tensors of other types than PyTorch's own
        stack.enter_context(_patched(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True))
        stack.enter_context(_patched(NoiseSchedule, "levels", _levels))
        stack.enter_context(_patched(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext()))
        yield


@contextlib.contextmanager
def compiling_as_is(counter: Counter) -> Iterator[None]:
    """Inside, tensors have no memory and torch.compile is described."""
    with _without_values(), counter.compiling(), counter:
        yield


_LEVELS = NoiseSchedule.levels


def _levels(*arguments) -> list[float]:
    """Noise levels are numbers that samplers look at."""
    with unset_fake_temporarily():
        return _LEVELS(*arguments)


def count(job: Job, variant: Variant) -> Counter:
    """A counter with a job's kernels. Raises NotCounted if it cannot be done this way."""
    from torch._inductor import config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    counter = Counter()
    with contextlib.ExitStack() as stack:
        if variant.tuned:
            stack.enter_context(config.patch(coordinate_descent_tuning=True, epilogue_fusion=False))
        if variant.attention:
            stack.enter_context(sdpa_kernel(getattr(SDPBackend, variant.attention)))
        stack.enter_context(compiling_as_is(counter))
        try:
            job.count(counter, job, variant)
        except ValueError as error:
            raise NotCounted(str(error).splitlines()[0]) from error
    return counter


def _forward(job: Job) -> parts.Job:
    return parts.forward(_on_meta(job), job.batch)


def _heun(job: Job) -> parts.Job:
    return parts.heun(_on_meta(job), job.batch, job.levels, INTERVAL)


def _trained(task: str, job: Job) -> parts.Job:
    return next(made for made in map(parts.training, parts.training_stages(job.preset, job.batch)) if made.name == task)


def _forward_and_backward(job: Job) -> parts.Job:
    """A diffusion update without what is behind the network, and before it."""
    made = _trained("finetune-diffusion", job)
    kept = [part for part in made.parts if part.name != "patch_loss" and part.direction != "update"]
    return dataclasses.replace(made, parts=tuple(kept))


def _on_meta(job: Job) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(job.preset)


def _update_job(name: str, task: str, preset: str, batch: int) -> Job:
    return Job(
        name,
        preset,
        batch,
        "bf16",
        ("forward", "backward", "update"),
        partial(_update, task),
        partial(_trained, task),
    )


JOBS = {
    job.name: job
    for job in (
        Job("sample_xl", _XL, 64, "bf16", ("call",), _sampling_call, _forward),
        Job("sample_xl_fp8", _XL, 64, "fp8", ("call",), _sampling_call, _forward),
        Job("sample_g", _G, 64, "bf16", ("call",), _sampling_call, _forward),
        Job("sample_l_32", "epg_l_32_512", 64, "bf16", ("call",), _sampling_call, _forward),
        Job("heun_xl", _XL, 64, "bf16", ("images",), _images, _heun, 32),
        Job("heun_xl_fp8", _XL, 64, "fp8", ("images",), _images, _heun, 32),
        Job("heun_g", _G, 64, "bf16", ("images",), _images, _heun, 32),
        Job("heun_l_32", "epg_l_32_512", 64, "bf16", ("images",), _images, _heun, 32),
        Job("onestep_l_1", _L, 1, "bf16", ("images",), _images, _forward),
        Job("onestep_l_64", _L, 64, "bf16", ("images",), _images, _forward),
        Job("train_xl", _XL, 64, "bf16", ("forward", "backward"), _gradients, _forward_and_backward),
        _update_job("update_pretrain", "pretrain", _XL, 256),
        _update_job("update_diffusion", "finetune-diffusion", _XL, 64),
        _update_job("update_consistency", "finetune-consistency", _L, 64),
    )
}
