"""The command line as a user meets it: failures are one line with exit code 2, and nothing is overwritten."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from epg_fast.__main__ import _JOBS, main
from epg_fast.config import (
    ConsistencyConfig,
    DataConfig,
    DiffusionConfig,
    EvaluateConfig,
    OptimizerConfig,
    PosthocEmaConfig,
    PrepareDataConfig,
    PretrainConfig,
    SampleConfig,
)
from epg_fast.distributed import Ranks
from epg_fast.files import OutputFolder
from epg_fast.flags import _flags, _shown, parse
from epg_fast.flags import words as words_of
from epg_fast.models import load_weights
from epg_fast.training import loop
from epg_fast.training.state import RunFolder, RunState
from tests.commands import fails, held_by_another_process, run, snapshot
from tests.sampling.conftest import write_checkpoint


@pytest.fixture
def diffusion(tiny_run, tmp_path):
    """Command of a short diffusion run, without its folder."""
    return ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--preview.every", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A generator with random weights, as a run would leave it."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.safetensors").parent


def test_help_env_and_version_work_without_arguments(capsys):
    assert main([]) == 0
    assert "finetune-consistency" in capsys.readouterr().out
    assert main(["env"]) == 0
    out, torch_version = capsys.readouterr().out, torch.__version__.partition("+")[0]
    assert "torch:" in out and torch_version in out and "extension:" in out
    assert main(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("epg-fast ") and f"torch {torch_version}" in line and "extension" in line
    with pytest.raises(SystemExit):
        main(["env", "--help"])
    assert "Versions, devices, extension" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["finetune-diffusion", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "--optimizer.clip_norm NUMBER or null" in text and "(default: 0.5)" in text


def test_a_recipe_brings_those_that_it_is_made_on_once_and_before_itself(tmp_path):
    """With or without them in front; a file of one's own, and flags, win."""
    for name, kind, first in (
        ("digits_pretrain", PretrainConfig, "digits"),
        ("imagenet512_diffusion", DiffusionConfig, "imagenet256_diffusion"),
    ):
        alone = parse([kind], ["--config", name], "x")
        assert alone == parse([kind], ["--config", first, "--config", name], "x")
    assert alone[0].batch_size == 1024 and alone[0].model.preset == "epg_l_32_512"
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"config: [digits_pretrain, {b}]\nsteps: 7")
    b.write_text(f"config: {a}\nsteps: 5\nbatch_size: 6")  # in a circle
    (found,) = parse([PretrainConfig], ["--config", str(a), "--seed", "3"], "x")
    assert (found.steps, found.batch_size, found.seed, found.model.preset) == (7, 6, 3, "digits_32")
    b.write_text("config: digit_pretrain")
    with pytest.raises(ValueError, match="config 'digit_pretrain': no such file .did you mean 'digits_pretrain'"):
        parse([PretrainConfig], ["--config", str(b)], "x")


@pytest.mark.parametrize("job", [name for name in _JOBS if name != "env"])
def test_every_flag_of_every_job_has_a_text_in_its_help(job, capsys):
    with pytest.raises(SystemExit):
        main([job, "--help"])
    lines = capsys.readouterr().out.splitlines()
    flags = [i for i, line in enumerate(lines) if line.startswith("  --")]
    assert len(flags) > 3 and all(lines[i + 1].startswith(" " * 8) and len(lines[i + 1]) > 12 for i in flags)
    assert all(len(line) <= 100 for line in lines)


