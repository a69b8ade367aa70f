"""The ladder of training: plain PyTorch, 16 bits, torch.compile, the package's update, its optimiser, CUDA graphs, FP8.

An update is timed from a batch on the device to the EMA: forward, backward, clipping where the stage has it, AdamW,
EMA. The lowest variant is in the released precision: float16 with a loss scale for pre-training; for the other stages,
where the specification names none, float32. An error is that of the first losses, with the same weights, images and
random numbers, against those of the plain code in float32 (relative L2). Dropout is off, so that losses can be
compared; the learning rate is constant, so that the first updates count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch.utils.checkpoint import checkpoint

from bench import measure, plain, roofline
from bench.ladder import Ladder, NotHere, Ready, Variant, chosen, default_device
from bench.plain import PlainEncoder, PlainGenerator, from_config
from bench.roofline import STAGES
from epg_fast import config as configs
from epg_fast import training
from epg_fast.config import RunConfig
from epg_fast.diffusion import consistency_r, consistency_stage, curriculum_scales
from epg_fast.distributed import Ranks
from epg_fast.models import encoder_from_config, generator_from_config, preset_config
from epg_fast.models.fp8 import require_fp8, use_fp8
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import compile_stage
from epg_fast.training.loop import train_step
from epg_fast.training.state import RunState
from epg_fast.tuning.workloads import NoImages, lively

_EAGER = {"optimizer": "torch", "compile": "off", "ops": "plain"}
_BLOCKS = _EAGER | {"compile": "blocks"}
_NETWORK = _EAGER | {"compile": "network"}
_COMMON = (
    Variant("plain, 16 bits", "bf16", {"plain": None}, profiled=True),
    Variant("plain, torch.compile", "bf16", {"plain": "network"}),
    Variant("ours", "bf16", _EAGER),
    Variant("ours, compiled blocks", "bf16", _BLOCKS, profiled=True),
    Variant("ours, blocks, fused optimiser", "bf16", _BLOCKS | {"optimizer": "fused"}, profiled=True),
    Variant("ours, blocks, Triton kernels", "bf16", _BLOCKS | {"ops": "triton"}, profiled=True),
    Variant("ours, planned", "bf16", {"ops": "auto"}, profiled=True),
    Variant("ours, blocks, FP8", "fp8", _BLOCKS | {"fp8": "rowwise"}, profiled=True),
    Variant("ours, compiled network", "bf16", _NETWORK),  # compiles for minutes, as the next
    Variant("ours, network, CUDA graphs", "bf16", _NETWORK | {"cuda_graphs": True}),
)
VARIANTS = {job: (Variant("plain", "fp32", {"plain": None}), *_COMMON) for job in STAGES}
VARIANTS["pretrain"] = (Variant("plain", "fp16", {"plain": None}), *_COMMON)

_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Training(Ladder):
    """job: a stage's; batch: images of an update; compared: losses."""

    unit = "images/s"

    def __init__(
        self,
        job: str = "finetune-diffusion",
        preset: str = "epg_xl_16_256",
        batch: int = 64,
        *,
        seconds: float = 4.0,
        compared: int = 3,
        device: str | None = None,
        variants: list[str] | None = None,
    ):
        self.job, self.preset, self.images, self.shape = job, preset, batch, f"{preset}, batch {batch}"
        self.seconds, self.compared = seconds, compared
        self.device = torch.device(device or default_device())
        self.variants = chosen(VARIANTS[job], variants)

    @cached_property
    def work(self) -> roofline.Work:
        return roofline.update(self.job, self.preset, self.images)

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.job, self.preset, self.images, self.device)

    @cached_property
    def reference(self) -> torch.Tensor:
        """The first losses in float32: [compared] float64."""
        return torch.tensor(PlainTraining(self.problem, None, recompute=True).losses(self.compared)).double()

    def prepare(self, variant: Variant) -> Ready:
        made = self._made(variant)
        losses = torch.tensor(made.losses(self.compared)).double()
        error = ((losses - self.reference).norm() / self.reference.norm()).item()
        made.step()
        once = measure.rounds(made.step, self.device, 0.0, least=1)[0]
        # an update is launched while the one before it is computed
        calls = max(1, min(10, round(0.2 * self.seconds / once))) if self.device.type == "cuda" else 1
        planned = isinstance(made, OurTraining) and made.state.stage.chosen.plan and "ops" not in variant.options
        return Ready(
            made.step,
            error,
            calls=calls,
            notes=["planned"] if planned else [],
            details={"first_losses": losses.tolist()},
        )

    def _made(self, variant: Variant) -> PlainTraining | OurTraining:
        options, cuda = variant.options, self.device.type == "cuda"
        if "plain" in options:
            return PlainTraining(self.problem, _DTYPES[variant.dtype], compiled=options["plain"] == "network")
        if not cuda and (options.get("ops") == "triton" or {"cuda_graphs", "fp8"} & set(options)):
            raise NotHere("needs a CUDA device")
        try:
            if "fp8" in options:
                require_fp8(self.device)
            made = OurTraining(self.problem, **({"precision": "fp32"} if variant.dtype == "fp32" else {}), **options)
        except ValueError as reason:  # what this machine lacks
            raise NotHere(str(reason)) from None
        if options.get("ops") == "auto" and made.state.stage.chosen.plan is None:
            raise NotHere(made.state.stage.chosen.why)
        return made


