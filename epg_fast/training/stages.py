"""The three training jobs: which networks they hold, what they draw at random, which objective they call."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from epg_fast.config import ConsistencyConfig, DiffusionConfig, PretrainConfig, RunConfig
from epg_fast.diffusion import NoiseSchedule, PixelNormalization, consistency_r, consistency_stage, curriculum_scales
from epg_fast.distributed import Ranks
from epg_fast.models import encoder_from_config, generator_from_config, load_into, load_weights, preset_config
from epg_fast.models.pretrained import is_generator, model_config
from epg_fast.objectives import (
    Loss,
    PretrainingObjective,
    consistency_loss,
    denoising_loss,
    noised_inputs,
    perceptual_keys,
)
from epg_fast.plans import Case, Chosen, choose_together
from epg_fast.plans.plan import architecture
from epg_fast.plans.sites import has_fused_operations
from epg_fast.training.draws import Draws

log = logging.getLogger("epg_fast")


class Stage:
    """What the loop needs of a job: `network` is trained, `ema` follows it, `exported` is what users load."""

    name: str
    three_views = False
    parameterization: str | None = None
    by_level: str
    """Term of the loss that is also logged by noise level."""
    calls_ema = False
    """Whether the loss calls `ema`, which then stays on the device whatever `offload_ema` says."""
    grad_cache = False
    """Whether the loss compares samples with each other: micro-batches then need `objective` and `views`."""
    perceptual: torch.nn.Module | None = None
    """Frozen encoder of the loss."""
    untrained_before: list[int] | None = None
    """Classes that the weights to start from were not trained on; None for all."""
    untrained_classes: list[int] = []
    """Those that will not have been trained at the end: see `note_classes`."""
    class_names: list[str] = []
    """Of the data, where they are known."""

    def __init__(self, config: RunConfig, network: torch.nn.Module, ranks: Ranks, kept: Mapping | None):
        """kept: the record of what the run has computed with so far."""
        case = training_case(self.name, config, network, ranks.world_size)
        self.chosen = choose_together(config.ops, case, ranks, kept)
        if ranks.device.type != "meta":  # as of a dry run, where nothing is chosen
            log.info("%s", self.chosen.why)
        if config.fp8 and has_fused_operations(self.chosen.ops):
            raise ValueError(
                f"fp8: got ops {config.ops}, whose fused operations take weights in 16 bits; want ops plain"
            )
        self.config, self.ranks = applied(config, self.chosen, ranks.world_size), ranks
        self.normalization = PixelNormalization(config.data.normalization)
        self.network = network.use_ops(self.chosen.ops).train()
        if not self.sharded:
            self.network.to(ranks.device)  # sharded networks come to it part by part
        self.ema = ema_copy(self.network, ranks, config.offload_ema and not self.calls_ema)
        """None on the ranks that keep no EMA in host memory."""

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the networks only."""
        return self.config.parallelism == "fsdp"

    @property
    def exported(self) -> torch.nn.Module | None:
        """The network whose weights are written to model.safetensors; the main rank has it."""
        return self.ema

    def ema_decay(self, iteration: int) -> float:
        """Decay of `ema` after the update of `iteration`."""
        raise NotImplementedError

    def loss(self, batch: dict[str, torch.Tensor], draws: Draws, iteration: int, keys: tuple | None = None) -> Loss:
        """Loss of samples of this rank (normalised images, labels).

        keys: what `keys_of` makes of these samples and of the global batch; None computes them.
        """
        raise NotImplementedError

    def keys_of(self, iteration: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The function of images whose results for the whole batch the loss compares samples with, if it does."""
        return None

    def metadata(self) -> dict:
        """Stored with the weights, so that a file says how it is to be used."""
        return {
            "stage": self.name,
            "preset": self.config.model.preset,
            "config": network_config(self.config),
            "parameterization": self.parameterization,
            "normalization": self.config.data.normalization,
            "noise": asdict(self.config.noise),
            **({"untrained_classes": self.untrained_classes} if self.untrained_classes else {}),
            **({"class_names": self.class_names} if self.class_names else {}),
        }

    def _schedule(self, num_scales: int = 1280) -> NoiseSchedule:
        return NoiseSchedule(num_scales, **asdict(self.config.noise))

    def _dropped(self, labels: torch.Tensor, draws: Draws) -> torch.Tensor | None:
        """Labels, some replaced by the unconditional one; None for an unconditional network."""
        if not self.network.num_classes:
            return None
        drop = draws.uniform("label") < self.config.label_dropout
        return torch.where(drop, self.network.num_classes, labels)


class PretrainStage(Stage):
    """Stage 1. `ema` is the target network: eval mode, parameters averaged, BatchNorm buffers left at 0 and 1."""

    name = "pretrain"
    three_views = calls_ema = grad_cache = True
    noised = staticmethod(noised_inputs)
    """What the encoders take, from images and noise; a stage that is compiled has its own."""
    by_level = "consistency"  # the contrastive term is always at the cleanest level
    config: PretrainConfig

    def __init__(self, config: PretrainConfig, ranks: Ranks, kept: Mapping | None = None):
        arguments = network_config(config, use_checkpoint=config.activation_checkpointing)
        super().__init__(config, encoder_from_config(arguments), ranks, kept)

    @property
    def exported(self):
        return self.network

    def ema_decay(self, iteration):
        return self.config.target_ema

    def loss(self, batch, draws, iteration, keys=None):
        return self.objective(draws, iteration).loss(*self.views(batch, draws), self.ranks.gather_tensors)

    def views(self, batch: dict[str, torch.Tensor], draws: Draws) -> tuple[torch.Tensor, ...]:
        """What the objective's methods take: x, view 1, view 2 and the noise that they share."""
        return batch["x"], batch["view1"], batch["view2"], draws.normal("noise", *batch["x"].shape[1:])

    def objective(self, draws: Draws, iteration: int) -> PretrainingObjective:
        """The objective at the noise level that is drawn for the whole batch."""
        c = self.config
        schedule = self._schedule(curriculum_scales(iteration, c.steps, c.start_scales, c.end_scales))
        return PretrainingObjective(
            self.network,
            self.ema,
            draws.integer("index", schedule.num_scales - 1),
            schedule,
            contrastive_temperature=c.contrastive_temperature,
            temperature=c.temperature if c.temperature_schedule == "constant" else tuple(c.temperature_range),
            noised=self.noised,
        )


class _FineTuning(Stage):
    config: DiffusionConfig | ConsistencyConfig

    def __init__(self, config, ranks, kept):
        arguments = network_config(config, drop=config.dropout, use_checkpoint=config.activation_checkpointing)
        network = generator_from_config(arguments)
        if config.init_from:
            self.untrained_before = _initialize(
                network, config.init_from, self.parameterization, config.noise.sigma_data
            )
        # A decoder deeper than the encoder has blocks without a skip: nothing reaches these parameters, and gradient
        # averaging over ranks would wait for them.
        for block in network.decoder_blocks[len(network.blocks) :]:
            block.skip_linear.requires_grad_(False)
            block.skip_norm.requires_grad_(False)
        super().__init__(config, network, ranks, kept)

    def ema_decay(self, iteration):
        return min(self.config.ema, iteration / (iteration + 10)) if self.config.ema_warmup else self.config.ema


class DiffusionStage(_FineTuning):
    """Stage 2a."""

    name = "finetune-diffusion"
    by_level = "squared_error"
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, ranks: Ranks, kept: Mapping | None = None):
        self.parameterization = config.parameterization
        super().__init__(config, ranks, kept)

    def loss(self, batch, draws, iteration, keys=None):
        c = self.config
        return denoising_loss(
            self.network,
            batch["x"],
            draws.normal("noise", *batch["x"].shape[1:]),
            self._dropped(batch["label"], draws),
            torch.exp(c.p_mean + c.p_std * draws.normal("level")),
            self._schedule(c.num_scales),
            parameterization=c.parameterization,
            dropout_seed=draws.per_rank_seed("dropout"),
        )


