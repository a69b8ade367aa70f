"""The `sample` command: what is in its folder, whoever drew it and however often it was stopped."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.__main__ import main
from epg_fast.config import SampleConfig
from epg_fast.models import from_pretrained, load_weights, save_weights
from epg_fast.plans import Machine
from epg_fast.sampling import command as command_module
from epg_fast.sampling import image_error, outputs, sample
from epg_fast.sampling.outputs import Outputs
from tests.commands import Kept, ask_to_stop, fails, full_disk, held_by_another_process, on_two_ranks, python, snapshot
from tests.sampling.conftest import write_checkpoint

KILLER = Path(__file__).parent / "kill_everywhere.py"


@pytest.fixture(scope="session")
def command(checkpoint):
    """Of 8 images in batches of 3, without its folder."""
    flags = {"checkpoint": checkpoint, "num": 8, "steps": 2, "batch_size": 3, "device": "cpu"}
    return ["sample", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


@pytest.fixture
def arguments(command, tmp_path):
    """That command with a folder for one test, `s`."""
    return [*command, "--outdir", str(tmp_path / "s")]


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """The folder of that command, with PNG files."""
    folder = tmp_path_factory.mktemp("finished") / "s"
    assert main([*command, "--png", "true", "--outdir", str(folder)]) == 0
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Indices of the images that are drawn, batch by batch."""
    batches, save = Kept(), Outputs.save_part

    def note(held, start, pixels):
        images = save(held, start, pixels)
        batches.append(list(images))
        return images

    monkeypatch.setattr(Outputs, "save_part", note)
    return batches


