"""`--dry_run`: what a run would be, before anything is started; every shipped recipe; activations to the byte."""

import contextlib
import resource

import pytest
import torch

from epg_fast import training
from epg_fast.__main__ import main
from epg_fast.config import DryRunConfig, OptimizerConfig, PosthocEmaConfig
from epg_fast.flags import RECIPES
from epg_fast.runtime import autocast
from epg_fast.training import estimate
from epg_fast.training.ema import HostEma
from epg_fast.training.estimate import (
    Activations,
    SavedTensors,
    activation_bytes,
    describe,
    memory_per_gpu,
    planned_stage,
    total_flops,
)
from epg_fast.training.flops import step_flops
from epg_fast.training.optimizer import make_optimizer
from epg_fast.training.stages import ema_copy
from tests.training.runs import fails
from tests.training.stages import CPU, JOBS, backward_of, device_of, loss_of, make_config, make_stage, stage_class

# Every shipped recipe in a combination that the README gives, and what the paper says about it: millions of parameters
# of what is trained, and updates.
RUNS = {
    "digits, pre-training": ("pretrain digits digits_pretrain", 0.5, 360),
    "digits, diffusion": ("finetune-diffusion digits digits_diffusion", 0.9, 2700),
    "digits, one step": ("finetune-consistency digits digits_consistency", 0.9, 2500),
    "encoder of XL, XXL and G": ("pretrain imagenet256_pretrain", 106.8, 600_000),
    "encoder of L/16": ("pretrain imagenet256_pretrain --model.preset epg_l_16_256", 224.6, 600_000),
    "encoder of L/32": ("pretrain imagenet256_pretrain imagenet512_pretrain", 226.9, 600_000),
    "XL/16": ("finetune-diffusion imagenet256_diffusion", 583.0, 1_000_000),
    "XXL/16": ("finetune-diffusion imagenet256_diffusion --model.preset epg_xxl_16_256", 788.9, 1_000_000),
    "G/16": ("finetune-diffusion imagenet256_diffusion imagenet256_diffusion_g", 1391.9, 2_000_000),
    "L/32 at 512": ("finetune-diffusion imagenet256_diffusion imagenet512_diffusion", 544.9, 1_000_000),
    "L/16, one step": ("finetune-consistency imagenet256_consistency", 540.2, 700_000),
}


DESCRIBED = (
    """finetune-diffusion --config imagenet256_diffusion --init_from runs/pretrain256 --outdir runs/xl256 --dry_run"""
)
DESCRIPTION = """
epg-fast finetune-diffusion: dry run; no data, GPU or run folder is touched

model              epg_xl_16_256, 256 x 256 pixels in patches of 16: 258 tokens
parameters         583.0 M (encoder 85.8 M, decoder and class embedding 497.2 M)
batch              1024 images = 8 GPUs x 128 (assumed; --gpus says how many)
steps              1,000,000 = 1,024,000,000 images
FLOPs per image    787 GFLOP (forward 263 G, backward 525 G)
FLOPs per step     806 TFLOP
memory per GPU     an estimate, in GiB
  weights             2.2   float32
  gradients           2.2   float32
  AdamW moments       4.3   float32
  EMA                 2.2   float32
  activations        44.1   5.8 with --activation_checkpointing true
  sum                55.0   16.7 with --activation_checkpointing true
                   Activations: what autograd keeps of plain PyTorch, 16-bit copies of weights included,
                   counted on shapes; torch.compile and fused kernels keep other tensors. Not counted:
                   workspaces, fragmentation, batches in flight, NCCL, the CUDA context.
duration           47.2 hours on 8 x H200 at an assumed 60% of the nominal bf16 peak of 989.5 TFLOP/s; nothing measured
                   --gpu takes A100, A100 PCIe, A100 40GB, H100, H100 PCIe, H200, L40S, RTX 4090, B200
missing            data.path data/imagenet256/train: epg-fast prepare-data makes it
missing            init_from runs/pretrain256: the run folder of the stage before makes it
"""


@pytest.fixture
def uncounted(monkeypatch):
    """Skip the count of activations, which takes seconds and is tested beside this."""
    monkeypatch.setattr(estimate, "activation_bytes", lambda *_: Activations(2**40, 2**39, 2**40))


def _command(run):
    words, flag, rest = RUNS[run][0].partition(" --")
    job, *recipes = words.split()
    return [job, *(word for name in recipes for word in ("--config", name)), *(flag + rest).split()]


def test_every_recipe_is_part_of_a_run():
    shipped = {file.name.removesuffix(".yaml") for file in RECIPES.iterdir() if file.name.endswith(".yaml")}
    used = [(flag, value) for run in RUNS for flag, value in zip(_command(run), _command(run)[1:], strict=False)]
    assert {value for flag, value in used if flag == "--config"} == shipped