class ConsistencyStage(_FineTuning):
    """Stage 2b, with an optional frozen encoder for the auxiliary contrastive term."""

    name = "finetune-consistency"
    by_level = "consistency"
    parameterization = "edm"
    config: ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, ranks: Ranks, kept: Mapping | None = None):
        super().__init__(config, ranks, kept)
        self.perceptual = _frozen_encoder(config, ranks, self.chosen.ops) if config.perceptual else None

    def loss(self, batch, draws, iteration, keys=None):
        c = self.config
        stage = consistency_stage(iteration, c.first_stage, c.stage_length, c.delta)
        t = torch.exp(c.p_mean + c.p_std * draws.normal("level")).clamp_min(c.noise.sigma_min)
        return consistency_loss(
            self.network,
            batch["x"],
            draws.normal("noise", *batch["x"].shape[1:]),
            self._dropped(batch["label"], draws),
            t,
            consistency_r(t, stage, c.q, c.k, c.b, c.noise.sigma_min),
            stage,
            self._schedule(),
            huber_c=c.huber_c,
            perceptual=self.perceptual,
            temperature=c.temperature,
            dropout_seed=draws.per_rank_seed("dropout"),
            keys=keys,
            gather=self.ranks.gather_tensors,
        )

    def keys_of(self, iteration):
        c = self.config
        if self.perceptual is None or not consistency_stage(iteration, c.first_stage, c.stage_length, c.delta):
            return None
        return lambda images: perceptual_keys(self.perceptual, images, self._schedule())