class Problem:
    """What is trained on what. batch: images of an update."""

    def __init__(self, job: str, preset: str, batch: int, device: torch.device):
        self.job, self.preset, self.batch, self.device = job, preset, batch, device
        self.network = preset_config(preset)
        generator = torch.Generator().manual_seed(2)
        names = ("x", "view1", "view2") if job == "pretrain" else ("x",)
        shape = (batch, 3, self.network["image_size"], self.network["image_size"])
        self.images = {name: torch.randn(shape, generator=generator).mul(0.5).to(device) for name in names}
        labels = torch.randint(self.network["num_classes"], (batch,), generator=generator)
        self.images["label"] = labels.to(device)

    def config(self, **options) -> RunConfig:
        """The stage's own settings, with `options`, no dropout and no warm-up."""
        made = getattr(configs, STAGES[self.job] + "Config")(
            outdir="unused", model=configs.ModelConfig(self.preset), batch_size=self.batch, **options
        )
        made.optimizer.schedule, made.optimizer.warmup_steps, made.optimizer.clip_after = "constant", 0, 0
        if hasattr(made, "dropout"):
            made.dropout = 0.0
        return made

    def weights(self) -> dict[str, torch.Tensor]:
        """Of every variant, at the start."""
        torch.manual_seed(3)
        with self.device:
            if self.job == "pretrain":
                return encoder_from_config(self.network).state_dict()
            return lively(generator_from_config(self.network)).state_dict()

    def perceptual(self, kind: Callable) -> torch.nn.Module | None:
        """Consistency training's frozen encoder, made by kind(config); None for the other jobs."""
        if self.job != "finetune-consistency":
            return None
        torch.manual_seed(4)
        with self.device:
            weights, encoder = encoder_from_config(self.network).state_dict(), kind(self.network)
        encoder.load_state_dict(weights, strict=True)
        return encoder.eval().requires_grad_(False)


class PlainTraining:
    """`bench.plain` on a problem. dtype: of autocast, None for float32; compiled: with torch.compile.

    recompute: blocks are computed again in the backward pass, the same numbers in less memory. `losses(n)` makes the
    first n updates; `step()` makes one with the random numbers of the first, which it does not draw again.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype | None, compiled: bool = False, recompute: bool = False):
        self.problem, self.config = problem, problem.config()
        kind = PlainEncoder if problem.job == "pretrain" else PlainGenerator
        with problem.device:
            network, ema = (from_config(kind, problem.network) for _ in range(2))
        for made in (network, ema):
            made.load_state_dict(problem.weights(), strict=True)
        if recompute:
            for block in [*network.blocks, *getattr(network, "decoder_blocks", ())]:
                block.forward = _again(block.forward)
        ema.eval().requires_grad_(False)
        self.perceptual = problem.perceptual(lambda config: from_config(PlainEncoder, config))
        called = [network, ema if problem.job == "pretrain" else None, self.perceptual]
        for module in filter(None, called if compiled else []):
            module.compile(dynamic=False)
        o = self.config.optimizer
        self.trainer = plain.Trainer(
            network,
            ema,
            lr=o.lr,
            betas=o.betas,
            weight_decay=o.weight_decay,
            exempt=() if o.decay_tokens else ("pos_embed", "cls_token"),
            ema_decay=getattr(self.config, "target_ema", None) or self.config.ema,
            clip_norm=o.clip_norm,
            dtype=dtype,
        )
        self._first = self._arguments(0)

    def step(self) -> None:
        self.trainer.step(*self._first)

    def losses(self, count: int) -> list[float]:
        return [self.trainer.step(*self._arguments(update)) for update in range(count)]

    def _arguments(self, update: int) -> tuple:
        """A loss of `bench.plain` and its arguments, as the package's stage would draw them."""
        c, images, device = self.config, self.problem.images, self.problem.device
        draws = Draws(0, update, 0, self.problem.batch, device)
        noise = draws.normal("noise", *images["x"].shape[1:])
        if self.problem.job == "pretrain":
            scales = curriculum_scales(update, c.steps, c.start_scales, c.end_scales)
            index = torch.tensor(draws.integer("index", scales - 1), device=device)
            views = (images["x"], images["view1"], images["view2"])
            return plain.pretraining_loss, self.trainer.ema, *views, noise, index, scales
        dropped = draws.uniform("label") < c.label_dropout
        labels = torch.where(dropped, self.trainer.network.num_classes, images["label"])
        level = torch.exp(c.p_mean + c.p_std * draws.normal("level"))
        if self.problem.job == "finetune-diffusion":
            return plain.denoising_loss, images["x"], noise, labels, level
        stage = consistency_stage(update, c.first_stage, c.stage_length, c.delta)
        t = level.clamp_min(c.noise.sigma_min)
        r = consistency_r(t, stage, c.q, c.k, c.b, c.noise.sigma_min)
        return plain.consistency_loss, images["x"], noise, labels, t, r, stage, self.perceptual


def _again(forward: Callable) -> Callable:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


class OurTraining:
    """The package's update, as `epg_fast.training.train` makes it. options: of the run's configuration."""

    def __init__(self, problem: Problem, optimizer: str = "auto", **options):
        self.problem = problem
        self.config = config = problem.config(**options)
        config.optimizer.backend = optimizer
        ranks = Ranks(0, 1, problem.device)
        with problem.device:
            stage = getattr(training, STAGES[problem.job] + "Stage")(config, ranks)
        for network in (stage.network, stage.ema):
            network.load_state_dict(problem.weights(), strict=True)
        if (perceptual := problem.perceptual(encoder_from_config)) is not None:
            stage.perceptual = perceptual.use_ops(stage.chosen.ops)
        self.state = RunState(stage, NoImages())
        if config.fp8:
            use_fp8(stage.network)
        self._losses = _Losses()
        compile_stage(stage)

    def step(self) -> None:
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
