"""MFU is logged for GPUs whose nominal peak is known, and nothing is made up for others."""

import pytest
import torch

from epg_fast.distributed import Ranks
from epg_fast.training.estimate import planned_stage
from epg_fast.training.flops import Utilization, gpu_named, gpu_of, step_flops
from epg_fast.training.metrics import Progress
from tests.training.stages import ALONE, device_of, make_config, make_stage, stage_class

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


def test_the_progress_line_shows_them(capsys):
    figures = {"loss": 0.5, "images_per_second": 80.0, "data_wait": 0.02, "mfu": 0.413, "peak_memory_gib": 61.04}
    with Progress("diffusion", 10, 0, "images", ALONE) as progress:
        progress.show(figures)
    assert "data wait=2%, MFU=41.3%, peak=61.0 GiB" in capsys.readouterr().err
