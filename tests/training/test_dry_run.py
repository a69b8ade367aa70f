"""`--dry_run`: what a run would be, before anything is started; every shipped recipe."""

import dataclasses
import resource
from pathlib import Path

import pytest
import torch

from epg_fast import training
from epg_fast.__main__ import main
from epg_fast.config import DryRunConfig, PosthocEmaConfig
from epg_fast.flags import RECIPES, parse
from epg_fast.training import dry_run
from epg_fast.training.activations import Activations
from epg_fast.training.dry_run import describe, memory_per_gpu, planned_stage, total_flops
from epg_fast.training.flops import step_flops
from tests.training.stages import JOBS, device_of, make_config

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


@pytest.fixture
def uncounted(monkeypatch):
    """Skip the count of activations, which takes seconds and is tested beside this."""
    monkeypatch.setattr(dry_run, "activation_bytes", lambda *_: Activations(2**40, 2**39, 2**40))


def _command(run):
    words, flag, rest = RUNS[run][0].partition(" --")
    job, *recipes = words.split()
    return [job, *(part for name in recipes for part in ("--config", name)), *(flag + rest).split()]


def _recipe_names(command):
    return {value for flag, value in zip(command, command[1:], strict=False) if flag == "--config"}


def test_every_recipe_is_part_of_a_run():
    shipped = {file.name.removesuffix(".yaml") for file in RECIPES.iterdir() if file.name.endswith(".yaml")}
    assert set().union(*(_recipe_names(_command(run)) for run in RUNS)) == shipped