def stopped_at(target, name, arguments):
    """Give a command that gets SIGTERM where it calls target.name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, ask_to_stop)
        assert main([str(a) for a in arguments]) == 128 + signal.SIGTERM


def arrays(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"], json.loads(file["metadata"].item())


def test_the_folder_says_what_it_holds(finished, checkpoint):
    images, labels, metadata = arrays(finished)
    assert images.shape == (8, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert metadata == json.loads((finished / "settings.json").read_text())
    wanted = {"checkpoint": str(checkpoint), "sampler": "heun", "steps": 2, "evaluations": 2, "labels": "balanced"}
    wanted |= {"guidance": 1.0, "interval": [0.19, 1.61], "precision": "fp32", "seed": 0, "num": 8}
    assert wanted.items() <= metadata.items() and len(metadata["weights_sha256"]) == 64
    (using,) = metadata["drawn_with"]
    assert using.items() >= {"compile": "off", "cuda_graphs": False, "plan": None, "ops": {}}.items()
    assert using.items() >= {"torch": torch.__version__, "numpy": np.__version__, "processes": 1}.items()
    assert using["device"] == Machine.here(torch.device("cpu")).device and using["batch_size"] == 3
    assert metadata["ema"] == {"step": 7, "ema_decay": 0.99} and not (finished / "parts").exists()
    for i, label in enumerate(labels):
        with Image.open(finished / "png" / f"{label:04d}" / f"{i:06d}.png") as file:
            assert np.array_equal(np.asarray(file), images[i])
    assert Image.open(finished / "grid.png").width > 3 * 96


def test_names_of_classes_are_below_the_grid_and_in_the_note(command, finished, tmp_path):
    """A folder that was begun before names were noted goes on."""
    state, metadata = load_weights(command[command.index("--checkpoint") + 1])
    save_weights(tmp_path / "named.safetensors", state, metadata | {"class_names": [f"kind {i}" for i in range(10)]})
    named = [*command, "--checkpoint", str(tmp_path / "named.safetensors"), "--outdir", str(tmp_path / "s")]
    stopped_at(outputs, "save_grid", named)
    settings = json.loads((tmp_path / "s/settings.json").read_text())
    assert settings.pop("class_names") == [f"kind {i}" for i in range(10)]
    (tmp_path / "s/settings.json").write_text(json.dumps(settings))
    assert main(named) == 0
    assert np.array_equal(arrays(tmp_path / "s")[0], arrays(finished)[0])
    with Image.open(tmp_path / "s/grid.png") as grid, Image.open(finished / "grid.png") as bare:
        assert grid.width == bare.width and grid.height > bare.height + 30


@pytest.mark.parametrize("classes", [10, 0])
def test_the_error_of_a_precision_is_measured_once_on_the_first_images(command, tmp_path, monkeypatch, classes):
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", num_classes=classes)
    arguments = [*command, "--checkpoint", str(checkpoint), "--precision", "bf16", "--outdir", str(tmp_path / "s")]
    stopped_at(outputs, "save_grid", [*arguments, "--error_images", "4"])
    model, labels = from_pretrained(checkpoint), [0, 1, 2, 3] if classes else 4
    want = image_error(*(sample(model, labels, steps=2, batch_size=3, precision=p) for p in ("bf16", "fp32")))
    found = json.loads((tmp_path / "s" / "precision.json").read_text())
    assert found == {"precision": "bf16", "images": 3} | found  # of the first batch
    assert found["relative_l2"] == pytest.approx(want["relative_l2"], rel=0.5) and 0 < found["relative_l2"] < 0.2
    assert main([*arguments[:-1], str(tmp_path / "other"), "--error_images", "0"]) == 0
    assert not (tmp_path / "other" / "precision.json").exists()
    monkeypatch.setattr(command_module, "_precision_error", None)
    assert main(arguments) == 0
    assert arrays(tmp_path / "s")[2]["precision_error"] == found


def test_a_folder_without_images_takes_other_settings_and_keeps_no_error_of_the_first(arguments, tmp_path):
    stopped_at(command_module, "_draw", [*arguments, "--precision", "bf16", "--steps", "3"])
    assert json.loads((tmp_path / "s" / "precision.json").read_text())["precision"] == "bf16"
    assert main([*arguments, "--precision", "fp8"]) == 0
    metadata = arrays(tmp_path / "s")[2]
    assert metadata["precision"] == metadata["wanted_precision"] == metadata["precision_error"]["precision"] == "fp8"
    assert (metadata["wanted_parameterization"], metadata["parameterization"]) == ("auto", "x0")
    assert metadata["steps"] == 2 and len(metadata["drawn_with"]) == 1


def test_a_precision_that_the_model_overflows_is_refused_before_hours_of_it(command, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "model.safetensors")
    state, metadata = load_weights(checkpoint)
    state["decoder_blocks.0.mlp.fc2.weight"] *= 1e6
    save_weights(checkpoint, state, metadata)
    arguments = [*command, "--checkpoint", checkpoint, "--precision", "fp16", "--outdir", tmp_path / "s"]
    fails(capsys, arguments, "precision fp16", "not finite", "take bf16 or fp32")


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_finishes_to_the_same_bytes(command, finished, tmp_path):
    commands = [[*command, "--png", "true", "--npz", npz, "--outdir", str(tmp_path / npz)] for npz in ("true", "false")]
    assert min(json.loads(python(KILLER, json.dumps(commands)).stdout)) >= 6
    want = snapshot(finished)
    assert snapshot(tmp_path / "true") == want
    del want["samples.npz"]
    assert snapshot(tmp_path / "false") == want


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_keeps_what_is_finished(arguments, finished, tmp_path, capsys, drawn, number):
    before = signal.getsignal(signal.SIGTERM)

    def twice():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after the scheduler's

    drawn.stop = {2: twice}
    fails(capsys, arguments, f"{number.name}: stopped", "the same command goes on", code=128 + number)
    assert signal.getsignal(signal.SIGTERM) == before
    assert drawn == [[0, 1, 2], [3, 4, 5]] and len(list((tmp_path / "s" / "parts").iterdir())) == 2
    assert main([*arguments, "--png", "true"]) == 0  # which it was not to write before
    assert drawn[2:] == [[6, 7]] and snapshot(tmp_path / "s") == snapshot(finished)


@pytest.mark.parametrize("name", ["save_grid", "save_png", "write_npz"])
def test_stopped_in_the_end_the_same_command_goes_on_without_drawing(command, finished, tmp_path, drawn, name):
    arguments = [*command, "--png", "true", "--outdir", str(tmp_path / "s")]
    stopped_at(outputs, name, arguments)
    assert len(list((tmp_path / "s" / "parts").iterdir())) == 3
    assert main(arguments) == 0 and len(drawn) == 3
    assert snapshot(tmp_path / "s") == snapshot(finished)


def test_another_batch_size_goes_on_and_is_noted(arguments, finished, tmp_path, drawn):

    def crash():
        raise RuntimeError("out of memory")

    drawn.stop = {2: crash}
    assert main(arguments) == 1
    (tmp_path / "s" / "parts" / "00000000_00000003.npy").write_bytes(b"damaged")
    assert main([*arguments, "--batch_size", "4"]) == 0
    assert sorted(i for batch in drawn[2:] for i in batch) == [0, 1, 2, 6, 7]
    (images, labels, metadata), (wanted, wanted_labels, _) = arrays(tmp_path / "s"), arrays(finished)
    assert np.array_equal(labels, wanted_labels) and np.abs(images.astype(int) - wanted).max() <= 1
    assert [using["batch_size"] for using in metadata["drawn_with"]] == [3, 4]


def test_outputs_are_chosen_and_completed(command, finished, tmp_path, capsys, drawn):
    """PNG files are made of an npz; of PNG files nothing is read back."""
    want, arguments = snapshot(finished), [*command, "--outdir", str(tmp_path / "s")]
    assert main([*arguments, "--npz", "false", "--png", "true"]) == 0
    assert snapshot(tmp_path / "s") == {name: data for name, data in want.items() if name != "samples.npz"}
    assert main(arguments) == 0 and len(drawn) == 6
    assert snapshot(tmp_path / "s") == want
    assert "8 images are drawn again: PNG files of them are not read back" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "npz")
    assert main(arguments) == 0 and len(drawn) == 9
    assert set(snapshot(tmp_path / "npz")) == {"samples.npz", "grid.png", "settings.json"}
    assert main([*arguments, "--png", "true", "--batch_size", "5"]) == 0
    assert snapshot(tmp_path / "npz") == want and len(drawn) == 9


@pytest.mark.parametrize(("limit", "failing", "parts"), [(8000, "00000000_00000003.npy", 0), (20000, "samples.npz", 3)])
def test_a_full_disk_is_named_and_nothing_is_lost(arguments, tmp_path, capsys, limit, failing, parts):
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, full_disk(limit):
        patch.setattr(outputs, "save_grid", lambda images, path, *_: path.touch())  # which is too large as well
        assert main(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{failing}: File too large; what is finished stays" in said and "goes on" in said
    assert len(list((tmp_path / "s").glob("parts/*"))) == parts
    assert not list((tmp_path / "s").rglob("*.tmp")) and not (tmp_path / "s" / "samples.npz").exists()
    assert main(arguments) == 0
    assert arrays(tmp_path / "s")[0].shape == (8, 32, 32, 3)


def test_a_folder_of_other_settings_is_refused_and_left_alone(command, finished, checkpoint, tmp_path, capsys):
    before, manifest = snapshot(finished), tmp_path / "manifest.json"
    run = [*command, "--outdir", finished]
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    for flags, message in (
        (["--steps", "3"], "steps was 2, now 3"),
        (["--num", "9"], "num was 8, now 9"),
        (["--labels", "random"], "labels was 'balanced', now 'random'"),
        (["--seed", "1"], "seed was 0, now 1"),
        (["--guidance", "2"], "guidance was 1.0, now 2.0"),
        (["--precision", "bf16"], "precision was 'fp32', now 'bf16'"),
        (["--autoguidance", checkpoint], "autoguidance_sha256 was None"),
        (["--checkpoint", other], "weights_sha256 was"),
    ):
        fails(capsys, [*run, *flags], "other settings", message)
    moved = shutil.copy(checkpoint, tmp_path / "moved.safetensors")
    assert main([str(a) for a in [*run, "--checkpoint", moved]]) == 0  # the same weights
    assert snapshot(finished) == before

    manifest.write_text(json.dumps({"complete": True, "class_frequencies": [0.1] * 10}))
    arguments = [*command, "--labels", f"frequencies:{manifest}", "--outdir", tmp_path / "s"]
    assert main([str(a) for a in arguments]) == 0
    manifest.write_text(json.dumps({"complete": True, "class_frequencies": [0.5, 0.5] + [0] * 8}))
    fails(capsys, arguments, "labels_sha256 was")


def test_a_folder_that_cannot_be_used_is_refused_and_left_alone(command, finished, tmp_path, capsys):
    whole = shutil.copytree(finished, tmp_path / "whole")
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine" / "thesis.txt", tmp_path / "file"):
        path.write_text("dear")
    (whole / "settings.json").write_text("{")
    before = snapshot(tmp_path)
    for name, *expected in (
        ("mine", "not a folder of sample"),
        ("file", "is a file, wanted a folder"),
        ("file/s", "cannot be written", "Not a directory", "--outdir"),
        ("whole", "settings.json cannot be read", "restore it"),
    ):
        fails(capsys, [*command, "--outdir", tmp_path / name], *expected)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--labels 10", "label 10 is out of range: the model has classes 0..9"),
        ("--checkpoint PLAIN --guidance 2", "guidance is 2.0, which needs a class-conditional network"),
        ("--autoguidance LARGER", "image_size 64, want 32"),
        ("--npz false", "npz and png are both false"),
    ],
)
def test_a_bad_request_writes_nothing(command, tmp_path, capsys, flags, expected):
    for name, sizes in (("PLAIN", {"num_classes": 0}), ("LARGER", {"image_size": 64})):
        if name in flags:
            flags = flags.replace(name, str(write_checkpoint(tmp_path / f"{name}.safetensors", **sizes)))
    fails(capsys, [*command, "--outdir", tmp_path / "s", *flags.split()], expected)
    assert not (tmp_path / "s").exists()


def test_two_commands_cannot_write_to_one_folder(command, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    with held_by_another_process(tmp_path / "s"):
        fails(capsys, [*command, "--outdir", tmp_path / "s"], "another sample is at work in")
        assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]
    assert main([*command, "--outdir", str(tmp_path / "s")]) == 0


def test_resumed_images_count_as_done_and_not_as_speed(arguments, tmp_path, drawn, monkeypatch, capsys):
    bars, tqdm = [], command_module.tqdm
    monkeypatch.setattr(command_module, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    drawn.stop = {2: ask_to_stop}
    assert [main(arguments) for _ in range(3)] == [128 + signal.SIGTERM, 0, 0]
    assert [(bar.initial, bar.n, bar.total, bar.unit) for bar in bars] == [(0, 3, 8, "image"), (6, 8, 8, "image")]
    said = capsys.readouterr().err
    assert f"8 images in {tmp_path / 's'}" in said and "already holds these samples" in said


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws_and_share_what_is_left(command, tmp_path, drawn):
    arguments = [*command, "--num", "20", "--png", "true", "--outdir"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have
    try:
        assert main([*arguments, str(tmp_path / "one")]) == 0
        drawn.stop = {len(drawn) + 2: ask_to_stop}
        assert main([*arguments, str(tmp_path / "two")]) == 128 + signal.SIGTERM
    finally:
        torch.set_num_threads(threads)
    done = on_two_ranks([*arguments, tmp_path / "two"])
    assert "sample (2 processes): 100%" in done.stderr and "20/20" in done.stderr
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert np.array_equal(arrays(tmp_path / "one")[0], arrays(tmp_path / "two")[0])
    assert [u["processes"] for u in json.loads(two["settings.json"])["drawn_with"]] == [1, 2]
    assert {k: v for k, v in one.items() if k.endswith(".png")} == {k: v for k, v in two.items() if k.endswith(".png")}


class _Elsewhere:
    """The main one of two ranks, of which the other works on a node with a folder of its own."""

    main, rank, world_size, device = True, 0, 2, torch.device("cpu")

    def __init__(self, theirs):
        self.theirs = theirs

    def gather(self, value, while_waiting=None):
        return [value, self.theirs]

    def decide(self, choose):
        return choose()

    def count(self, number):
        return number


def test_ranks_whose_folder_is_not_shared_or_that_read_other_weights_are_named(command, tmp_path, finished):
    with pytest.raises(ValueError, match="rank 1 does not see .* of rank 0; .* must be a folder that nodes share"):
        command_module.require_shared(command_module.SampleFolder(finished), _Elsewhere(False))
    config = SampleConfig(checkpoint=command[2], outdir=str(tmp_path / "s"), device="cpu")
    with pytest.raises(ValueError, match="rank 1 has read other weights or labels than rank 0"):
        command_module._run(config, _Elsewhere(({"weights_sha256": "other"}, "cpu")))
    assert not (tmp_path / "s").exists()
    held = Outputs(tmp_path, np.zeros(8, int), 32, True, False)
    held.save_part(0, np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(RuntimeError, match=r"rank 1 has written .*00000004_00000008\.npy, which rank 0 does not see"):
        command_module._draw(None, held, [], 0, _Elsewhere([range(4), range(4, 8)]))
