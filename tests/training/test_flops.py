"""The count of operations is that of torch's own counter, in every stage."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.training.flops import step_flops
from tests.training.stages import JOBS, backward_of, loss_of, make_config, make_stage


def _assert_counted(job, images=2, step=0, perceptual=True, ops="plain", **fields):
    # Plain products for attention: torch's counter does not know what SDPA calls on a CPU.
    config = make_config(job, ops=f"{ops},attention=math", batch_size=images, **fields)
    stage = make_stage(job, config, perceptual)
    flops = step_flops(stage, step)
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(stage, images, step).loss
        assert counter.get_total_flops() / images == flops.forward + flops.without_gradient
        loss.backward()
    assert counter.get_total_flops() / images == flops.total + flops.recomputed
    return flops


@pytest.mark.parametrize("job", JOBS)
def test_operations_of_a_step_are_those_that_torch_counts(job):
    """Activation checkpointing adds the forward pass of the blocks."""
    plain = _assert_counted(job)
    assert plain.recomputed == 0 and plain.backward > 1.4 * plain.forward > 0
    half, whole = (_assert_counted(job, activation_checkpointing=share) for share in (0.5, True))
    assert whole.total == plain.total and 0.5 * plain.forward < whole.recomputed < plain.forward
    assert 0.2 * whole.recomputed < half.recomputed < 0.7 * whole.recomputed


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pretrain", "finetune-consistency"])
def test_fused_blocks_compute_of_the_last_block_of_a_feature_what_the_class_token_needs(job):
    pytest.importorskip("triton")
    stages = {"delta": 1} if job == "finetune-consistency" else {}
    plain = _assert_counted(job, **stages)
    fused = _assert_counted(job, ops="plain,encoder.norm=triton", **stages)
    checkpointed = _assert_counted(job, ops="plain,encoder.norm=triton", activation_checkpointing=True, **stages)
    assert fused.total < 0.97 * plain.total and checkpointed.total == fused.total


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
    _assert_counted("finetune-diffusion", model=model)


def test_consistency_is_plain_denoising_first_and_then_needs_the_second_pass_and_the_frozen_encoder():
    stages = {"delta": 0, "first_stage": 10, "stage_length": 10}
    early = _assert_counted("finetune-consistency", **stages)
    late = _assert_counted("finetune-consistency", step=10, **stages)
    unjudged = _assert_counted("finetune-consistency", step=10, perceptual=False, **stages)
    assert early.without_gradient == 0 and unjudged.without_gradient == early.forward
    assert late.total > unjudged.total > early.total
