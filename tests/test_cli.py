"""The command line as a user meets it: failures are one line with exit code 2, and nothing is overwritten."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from epg_fast.__main__ import _parse, main
from epg_fast.config import DiffusionConfig
from epg_fast.models import load_weights
from epg_fast.training import loop
from epg_fast.training.state import RunState


def _fails(capsys, arguments, *expected, code=2):
    """Run a command in this process; it must fail with one line that holds all of `expected`."""
    assert main([str(a) for a in arguments]) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("epg-fast: error: ")
    for text in expected:
        assert text in line, line
    return line


@pytest.fixture
def diffusion(tiny_run, tmp_path):
    """Command of a short diffusion run, without its folder."""
    return ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--preview.every", "0"]


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    """A generator with random weights, as a run would leave it."""
    from epg_fast.models import create_model, preset_config, save_weights

    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 1}
    sizes["decoder_num_heads"] = 2
    model = create_model("digits_32", **sizes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    metadata = {"config": preset_config("digits_32", **sizes), "parameterization": "x0", "normalization": "simple"}
    save_weights(folder / "model.safetensors", model.state_dict(), metadata)
    return folder


def test_help_and_env_work_without_arguments(capsys):
    assert main([]) == 0
    assert "finetune-consistency" in capsys.readouterr().out
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"torch: {' ' * 0}" in out.replace("  ", " ") or "torch:" in out
    assert torch.__version__.partition("+")[0] in out and "extension:" in out


def test_misspelt_names_are_answered_with_the_nearest(capsys, tmp_path):
    _fails(capsys, ["pretain"], "unknown job 'pretain'", "did you mean 'pretrain'")
    _fails(capsys, ["pretrain", "--optimizer.lrr", "1"], "--optimizer.lrr", "did you mean 'optimizer.lr'")
    _fails(capsys, ["pretrain", "--config", "digit_pretrain"], "did you mean 'digits_pretrain'")
    _fails(capsys, ["pretrain", "--model.preset", "epg_xl", "--outdir", tmp_path / "x", "--data.path", "x"], "x")
    (tmp_path / "a.yaml").write_text("optimizer: {wieght_decay: 1}\n")
    _fails(capsys, ["pretrain", "--config", tmp_path / "a.yaml"], "did you mean 'optimizer.weight_decay'")
    (tmp_path / "b.yaml").write_text("batchsize: 1\n")
    _fails(capsys, ["pretrain", "--config", tmp_path / "b.yaml"], "did you mean 'batch_size'")
    (tmp_path / "c.yaml").write_text("a: [\n")
    _fails(capsys, ["pretrain", "--config", tmp_path / "c.yaml"], "c.yaml")
    _fails(capsys, ["pretrain", "--batch_size", "many"], "batch_size", "many")
    _fails(capsys, ["pretrain", "--steps", "0"], "steps is 0")


def test_configs_merge_left_to_right_and_flags_win_wherever_they_stand(tmp_path, diffusion):
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 0.5, eps: 0.25}\nseed: 3\n")
    (tmp_path / "b.yaml").write_text("optimizer: {lr: 0.125}\nseed: 4\n")
    out = tmp_path / "run"
    flags = ["--seed", "5", "--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--steps", "1"]
    assert main([str(a) for a in [*diffusion, *flags, "--outdir", out]]) == 0
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["optimizer"]["lr"], saved["optimizer"]["eps"], saved["seed"]) == (0.125, 0.25, 5)
    assert saved["model"]["preset"] == "digits_32" and saved["optimizer"]["betas"] == [0.9, 0.99]
    again = tmp_path / "again"
    assert main(["finetune-diffusion", "--config", str(out / "config.yaml"), "--outdir", str(again)]) == 0
    one, two = (json.loads((f / "metrics.jsonl").read_text()) for f in (out, again))
    assert one["loss"] == two["loss"]


def test_a_run_folder_of_another_configuration_is_refused_and_left_alone(capsys, diffusion, tmp_path):
    command = [*diffusion, "--steps", "2", "--outdir", tmp_path / "run"]
    assert main([str(a) for a in command]) == 0
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    _fails(capsys, [*command, "--optimizer.lr", "0.5"], "other settings", "optimizer.lr was 0.003, now 0.5")
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    _fails(capsys, [*diffusion, "--outdir", tmp_path / "mine"], "not empty and not a folder of training")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_processes_cannot_train_in_the_same_folder(capsys, diffusion, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = [*diffusion, "--steps", "2", "--checkpoint_every", "1", "--outdir", out]
    assert main([str(a) for a in command]) == 0
    shutil.rmtree(out / "checkpoints" / "step_000000002")
    resumed = []
    monkeypatch.setattr(RunState, "resume", lambda *arguments: resumed.append(1))
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
    code += "print('held', flush=True); input()"
    arguments = [sys.executable, "-c", code, str(out / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        _fails(capsys, command, "another training is at work in")
        assert not resumed  # the other one, if it is just ending, leaves a newer state
        other.communicate("\n")
    monkeypatch.undo()
    assert main([str(a) for a in command]) == 0


def test_a_run_that_came_and_went_during_the_start_is_not_started_anew(capsys, diffusion, tmp_path, monkeypatch):
    checkpoints, make = tmp_path / "run" / "checkpoints", loop.make_loader

    def make_loader(*arguments, **options):  # after the state is read
        (checkpoints / "step_000000002").mkdir(parents=True)
        return make(*arguments, **options)

    monkeypatch.setattr(loop, "make_loader", make_loader)
    _fails(capsys, [*diffusion, "--steps", "2", "--outdir", tmp_path / "run"], "meanwhile; give the same command again")
    assert [path.name for path in checkpoints.iterdir()] == ["step_000000002"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--optimizer.lr=-1", "lr is -1"),
        ("--optimizer.lr .nan", "lr is nan"),
        ("--optimizer.betas [0.9,1.0]", "betas"),
        ("--ema 2", "ema is 2"),
        ("--label_dropout 7", "label_dropout is 7"),
        ("--noise.sigma_min 100", "sigma_min is 100"),
        ("--noise.rho 0", "rho is 0"),
        ("--model.num_heads 0", "num_heads is 0"),
        ("--model.depth 0", "depth is 0"),
        ("--preview.sampler huen", "huen"),
        ("--preview.steps 1", "steps is 1"),
        ("--preview.interval [2,1]", "low <= high"),
        ("--seed -1", "seed is -1"),
        ("--num_scales 1", "num_scales is 1"),
        ("--seed 18446744073709551616", "seed is 18446744073709551616"),
        ("--p_mean .nan", "p_mean is nan"),
        ("--preview.guidance .inf", "guidance is inf"),
        ("--optimizer.warmup_steps -4", "warmup_steps is -4"),
        ("--optimizer.milestones [5,1]", "milestones are (5, 1)"),
        ("--data.readers -3", "readers is -3"),
    ],
)
def test_numbers_without_meaning_are_refused_before_training(capsys, diffusion, tmp_path, flags, message):
    _fails(capsys, [*diffusion, *flags.split(" "), "--outdir", tmp_path / "run"], message)
    assert not (tmp_path / "run").exists()


def test_wandb_is_missed_before_anything_is_written(capsys, diffusion, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _fails(capsys, [*diffusion, "--wandb", "digits", "--outdir", tmp_path / "run"], "pip install wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["data: 5", "model: null", "optimizer: [1]"])
def test_a_group_in_a_recipe_must_hold_fields(capsys, diffusion, tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    _fails(capsys, [*diffusion, "--config", tmp_path / "a.yaml", "--outdir", tmp_path / "run"], "a.yaml", "is a group")


def test_a_run_that_failed_before_its_first_checkpoint_can_be_corrected(capsys, tiny_run, tmp_path):
    command = ["pretrain", *tiny_run[:2], "--config", "digits_pretrain", *tiny_run[2:], "--steps", "2"]
    command = [*command, "--outdir", tmp_path / "run"]
    _fails(capsys, [*command, "--batch_size", "1"], "more than 1 value", code=2)
    assert main([str(a) for a in [*command, "--batch_size", "4"]]) == 0


def test_a_damaged_run_folder_is_reported(capsys, diffusion, tmp_path):
    command = [*diffusion, "--steps", "2", "--checkpoint_every", "1", "--outdir", tmp_path / "run"]
    assert main([str(a) for a in command]) == 0
    (tmp_path / "run" / "checkpoints" / "step_000000002" / "state.json").write_text("{}")
    assert main([str(a) for a in command]) == 0
    assert "trying the one before it" in capsys.readouterr().err
    (tmp_path / "run" / "config.yaml").write_text("- 1\n")
    _fails(capsys, command, "config.yaml cannot be read")


def test_a_missing_optional_package_is_named_with_its_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    _fails(capsys, ["prepare-data", "--outdir", tmp_path / "x"], "scikit-learn", "pip install")


def test_bad_models_and_data_are_refused_before_anything_is_written(capsys, diffusion, digits, tmp_path):
    out = tmp_path / "run"
    run = [*diffusion, "--outdir", out]
    _fails(capsys, [*run, "--model.preset", "digits_23"], "unknown preset 'digits_23'", "did you mean 'digits_32'")
    _fails(capsys, [*run, "--model.image_size", "30"], "image_size 30", "patch_size 8")
    _fails(capsys, [*run, "--model.num_classes", "7"], "10 classes", "model has 7")
    _fails(capsys, [*run, "--model.num_heads", "5"], "32", "heads 5")
    _fails(capsys, [*run, "--data.path", tmp_path / "nowhere"], "nowhere")
    (tmp_path / "empty").mkdir()
    _fails(capsys, [*run, "--data.path", tmp_path / "empty"], "empty")
    flat = tmp_path / "flat"
    shutil.copytree(digits / "train" / "0", flat)
    _fails(capsys, [*run, "--data.path", flat], "flat", "class")
    _fails(capsys, [*run, "--batch_size", "5000"], "5000", "1347")
    _fails(capsys, [*run, "--init_from", tmp_path / "no.pth"], "no.pth", "no such file")
    _fails(capsys, diffusion, "outdir is missing")
    if not torch.cuda.is_available():
        _fails(capsys, [*run, "--device", "cuda"], "sees no CUDA GPU")
    assert not (out / "checkpoints").exists() and not (out / "config.yaml").exists()


def test_a_checkpoint_that_does_not_fit_or_is_no_checkpoint(capsys, diffusion, checkpoint, tmp_path):
    run = [*diffusion, "--outdir", tmp_path / "run"]
    _fails(
        capsys,
        [*run, "--init_from", checkpoint, "--model.decoder_embed_dim", "96"],
        "has shape [48], want [96]",
        "more",
    )
    executed = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(executed),))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Evil()}))
    _fails(capsys, [*run, "--init_from", tmp_path / "evil.pth"], "evil.pth", "not loaded")
    _fails(capsys, ["sample", "--checkpoint", tmp_path / "evil.pth", "--outdir", tmp_path / "s"], "evil.pth")
    assert not executed.exists()


def test_a_checkpoint_to_resume_from_names_the_run_whose_weights_are_wanted(capsys, diffusion, tmp_path):
    assert main([str(a) for a in [*diffusion, "--steps", "1", "--outdir", tmp_path / "run"]]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000001"
    command = ["export", "--output", tmp_path / "x.safetensors", "--checkpoint", checkpoint]
    _fails(capsys, command, "no weights in this folder", f"{tmp_path / 'run'}: pass that")


def test_bad_images_are_skipped_and_named_and_too_many_stop_the_run(capsys, diffusion, digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data)
    files = sorted(data.rglob("*.png"))
    files[5].write_bytes(files[5].read_bytes()[:40])
    run = [*diffusion, "--data.path", data, "--steps", "90"]
    assert main([str(a) for a in [*run, "--outdir", tmp_path / "a"]]) == 0
    assert str(files[5].relative_to(data)) in capsys.readouterr().err
    for file in files[20:60]:
        file.write_text("not an image")
    _fails(capsys, [*run, "--outdir", tmp_path / "b"], "files")


def test_sample_writes_the_images_it_says(checkpoint, tmp_path):
    out = tmp_path / "s"
    command = ["sample", "--checkpoint", checkpoint, "--num", "6", "--labels", "3,7", "--steps", "3", "--png", "true"]
    assert main([str(a) for a in [*command, "--outdir", out]]) == 0
    with np.load(out / "samples.npz") as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8 and labels.tolist() == [3, 7, 3, 7, 3, 7]
    with Image.open(out / "png" / "0007" / "000003.png") as file:
        assert np.array_equal(np.asarray(file), images[3])
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 64


def test_sample_refuses_what_it_cannot_do(capsys, checkpoint, tmp_path):
    out = tmp_path / "s"
    command = ["sample", "--checkpoint", checkpoint, "--num", "2", "--outdir", out]
    _fails(capsys, [*command, "--steps", "1"], "heun needs at least 2")
    _fails(capsys, [*command, "--labels", "0,10"], "label 10", "0..9")
    _fails(capsys, [*command, "--labels", "cats"], "balanced, random")
    _fails(capsys, [*command, "--sampler", "huen"], "huen", "heun")
    _fails(capsys, [*command, "--num", "0"], "num is 0")
    _fails(capsys, [*command, "--guidance", "2", "--interval", "[3,1]"], "low <= high")
    _fails(capsys, ["sample", "--outdir", out], "--checkpoint")
    assert not out.exists()
    assert main([str(a) for a in [*command, "--steps", "2"]]) == 0
    content = (out / "samples.npz").read_bytes()
    _fails(capsys, [*command, "--steps", "3"], "other settings", "steps was 2, now 3")
    assert main([str(a) for a in [*command, "--steps", "2"]]) == 0
    assert (out / "samples.npz").read_bytes() == content


def test_prepare_data_writes_shards_verifies_them_and_names_the_damaged_one(capsys, digits, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "folder"
    command = ["prepare-data", "--source", digits / "test", "--image_size", "8", "--workers", "0", "--outdir"]
    flags = ["--images_per_shard", "200", "--format", "jpeg", "--quality", "90", "--seed", "3"]
    assert main([str(a) for a in [*command, out, *flags]]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["format"], manifest["quality"], manifest["seed"], len(manifest["shards"])) == ("jpeg", 90, 3, 3)
    verify = ["prepare-data", "--verify", "true", "--outdir"]
    assert main([*verify, str(out)]) == 0
    assert "3 shards" in capsys.readouterr().out
    shard = out / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    _fails(capsys, [*verify, out], "shard-000001.tar is damaged", "delete it")
    _fails(capsys, [*verify, digits], "has no shards")
    assert main([str(a) for a in [*command, folder, "--layout", "folder"]]) == 0
    assert len(list(folder.rglob("*.png"))) == 450
    _fails(capsys, [*command, folder], "layout folder, wanted shards", "--layout folder")
    _fails(capsys, [*command, out, "--layout", "folder", "--format", "jpeg"], "layout folder is of PNG files")
    _fails(capsys, [*command, out, "--quality", "0"], "quality is 0")


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


def test_labels_of_samples_may_follow_the_frequencies_of_the_data(capsys, checkpoint, tmp_path):
    command = ["sample", "--checkpoint", checkpoint, "--num", "6", "--steps", "2", "--outdir", tmp_path / "s"]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"complete": True, "class_frequencies": [0.5, 0.5]}))
    _fails(capsys, [*command, "--labels", f"frequencies:{manifest}"], "2 classes, the model has 10")
    manifest.write_text(json.dumps({"complete": True, "class_frequencies": [0, 0.5, 0, 0.5] + [0] * 6}))
    assert main([str(a) for a in [*command, "--labels", f"frequencies:{manifest}"]]) == 0
    with np.load(tmp_path / "s" / "samples.npz") as stored:
        assert set(stored["arr_1"].tolist()) == {1, 3}


def test_evaluate_probe_and_export(capsys, checkpoint, digits, tmp_path):
    real = ["--train", digits / "train", "--test", digits / "test"]
    out = tmp_path / "probe.json"
    command = ["evaluate", "--probe", checkpoint, *real, "--sigmas", "[0.002]", "--output", out]
    assert main([str(a) for a in command]) == 0
    assert 0.1 < json.loads(out.read_text())["accuracy"]["0.002"] <= 1
    _fails(capsys, ["evaluate", *real], "--samples", "--probe")
    _fails(capsys, ["export", "--checkpoint", checkpoint], "--output")
    target = tmp_path / "x.safetensors"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(target)]) == 0
    _fails(capsys, ["export", "--checkpoint", checkpoint, "--output", target], "nothing is overwritten")


def test_configuration_files_are_understood_as_flags_are(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "# größe\ncompile: off\nwandb: 2026\ninit_from: 1e5\noutdir: ~/runs\noptimizer: {clip_norm:, lr: 1e-4}\n"
    for name, content in (("a", text.encode()), ("b", text.encode("utf-16")), ("empty", b"# nothing but this\n")):
        (tmp_path / f"{name}.yaml").write_bytes(content)
    for name in "ab":
        config, _ = _parse(
            "finetune-diffusion", DiffusionConfig, ["--config", f"~/{name}.yaml", "--config=~/empty.yaml"]
        )
        assert (config.compile, config.wandb, config.init_from) == ("off", "2026", "1e5")
        assert (config.outdir, config.optimizer.clip_norm) == (f"{tmp_path}/runs", None)
    config, _ = _parse("finetune-diffusion", DiffusionConfig, ["--outdir=~/x", "--data.path", "$HOME/y"])
    assert (config.outdir, config.data.path) == (f"{tmp_path}/x", f"{tmp_path}/y")
    _fails(capsys, ["pretrain", "--outdir", "$NO_SUCH_VARIABLE/x"], "outdir is '$NO_SUCH_VARIABLE/x'")
    for content, wanted in (
        ("seed:", "seed has no value"),
        ("steps: 1\nsteps: 2", "steps comes twice"),
        ("- 1", "mapping"),
    ):
        (tmp_path / "c.yaml").write_text(content)
        _fails(capsys, ["pretrain", "--config", tmp_path / "c.yaml"], "c.yaml", wanted)


def test_the_configuration_of_a_run_is_read_again_whatever_its_folder_is_called(diffusion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1e5", "off", os.fsdecode(b"not \xff utf-8")):
        assert main([*diffusion, "--steps", "1", "--tensorboard", "true", "--outdir", name]) == 0
        config, _ = _parse("finetune-diffusion", DiffusionConfig, ["--config", f"{name}/config.yaml"])
        assert config.outdir == name


@pytest.mark.parametrize("names", [["lost+found"], [".DS_Store"], ["@eaDir", "Thumbs.db", ".nfs0001"]])
def test_what_systems_leave_in_a_folder_does_not_make_it_someone_elses(diffusion, checkpoint, tmp_path, names):
    for folder in ("run", "samples"):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
    assert main([*diffusion, "--steps", "1", "--outdir", str(tmp_path / "run")]) == 0
    sample = ["sample", "--checkpoint", str(checkpoint), "--num", "1", "--steps", "2", "--outdir"]
    assert main([*sample, str(tmp_path / "samples")]) == 0


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
        _fails(capsys, command, reason, place)
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
        _fails(capsys, sample, expected, "start with torchrun")


def test_no_message_ends_the_work(checkpoint, tmp_path):
    """Neither names and locales that do not go together, nor streams that are closed or full."""
    run = tmp_path / os.fsdecode(b"not \xff utf-8")
    shutil.copytree(checkpoint, run)
    command = [sys.executable, "-m", "epg_fast", "export", "--checkpoint", os.fsencode(run), "--output"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    outputs = [os.fsencode(run / name) for name in ("a.safetensors", "b.safetensors")]
    done = subprocess.run([*command, outputs[0]], capture_output=True, env=os.environ | ascii_only)
    assert done.returncode == 0 and rb"not \udcff utf-8" in done.stdout, done.stderr
    sample = [*command[:3], "sample", *command[4:6], "--num", "1", "--steps", "2", "--outdir"]
    for name, stderr in (("closed", "2>&-"), ("full", "2>/dev/full")):
        words = ["sh", "-c", f'exec "$@" {stderr}', "sh", *sample, str(tmp_path / name)]
        assert subprocess.run(words, stdout=subprocess.PIPE).returncode == 0
        assert (tmp_path / name / "samples.npz").is_file()


def test_the_exit_code_reaches_the_shell(tmp_path):
    command = [sys.executable, "-m", "epg_fast", "pretrain", "--data.path", str(tmp_path / "x"), "--outdir", "y"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
