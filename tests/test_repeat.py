"""`evaluate --protocol`: a result is repeated to the last bit, and whatever is not as it was is named."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.evaluation.protocol import protocol_changes
from epg_fast.repeat import compared
from epg_fast.sampling.outputs import Outputs
from tests.commands import ask_to_stop, fails, on_two_ranks, run, snapshot
from tests.conftest import TinyInception
from tests.evaluation.samples import pictures, save_npz
from tests.sampling.conftest import write_checkpoint


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Folder with a checkpoint, what judges, images that were drawn with guidance, and the result of judging them."""
    folder = tmp_path_factory.mktemp("original")
    write_checkpoint(folder / "model.safetensors")
    torch.jit.script(TinyInception()).save(folder / "network.bin")
    save_npz(pictures(1, 40), np.arange(40) % 10, folder / "real.npz")
    draw = ["sample", "--checkpoint", folder / "model.safetensors", "--num", 12, "--steps", 3, "--guidance", 1.5]
    draw += ["--interval", "[0,100]"]
    run(*draw, "--seed", 5, "--batch_size", 5, "--device", "cpu", "--outdir", folder / "drawn")
    judge = ["evaluate", "--samples", folder / "drawn" / "samples.npz", "--reference", folder / "real.npz"]
    judge += ["--inception", folder / "network.bin", "--splits", 3, "--neighbors", 2, "--bootstrap", 4]
    judge += ["--batch_size", 7]
    run(*judge, "--device", "cpu", "--output", folder / "result.json")
    return folder


@pytest.fixture
def again(original, tmp_path):
    """The command that repeats it."""
    words = ["evaluate", "--protocol", original / "result.json", "--outdir", tmp_path / "again", "--device", "cpu"]
    return [*map(str, words), "--output", str(tmp_path / "now.json")]


@pytest.fixture
def edited(original, tmp_path):
    """Makes a result with another value at `names` of its protocol; returns its path."""

    def edit(value, *names):
        result = json.loads((original / "result.json").read_text())
        place = result["protocol"]
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value
        (tmp_path / "edited.json").write_text(json.dumps(result))
        return str(tmp_path / "edited.json")

    return edit


def images(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"]


def test_the_protocol_says_how_images_were_drawn_and_judged(original):
    protocol = json.loads((original / "result.json").read_text())["protocol"]
    assert {*protocol} == {"text", "sampling", "judging", "versions"}
    drawn = {"sampler": "heun", "steps": 3, "evaluations": 8, "guidance": 1.5, "seed": 5, "num": 12}
    drawn |= {"precision": "fp32", "labels": "balanced", "interval": [0, 100], "ema": {"step": 7, "ema_decay": 0.99}}
    drawn["checkpoint"] = str(original / "model.safetensors")
    assert protocol["sampling"].items() >= drawn.items()
    assert protocol["judging"]["seconds"] > 0
    assert protocol["judging"]["settings"]["splits"] == 3 and protocol["judging"]["bootstrap"] == 4
    network = protocol["judging"]["judges"]["inception"]
    assert len(network["network"]["sha256"]) == len(network["reference"]["sha256"]) == 64
    assert protocol["versions"]["torch"] == torch.__version__ and protocol["versions"]["numpy"] == np.__version__


def test_a_result_is_repeated_to_the_last_bit(original, again, tmp_path, capsys):
    run(*again)
    before, now = (json.loads(path.read_text()) for path in (original / "result.json", tmp_path / "now.json"))
    assert np.array_equal(images(tmp_path / "again"), images(original / "drawn"))
    assert now["fid"] == before["fid"] and now["spread"] == before["spread"]
    repeated = now["repeated"]
    assert repeated["protocol"] == [] and {*repeated["figures"]} == {*before["spread"]}
    assert all(figure["difference"] == 0 for figure in repeated["figures"].values())
    assert repeated["images"]["same"] is True and repeated["images"]["num"] == 12
    output = capsys.readouterr()
    assert json.loads(output.out) == now  # and the words for people are elsewhere
    assert "protocol: as in" in output.err and "all 12 are those of" in output.err and "fid: then " in output.err
    # what has been repeated is itself a protocol, and its images are compared as well
    second = [*again[:2], str(tmp_path / "now.json"), "--outdir", str(tmp_path / "third"), "--device", "cpu"]
    run(*second)
    assert json.loads(capsys.readouterr().out)["repeated"]["images"]["same"] is True


def test_an_interrupted_repeat_goes_on_with_another_batch_size_which_is_named(again, tmp_path, monkeypatch, original):
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "save_part", ask_to_stop)
        assert main(again) == 128 + signal.SIGTERM and not (tmp_path / "now.json").exists()
    run(*again, "--batch_size", 4)
    assert np.array_equal(images(tmp_path / "again"), images(original / "drawn"))
    changes = json.loads((tmp_path / "now.json").read_text())["repeated"]["protocol"]
    assert changes[-2:] == ["sampling.drawn_with.batch_size was 5, now 4", "judging.batch_size was 7, now 4"]


