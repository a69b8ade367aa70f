"""The `sample` command: what is in its folder, whoever drew it and however often it was stopped."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.__main__ import main
from epg_fast.config import SampleConfig
from epg_fast.models import from_pretrained, load_weights, save_weights
from epg_fast.sampling import image_error, job, sample
from epg_fast.sampling.image_writer import ImageWriter
from epg_fast.sampling.images import Images
from tests.sampling.conftest import write_checkpoint

KILLER = Path(__file__).parent / "kill_everywhere.py"


@pytest.fixture
def command(checkpoint):
    """Of 8 images in batches of 3, without its folder."""
    flags = {"checkpoint": checkpoint, "num": 8, "steps": 2, "batch_size": 3, "device": "cpu"}
    return ["sample", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


@pytest.fixture
def whole(command, tmp_path_factory):
    """The folder of that command, with PNG files."""
    folder = tmp_path_factory.mktemp("whole") / "s"
    assert main([*command, "--png", "true", "--outdir", str(folder)]) == 0
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Indices of the images that are drawn, batch by batch."""
    batches, add = [], ImageWriter.add

    def note(writer, indices, pixels):
        batches.append(indices.tolist())
        add(writer, indices, pixels)

    monkeypatch.setattr(ImageWriter, "add", note)
    return batches


@pytest.fixture
def stop_after(monkeypatch):
    """Return a function: n, action -> the action is done when n batches have been added."""

    def stop(number, action):
        left, add = [number], ImageWriter.add

        def stopping(writer, indices, pixels):
            add(writer, indices, pixels)
            left[0] -= 1
            if left[0] == 0:
                action()

        monkeypatch.setattr(ImageWriter, "add", stopping)

    return stop


@pytest.fixture
def one_thread():
    """As torchrun's processes have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fails(capsys, arguments, *expected, code=2):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("epg-fast: error: ") and "Traceback" not in error
    for text in expected:
        assert text in line, line


def content(folder):
    """Bytes of all files but the lock."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def arrays(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"], json.loads(file["metadata"].item())


def test_the_folder_says_what_it_holds(whole, checkpoint):
    images, labels, metadata = arrays(whole)
    assert images.shape == (8, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert metadata == json.loads((whole / "settings.json").read_text())
    wanted = {"checkpoint": str(checkpoint), "sampler": "heun", "steps": 2, "evaluations": 2, "labels": "balanced"}
    wanted |= {"guidance": 1.0, "interval": [0.19, 1.61], "precision": "fp32", "seed": 0, "num": 8}
    assert wanted.items() <= metadata.items() and len(metadata["weights_sha256"]) == 64
    using = {"compile": "off", "cuda_graphs": False, "plan": None, "ops": {}}
    using |= {"torch": torch.__version__, "device": "cpu", "processes": 1, "batch_size": 3}
    assert metadata["drawn_with"] == [using] and not (whole / "parts").exists()
    for i, label in enumerate(labels):
        with Image.open(whole / "png" / f"{label:04d}" / f"{i:06d}.png") as file:
            assert np.array_equal(np.asarray(file), images[i])
    assert Image.open(whole / "grid.png").width > 3 * 96


@pytest.mark.parametrize("classes", [10, 0])
def test_the_error_of_a_precision_is_measured_once_on_the_first_images(command, tmp_path, classes):
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", num_classes=classes)
    arguments = [*command, "--checkpoint", str(checkpoint), "--precision", "bf16", "--outdir", str(tmp_path / "s")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Images, "discard_parts", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*arguments, "--error_images", "4"]) == 128 + signal.SIGTERM
    model, labels = from_pretrained(checkpoint), [0, 1, 2, 3] if classes else 4
    want = image_error(*(sample(model, labels, steps=2, batch_size=3, precision=p) for p in ("bf16", "fp32")))
    found = json.loads((tmp_path / "s" / "precision.json").read_text())
    assert found == {"precision": "bf16", "images": 3} | found  # of the first batch
    assert found["relative_l2"] == pytest.approx(want["relative_l2"], rel=0.5) and 0 < found["relative_l2"] < 0.2
    assert arrays(tmp_path / "s")[2]["precision_error"] == found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_report_error", None)
        assert main(arguments) == 0
    assert main([*arguments[:-1], str(tmp_path / "other"), "--error_images", "0"]) == 0
    assert not (tmp_path / "other" / "precision.json").exists()


