"""What is checked and timed: sampling and training as they will run, of a network with a few of its blocks, or all.

Weights and images are random. Networks begin with outputs and gates of zero, through which no error would be seen:
here they are random, too.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from epg_fast.config import ModelConfig, RunConfig
from epg_fast.diffusion import STEPPED
from epg_fast.distributed import Ranks
from epg_fast.models import generator_from_config
from epg_fast.models.encoder import ViTEncoder
from epg_fast.models.fp8 import use_fp8
from epg_fast.plans import Chosen, Variant
from epg_fast.sampling.engine import SamplingEngine
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import add_gradients, compile_stage
from epg_fast.training.loop import train_step
from epg_fast.training.stages import stage_without_files
from epg_fast.training.state import RunState, choice_record
from epg_fast.tuning.candidates import UNITS
from epg_fast.tuning.job import Job

_LEVELS = 3
_CHECKED_ON_CPU = 2  # images


@torch.no_grad()
def lively(network: ViTEncoder) -> ViTEncoder:
    """Give random values to what begins as zero, in place."""
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.5 / math.sqrt(parameter.shape[-1]))
    return network


class Sampling:
    """A few steps of the sampler. dtype: of weights."""

    def __init__(self, job: Job, unit: str, variant: Variant, batch: int, dtype: torch.dtype | None):
        config, device, network = job.config, job.device, dict(job.network)
        if unit != "whole":
            network["depth"], network["decoder_depth"] = UNITS[unit]
        torch.manual_seed(0)
        with device:
            model = lively(generator_from_config(network)).eval().to(dtype)
        sampler = config.sampler if config.sampler in (*STEPPED, "onestep") else "heun"
        self.engine = SamplingEngine(
            model,
            sampler=sampler,
            steps=_LEVELS,
            guidance=config.guidance if model.num_classes and not config.autoguidance else 1.0,
            interval=(0.0, math.inf),  # every call has the images of guidance, if there is any
            clamp="none",
            batch_size=batch,
            precision=config.precision,
            compile=variant.compile,
            cuda_graphs=variant.cuda_graphs,
            ops=lambda case: Chosen.of(variant, "tuning"),
        )
        labels = torch.arange(batch) % max(model.num_classes, 1)
        self._inputs = [x.to(device) for x in (torch.arange(batch), torch.tensor([0]), labels)]

    def step(self) -> None:
        """Draw a batch, and leave it on the device."""
        self.engine._draw(self._inputs)

    def results(self) -> dict[str, torch.Tensor]:
        """What is compared: the images."""
        return {"images": self.engine._draw(self._inputs).clone()}


class Training:
    """An update of a stage on images that are on the device; with unit "optimizer" what follows the gradients.

    dtype: of weights and images, for results alone.
    """

    def __init__(self, job: Job, unit: str, variant: Variant, batch: int, dtype: torch.dtype | None):
        config, device = job.config, job.device
        config = dataclasses.replace(
            config,
            batch_size=batch,
            gradient_accumulation=1,
            compile=variant.compile,
            ops="auto",
            model=_model(config, unit),
            cuda_graphs=variant.cuda_graphs,
            offload_ema=False,
        )
        ranks = Ranks(0, 1, device)
        torch.manual_seed(0)
        with device:
            stage = stage_without_files(job.stage, config, ranks, choice_record(Chosen.of(variant, "tuning"), device))
            perceptual = stage.perceptual
            for network in filter(None, (stage.network, perceptual)):
                lively(network)
            stage.ema.load_state_dict(stage.network.state_dict())
        for network in filter(None, (stage.network, stage.ema, perceptual)):
            network.to(dtype)
        self.stage, self.unit = stage, unit
        self.state = RunState(stage, NoImages())
        if config.fp8:
            use_fp8(stage.network)
        self._metrics = NoMetrics()
        if unit != "optimizer":
            compile_stage(stage)
        self._batch = {k: v.to(dtype) if k != "label" else v for k, v in _images(stage, batch, device).items()}

    def step(self) -> None:
        """One update."""
        if self.unit == "optimizer":
            for parameter in self.stage.network.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.full_like(parameter, 1e-3)
            self.state.optimizer.schedule(1.0, 1.0, [0.999] * len(self.state.optimizer.emas))
            self.state.optimizer.step()
            return
        train_step(self.state, self._batch, self._metrics)

    def results(self) -> dict[str, torch.Tensor]:
        """What is compared: losses and gradients, or weights after an update."""
        if self.unit == "optimizer":
            self.step()
            return {name: p.detach().clone() for name, p in self.stage.network.named_parameters() if p.requires_grad}
        draws = Draws(0, 0, 0, len(self._batch["x"]), self._batch["x"].device)
        loss = add_gradients(self.stage, self.state.parallel, self._batch, draws, 0, self.state.loss_scale)
        found = {"loss": loss.per_sample.detach().clone()}
        scale = self.state.loss_scale.value
        for name, parameter in self.stage.network.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad / (1 if scale is None else scale)
        self.state.optimizer.zero_grad()
        return found


def _model(config: RunConfig, unit: str) -> ModelConfig:
    if unit in ("whole", "optimizer"):
        return config.model
    depth, decoder_depth = UNITS[unit]
    model = dataclasses.replace(config.model)
    model.depth, model.decoder_depth = depth, decoder_depth  # past the check that there is a decoder
    return model


def _images(stage, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    network = stage.network
    shape = (batch, network.in_chans, network.image_size, network.image_size)
    names = ("x", "view1", "view2") if stage.three_views else ("x",)
    found = {name: torch.rand(shape, generator=generator).to(device) for name in names}
    classes = max(getattr(network, "num_classes", 1), 1)
    return found | {"label": torch.randint(classes, (batch,), generator=generator).to(device)}


class NoMetrics:
    """In the place of a run's metrics."""

    def add(self, *values) -> None:
        pass


class NoImages:
    """In the place of a run's images."""

    def fingerprint(self) -> str:
        return ""


def checked_batch(batch: int, device: torch.device) -> int:
    """How many images results are compared for: a few where arithmetic is slow."""
    return batch if device.type == "cuda" else min(batch, _CHECKED_ON_CPU)


def errors(got: dict, plain: dict, exact: dict) -> dict[str, tuple[float, float]]:
    """Per result, the relative L2 error of the candidate and of plain code."""
    return {name: (_error(got[name], exact[name]), _error(plain[name], exact[name])) for name in exact}


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.double()
    size = exact.norm().item()
    error = (got.double() - exact).norm().item()
    return error / size if size else error


def worst(found: dict[str, tuple[float, float]], rounding: float) -> tuple[str, float, float] | None:
    """(name, error, allowed) of the result that is furthest beyond what it may be off; None if all are right.

    Twice the error of plain code for images and losses, three times for gradients. Where plain code happens to be
    nearly exact, the median of all results' errors and `rounding`, that of the precision, count instead.
    """
    middle = sorted(plain for _, plain in found.values())[len(found) // 2]
    beyond = []
    for name, (own, plain) in found.items():
        factor = 2 if name in ("images", "loss") else 3
        allowed = factor * max(plain, middle, rounding / 4)
        if not own <= allowed:
            beyond.append((own / allowed if own == own else math.inf, name, own, allowed))
    if not beyond:
        return None
    _, name, own, allowed = max(beyond)
    return name, own, allowed
