"""The `evaluate` command: settings that go together, and results that are not overwritten."""

import json
from dataclasses import replace

import numpy as np
import pytest

from epg_fast.config import EvaluateConfig
from epg_fast.evaluation import command
from tests.commands import fails
from tests.evaluation.samples import save_npz, save_pngs

FID = "--samples s --reference r --inception i"
REAL = "--train real --test real"
MISTAKES = {
    "": ["--samples", "--probe"],
    "--samples s --probe p": ["--samples", "--probe"],
    "--samples s": ["nothing to judge by", "--reference", "--train"],
    "--samples s --reference r": ["got --reference without --inception", "inception-2015-12-05.pt"],
    "--samples s --inception i": ["got --inception without --reference", "ADM"],
    f"{FID} --train t": ["--reference and --train"],
    "--samples s --train t": ["--test is missing; pass --train and --test"],
    "--probe p --reference r": ["got --reference with --probe"],
    "--probe digits_32 --page p.html": ["got --page with --probe"],
    f"{FID} --splits 0": ["splits is 0, want at least 1"],
    FID: ["reference: r: no such file or folder"],
    f"{FID} --bootstrap 1": ["bootstrap is 1, want 0, or at least 2"],
    "--samples s --outdir x": ["got --outdir without --protocol"],
    # images that are not there are called as their flag is
    f"{REAL} --samples nowhere": ["error: samples: nowhere: no such file or folder"],
    f"{REAL} --samples empty": ["error: samples: empty is empty, wanted a folder of class folders"],
    f"{REAL} --samples s.npz --compare empty": ["error: compare: empty is empty"],
    f"{REAL} --samples s.npz --train nowhere": ["error: train: nowhere does not exist, wanted"],
    f"{REAL} --samples s.npz --test s.npz": ["error: test: s.npz is a file, wanted a folder"],
    f"{REAL} --probe digits_32 --test empty": ["error: test: empty is empty"],
}


def test_settings_and_files_that_cannot_be_are_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    save_npz(images, np.arange(4) % 2, tmp_path / "s.npz")
    save_pngs(images, np.arange(4) % 2, tmp_path / "real")
    before = sorted(tmp_path.iterdir())
    for words, parts in MISTAKES.items():
        fails(capsys, ["evaluate", *words.split(), "--output", "out.json", "--device", "cpu"], *parts)
        assert sorted(tmp_path.iterdir()) == before, words


@pytest.fixture
def figure(monkeypatch):
    """Let `evaluate_images` return the next of these numbers, and count its calls."""
    calls = []
    monkeypatch.setattr(command, "evaluate_images", lambda config: {"fid": float(len(calls)), "n": calls.append(1)})
    return calls


def config(output, **fields):
    return EvaluateConfig(samples="s", reference="r", inception="i", output=str(output), **fields)


def test_the_same_command_replaces_its_result_and_leaves_that_of_another_alone(tmp_path, figure):
    out = tmp_path / "a" / "b" / "out.json"
    command.run(config(out))
    first = json.loads(out.read_text())
    command.run(config(out, batch_size=7, device="cpu"))
    second = json.loads(out.read_text())
    assert (first["fid"], second["fid"]) == (0, 1) and first["settings"] == second["settings"]
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    before = out.read_bytes()
    for fields, message in (
        ({"splits": 5}, r"other settings \(splits was \d+, now 5\)"),
        ({"samples": "t"}, "samples was 's', now 't'"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(replace(config(out), **fields))
    assert out.read_bytes() == before and len(figure) == 2


def test_an_output_or_page_that_is_something_else_or_cannot_be_is_refused_before_the_work_starts(tmp_path, figure):
    odd, new = tmp_path / "out.json", tmp_path / "new.html"
    for content in (b"text", b"[]", b'{"fid": 1.0}', b"\xff\xfe\xfd", b'{"settings": 3}', b'{"settings": {}}'):
        odd.write_bytes(content)
        with pytest.raises(ValueError, match=r"output: .*out\.json .*choose another --output or delete it"):
            command.run(config(odd))
        assert odd.read_bytes() == content
    for settings, message in (
        (config(tmp_path), "no result of `evaluate`"),
        (config(odd / "sub" / "out.json"), r"out\.json: Not a directory\); choose another --output"),
        (config(new, page=str(odd)), "exists and is no page of `evaluate`"),
        (config(new, page=str(tmp_path)), "is a folder"),
        (config(new, page=str(new)), "is the --output, too"),
        (config(new, page=str(odd / "page.html")), "page: .*choose another --page"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(settings)
    assert not figure and [path.name for path in tmp_path.iterdir()] == ["out.json"]
