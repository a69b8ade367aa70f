"""What the ledger counts: jobs of sampling and training, each done by several variants.

They are the plain code (`bench.plain`) and the package's plain operations ("auto") under torch.compile, with what a
keen user would try, of which the best is the rival; and the package's kernels ("ours"), with compiled blocks, with a
compiled network, with norms within products and with the extension's products. Weights of the plain code are cast for
sampling once, as anyone would, and its optimiser is PyTorch's fused one with one foreach call for the EMA, not the
loops that `bench.plain` has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch._inductor import config
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import roofline
from bench.ledger.cost import H200, KINDS, OPTIMISER
from bench.ledger.count import Counter
from bench.plain import PlainGenerator, Sampler, Trainer, from_config
from bench.roofline import Work
from bench.sample import GUIDANCE, INTERVAL
from epg_fast import SamplingEngine
from epg_fast.diffusion import NoiseSchedule
from epg_fast.models import create_model, preset_config
from epg_fast.models.compilation import compile_blocks, compile_denoising, compile_network
from epg_fast.plans import site_choices
from epg_fast.plans.sites import sites_of
from epg_fast.sampling.precision import inference_network
from epg_fast.training.optimizer import WeightCopies

_XL, _G, _L = "epg_xl_16_256", "epg_g_16_256", "epg_l_16_256"


class NotCounted(Exception):
    """A job cannot be done this way; says why."""


@dataclass(frozen=True)
class Variant:
    """A way of doing jobs. code: "plain" (bench/plain.py), "auto" (ours, with PyTorch's operators) or "ours".

    how: what torch.compile gets. ops: of the package, at all sites or by site: "cuda" are the extension's products.
    optimizer: of the package, in whole updates: "fused" is the extension's, "torch" PyTorch's. within: a context.
    """

    name: str
    code: str
    how: str
    ops: str | Mapping[str, str] = "plain"
    optimizer: str = "torch"
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


_TUNED = partial(config.patch, coordinate_descent_tuning=True, epilogue_fusion=False)
# Norms within the products that read them.
_PROLOGUE = site_choices("triton") | dict.fromkeys(sites_of("norm"), "prologue")
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain-blocks", "plain", "blocks"),
        Variant("plain-network", "plain", "network"),
        Variant("plain-tuned", "plain", "network", within=_TUNED),
        Variant("plain-cudnn", "plain", "network", within=partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
        Variant("auto-blocks", "auto", "blocks"),
        Variant("auto-network", "auto", "network"),
        Variant("ours-blocks", "ours", "blocks", "triton", "fused"),
        Variant("ours-network", "ours", "network", "triton", "fused"),
        Variant("ours-prologue", "ours", "blocks", _PROLOGUE, "fused"),
        Variant("ours-cuda", "ours", "blocks", "cuda", "fused"),
    )
}


@dataclass(frozen=True)
class Job:
    """prepare: makes a call that tells the counter where a phase ends. counted: phases that make up the job; others are
    listed beside it. task: a training job's. levels: a trajectory's."""

    name: str
    preset: str
    batch: int
    dtype: str
    counted: tuple[str, ...]
    prepare: Callable[[Counter, Job, Variant], Callable[[], None]]
    levels: int = 1
    task: str = ""

    @property
    def shape(self) -> str:
        return f"{self.preset}, batch {self.batch}" + (f", {self.levels} levels" if self.levels > 1 else "")

    def least(self) -> Work:
        """The job in the largest fusion there is; forward and backward pass alone leave out what is behind them."""
        if not self.task:
            return roofline.sampling(self.preset, self.batch, self.levels, INTERVAL)
        work = roofline.update(self.task, self.preset, self.batch)
        if "update" in self.counted:
            return work
        return Work(self.batch, tuple(op for op in work.ops if op.name != "patch_loss" and op.direction != "update"))


def _sampling_call(counter: Counter, job: Job, variant: Variant, **sizes: int) -> Callable:
    """One call of the denoiser; the package computes what depends on level and label ahead of it.

    sizes: of the package's network that differ from the preset's.
    """
    if variant.code == "plain":
        network, (x, t, y) = _plain_generator(job, variant), _inputs(job, torch.float32)

        def step():
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                network(x, t, y)
            counter.end("call")
    else:
        network = inference_network(_generator(job, variant, **sizes), job.dtype)
        x, t, y = _inputs(job, network.pos_embed.dtype)
        compile_denoising(network, variant.how)

        def step():
            with torch.no_grad():
                conditioning = network.conditioning(t, y)
                counter.end("conditioning")
                network.denoise(x, conditioning)
                counter.end("call")

    return step


def _images(counter: Counter, job: Job, variant: Variant) -> Callable:
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

    return step


def _gradients(counter: Counter, job: Job, variant: Variant) -> Callable:
    """Forward and backward pass of the network alone, from a gradient of its output; the optimiser wrote the copies."""
    copies = WeightCopies((), None)
    if variant.code == "plain":
        network = _plain_generator(job, variant, train=True)
    else:
        network = _generator(job, variant).train()
        (compile_network if variant.how == "network" else compile_blocks)(network)
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

    return step


def _update(counter: Counter, job: Job, variant: Variant) -> Callable:
    """A whole update: forward and backward pass of the loss, clipping, AdamW, EMA."""
    from bench.train import OurTraining, PlainTraining, Problem

    with torch.device("cuda"):
        problem = Problem(job.task, job.preset, job.batch, torch.device("cuda", 0))
    if variant.code == "plain":
        with torch.device("cuda"):
            training = PlainTraining(problem, torch.bfloat16)
        for network in {training.trainer.network, training.trainer.ema, training.perceptual} - {None}:
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

    def as_optimiser(call: Callable, *args, **kwargs):
        counter.kind = OPTIMISER
        try:
            return call(*args, **kwargs)
        finally:
            counter.kind = None

    def step():
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
            if variant.code != "plain":
                stack.enter_context(mock.patch.object(optimise, "step", partial(as_optimiser, optimise.step)))
            update()
        counter.kind = None
        counter.end("update")

    return step


_BACKWARD = torch.Tensor.backward


def _keen(trainer: Trainer) -> None:
    """PyTorch's fused AdamW and one foreach call for the EMA."""
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in trainer.optimizer.param_groups]
    first = trainer.optimizer.param_groups[0]
    trainer.optimizer = torch.optim.AdamW(groups, lr=first["lr"], betas=first["betas"], fused=True)

    @torch.no_grad()
    def update_ema() -> None:
        emas, weights = list(trainer.ema.parameters()), list(trainer.network.parameters())
        torch._foreach_lerp_(emas, weights, 1 - trainer.ema_decay)

    trainer.update_ema = update_ema


