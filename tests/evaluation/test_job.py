"""The `evaluate` command: settings that go together, and results that are not overwritten."""

import json
from dataclasses import replace

import numpy as np
import pytest

from epg_fast.__main__ import main
from epg_fast.config import EvaluateConfig
from epg_fast.evaluation import job
from tests.evaluation.samples import save_npz, save_pngs


def refused(capsys, words, *parts):
    assert main(["evaluate", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


FID = "--samples s --reference r --inception i"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["--samples", "--probe"]),
        ("--samples s --probe p", ["--samples", "--probe"]),
        ("--samples s", ["nothing to judge by", "--reference", "--train"]),
        ("--samples s --reference r", ["got --reference without --inception", "inception-2015-12-05.pt"]),
        ("--samples s --inception i", ["got --inception without --reference", "ADM"]),
        (f"{FID} --train t", ["--reference and --train"]),
        ("--samples s --train t", ["--test is missing; pass --train and --test"]),
        ("--probe p --reference r", ["got --reference with --probe"]),
        (f"{FID} --splits 0", ["splits is 0, want at least 1"]),
        (FID, ["reference: r: no such file or folder"]),
        (f"{FID} --bootstrap 1", ["bootstrap is 1, want 0, or at least 2"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(capsys, tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    refused(capsys, [*words.split(), "--output", "out.json", "--device", "cpu"], *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--samples nowhere", "samples: nowhere: no such file or folder"),
        ("--samples empty", "samples: empty is empty, wanted a folder of class folders"),
        ("--samples s.npz --compare empty", "compare: empty is empty"),
        ("--samples s.npz --train nowhere", "train: nowhere does not exist, wanted"),
        ("--samples s.npz --test s.npz", "test: s.npz is a file, wanted a folder"),
        ("--probe digits_32 --test empty", "test: empty is empty"),
    ],
)
def test_images_that_are_not_there_are_called_as_their_flag_is(capsys, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    save_npz(images, np.arange(4) % 2, tmp_path / "s.npz")
    save_pngs(images, np.arange(4) % 2, tmp_path / "real")
    real = {f"--{name} real" for name in ("train", "test") if f"--{name}" not in words}
    refused(capsys, [*words.split(), *" ".join(sorted(real)).split(), "--device", "cpu"], f"error: {line}")


@pytest.fixture
def figure(monkeypatch):
    """Let `evaluate_images` return the next of these numbers, and count its calls."""
    calls = []
    monkeypatch.setattr(job, "evaluate_images", lambda config: {"fid": float(len(calls)), "n": calls.append(1)})
    return calls


def config(output, **fields):
    return EvaluateConfig(samples="s", reference="r", inception="i", output=str(output), **fields)


def test_the_same_command_replaces_its_result(tmp_path, figure):
    out = tmp_path / "a" / "b" / "out.json"
    job.run(config(out))
    first = json.loads(out.read_text())
    job.run(config(out, batch_size=7, device="cpu"))
    second = json.loads(out.read_text())
    assert (first["fid"], second["fid"]) == (0, 1) and first["settings"] == second["settings"]
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("content", [b"text", b"[]", b'{"fid": 1.0}', b"\xff\xfe\xfd", b'{"settings": {}}'])
def test_a_file_that_is_something_else_is_left_alone_before_the_work_starts(tmp_path, figure, content):
    out = tmp_path / "out.json"
    out.write_bytes(content)
    with pytest.raises(ValueError, match=r"output: .*out\.json .*choose another --output or delete it"):
        job.run(config(out))
    assert out.read_bytes() == content and not figure


def test_a_page_replaces_nothing_but_a_page(tmp_path, figure):
    result = tmp_path / "r.json"
    result.write_text("{}")
    for page, message in (
        (result, "exists and is no page of `evaluate`"),
        (tmp_path, "is a folder"),
        (tmp_path / "new.html", "is the --output, too"),
    ):
        with pytest.raises(ValueError, match=message):
            job.run(config(tmp_path / "new.html", page=str(page)))
    assert result.read_text() == "{}" and not figure and [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_result_of_other_settings_is_left_alone(tmp_path, figure):
    out = tmp_path / "out.json"
    job.run(config(out))
    before = out.read_bytes()
    for fields, message in (
        ({"splits": 5}, r"other settings \(splits was \d+, now 5\)"),
        ({"neighbors": 4}, r"neighbors was \d+, now 4"),
        ({"samples": "t"}, "samples was 's', now 't'"),
    ):
        with pytest.raises(ValueError, match=message):
            job.run(replace(config(out), **fields))
    assert out.read_bytes() == before and len(figure) == 1


def test_an_output_that_cannot_be_written_is_refused_before_the_work_starts(tmp_path, figure):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: Not a directory\); choose another --output"):
        job.run(config(tmp_path / "file" / "sub" / "out.json"))
    with pytest.raises(ValueError, match="no result of `evaluate`"):
        job.run(config(tmp_path))
    assert not figure
