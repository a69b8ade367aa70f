"""A training job on a batch that is on the device: by the plain code, and by the package's own update.

Both start from the same weights and are given the same images, noise, levels and labels, so that their losses can be
compared; dropout is off for that, and the learning rate constant, so that the first updates count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from bench import plain
from bench.bench_sample import lively
from epg_fast import config as configs
from epg_fast import training
from epg_fast.config import RunConfig
from epg_fast.diffusion import consistency_r, consistency_stage, curriculum_scales
from epg_fast.distributed import Ranks
from epg_fast.models import encoder_from_config, generator_from_config, preset_config
from epg_fast.models.fp8 import use_fp8
from epg_fast.training.compilation import begin_step, compile_stage
from epg_fast.training.draws import Draws
from epg_fast.training.loop import train_step
from epg_fast.training.state import RunState

JOBS = {"pretrain": "Pretrain", "finetune-diffusion": "Diffusion", "finetune-consistency": "Consistency"}


class Problem:
    """What is trained on what. job: one of `JOBS`; batch: images of an update."""

    def __init__(self, job: str, preset: str, batch: int, device: torch.device):
        self.job, self.preset, self.batch, self.device = job, preset, batch, device
        generator = torch.Generator().manual_seed(2)
        size = preset_config(preset)["image_size"]
        names = ("x", "view1", "view2") if job == "pretrain" else ("x",)
        shape = (batch, 3, size, size)
        self.images = {name: torch.randn(shape, generator=generator).mul(0.5).to(device) for name in names}
        classes = preset_config(preset)["num_classes"]
        self.images["label"] = torch.randint(classes, (batch,), generator=generator).to(device)

    def config(self, **options) -> RunConfig:
        """The stage's own settings, with `options`, no dropout and no warm-up."""
        made = getattr(configs, JOBS[self.job] + "Config")(
            outdir="unused", model=configs.ModelConfig(self.preset), batch_size=self.batch, **options
        )
        made.optimizer.schedule, made.optimizer.warmup_steps, made.optimizer.clip_after = "constant", 0, 0
        if hasattr(made, "dropout"):
            made.dropout = 0.0
        return made

    def weights(self) -> dict[str, torch.Tensor]:
        """Of every rung, at the start."""
        torch.manual_seed(3)
        with self.device:
            if self.job == "pretrain":
                return encoder_from_config(preset_config(self.preset)).state_dict()
            return lively(generator_from_config(preset_config(self.preset))).state_dict()

    def judge(self) -> dict[str, torch.Tensor] | None:
        """Weights of consistency training's frozen encoder; None for the other jobs."""
        if self.job != "finetune-consistency":
            return None
        torch.manual_seed(4)
        with self.device:
            return encoder_from_config(preset_config(self.preset)).state_dict()

    def draws(self, update: int) -> Draws:
        """The random numbers that the package's update takes."""
        return Draws(0, update, 0, self.batch, self.device)