@pytest.mark.slow
def test_two_ranks_share_the_drawing_and_one_judges(original, again, tmp_path):
    repeated = json.loads(on_two_ranks(again).stdout)["repeated"]
    assert repeated["protocol"] == ["sampling.drawn_with.processes was 1, now 2"]
    assert np.array_equal(images(tmp_path / "again"), images(original / "drawn"))


def test_files_that_have_moved_are_found_where_they_are_said_to_be(original, tmp_path, capsys):
    moved = shutil.copytree(original, tmp_path / "moved")
    result = json.loads((moved / "result.json").read_text().replace(str(original), "/gone"))
    (moved / "result.json").write_text(json.dumps(result))
    words = ["evaluate", "--protocol", moved / "result.json", "--outdir", tmp_path / "again", "--device", "cpu"]
    fails(capsys, words, "/gone/", "no such file")
    words += ["--reference", moved / "real.npz", "--inception", moved / "network.bin"]
    fails(capsys, words, "/gone/model.safetensors")
    assert not (tmp_path / "again").exists()
    run(*words, "--checkpoint", moved / "model.safetensors")
    found = capsys.readouterr()
    repeated = json.loads(found.out)["repeated"]
    assert repeated["protocol"] == [] and repeated["figures"]["fid"]["difference"] == 0
    assert repeated["images"]["same"] is None and "not there any more" in found.err