def test_an_error_of_other_settings_is_not_kept(command, tmp_path, stop_after):
    """Of a start that was stopped before its first image."""
    arguments = [*command, "--outdir", str(tmp_path / "s")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_draw_missing", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*arguments, "--precision", "bf16"]) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "s" / "precision.json").read_text())["precision"] == "bf16"
    assert main([*arguments, "--precision", "fp8"]) == 0
    metadata = arrays(tmp_path / "s")[2]
    assert metadata["precision"] == metadata["wanted_precision"] == metadata["precision_error"]["precision"] == "fp8"
    assert (metadata["wanted_parameterization"], metadata["parameterization"]) == ("auto", "x0")


def test_a_damaged_npz_is_not_taken_for_finished(command, whole, capsys):
    (whole / "samples.npz").write_bytes((whole / "samples.npz").read_bytes()[:-100])
    fails(capsys, [*command, "--png", "true", "--outdir", whole], "samples.npz is damaged; delete it")


def test_a_precision_that_the_model_overflows_is_refused_before_hours_of_it(command, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "model.safetensors")
    state, metadata = load_weights(checkpoint)
    state["decoder_blocks.0.mlp.fc2.weight"] *= 1e6
    save_weights(checkpoint, state, metadata)
    arguments = [*command, "--checkpoint", checkpoint, "--precision", "fp16", "--outdir", tmp_path / "s"]
    fails(capsys, arguments, "precision fp16", "not finite", "take bf16 or fp32")


def test_killed_at_any_moment_the_same_command_finishes_to_the_same_bytes(command, whole, tmp_path):
    commands = [[*command, "--png", "true", "--npz", npz, "--outdir", str(tmp_path / npz)] for npz in ("true", "false")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, KILLER, json.dumps(commands)]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert min(json.loads(done.stdout)) >= 8
    want = content(whole)
    assert content(tmp_path / "true") == want
    del want["samples.npz"]
    assert content(tmp_path / "false") == want


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_keeps_what_is_finished(command, whole, tmp_path, capsys, stop_after, drawn, number):
    arguments = [*command, "--png", "true", "--outdir", tmp_path / "s"]
    before = signal.getsignal(signal.SIGTERM)

    def twice():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after the scheduler's

    stop_after(2, twice)
    fails(capsys, arguments, f"{number.name}: stopped", "the same command goes on", code=128 + number)
    assert signal.getsignal(signal.SIGTERM) == before
    assert drawn == [[0, 1, 2], [3, 4, 5]] and len(list((tmp_path / "s" / "parts").iterdir())) == 2
    assert main([str(a) for a in arguments]) == 0
    assert drawn[2:] == [[6, 7]] and content(tmp_path / "s") == content(whole)


def test_another_batch_size_goes_on_and_is_noted(command, whole, tmp_path, stop_after, drawn):
    arguments = [*command, "--outdir", str(tmp_path / "s")]

    def crash():
        raise RuntimeError("out of memory")

    stop_after(2, crash)
    assert main(arguments) == 1
    (tmp_path / "s" / "parts" / "00000000_00000003.npy").write_bytes(b"damaged")
    assert main([*arguments, "--batch_size", "4"]) == 0
    assert sorted(i for batch in drawn[2:] for i in batch) == [0, 1, 2, 6, 7]
    (images, labels, metadata), (wanted, wanted_labels, _) = arrays(tmp_path / "s"), arrays(whole)
    assert np.array_equal(labels, wanted_labels) and np.abs(images.astype(int) - wanted).max() <= 1
    assert [using["batch_size"] for using in metadata["drawn_with"]] == [3, 4]


def test_outputs_are_chosen_and_completed_without_drawing(command, whole, tmp_path, capsys, drawn):
    want = content(whole)
    pngs = {name: data for name, data in want.items() if name.endswith(".png")}
    for first, then in (("npz", "png"), ("png", "npz")):
        folder = tmp_path / first
        arguments = [*command, "--outdir", str(folder)]
        assert main([*arguments, f"--{first}", "true", f"--{then}", "false"]) == 0
        assert set(content(folder)) == (
            {"samples.npz", "grid.png", "settings.json"} if first == "npz" else {*pngs, "settings.json"}
        )
        count = len(drawn)
        assert main([*arguments, "--npz", "true", "--png", "true", "--batch_size", "5"]) == 0
        assert content(folder) == want and len(drawn) == count
    fails(capsys, [*command, "--npz", "false", "--outdir", tmp_path / "x"], "npz and png are both false")


def test_a_command_without_png_may_be_continued_with_them(command, whole, tmp_path, stop_after):
    arguments = [*command, "--outdir", str(tmp_path / "s")]
    stop_after(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments) == 128 + signal.SIGTERM
    assert not (tmp_path / "s" / "png").exists()
    assert main([*arguments, "--png", "true"]) == 0
    assert content(tmp_path / "s") == content(whole)


@pytest.mark.parametrize("npz", [True, False])
def test_a_lost_png_is_made_again_and_no_other(command, whole, npz, drawn):
    before = content(whole)
    (whole / "png" / "0004" / "000004.png").unlink()
    if not npz:
        (whole / "samples.npz").unlink()
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("0*.png")}
    assert main([*command, "--png", "true", "--outdir", str(whole)]) == 0
    assert drawn == ([] if npz else [[4]]) and times == {path: path.stat().st_mtime_ns for path in times}
    after, _, metadata = arrays(whole)
    assert content(whole).keys() == before.keys() and len(metadata["drawn_with"]) == 1 and after.shape[0] == 8
    with Image.open(whole / "png" / "0004" / "000004.png") as file:
        assert np.array_equal(np.asarray(file), after[4])
    assert not npz or content(whole) == before


