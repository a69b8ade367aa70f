"""The count of operations is that of torch's own counter, in every stage."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.training.flops import step_flops
from tests.training.stages import JOBS, backward_of, loss_of, make_config, make_stage


def _counted(stage, images, step):
    """(operations of the forward pass, of both passes) per image, as PyTorch dispatches them."""
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(stage, images, step).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward / images, counter.get_total_flops() / images


def _assert_counted(job, images=2, step=0, perceptual=True, **fields):
    # Plain products for attention: torch's counter does not know what SDPA calls on a CPU.
    config = make_config(job, ops="plain,attention=math", batch_size=images, **fields)
    stage = make_stage(job, config, perceptual)
    flops = step_flops(stage, step)
    forward, total = _counted(stage, images, step)
    assert forward == flops.forward + flops.without_gradient
    assert total == flops.total + flops.recomputed
    return flops


@pytest.mark.parametrize("job", JOBS)
def test_operations_of_a_step_are_those_that_torch_counts(job):
    flops = _assert_counted(job)
    assert flops.recomputed == 0 and flops.backward > 1.4 * flops.forward > 0


@pytest.mark.parametrize("job", JOBS)
def test_activation_checkpointing_adds_the_forward_pass_of_the_blocks(job):
    checkpointed = _assert_counted(job, activation_checkpointing=True)
    plain = step_flops(make_stage(job, make_config(job, batch_size=2)), 0)
    assert (checkpointed.total, plain.recomputed) == (plain.total, 0)
    assert 0.5 * plain.forward < checkpointed.recomputed < plain.forward
    half = _assert_counted(job, activation_checkpointing=0.5)
    assert 0.2 * checkpointed.recomputed < half.recomputed < 0.7 * checkpointed.recomputed


@pytest.mark.parametrize("job", JOBS)
def test_parts_add_the_three_views_of_pretraining_only(job):
    config = make_config(job, ops="plain,attention=math", batch_size=4, gradient_accumulation=2)
    stage = make_stage(job, config)
    flops = step_flops(stage, 0)
    with FlopCounterMode(display=False) as counter:
        backward_of(stage, images=4)
    assert counter.get_total_flops() / 4 == flops.total + flops.recomputed
    whole = step_flops(make_stage(job, make_config(job, batch_size=4)), 0)
    assert flops.total == whole.total and whole.recomputed == 0
    assert (flops.recomputed > 0.9 * flops.forward) if job == "pretrain" else flops.recomputed == 0


@pytest.mark.parametrize(
    "model",
    [
        {"num_classes": 0},  # the condition of the decoder has no gradient
        {"decoder_embed_dim": 32, "decoder_depth": 1},  # no projection between the widths, fewer blocks than skips
        {"image_size": 64, "patch_size": 16, "mlp_ratio": 2.5},
    ],
)
def test_other_networks(model):
    _assert_counted("finetune-diffusion", images=3, model=model)


def test_pretraining_costs_twelve_forward_passes_of_the_encoder():
    """Three with and three without gradient, but for what the backward pass of the patch embedding leaves out."""
    flops = _assert_counted("pretrain", images=2, model={"hidden_dim": 1, "output_dim": 1})
    assert flops.total == pytest.approx(4 * flops.forward, rel=0.05)
    assert flops.without_gradient == pytest.approx(flops.forward, rel=0.01)


def test_consistency_is_plain_denoising_first_and_then_needs_the_second_pass_and_the_frozen_encoder():
    stages = {"delta": 0, "first_stage": 10, "stage_length": 10}
    early = _assert_counted("finetune-consistency", **stages)
    late = _assert_counted("finetune-consistency", step=10, **stages)
    unjudged = _assert_counted("finetune-consistency", step=10, perceptual=False, **stages)
    assert early.without_gradient == 0 and unjudged.without_gradient == early.forward
    assert late.total > unjudged.total > early.total


def test_the_networks_may_have_no_memory():
    from epg_fast.training import DiffusionStage
    from epg_fast.training.estimate import planned_stage

    config = make_config("finetune-diffusion")
    meta = planned_stage(config, DiffusionStage, 2)
    assert all(p.device == torch.device("meta") for p in meta.network.parameters())
    assert step_flops(meta, 0) == step_flops(make_stage("finetune-diffusion", config), 0)