MISTAKES = {
    # command: what its one line of error says
    "pretain": "unknown job 'pretain' (did you mean 'pretrain'?)",
    "pretrain --optimizer.lrr 1": "unknown argument --optimizer.lrr (did you mean 'optimizer.lr'?)",
    "pretrain --config digit_pretrain": "did you mean 'digits_pretrain'",
    "pretrain --batch_size many": "batch_size: got 'many', want INTEGER",
    "pretrain --batch_size": "batch_size: got 'nothing', want INTEGER",
    "pretrain --steps 0": "steps is 0, want at least 1",
    "pretrain --data.max_bad_fraction 2": "data.max_bad_fraction is 2.0, want 0 to 1",
    "pretrain --batch_size 1": "batch_size is 1, want at least 2",
    "pretrain --data.workers -1": "error: data.workers is -1, want at least 0",
    "pretrain --steps --seed 1": "steps: got 'nothing', want INTEGER",
    "pretrain steps": "unknown argument 'steps', want --flag value",
    "finetune-diffusion --ema -1e-3": "ema is -0.001, want 0 to 1",
    "pretrain --steps 2.5": "steps: got '2.5', want INTEGER",
    "pretrain --tensorboard maybe": "tensorboard: got 'maybe', want true or false",
    "pretrain --outdir $NO_SUCH_VARIABLE/x": "outdir is '$NO_SUCH_VARIABLE/x': no such user or variable",
    "pretrain --temperature_range [0,1]": "temperature_range is (0.0, 1.0), want more than 0",
    "pretrain --end_scales 4": "end_scales is 4, want at least start_scales, 20",
    "finetune-diffusion --optimizer.lr=-1": "lr is -1",
    "finetune-diffusion --optimizer.betas [0.9,1.0]": "betas is (0.9, 1.0), want at least 0 and less than 1",
    "finetune-diffusion --optimizer.betas [0.9]": "optimizer.betas: got '[0.9]', want [NUMBER,NUMBER]",
    "finetune-diffusion --noise.sigma_min 100": "sigma_min is 100",
    "finetune-diffusion --dry_run --model.depth 1000000": "model.depth is 1000000, want 1 to 1000",
    "finetune-diffusion --preview.sampler huen": "preview.sampler: got 'huen', want heun|euler",
    "finetune-diffusion --preview.steps 1": "heun needs at least 2 noise levels",
    "finetune-diffusion --preview.interval [2,1]": "interval is (2.0, 1.0), want low <= high",
    "finetune-diffusion --seed 18446744073709551616": "seed is 18446744073709551616",
    "finetune-diffusion --p_mean .nan": "p_mean is nan, want a finite number",
    "finetune-diffusion --compile on": "compile: got 'on', want auto|off|blocks|network",
    "sample --sampler onestep --s_churn 3": "s_churn is 3.0: no option of onestep",
    "sample --sampler edm_sde --s_min 3 --s_max 2": "s_max is 2.0, want at least s_min (3.0)",
    "export --checkpoint x": "output is missing; say it with --output",
    "reconstruct-ema --run x": "sigma_rel is missing",
    "sample --outdir x": "--checkpoint",
    "env now": "unknown argument 'now'",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_in_one_line(capsys, command):
    fails(capsys, command.split(" "), MISTAKES[command])


MISTAKES_IN_FILES = {
    "optimizer: {wieght_decay: 1}": "unknown name optimizer.wieght_decay (did you mean 'optimizer.weight_decay'?)",
    "batchsize: 1": "did you mean 'batch_size'",
    "a: [": "not valid YAML",
    "steps: 1\nsteps: 2": "steps comes twice",
    "- 1": "mapping",
    "data: 5": "data is a group",
    "model: null": "model is a group",
    "optimizer: [1]": "optimizer is a group",
    "steps: {a: 1}": "unknown name steps.a",
    "seed:": "seed: got 'nothing', want INTEGER",
    "steps: [1]": "steps: got ['1'], want INTEGER",
    "posthoc_ema: {sigma_rel: [{a: 1}]}": "posthoc_ema.sigma_rel: got [{'a': '1'}], want [NUMBER,...] or null",
}


def test_a_mistake_in_a_file_is_answered_in_one_line(capsys, tmp_path):
    for content, expected in MISTAKES_IN_FILES.items():
        (tmp_path / "a.yaml").write_text(content)
        of_a_value = ": got " in expected
        fails(capsys, ["pretrain", "--config", tmp_path / "a.yaml"], expected, "" if of_a_value else "a.yaml")


def test_configs_merge_left_to_right_and_flags_win_wherever_they_stand(tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 0.5, eps: 0.25}\nseed: 3\n")
    (tmp_path / "b.yaml").write_text("optimizer: {lr: 0.125}\nseed: 4\n")
    flags = ["--seed", "5", "--config", "digits", "--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"]
    (config,) = parse([DiffusionConfig], [*flags, "--batch-size", "7"], "finetune-diffusion")
    assert (config.optimizer.lr, config.optimizer.eps, config.seed, config.batch_size) == (0.125, 0.25, 5, 7)
    assert config.model.preset == "digits_32" and config.optimizer.betas == (0.9, 0.99)
    assert (config.optimizer.clip_norm, config.steps) == (0.5, 1_000_000)  # the job's own defaults


MADE_AGAIN = [
    SampleConfig(),
    SampleConfig(checkpoint="a b", guidance=1.25, interval=(0.28, 2.9), cuda_graphs=False, npz=False, png=True),
    SampleConfig(sampler="edm_sde", s_churn=3.5, labels="--odd", s_max=5.0),
    EvaluateConfig(samples="x.npz", sigmas=[0.5, 1e-7], inception="network.pt", train=""),
    PretrainConfig(optimizer=OptimizerConfig(lr=0.125), activation_checkpointing=0.5),
    DiffusionConfig(posthoc_ema=PosthocEmaConfig(sigma_rel=[0.05, 0.1]), ema_warmup=True),
]


@pytest.mark.parametrize("made", MADE_AGAIN)
def test_the_words_of_a_configuration_make_it_again(made):
    assert parse([type(made)], words_of(made), "job") == [made]


def test_configuration_files_are_understood_as_flags_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "# größe\ncompile: off\nwandb: 2026\ninit_from: 1e5\noutdir: ~/runs\nactivation_checkpointing: 0.5\n"
    text += "posthoc_ema:\n  sigma_rel:\n  - 0.05\n  - 1e-1\noptimizer: {clip_norm:, lr: 1e-4}\n"
    for name, content in (("a", text.encode()), ("b", text.encode("utf-16")), ("empty", b"# nothing but this\n")):
        (tmp_path / f"{name}.yaml").write_bytes(content)
    flags = ["--compile=off", "--wandb=2026", "--init_from=1e5", "--outdir=~/runs", "--activation_checkpointing=0.5"]
    flags += ["--posthoc_ema.sigma_rel=[0.05, 1e-1]", "--optimizer.clip_norm=null", "--optimizer.lr=1e-4"]
    commands = [["--config", f"~/{name}.yaml", "--config=~/empty.yaml"] for name in "ab"]
    a, b, c = (parse([DiffusionConfig], words, "finetune-diffusion")[0] for words in [*commands, flags])
    assert a == b == c
    assert (a.compile, a.wandb, a.init_from, a.outdir) == ("off", "2026", "1e5", f"{tmp_path}/runs")
    assert (a.optimizer.clip_norm, a.posthoc_ema.sigma_rel) == (None, [0.05, 0.1])


def test_every_default_is_what_its_own_text_means():
    """What `--help` shows can be given; what a run folder's config.yaml holds can be read again."""
    for kind in (PretrainConfig, DiffusionConfig, ConsistencyConfig, SampleConfig, EvaluateConfig, PrepareDataConfig):
        words = [f"--{flag.name}={_shown(flag.default)}" for flag in _flags(kind)]
        assert parse([kind], words, "x") == [kind()]


def test_a_run_folder_of_another_configuration_is_refused_and_left_alone(capsys, diffusion, tmp_path):
    command = [*diffusion, "--steps", "2", "--outdir", tmp_path / "run"]
    run(*command)
    before = snapshot(tmp_path / "run")
    fails(capsys, [*command, "--optimizer.lr", "0.5"], "other settings", "optimizer.lr was 0.003, now 0.5")
    assert snapshot(tmp_path / "run") == before
    (tmp_path / "run" / "config.yaml").write_text("- 1\n")
    fails(capsys, command, "config.yaml cannot be read")
    fails(capsys, [*diffusion, "--outdir", tmp_path], "not empty and not a folder of training")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000002"
    command = ["export", "--output", tmp_path / "x.safetensors", "--checkpoint", checkpoint]
    fails(capsys, command, "no weights in this folder", f"{tmp_path / 'run'}: pass that")


def test_two_processes_cannot_train_in_the_same_folder(capsys, diffusion, tmp_path, monkeypatch):
    out, resumed = tmp_path / "run", []
    command = [*diffusion, "--steps", "2", "--checkpoint_every", "1", "--outdir", out]
    run(*command)
    shutil.rmtree(out / "checkpoints" / "step_000000002")
    with monkeypatch.context() as patch, held_by_another_process(out):
        patch.setattr(RunState, "resume", lambda *arguments: resumed.append(1))
        fails(capsys, command, "another training is at work in")
        assert not resumed  # the other one, if it is just ending, leaves a newer state
    run(*command)


def test_a_run_that_came_and_went_during_the_start_is_not_started_anew(capsys, diffusion, tmp_path, monkeypatch):
    checkpoints, make = tmp_path / "run" / "checkpoints", loop.make_loader

    def make_loader(*arguments, **options):  # after the state is read
        (checkpoints / "step_000000002").mkdir(parents=True)
        return make(*arguments, **options)

    monkeypatch.setattr(loop, "make_loader", make_loader)
    fails(capsys, [*diffusion, "--steps", "2", "--outdir", tmp_path / "run"], "meanwhile; give the same command again")
    assert [path.name for path in checkpoints.iterdir()] == ["step_000000002"]


def test_a_run_that_failed_before_its_first_checkpoint_can_be_corrected(capsys, tiny_run, tmp_path, monkeypatch):
    command = ["pretrain", *tiny_run[:2], "--config", "digits_pretrain", *tiny_run[2:], "--steps", "2"]
    command = [*command, "--outdir", tmp_path / "run"]

    def fail(*_):
        raise ValueError("not with these numbers")

    with monkeypatch.context() as mistake:
        mistake.setattr(loop, "train_step", fail)
        fails(capsys, [*command, "--batch_size", "2"], "not with these numbers", code=2)
    assert (tmp_path / "run" / "config.yaml").exists()
    run(*command, "--batch_size", "4")


def test_a_missing_optional_package_is_named_with_its_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    fails(capsys, ["prepare-data", "--outdir", tmp_path / "x"], "pip install scikit-learn")
    assert not (tmp_path / "x").exists()


def test_bad_models_and_data_are_refused_before_anything_is_written(
    capsys, diffusion, digits, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out, flat = tmp_path / "run", shutil.copytree(digits / "train" / "0", tmp_path / "flat")
    (tmp_path / "empty").mkdir()
    cases = {
        "--model.preset digits_23": ("unknown preset 'digits_23'", "did you mean 'digits_32'"),
        "--model.image_size 30": ("image_size 30", "patch_size 8"),
        "--model.num_classes 7": ("10 classes", "model has 7"),
        "--model.num_heads 5": ("32", "heads 5"),
        f"--data.path {tmp_path}/nowhere": ("nowhere",),
        f"--data.path {tmp_path}/empty": ("empty",),
        f"--data.path {flat}": ("flat", "class"),
        "--batch_size 5000": ("5000", "1347"),
        f"--init_from {tmp_path}/no.pth": ("no.pth", "no such file"),
        f"--init_from {checkpoint} --model.decoder_embed_dim 96": ("has shape [48], want [96]", "more"),
        "--wandb digits": ("pip install wandb",),
    }
    if not torch.cuda.is_available():
        cases["--device cuda"] = ("sees no CUDA GPU",)
    for flags, expected in cases.items():
        fails(capsys, [*diffusion, "--outdir", out, *flags.split()], *expected)
    fails(capsys, diffusion, "outdir is missing")
    assert not (out / "checkpoints").exists() and not (out / "config.yaml").exists()


def test_prepare_data_writes_shards_verifies_them_and_names_the_damaged_one(capsys, digits, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "folder"
    command = ["prepare-data", "--source", digits / "test", "--image_size", "8", "--workers", "0", "--outdir"]
    run(*command, out, "--images_per_shard", "200", "--format", "jpeg", "--quality", "90", "--seed", "3")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["format"], manifest["quality"], manifest["seed"], len(manifest["shards"])) == ("jpeg", 90, 3, 3)
    verify = ["prepare-data", "--verify", "true", "--outdir"]
    run(*verify, out)
    assert "3 shards" in capsys.readouterr().out
    (out / "shard-000001.tar").write_bytes(b"\1" + (out / "shard-000001.tar").read_bytes()[1:])
    fails(capsys, [*verify, out], "shard-000001.tar is damaged", "delete it")
    fails(capsys, [*verify, digits], "has no shards")
    run(*command, folder, "--layout", "folder")
    assert len(list(folder.rglob("*.png"))) == 450
    fails(capsys, [*command, folder], "layout was 'folder', now 'shards'", "choose another --outdir")
    fails(capsys, [*command, out, "--layout", "folder", "--format", "jpeg"], "layout folder is of PNG files")
    fails(capsys, [*command, out, "--quality", "0"], "quality is 0")


def test_classes_without_images_are_said_recorded_and_not_sampled(capsys, digits, diffusion, tmp_path):
    data, run, later = tmp_path / "data", tmp_path / "run", tmp_path / "later"
    for name in map(str, range(10)):
        files = sorted((digits / "train" / name).iterdir())[: 0 if name in "06" else 2]
        (data / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, data / name)
    flags = ["--data.path", data, "--steps", "1", "--batch_size", "4", "--posthoc_ema.sigma_rel", "[0.1]"]
    flags += ["--preview.every", "1", "--preview.num", "10", "--preview.steps", "2"]
    assert main([str(a) for a in [*diffusion, *flags, "--outdir", run]]) == 0
    said = capsys.readouterr().err
    assert said.count("has no images of 2 of the model's 10 classes (0, 6): 2 stay untrained") == 1
    average = tmp_path / "average.safetensors"
    assert main(["reconstruct-ema", "--run", str(run), "--sigma_rel", "0.1", "--output", str(average)]) == 0
    for i, checkpoint in enumerate((run, average)):
        command = ["sample", "--checkpoint", checkpoint, "--num", "16", "--steps", "2", "--outdir", tmp_path / str(i)]
        assert main([str(a) for a in command]) == 0
        assert "was trained on 8 of its 10 classes: these are drawn" in capsys.readouterr().err
        with np.load(tmp_path / str(i) / "samples.npz") as stored:
            assert stored["arr_1"].tolist() == [1, 2, 3, 4, 5, 7, 8, 9] * 2
    # what is learnt later counts
    shutil.copy(sorted((digits / "train" / "6").iterdir())[0], data / "6")
    assert main([str(a) for a in [*diffusion, *flags, "--init_from", run, "--outdir", later]]) == 0
    assert load_weights(later)[1]["untrained_classes"] == [0]


def test_evaluate_probe_and_export(capsys, checkpoint, digits, tmp_path):
    out, target = tmp_path / "probe.json", tmp_path / "x.safetensors"
    data = ["--train", digits / "train", "--test", digits / "test"]
    run("evaluate", "--probe", checkpoint, *data, "--sigmas", "[0.002]", "--output", out)
    assert 0.1 < json.loads(out.read_text())["accuracy"]["0.002"] <= 1
    run("export", "--checkpoint", checkpoint, "--output", target)
    fails(capsys, ["export", "--checkpoint", checkpoint, "--output", target], "nothing is overwritten")


def test_the_configuration_of_a_run_is_read_again_whatever_its_folder_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1e5", "off", os.fsdecode(b"not \xff utf-8")):
        begun = DiffusionConfig(outdir=name, data=DataConfig(path="null"))
        RunFolder(name).claim("finetune-diffusion", begun, {}, Ranks(0, 1, torch.device("cpu")))
        assert parse([DiffusionConfig], ["--config", f"{name}/config.yaml"], "finetune-diffusion") == [begun]


def test_what_systems_leave_in_a_folder_does_not_make_it_someone_elses(tmp_path):
    for name in ("lost+found", ".DS_Store", "@eaDir", "Thumbs.db", ".nfs0001"):
        (tmp_path / "out" / name).mkdir(parents=True)
    assert not OutputFolder(tmp_path / "out", "training", "config.yaml").check()
    (tmp_path / "out" / "@eaDir" / "mine.txt").touch()
    assert not OutputFolder(tmp_path / "out", "training", "config.yaml").check()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="not empty and not a folder of training"):
        OutputFolder(tmp_path / "out", "training", "config.yaml").check()


@pytest.mark.parametrize(
    "place, reason",
    [("file/x", "Not a directory"), ("x" * 300, "File name too long"), ("/proc/x", "No such file or directory")],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    capsys, diffusion, tmp_path, monkeypatch, place, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    # nothing that the work needs is there: once begun it would fail in another way
    for command in (
        ["sample", "--checkpoint", "none", "--outdir", place],
        ["export", "--checkpoint", "none", "--output", f"{place}.safetensors"],
        ["export", "--checkpoint", "none", "--format", "official", "--output", place],
        ["reconstruct-ema", "--run", "none", "--sigma_rel", "0.1", "--output", f"{place}.safetensors"],
        ["evaluate", "--probe", "none", "--output", place],
        ["prepare-data", "--source", "none", "--outdir", place],
        [*diffusion, "--data.path", "none", "--outdir", place],
    ):
        fails(capsys, command, reason, place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_launcher_leaves_empty_means_one_process_and_what_makes_no_sense_is_refused(
    capsys, checkpoint, tmp_path, monkeypatch
):
    sample = ["sample", "--checkpoint", str(checkpoint), "--num", "1", "--steps", "2", "--outdir", str(tmp_path / "s")]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")
    assert main(sample) == 0
    assert "1 images in" in capsys.readouterr().err  # the only process talks
    for set_to, expected in (
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', want a number"),
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE=2 with no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "with RANK=2"),
    ):
        for name in names:
            monkeypatch.setenv(name, set_to.get(name, ""))
        fails(capsys, sample, expected, "start with torchrun")


@pytest.mark.slow
def test_no_message_ends_the_work(checkpoint, tmp_path):
    """Neither names and locales that do not go together, nor streams that are closed or full."""
    folder = tmp_path / os.fsdecode(b"not \xff utf-8")
    shutil.copytree(checkpoint, folder)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    for stderr, words, output in (
        ("2>&-", ["export", "--output"], "x.safetensors"),
        ("2>/dev/full", ["sample", "--num", "1", "--steps", "2", "--outdir"], "samples.npz"),
    ):
        place = folder / output if "export" in words else folder / "s"
        program = ["sh", "-c", f'exec "$@" {stderr}', "sh", sys.executable, "-m", "epg_fast"]
        command = [*program, *words, os.fsencode(place), "--checkpoint", os.fsencode(checkpoint)]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | ascii_only)
        assert done.returncode == 0 and (place if "export" in words else place / output).is_file()
        assert "sample" in words or rb"not \udcff utf-8" in done.stdout


def test_the_exit_code_reaches_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["epg-fast", "pretrain", "--data.path", "x", "--outdir", "y"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("epg_fast", run_name="__main__")
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_help_that_has_seen_enough_is_no_error(monkeypatch, capsys):
    """`epg-fast sample --help | head`: `console` ends without a word."""

    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        main(["sample", "--help"])
    assert capsys.readouterr().err == ""