@pytest.mark.parametrize(("limit", "failing"), [(8000, "00000000_00000003.npy"), (20000, "samples.npz")])
def test_a_full_disk_is_named_and_nothing_is_lost(command, tmp_path, capsys, limit, failing):
    arguments = [*command, "--outdir", str(tmp_path / "s")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "s").mkdir()
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        if failing == "samples.npz":  # its grid is too large for the limit, too
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job, "save_grid", lambda *_: (tmp_path / "s" / "grid.png").touch())
                code = main(arguments)
        else:
            code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and f"{failing}: File too large; what is finished stays" in said and "goes on" in said
    parts = sorted((tmp_path / "s" / "parts").iterdir()) if (tmp_path / "s" / "parts").exists() else []
    assert len(parts) == (3 if failing == "samples.npz" else 0)
    assert not list((tmp_path / "s").rglob("*.tmp")) and not (tmp_path / "s" / "samples.npz").exists()
    assert main(arguments) == 0
    assert arrays(tmp_path / "s")[0].shape == (8, 32, 32, 3)


def test_folders_that_cannot_be_used_are_refused_and_left_alone(command, whole, checkpoint, tmp_path, capsys):
    before = content(whole)
    run = [*command, "--outdir", whole]
    for flags, message in (
        (["--steps", "3"], "steps was 2, now 3"),
        (["--num", "9"], "num was 8, now 9"),
        (["--labels", "random"], "labels was 'balanced', now 'random'"),
        (["--seed", "1"], "seed was 0, now 1"),
        (["--guidance", "2"], "guidance was 1.0, now 2.0"),
        (["--precision", "bf16"], "precision was 'fp32', now 'bf16'"),
        (["--autoguidance", str(checkpoint)], "autoguidance_sha256 was None"),
    ):
        fails(capsys, [*run, *flags], "other settings", message)
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    fails(capsys, [*run, "--checkpoint", other], "weights_sha256 was")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(checkpoint.read_bytes())
    assert main([str(a) for a in [*run, "--checkpoint", moved]]) == 0  # the same weights
    (whole / "settings.json").write_text("{")
    fails(capsys, run, "settings.json cannot be read", "restore it")
    (whole / "settings.json").write_bytes(before["settings.json"])
    assert content(whole) == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    fails(capsys, [*command, "--outdir", tmp_path / "mine"], "not a folder of sample")
    fails(capsys, [*command, "--outdir", tmp_path / "file"], "is a file, wanted a folder")
    fails(capsys, [*command, "--outdir", tmp_path / "file" / "s"], "cannot be written", "Not a directory", "--outdir")
    assert content(tmp_path / "mine") == {"thesis.txt": b"dear"} and (tmp_path / "file").read_text() == "dear"


def test_samples_of_other_labels_are_refused_though_the_flag_is_the_same(command, tmp_path, capsys):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"complete": True, "class_frequencies": [0.1] * 10}))
    arguments = [*command, "--labels", f"frequencies:{manifest}", "--outdir", tmp_path / "s"]
    assert main([str(a) for a in arguments]) == 0
    manifest.write_text(json.dumps({"complete": True, "class_frequencies": [0.5, 0.5] + [0] * 8}))
    fails(capsys, arguments, "labels_sha256 was")