@pytest.mark.slow
def test_a_real_size_is_described_line_by_line_and_takes_no_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(DESCRIBED.split()) == 0
    assert capsys.readouterr().out.strip() == DESCRIPTION.strip()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # KiB; the weights alone are 2e6


@pytest.mark.parametrize("run", RUNS)
def test_every_recipe_is_described(run, tmp_path, monkeypatch, uncounted, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _, parameters, steps = RUNS[run]
    assert main([*_command(run), "--dry_run"]) == 0
    out, messages = capsys.readouterr()
    assert "ops:" not in messages  # nothing is chosen
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith(" "))
    assert rows["parameters"].startswith(f"{parameters} M")
    assert rows["steps"].startswith(f"{steps:,} = ")
    assert "= 8 GPUs x" in rows["batch"] and "at an assumed 60% of the nominal" in rows["duration"]
    assert "nothing measured" in rows["duration"] and rows["missing"]
    assert list(tmp_path.iterdir()) == []


def _config(job="finetune-diffusion", **fields):
    return make_config(job, **({"batch_size": 16, "steps": 10} | fields))


def _describe(job="finetune-diffusion", options=None, **fields):
    options = DryRunConfig(dry_run=True, **({"gpus": 1} if options is None else options))
    return describe(_config(job, **fields), stage_class(job), options)


@pytest.mark.parametrize(
    "world_size, device, options, shown",
    [
        ("", None, {}, ["8 GPUs x 2 (assumed", "8 x H200 at"]),
        ("4", None, {}, ["4 GPUs x 4 (torchrun's)"]),
        ("4", None, {"gpus": 1}, ["1 GPU x 16 (--gpus)"]),
        ("", "NVIDIA B200", {"gpus": 1}, ["1 x B200 at", "the GPU of this machine"]),
        ("", "NVIDIA B200", {"gpus": 1, "gpu": "l40s", "utilization": 0.25}, ["1 x L40S at an assumed 25%"]),
    ],
)
def test_gpus_are_those_of_flags_then_of_the_machine_then_h200(
    world_size, device, options, shown, monkeypatch, uncounted
):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with device_of(device) if device else contextlib.nullcontext():
        text = _describe(options=options)
    assert all(part in text for part in shown), text


def test_micro_batches_are_shown_and_their_images_are_what_is_kept(monkeypatch):
    kept = []
    count = lambda stage, images, step: kept.append(images) or Activations(0, 0, 0)  # noqa: E731
    monkeypatch.setattr(estimate, "activation_bytes", count)
    shown = _describe(options={"gpus": 2}, gradient_accumulation=4)
    assert "16 images = 2 GPUs x 8 in 4 micro-batches (--gpus)" in shown and kept == [2]
    with pytest.raises(ValueError, match="16 does not divide over 2 ranks .* --batch_size 10 or 20"):
        _describe(options={"gpus": 2}, gradient_accumulation=5)


def test_fp8_changes_no_figure_and_says_so(uncounted):
    note = "FP8 is left out of the reckoning"
    plain, fp8 = (_describe(precision="bf16", fp8=fp8) for fp8 in (None, "rowwise"))
    assert [line for line in fp8.splitlines() if note not in line] == plain.splitlines() and note in fp8


def test_the_duration_is_all_operations_over_the_assumed_rate(uncounted):
    fields = {"delta": 0, "first_stage": 4, "stage_length": 4, "activation_checkpointing": True}
    stage = planned_stage(_config("finetune-consistency", **fields), training.ConsistencyStage, 1)
    each = [step_flops(stage, step) for step in range(10)]
    assert total_flops(stage) == 16 * sum(flops.total + flops.recomputed for flops in each)
    text = _describe("finetune-consistency", **fields)
    assert "from step 4 on, less before" in text and "again for less memory" in text
    assert "with --activation_checkpointing false" in text


# ---- memory


