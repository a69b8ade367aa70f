"""What is tuned: a sampling command or a stage of training, and its network."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch

from epg_fast.config import ModelConfig, RunConfig, SampleConfig
from epg_fast.distributed import resolve_device
from epg_fast.models import load_weights, preset_config
from epg_fast.models.presets import encoder_from_config, generator_from_config
from epg_fast.models.pretrained import is_generator, model_config
from epg_fast.plans import Case
from epg_fast.plans.plan import architecture
from epg_fast.runtime import is_small
from epg_fast.sampling.precision import available_precision
from epg_fast.training.gradients import check_batch_size
from epg_fast.training.stages import Stage, network_config, training_case


@dataclass(frozen=True)
class Job:
    """A job's configuration, its stage if it trains, and the network."""

    config: SampleConfig | RunConfig
    stage: type[Stage] | None
    network: dict
    """Arguments of its constructor."""
    case: Case
    small: bool
    """Whether one thread computes the network where nothing says otherwise."""

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.case.batch if self.stage else self.config.batch_size

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return resolve_device(self.config.device)

    @property
    def digest(self) -> str:
        """Of the options that measurements may depend on."""
        return hashlib.sha256(repr(dataclasses.replace(self.config, outdir="")).encode()).hexdigest()


def job_of(
    config: SampleConfig | RunConfig, stage: type[Stage] | None, ranks: int, model: ModelConfig | None = None
) -> Job:
    """The job of a command. model: of the network to sample from, where there is no checkpoint.

    Raises ValueError for a batch that does not divide over the ranks, and for a checkpoint that cannot draw images.
    """
    if stage is not None:
        check_batch_size(config, ranks)
        network = network_config(config)
    elif config.checkpoint:
        state, metadata = load_weights(config.checkpoint)
        if not is_generator(state):
            raise ValueError(f"{config.checkpoint} holds a pre-trained encoder, which cannot draw images")
        network = model_config(state, metadata)
    else:
        overrides = dataclasses.asdict(model)
        network = preset_config(overrides.pop("preset"), **overrides)
    with torch.device("meta"):
        made = (encoder_from_config if stage and stage.name == "pretrain" else generator_from_config)(network)
    if stage is not None:
        case = training_case(stage.name, config, made, ranks)
    else:
        guided = config.guidance != 1 and not config.autoguidance and made.num_classes
        precision = available_precision(config.precision, resolve_device(config.device))
        case = Case("sample", architecture(made), precision, config.batch_size * (2 if guided else 1))
    return Job(config, stage, network, case, is_small(made))