def test_a_real_size_takes_no_memory(capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main([*_command("G/16"), "--dry_run"]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # KiB; the weights alone are 5.4e6
    assert "activations        67.8" in capsys.readouterr().out


def test_the_readme_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    command, _, shown = readme.partition("$ epg-fast ")[2].partition("\n```")[0].partition("\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command.split()) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


@pytest.mark.parametrize("run", RUNS)
def test_every_recipe_is_described(run, tmp_path, monkeypatch, uncounted, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _, parameters, steps = RUNS[run]
    assert main([*_command(run), "--dry_run"]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith(" "))
    assert rows["parameters"].startswith(f"{parameters} M")
    assert rows["steps"].startswith(f"{steps:,} = ")
    assert "= 8 GPUs x" in rows["batch"] and "at an assumed 60% of the nominal" in rows["duration"]
    assert "nothing measured" in rows["duration"] and rows["missing"]
    assert list(tmp_path.iterdir()) == []


def _config(job="finetune-diffusion", **fields):
    return make_config(job, **({"batch_size": 16, "steps": 10} | fields))


def test_gpus_come_from_the_flag_then_torchrun_then_eight(monkeypatch, uncounted):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    say = lambda **options: describe(_config(), training.DiffusionStage, DryRunConfig(dry_run=True, **options))  # noqa: E731
    assert "8 GPUs x 2 (assumed" in say()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 GPUs x 4 (torchrun's)" in say()
    assert "1 GPU x 16 (--gpus)" in say(gpus=1)


def test_parts_are_shown_and_their_images_are_what_is_kept(monkeypatch):
    kept = []

    def count(stage, images, step):
        kept.append(images)
        return Activations(0, 0, 0)

    monkeypatch.setattr(dry_run, "activation_bytes", count)
    config, options = _config(gradient_accumulation=4), DryRunConfig(dry_run=True, gpus=2)
    assert "16 images = 2 GPUs x 8 in 4 parts (--gpus)" in describe(config, training.DiffusionStage, options)
    assert kept == [2]
    with pytest.raises(ValueError, match="16 does not divide over 2 ranks with 5 parts each .* --batch_size 20"):
        describe(_config(gradient_accumulation=5), training.DiffusionStage, options)


def test_the_gpu_is_the_named_one_then_this_machines_then_an_h200(uncounted):
    say = lambda **options: describe(_config(), training.DiffusionStage, DryRunConfig(dry_run=True, **options))  # noqa: E731
    assert "8 x H200 at" in say() and "8 x L40S at an assumed 25%" in say(gpu="l40s", utilization=0.25)
    with device_of("NVIDIA B200"):
        assert "8 x B200 at" in say() and "the GPU of this machine" in say()


def test_fp8_changes_no_figure_and_says_so(uncounted):
    options, note = DryRunConfig(dry_run=True, gpus=1), "FP8 is left out of the reckoning"
    plain, fp8 = (
        describe(_config(precision="bf16", fp8=f), training.DiffusionStage, options) for f in (None, "rowwise")
    )
    assert [line for line in fp8.splitlines() if note not in line] == plain.splitlines() and note in fp8


def test_the_duration_is_all_operations_over_the_assumed_rate():
    config = _config("finetune-consistency", delta=0, first_stage=4, stage_length=4, activation_checkpointing=True)
    stage = planned_stage(config, training.ConsistencyStage, 1)
    each = [step_flops(stage, step) for step in range(10)]
    assert total_flops(stage) == 16 * sum(flops.total + flops.recomputed for flops in each)
    text = describe(config, training.ConsistencyStage, DryRunConfig(dry_run=True, gpus=1))
    assert "from step 4 on, less before" in text and "again for less memory" in text
    assert "with --activation_checkpointing false" in text


def test_sharded_memory_is_divided_and_says_what_is_whole_for_a_time(uncounted):
    config = _config("pretrain", posthoc_ema=PosthocEmaConfig([0.1]))
    plain = memory_per_gpu(planned_stage(config, training.PretrainStage, 1), 1)
    sharded = dataclasses.replace(config, parallelism="fsdp")
    stage = planned_stage(sharded, training.PretrainStage, 3)
    split = memory_per_gpu(stage, 3)
    parts = sum(p.chunk(3)[0].numel() * 4 for p in stage.network.parameters())
    assert parts == split.gradients == split.moments // 2 and plain.gradients / 3 < parts < plain.gradients / 2
    buffers = split.weights - parts
    assert buffers == plain.weights - plain.gradients and split.averages == 2 * split.weights
    block = sum(p.numel() * 4 for p in stage.network.blocks[0].parameters())
    assert split.gathered == 2 * (plain.gradients - 2 * block + 2 * block)  # of two blocks in all
    assert split.total(2**39) == sum((parts, split.weights, 2 * parts, split.averages, split.gathered)) + 2**39
    text = describe(sharded, training.PretrainStage, DryRunConfig(dry_run=True, gpus=4))
    assert "whole for a time" in text and "float32, this GPU's part" in text


@pytest.mark.parametrize("job", JOBS)
def test_memory_is_that_of_the_tensors_of_a_real_run(job, digits, tmp_path):
    from epg_fast.data import ImageFolder
    from epg_fast.distributed import Ranks
    from epg_fast.training.state import RunState

    stage_class, config = (
        getattr(training, JOBS[job] + "Stage"),
        _config(job, posthoc_ema=PosthocEmaConfig([0.05, 0.1])),
    )
    memory = memory_per_gpu(planned_stage(config, stage_class, 2), 2)
    stage = stage_class(config, Ranks(0, 1, torch.device("cpu")))
    state = RunState(config, stage, ImageFolder(f"{digits}/train"), stage.ranks)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    assert memory.weights == size([*stage.network.parameters(), *stage.network.buffers()])
    averages = [stage.average, *state.posthoc_ema.averages]
    assert memory.averages == sum(size([*average.parameters(), *average.buffers()]) for average in averages)
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    assert memory.gradients == memory.moments // 2 == size(trained) and memory.in_host_memory == 0


@pytest.mark.parametrize("job, on_gpu", [("finetune-diffusion", 0), ("pretrain", 1)])
def test_offloaded_averages_are_counted_in_host_memory(job, on_gpu, digits, uncounted):
    from epg_fast.data import ImageFolder
    from epg_fast.distributed import Ranks
    from epg_fast.training.state import RunState

    stage_class, config = (
        getattr(training, JOBS[job] + "Stage"),
        _config(job, posthoc_ema=PosthocEmaConfig([0.05, 0.1]), offload_ema=True),
    )
    memory = memory_per_gpu(planned_stage(config, stage_class, 2), 2)
    stage = stage_class(config, Ranks(0, 1, torch.device("cpu")))
    state = RunState(config, stage, ImageFolder(f"{digits}/train"), stage.ranks)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    one = size([*stage.network.parameters(), *stage.network.buffers()])
    assert memory.averages == on_gpu * one and len(state.optimizer._averages) == on_gpu
    staging = state.host_averages._staging
    assert size(staging) <= memory.in_host_memory - (3 - on_gpu) * one < 2 * size(staging)
    rows = describe(config, stage_class, DryRunConfig(dry_run=True))
    assert "in host memory" in rows and ("  average " in rows) == bool(on_gpu)


def _fails(capsys, flags, *expected):
    assert main(["finetune-diffusion", "--config", "imagenet256_diffusion", *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(text in line for text in expected), line


def test_what_cannot_be_is_refused_with_the_remedy(capsys):
    _fails(
        capsys, ["--dry-run", "--gpus", "7"], "1024 does not divide over 7 GPUs", "--batch_size 1022", "1029", "4 of"
    )
    _fails(capsys, ["--dry_run", "--gpu", "H20"], "'H20'", "did you mean 'H200'", "RTX 4090")
    _fails(capsys, ["--gpus", "8"], "gpus is for --dry_run", "torchrun --nproc-per-node")
    _fails(capsys, ["--utilization", "0.5"], "utilization is for --dry_run")
    _fails(capsys, ["--dry_run", "--utilization", "60"], "utilization is 60")
    _fails(capsys, ["--dry_run", "--model.num_heads", "5"], "768", "5")
    graphs = ["--dry_run", "--cuda_graphs", "true", "--compile", "network"]
    _fails(capsys, [*graphs, "--gpus", "2"], "got 2 ranks, wanted 1")
    _fails(capsys, [*graphs, "--gpus", "1", "--gradient_accumulation", "2"], "got gradient_accumulation 2, wanted 1")
    _fails(capsys, ["--dry_runn"], "did you mean 'dry_run'")


def test_the_flag_may_stand_alone_or_with_a_value():
    class_ = type(make_config("pretrain"))
    for flags, wanted in (("--dry-run", True), ("--dry_run false", False), ("--dry-run=true", True), ("", False)):
        config, options = parse([class_, DryRunConfig], [*flags.split(), "--steps", "3"], "pretrain")
        assert (options.dry_run, config.steps) == (wanted, 3)


def test_other_ranks_of_torchrun_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pretrain", "--config", "digits", "--config", "digits_pretrain", "--dry_run"]) == 0
    assert capsys.readouterr().out == ""