def _generator(job: Job, variant: Variant, **sizes: int) -> torch.nn.Module:
    with torch.device("cuda"):
        return create_model(job.preset, **sizes).use_ops(variant.ops).eval()


def _plain_generator(job: Job, variant: Variant, train: bool = False) -> torch.nn.Module:
    if job.dtype == "fp8":
        raise NotCounted("the plain code has no FP8; auto-blocks and auto-network are PyTorch's")
    with torch.device("cuda"):
        network = from_config(PlainGenerator, preset_config(job.preset)).train(train)
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
def compiling_as_is(counter: Counter) -> Iterator[None]:
    """Inside, tensors have no memory and torch.compile is described.

    What PyTorch cannot do to such tensors, or with generators that would have some, is left out.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor),
            (torch.nn.Module, "to", lambda module, *_, **__: module),  # all are made there
            (torch.nn.Module, "_apply", _apply),
            # which take their slow paths for tensors of other types than PyTorch's own
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (NoiseSchedule, "levels", _levels),
            (torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(counter.compiling())
        stack.enter_context(counter)
        yield


def _apply(module: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
    """Like PyTorch's, which swaps the insides of tensors, as those without memory do not allow."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, weight in module._parameters.items():
        if weight is not None:
            module._parameters[name] = torch.nn.Parameter(fn(weight.detach()), weight.requires_grad)
    module._buffers |= {name: fn(value) for name, value in module._buffers.items() if value is not None}
    return module


_LEVELS = NoiseSchedule.levels


def _levels(*arguments) -> list[float]:
    """Noise levels are numbers that samplers look at."""
    with unset_fake_temporarily():
        return _LEVELS(*arguments)


def count(job: Job, variant: Variant) -> Counter:
    """A counter with a job's kernels. Raises NotCounted if it cannot be done this way."""
    if variant.name == "ours-prologue" and (job.task or job.dtype == "fp8"):
        raise NotCounted("norms within products are of sampling in 16 bits; elsewhere this is ours-blocks")
    counter = Counter()
    with variant.within(), compiling_as_is(counter):
        try:
            call = job.prepare(counter, job, variant)
            call()  # compiles
            counter.phases.clear()
            counter.kernels.clear()
            with counter.counting():
                call()
        except ValueError as error:
            raise NotCounted(str(error).splitlines()[0]) from error
    return counter


def least_seconds(job: Job) -> dict[str, float]:
    """Floors by kind in the largest fusion there is; in FP8 of the products that can be."""
    seconds, fp8 = dict.fromkeys(KINDS, 0.0), (" qkv", " proj", " fc1", " fc2", " skip_linear")
    for op in job.least().ops:
        halved = job.dtype == "fp8" and any(word in op.name for word in fp8)
        seconds[op.kind] += op.times * H200.floor(op.flops / (2 if halved else 1), op.bytes)
    return seconds


_UPDATE = ("forward", "backward", "update")
JOBS = {
    job.name: job
    for job in (
        Job("sample_xl", _XL, 64, "bf16", ("call",), _sampling_call),
        Job("sample_xl_fp8", _XL, 64, "fp8", ("call",), _sampling_call),
        Job("sample_g", _G, 64, "bf16", ("call",), _sampling_call),
        Job("sample_l_32", "epg_l_32_512", 64, "bf16", ("call",), _sampling_call),
        Job("heun_xl", _XL, 64, "bf16", ("images",), _images, levels=32),
        Job("heun_xl_fp8", _XL, 64, "fp8", ("images",), _images, levels=32),
        Job("heun_g", _G, 64, "bf16", ("images",), _images, levels=32),
        Job("heun_l_32", "epg_l_32_512", 64, "bf16", ("images",), _images, levels=32),
        Job("onestep_l_1", _L, 1, "bf16", ("images",), _images),
        Job("onestep_l_64", _L, 64, "bf16", ("images",), _images),
        Job("train_xl", _XL, 64, "bf16", ("forward", "backward"), _gradients, task="finetune-diffusion"),
        Job("update_pretrain", _XL, 256, "bf16", _UPDATE, _update, task="pretrain"),
        Job("update_diffusion", _XL, 64, "bf16", _UPDATE, _update, task="finetune-diffusion"),
        Job("update_consistency", _L, 64, "bf16", _UPDATE, _update, task="finetune-consistency"),
    )
}