def training_case(job: str, config: RunConfig, network: torch.nn.Module, world_size: int) -> Case:
    """What a plan for this run is for."""
    images = config.batch_size // world_size // config.gradient_accumulation
    return Case(job, architecture(network), "fp8" if config.fp8 else config.precision, images)


def applied(config: RunConfig, chosen: Chosen, world_size: int) -> RunConfig:
    """The configuration with what was chosen where it says `auto`; flags that were given stay."""
    changes = {}
    if config.compile == "auto" and chosen.compile:
        changes["compile"] = chosen.compile
        if chosen.compile == "network" and config.parallelism == "fsdp":
            changes["compile"] = "blocks"
            log.info("blocks are compiled, not whole networks as in the plan: sharded networks take nothing else")
    if chosen.cuda_graphs and changes.get("compile") == "network":
        if world_size == 1 and config.gradient_accumulation == 1:
            changes["cuda_graphs"] = True
        else:
            log.info("no CUDA graphs, which the plan has: they take one rank and no gradient accumulation")
    return dataclasses.replace(config, **changes)


def ema_copy(network: torch.nn.Module, ranks: Ranks, offload: bool) -> torch.nn.Module | None:
    """A copy of `network` for its EMA: on its device or, with `offload`, in the main rank's host memory.

    None on the other ranks with `offload`, whose weights are the same.
    """
    if offload and not ranks.main:
        return None
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    return ema.cpu() if offload else ema


def stage_without_files(
    stage_class: type[Stage], config: RunConfig, ranks: Ranks, kept: Mapping | None = None
) -> Stage:
    """The stage with fresh weights, whatever its configuration would load; a frozen encoder is of the run's preset."""
    absent = {name: None for name in ("init_from", "perceptual") if hasattr(config, name)}
    stage = stage_class(dataclasses.replace(config, **absent), ranks, kept)
    if getattr(config, "perceptual", None):
        encoder = encoder_from_config(network_config(config))
        stage.perceptual = encoder.use_ops(stage.chosen.ops).eval().requires_grad_(False)
    return stage


def network_config(config: RunConfig, **extra) -> dict:
    """Constructor arguments of the run's network: the preset, what `model` changes in it, and `extra`."""
    overrides = asdict(config.model)
    return preset_config(overrides.pop("preset"), **overrides) | extra


def _initialize(network, source: str, parameterization: str, sigma_data: float) -> list[int] | None:
    """Start from a pre-trained encoder, or from a whole generator (its output layer rescaled from x0 to edm).

    Returns the classes that it was not trained on; None for all.
    """
    state, metadata = load_weights(source)
    if not is_generator(state):
        load_into(network, state, source, encoder_only=True)
        log.info("encoder weights from %s; the decoder starts fresh", source)
        return None
    load_into(network, state, source)
    before = metadata.get("parameterization") or "x0"
    if before == "x0" and parameterization == "edm":
        # Far from the data c_skip vanishes and c_out tends to sigma_data, so that F must be D / sigma_data there.
        with torch.no_grad():
            network.out.weight /= sigma_data
            network.out.bias /= sigma_data
    log.info("weights from %s (%s parameterisation)", source, before)
    return metadata.get("untrained_classes", [])


def _frozen_encoder(config: ConsistencyConfig, ranks: Ranks, ops: Mapping[str, str]):
    state, metadata = load_weights(config.perceptual)
    if is_generator(state) or not any(k.startswith("projection_head.") for k in state):
        raise ValueError(
            f"perceptual {config.perceptual}: want a pre-trained encoder with its projection head (RCMViT)"
        )
    encoder = encoder_from_config(model_config(state, metadata))
    load_into(encoder, state, config.perceptual)
    wanted = network_config(config)["image_size"]
    if encoder.image_size != wanted:
        raise ValueError(f"perceptual {config.perceptual}: made for {encoder.image_size} pixels, the run has {wanted}")
    return encoder.use_ops(ops).to(ranks.device).eval().requires_grad_(False)