def test_bad_requests_write_nothing(command, checkpoint, tmp_path, capsys):
    out = ["--outdir", tmp_path / "s"]
    plain = write_checkpoint(tmp_path / "plain.safetensors", num_classes=0)
    larger = write_checkpoint(tmp_path / "larger.safetensors", image_size=64)
    fails(capsys, [*command, *out, "--labels", "0,1,2,3,4,5,6,7,8"], "more labels than images")
    fails(capsys, [*command, *out, "--labels", "3 10"], "label 10 is out of range")
    fails(capsys, [*command, *out, "--checkpoint", plain, "--guidance", "2"], "guidance is 2.0", "unconditional")
    fails(capsys, [*command, *out, "--checkpoint", plain, "--labels", "3"], "labels", "unconditional")
    fails(capsys, [*command, *out, "--autoguidance", larger], "image_size 64, want 32")
    fails(capsys, [*command, *out, "--autoguidance", plain], "num_classes 0, want 10")
    fails(capsys, [*command, *out, "--guidance", ".inf"], "guidance is inf")
    fails(capsys, [*command, *out, "--batch_size", "0"], "batch_size is 0")
    fails(capsys, [*command, *out, "--s_churn", "40"], "s_churn is 40.0: an option of edm_sde, not of heun")
    fails(capsys, [*command, *out, "--sampler", "edm_sde", "--s_noise", "-1"], "s_noise is -1")
    fails(
        capsys, [*command, *out, "--sampler", "edm_sde", "--s_min", "5", "--s_max", "1"], "s_max is 1.0, want at least"
    )
    assert not (tmp_path / "s").exists()
    assert main([str(a) for a in [*command, *out, "--checkpoint", plain]]) == 0
    assert arrays(tmp_path / "s")[1].tolist() == [0] * 8


def test_a_folder_without_images_takes_other_settings(command, whole, tmp_path, stop_after):
    arguments = [*command, "--outdir", str(tmp_path / "s")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_draw_missing", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*arguments, "--steps", "3"]) == 128 + signal.SIGTERM
    assert main([*arguments, "--png", "true"]) == 0
    assert content(tmp_path / "s") == content(whole)


def test_two_commands_cannot_write_to_one_folder(command, tmp_path, capsys):
    out = tmp_path / "s"
    out.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
    code += "print('held', flush=True); input()"
    arguments = [sys.executable, "-c", code, str(out / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        fails(capsys, [*command, "--outdir", out], "another sample is at work in")
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.communicate("\n")
    assert main([*command, "--outdir", str(out)]) == 0


def test_resumed_images_count_as_done_and_not_as_speed(command, tmp_path, stop_after, monkeypatch):
    bars, tqdm = [], job.tqdm
    monkeypatch.setattr(job, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    arguments = [*command, "--outdir", str(tmp_path / "s")]
    stop_after(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments) == 128 + signal.SIGTERM
    assert main(arguments) == 0
    assert [(bar.initial, bar.n, bar.total, bar.unit) for bar in bars] == [(0, 3, 8, "image"), (6, 8, 8, "image")]


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws_and_share_what_is_left(command, one_thread, tmp_path, stop_after):
    arguments = [*command, "--num", "20", "--png", "true", "--outdir"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    stop_after(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*arguments, str(tmp_path / "two")]) == 128 + signal.SIGTERM
    # The dashes, because torchrun would take --num for the beginning of one of its own.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "epg_fast", *arguments, str(tmp_path / "two")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sample (2 processes): 100%" in done.stderr and "20/20" in done.stderr
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
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

    def count(self, number):
        return number


def test_ranks_whose_folder_is_not_shared_are_named(tmp_path, whole):
    with pytest.raises(
        ValueError, match="rank 1 does not see .* of rank 0; --outdir must be a folder that nodes share"
    ):
        job._check_shared(whole, _Elsewhere(False))
    images = Images(tmp_path, np.zeros(8, int), 32)
    images.save_part(0, np.zeros((4, 32, 32, 3), np.uint8))
    config = SampleConfig(batch_size=4)
    with pytest.raises(RuntimeError, match=r"rank 1 has written images 4\.\.7, which rank 0 does not see"):
        job._draw_missing(config, None, images, [], _Elsewhere([range(4), range(4, 8)]))


def test_ranks_that_read_other_weights_are_named(command, tmp_path):
    other = _Elsewhere(({"weights_sha256": "other"}, "cpu"))
    other.decide = lambda choose: choose()
    config = SampleConfig(checkpoint=command[2], outdir=str(tmp_path / "s"), device="cpu")
    with pytest.raises(ValueError, match="rank 1 has read other weights or labels than rank 0"):
        job._run(config, other)
    assert not (tmp_path / "s").exists()


def test_the_log_says_where_the_images_are(command, tmp_path, capsys):
    assert main([*command, "--outdir", str(tmp_path / "s")]) == 0
    assert main([*command, "--outdir", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().err
    assert f"8 images in {tmp_path / 's'}" in said and "already holds these samples" in said
    assert logging.getLogger("epg_fast").level == logging.INFO