def test_other_weights_reference_and_network_are_refused_before_anything_is_drawn(original, again, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_checkpoint(other / "model.safetensors", seed=1)
    save_npz(pictures(2, 40), np.arange(40) % 10, other / "real.npz")
    network = TinyInception()
    torch.nn.init.zeros_(network.output.weight)
    torch.jit.script(network).save(other / "network.bin")
    for option, name in (("checkpoint", "model.safetensors"), ("reference", "real.npz"), ("inception", "network.bin")):
        place = str(other / name)
        fails(capsys, [*again, f"--{option}", place], f"{option}: {place}", "want ", "SHA" if option[0] == "c" else "")
        fails(capsys, [*again, f"--{option}", str(tmp_path / "none")], str(tmp_path / "none"))
    assert not (tmp_path / "again").exists() and not (tmp_path / "now.json").exists()


def test_images_that_come_out_otherwise_are_counted_and_named(original, edited, again, tmp_path, capsys):
    path = edited(2.5, "sampling", "guidance")
    words = [*again[:2], path, *again[3:]]
    run(*words)
    found = capsys.readouterr()
    repeated = json.loads(found.out)["repeated"]
    then, now = images(original / "drawn"), images(tmp_path / "again")
    differ = int((then != now).any(axis=(1, 2, 3)).sum())
    assert differ > 0 and repeated["images"]["same"] is False and repeated["images"]["differ"] == differ
    assert repeated["images"]["most_levels"] == np.abs(then.astype(int) - now).max()
    fid = repeated["figures"]["fid"]
    assert fid["difference"] == fid["now"] - fid["then"] != 0
    assert fid["standard_errors"] == pytest.approx(fid["difference"] / np.hypot(*fid["spread"]))
    assert f"{differ} of 12 are not those of" in found.err
    # the folder is of that guidance now, which the original protocol does not have
    fails(capsys, again[:-2], "made with other settings", "guidance was 2.5, now 1.5")


def test_every_difference_of_two_protocols_is_named(original):
    before = json.loads((original / "result.json").read_text())["protocol"]
    now = json.loads(json.dumps(before))
    assert protocol_changes(before, now) == []
    now["sampling"] |= {"guidance": 2.5, "weights_sha256": "other", "checkpoint": "elsewhere"}
    now["sampling"]["drawn_with"][-1] |= {"device": "another GPU", "torch": "9.9", "batch_size": 1}
    now["judging"]["judges"]["inception"]["reference"] |= {"sha256": "other", "path": "elsewhere"}
    now["judging"] |= {"seconds": 0, "bootstrap": 0}
    now["versions"] |= {"numpy": "9.9"}
    changes = protocol_changes(before, now)
    assert sorted(change.partition(" was ")[0] for change in changes) == [
        "judging.bootstrap",
        "judging.judges.inception.reference.sha256",
        *(f"sampling.drawn_with.{name}" for name in ("batch_size", "device", "torch")),
        "sampling.guidance",
        "sampling.weights_sha256",
        "versions.numpy",
    ]
    assert "sampling.guidance was 1.5, now 2.5" in changes


def test_figures_that_only_one_of_two_results_has_are_left_out():
    protocol = {"sampling": {}, "judging": {}, "versions": {}}
    before = {"fid": 3.0, "gone": 1.0, "spread": {"fid": None}, "samples": "none", "protocol": protocol}
    now = {"fid": 5.0, "kid": 1.0, "spread": {"fid": 0.1, "kid": 0.1}, "samples": "none", "protocol": protocol}
    figures = compared(before, now)["figures"]
    assert figures == {"fid": {"then": 3, "now": 5, "spread": [None, 0.1], "difference": 2, "standard_errors": None}}


def test_what_cannot_be_repeated_is_named_in_one_line(original, edited, again, tmp_path, capsys):
    before = snapshot(original)
    for content, message in (
        (None, "cannot be read"),
        ("[]", "no result with a protocol"),
        ('{"fid": 3, "protocol": "FID: 50000 samples"}', "no result with a protocol"),
    ):
        path = tmp_path / "odd.json"
        if content is not None:
            path.write_text(content)
        fails(capsys, [*again[:2], str(path), *again[3:]], "protocol: ", str(path), message)
    for value, names, message in (
        ("much", ("sampling", "guidance"), "guidance: got 'much', want NUMBER"),
        ([], ("sampling", "drawn_with"), "does not say how its images were drawn"),
        (0, ("judging", "settings", "splits"), "splits is 0"),
        ("0" * 64, ("sampling", "labels_sha256"), "labels: balanced gives other labels"),
    ):
        fails(capsys, [*again[:2], edited(value, *names), *again[3:]], message)
    # of samples that do not say how they were drawn
    result = json.loads((original / "result.json").read_text())
    result["protocol"]["sampling"] = {"num": 12}
    (tmp_path / "odd.json").write_text(json.dumps(result))
    fails(
        capsys, [*again[:2], tmp_path / "odd.json", *again[3:]], "odd.json: does not say how its images were drawn (no "
    )
    for words, message in (
        (["--splits", "5"], "got --splits with --protocol, which has its own"),
        (["--samples", "s.npz"], "got --samples with --protocol"),
        (["--outdir", ""], "--protocol needs --outdir"),
        (["--outdir", str(original / "drawn")], "holds the images of"),
    ):
        fails(capsys, [*again, *words], message)
    assert snapshot(original) == before


@pytest.mark.slow
def test_images_that_were_judged_as_png_files_without_a_network_are_again(original, tmp_path, capsys):
    pytest.importorskip("sklearn")
    draw = ["sample", "--checkpoint", original / "model.safetensors", "--num", 20, "--steps", 2, "--device", "cpu"]
    run(*draw, "--png", "true", "--npz", "false", "--outdir", tmp_path / "s")
    judge = ["evaluate", "--samples", tmp_path / "s" / "png", "--components", 3, "--output", tmp_path / "r.json"]
    real = [word for name in ("train", "test") for word in (f"--{name}", tmp_path / "s" / "png")]
    run(*judge, *real)
    capsys.readouterr()
    run("evaluate", "--protocol", tmp_path / "r.json", "--outdir", tmp_path / "t", "--device", "cpu")
    repeated = json.loads(capsys.readouterr().out)["repeated"]
    assert repeated["images"]["same"] is True and repeated["images"]["num"] == 20 and repeated["protocol"] == []
    assert not (tmp_path / "t" / "samples.npz").exists()
    assert repeated["figures"]["frechet_distance"]["difference"] == 0
    next((tmp_path / "s" / "png" / "0003").iterdir()).write_bytes((tmp_path / "s/png/0000/000000.png").read_bytes())
    again = ["evaluate", "--protocol", tmp_path / "r.json", "--outdir", tmp_path / "u"]
    fails(capsys, again, "train: ", "not what it was")