def _size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_sharded_memory_is_divided_and_says_what_is_whole_for_a_time(uncounted):
    fields = {"posthoc_ema": PosthocEmaConfig([0.1])}
    plain = memory_per_gpu(planned_stage(_config("pretrain", **fields), training.PretrainStage, 1), 1)
    stage = planned_stage(_config("pretrain", parallelism="fsdp", **fields), training.PretrainStage, 3)
    split = memory_per_gpu(stage, 3)
    shards = _size(p.chunk(3)[0] for p in stage.network.parameters())
    assert shards == split.gradients == split.moments // 2 and plain.gradients / 3 < shards < plain.gradients / 2
    assert split.weights - shards == plain.weights - plain.gradients and split.ema == 2 * split.weights  # buffers
    # two of its two blocks, and what lies outside
    assert split.gathered == 2 * plain.gradients
    assert split.total(2**39) == 3 * shards + split.weights + split.ema + split.gathered + 2**39
    text = _describe("pretrain", {"gpus": 4}, parallelism="fsdp", **fields)
    assert "whole for a time" in text and "float32, this GPU's shard" in text


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("job", ["pretrain", "finetune-diffusion"])
def test_memory_is_that_of_the_tensors_of_a_real_run(job, offload, uncounted):
    config = _config(job, posthoc_ema=PosthocEmaConfig([0.05, 0.1]), offload_ema=offload)
    memory = memory_per_gpu(planned_stage(config, stage_class(job), 2), 2)
    stage = make_stage(job, config)
    network = stage.network
    emas = [stage.ema, *(ema_copy(network, stage.ranks, offload) for _ in range(2))]
    optimizer = make_optimizer(network, OptimizerConfig(backend="torch"))
    assert memory.weights == _size([*network.parameters(), *network.buffers()])
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert memory.gradients == memory.moments // 2 == _size(trained)
    on_gpu = 3 if not offload else 1 if job == "pretrain" else 0
    sizes = [_size([*ema.parameters(), *ema.buffers()]) for ema in emas]
    assert memory.ema == sum(sizes[:on_gpu])
    staging = _size(HostEma(network, emas[on_gpu:])._staging) if offload else 0
    assert staging <= memory.in_host_memory - sum(sizes[on_gpu:]) <= 2 * staging
    shown = _describe(job, posthoc_ema=config.posthoc_ema, offload_ema=offload)
    assert ("in host memory" in shown) == offload and ("\n  EMA " in shown) == bool(on_gpu)


def _kept(job, images, **fields):
    """Bytes that a real forward pass saves."""
    stage = make_stage(job, config := make_config(job, batch_size=images, **fields))
    networks = [stage.network, stage.ema, getattr(stage, "perceptual", None)]
    with SavedTensors(*filter(None, networks)) as saved, autocast(CPU, config.precision):
        loss_of(stage, images)
    return saved.bytes


def _estimate(job, images, gpus=1, **fields):
    config = make_config(job, batch_size=images * gpus, **fields)
    if job == "finetune-consistency":
        config.perceptual = "an encoder of the same preset"
    return activation_bytes(planned_stage(config, stage_class(job), gpus), images, 0)


@pytest.mark.parametrize("job", JOBS)
def test_the_estimate_of_activations_is_what_autograd_saves(job):
    """To the byte on a CPU; what a GPU's kernels save may differ.

    Pre-training has two blocks, the generators have five: of the former a share of 0.4 is none.
    """
    fields = {"precision": "bf16"} | ({"dropout": 0.5} if job == "finetune-consistency" else {})
    found = _estimate(job, 2, **fields, activation_checkpointing=0.4)
    assert found.plain == _kept(job, 2, **fields)
    some, every = (_kept(job, 2, **fields, activation_checkpointing=share) for share in (0.4, True))
    assert every < found.checkpointed < 0.8 * found.plain
    assert _estimate(job, 2, **fields, activation_checkpointing=True).chosen == found.checkpointed
    if job == "pretrain":
        assert some == found.chosen == found.plain
    else:
        assert found.plain > some and some < found.chosen < some + found.plain / 3


@pytest.mark.parametrize("job", JOBS)
def test_checkpointing_changes_no_bit_of_the_gradients(job):
    """Consistency training draws its dropout masks twice, and checkpointing once more."""
    fields = {"finetune-consistency": {"first_stage": 1, "stage_length": 1, "delta": 0}}.get(job, {})
    fields |= {} if job == "pretrain" else {"dropout": 0.5}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        stage = make_stage(job, make_config(job, activation_checkpointing=checkpointing, **fields))
        backward_of(stage, step=3)
        gradients.append([p.grad for p in stage.network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and any(g.any() for g in gradients[0])


def test_keys_of_all_gpus_are_kept_by_each():
    small = {"model": {"depth": 1}}
    assert _estimate("pretrain", 2, gpus=4, **small).plain > _estimate("pretrain", 2, **small).plain


# ---- mistakes


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--dry-run --gpus 7", ["1024 does not divide over 7 ranks", "--batch_size 1022 or 1029"]),
        ("--dry_run --gpu H20", ["'H20'", "did you mean 'H200'", "RTX 4090"]),
        ("--gpus 8", ["gpus is for --dry_run", "torchrun --nproc-per-node"]),
        ("--utilization 0.5", ["utilization is for --dry_run"]),
        ("--dry_run --utilization 60", ["utilization is 60"]),
        ("--dry_run --model.num_heads 5", ["768", "5"]),
        ("--dry_run --ops tritn", ["ops 'tritn'", "did you mean 'triton'"]),
        ("--dry_run --cuda_graphs true --compile network --gpus 2", ["got 2 ranks, wanted 1"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(flags, expected, capsys):
    fails(capsys, ["finetune-diffusion", "--config", "imagenet256_diffusion", *flags.split()], *expected)


def test_other_ranks_of_torchrun_are_silent(capsys, monkeypatch, uncounted):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pretrain", "--config", "digits", "--config", "digits_pretrain", "--dry_run"]) == 0
    assert capsys.readouterr().out == ""