class PlainTraining:
    """`bench.plain` on a problem. dtype: of autocast, None for float32; compiled: with torch.compile.

    `step()` makes an update with random numbers of its own, and `losses(n)` the first n with those of the problem.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype | None, compiled: bool = False, recompute: bool = False):
        self.problem, self.config = problem, problem.config()
        kind = plain.PlainEncoder if problem.job == "pretrain" else plain.PlainGenerator
        network, average = (self._network(kind, problem.weights()) for _ in range(2))
        if recompute:
            _recompute(network)
        average.eval().requires_grad_(False)
        self.perceptual = None
        if (judge := problem.judge()) is not None:
            self.perceptual = self._network(plain.PlainEncoder, judge).eval().requires_grad_(False)
        called = [network, average if problem.job == "pretrain" else None, self.perceptual]
        for module in filter(None, called if compiled else []):
            module.compile(dynamic=False)
        o = self.config.optimizer
        self.trainer = plain.Trainer(
            network,
            average,
            lr=o.lr,
            betas=o.betas,
            weight_decay=o.weight_decay,
            exempt=() if o.decay_tokens else ("pos_embed", "cls_token"),
            average_decay=getattr(self.config, "target_ema", None) or self.config.ema,
            warmup_steps=0,
            clip_norm=o.clip_norm,
            dtype=dtype,
        )

    def _network(self, kind: type, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        with self.problem.device:
            network = plain.from_config(kind, preset_config(self.problem.preset))
        network.load_state_dict(weights, strict=True)
        return network

    def step(self) -> None:
        images = self.problem.images
        if self.problem.job == "pretrain":
            plain.pretraining_step(self.trainer, images["x"], images["view1"], images["view2"])
        elif self.problem.job == "finetune-diffusion":
            plain.denoising_step(self.trainer, images["x"], images["label"])
        else:
            plain.consistency_step(self.trainer, images["x"], images["label"], 1, self.perceptual)

    def losses(self, count: int) -> list[float]:
        return [self.trainer.step(*self._arguments(update), **self._options()) for update in range(count)]

    def _options(self) -> dict:
        return {"perceptual": self.perceptual} if self.problem.job == "finetune-consistency" else {}

    def _arguments(self, update: int) -> tuple:
        """A loss of `bench.plain` and its arguments, as the package's stage would draw them."""
        c, images, draws = self.config, self.problem.images, self.problem.draws(update)
        noise = draws.normal("noise", *images["x"].shape[1:])
        if self.problem.job == "pretrain":
            scales = curriculum_scales(update, c.steps, c.start_scales, c.end_scales)
            index = torch.tensor(draws.integer("index", scales - 1), device=self.problem.device)
            views = (images["x"], images["view1"], images["view2"])
            return plain.pretraining_loss, self.trainer.average, *views, noise, index, scales
        dropped = draws.uniform("label") < c.label_dropout
        labels = torch.where(dropped, self.trainer.network.num_classes, images["label"])
        level = torch.exp(c.p_mean + c.p_std * draws.normal("level"))
        if self.problem.job == "finetune-diffusion":
            return plain.denoising_loss, images["x"], noise, labels, level
        stage = consistency_stage(update, c.first_stage, c.stage_length, c.delta)
        t = level.clamp_min(c.noise.sigma_min)
        r = consistency_r(t, stage, c.q, c.k, c.b, c.noise.sigma_min)
        return plain.consistency_loss, images["x"], noise, labels, t, r, stage


class OurTraining:
    """The package's update, as `epg_fast.training.train` makes it. options: of the run's configuration."""

    def __init__(self, problem: Problem, optimizer: str, **options):
        self.problem = problem
        self.config = config = problem.config(**options)
        config.optimizer.backend = optimizer
        ranks = Ranks(0, 1, problem.device)
        with problem.device:
            stage = getattr(training, JOBS[problem.job] + "Stage")(config, ranks)
        for network in (stage.network, stage.ema):
            network.load_state_dict(problem.weights(), strict=True)
        if (judge := problem.judge()) is not None:
            encoder = encoder_from_config(preset_config(problem.preset)).to(problem.device)
            encoder.load_state_dict(judge, strict=True)
            stage.perceptual = encoder.use_ops(stage.chosen.ops).eval().requires_grad_(False)
        self.state = RunState(config, stage, _NoImages(), ranks)
        if config.fp8:
            use_fp8(stage.network)
        self._losses = _Losses()
        compile_stage(stage)

    def step(self) -> None:
        begin_step(self.config)
        train_step(self.state, self.problem.images, self._losses)

    def losses(self, count: int) -> list[float]:
        for _ in range(count):
            self.step()
        return [loss.item() for loss in self._losses.found[:count]]


class _Losses:
    """In the place of a run's metrics."""

    def __init__(self):
        self.found: list[torch.Tensor] = []

    def add(self, names, sums, counts, made) -> None:
        self.found = [*self.found[:8], sums[names.index("loss")]]


class _NoImages:
    """In the place of a run's images."""

    def fingerprint(self) -> str:
        return ""


def _recompute(network: torch.nn.Module) -> None:
    """Compute the blocks again in the backward pass, in place: the same numbers in less memory."""

    def again(forward: Callable) -> Callable:
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)

    for block in _blocks(network):
        block.forward = again(block.forward)


def _blocks(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    yield from network.blocks
    yield from getattr(network, "decoder_blocks", ())
