"""Operations of a step are those that torch counts; MFU is logged where the nominal peak is known, none made up."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epg_fast.distributed import Ranks
from epg_fast.training.estimate import planned_stage
from epg_fast.training.flops import Utilization, gpu_named, gpu_of, step_flops
from tests.training.stages import JOBS, backward_of, device_of, loss_of, make_config, make_stage, stage_class


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


# ---- GPUs

CUDA = torch.device("cuda", 0)


def _on_gpus(job, world_size=1, **fields):
    stage = planned_stage(make_config(job, **fields), stage_class(job), world_size)
    stage.ranks = Ranks(0, world_size, CUDA)
    return stage


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(device, name):
    with device_of(device):
        found = gpu_of(CUDA)
    assert found is None if name is None else found == gpu_named(name)


def test_the_peak_depends_on_the_precision_and_a_mistyped_gpu_is_asked_for(monkeypatch):
    h200 = gpu_named("h200")
    assert h200.peak("bf16") == (989.5e12, "bf16") and h200.peak("fp16")[0] == 989.5e12
    assert h200.peak("fp32") == (67e12, "fp32") and h200.bandwidth == 4.8 and gpu_named("B200").bandwidth is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert h200.peak("fp32") == (494.5e12, "tf32")
    with pytest.raises(ValueError, match="did you mean 'H200'"):
        gpu_named("H20")


def test_mfu_is_operations_per_image_times_rate_over_the_peak_of_all_gpus():
    stage = _on_gpus("pretrain", 4, precision="bf16")
    with device_of("NVIDIA H200"):
        figures = Utilization(stage).figures(0, 10, 5000.0)
    assert figures == {
        "mfu": pytest.approx(step_flops(stage, 9).total * 5000 / (4 * 989.5e12), rel=1e-12),
        "peak_memory_gib": 3.0,
    }


def test_no_mfu_without_a_known_gpu_and_nothing_at_all_on_a_cpu():
    stage = _on_gpus("pretrain")
    with device_of("NVIDIA Unheard-of"):
        assert Utilization(stage).figures(0, 10, 5000.0) == {"peak_memory_gib": 3.0}
    assert Utilization(make_stage("pretrain", make_config("pretrain"))).figures(0, 10, 5000.0) == {}


def test_an_interval_in_which_the_work_per_image_changes_has_no_mfu():
    stage = _on_gpus("finetune-consistency", delta=0, first_stage=10, stage_length=10)
    with device_of("NVIDIA H200"):
        utilization = Utilization(stage)
        early, between, late = (utilization.figures(*steps, 100.0) for steps in ((0, 10), (5, 15), (10, 20)))
    assert "mfu" not in between and late["mfu"] > early["mfu"] > 0
