"""One command makes the folder; parts share the time, fail alone, and are not repeated."""

import json
import sys

import pytest
import torch

from bench import report, run
from bench.kernel_classes import CLASSES
from bench.ladder import UNFINISHED
from bench.results import Results, Row, header
from bench.run import COMPLETE, CUT_SHORT, Part
from tests.bench.files import ops_file


def _part(name, outcome=COMPLETE, seconds=10, calls=None):
    def work(folder, share):
        if calls is not None:
            calls.append((name, round(share)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return Part(name, seconds, work)


@pytest.fixture
def folder(tmp_path):
    """A folder with results of all kinds, on a made-up GPU."""
    about = header() | {"device": "NVIDIA H200", "gpu": "NVIDIA H200"}
    for name, job in (("sampling", "sample-heun"), ("training", "pretrain")):
        results = Results(tmp_path / f"{name}.json", about)
        split = {"of": "a batch", "milliseconds": dict.fromkeys(CLASSES, 1.0), "longest": []}
        for rung, value in (("ours", 120.0), ("plain", 100.0)):  # measured in this order
            numbers = {"median": value, "p20": value - 1, "p80": value + 1}
            details = {"mfu": 0.5, "split": split}
            row = Row(job, rung, "digits_32, batch 2", "bf16", "images/s", error=1e-3, details=details, **numbers)
            results.add(row)
        results.add(Row(job, "ours, FP8", "digits_32, batch 2", "fp8", "images/s", note="failed: out of memory"))
    ops_file(tmp_path / "ops.json", device="NVIDIA H200")
    return tmp_path


def test_the_report_has_the_ladders_in_order_goals_splits_and_what_is_missing(folder):
    pytest.importorskip("matplotlib")
    (folder / "progress.json").write_text(json.dumps({"data": {"outcome": "not here: no DALI", "seconds": 1}}))
    text = report.write(folder)
    assert text == (folder / "README.md").read_text() and "- data: not here: no DALI" in text
    ladder = text[text.index("### sample-heun") :]
    assert ladder.index("| plain ") < ladder.index("| ours ") < ladder.index("| ours, FP8")
    assert "1.20x" in ladder and "failed: out of memory" in ladder and "1.0e-03" in ladder
    assert "1.00 (14%)" in ladder and "| goal, on one Hopper GPU" in text and "reduced form" not in text
    assert "Missing" in text and "| layer_norm_modulate" in text
    for name in ("sampling", "training"):
        png = (folder / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 1200
        assert f"![{name.capitalize()}]({name}.png)" in text


def test_a_report_without_matplotlib_has_its_tables(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.ladder_plot", raising=False)
    text = report.write(folder)
    assert ".png" not in text and "| plain " in text and "pip install 'epg_fast[demo]'" in capsys.readouterr().err


def test_operations_show_losses_against_the_fastest_of_the_others(folder):
    text = report.write(folder)
    line = next(line for line in text.splitlines() if line.startswith("| layer_norm_modulate"))
    assert "10.0 (triton)" in line and "10.0 (compile)" in line and "1.00x" in line


def test_an_empty_folder_is_no_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_parts_get_their_share_and_what_others_leave(folder):
    calls = []
    parts = [_part("a", seconds=10, calls=calls), _part("b", seconds=30, calls=calls)]
    assert run.run(parts, folder, 100) == {"a": COMPLETE, "b": COMPLETE}
    assert calls == [("a", 25), ("b", 100)]


def test_a_part_that_fails_or_is_cut_short_is_done_again_and_the_others_are_not(folder):
    calls = []
    first = [
        _part("a", calls=calls),
        _part("b", ValueError("two\nlines"), calls=calls),
        _part("c", CUT_SHORT, calls=calls),
    ]
    found = run.run(first, folder, 100)
    assert found == {"a": COMPLETE, "b": "failed: ValueError: two", "c": CUT_SHORT}
    assert "- b: failed: ValueError: two" in (folder / "README.md").read_text()
    calls.clear()
    again = [_part(name, calls=calls) for name in "abc"]
    assert set(run.run(again, folder, 100).values()) == {COMPLETE}
    assert calls == [("b", 50), ("c", 100)]  # all the time is theirs
    assert "All parts are complete" in (folder / "README.md").read_text()


def test_parts_that_are_not_here_are_no_failure_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "tiny_parts", lambda: [_part("data", "not here: no DALI")])
    assert run.main(["--tiny", "--output", str(tmp_path)]) == 0
    assert "data: not here: no DALI" in capsys.readouterr().out


def test_exit_codes_say_how_it_ended(folder, monkeypatch):
    for outcome, code in ((COMPLETE, 0), ("not here: x", 0), ("failed: x", 1), (CUT_SHORT, 3)):
        monkeypatch.setattr(run, "tiny_parts", lambda outcome=outcome: [_part("a", outcome)])
        (folder / "progress.json").unlink(missing_ok=True)
        assert run.main(["--tiny", "--output", str(folder)]) == code


def test_an_unknown_part_is_named_before_anything_runs(folder, capsys):
    assert run.main(["--tiny", "--output", str(folder), "--parts", "huen"]) == 2
    assert "part 'huen': wanted one of heun" in capsys.readouterr().err


def test_gpu_parts_have_all_presets_and_stay_below_ten_minutes():
    parts = {part.name: part for part in run.gpu_parts()}
    assert sum(part.seconds for part in parts.values()) <= 600
    shapes = {name: part.work.args[0].shape for name, part in parts.items() if part.work.func is run.ladder}
    assert shapes["heun"] == "epg_xl_16_256, batch 64, 32 levels" and shapes["latency"] == "epg_l_16_256, batch 1"
    assert shapes["onestep"] == "epg_l_16_256, batch 64" and {"diffusion", "pretrain", "consistency"} <= set(shapes)
    assert all(part.work.args[0].plan.products for part in parts.values() if part.work.func is run.ladder)


def test_a_command_that_takes_too_long_is_interrupted(tmp_path):
    log = tmp_path / "x.log"
    assert run._command(["-c", "import time; time.sleep(60)"], log, 1.0) == CUT_SHORT
    assert run._command(["-c", "print('why'); raise SystemExit(4)"], log, 30.0) == "failed: exit code 4, see x.log"
    assert log.read_text() == "why\n"
    assert run._command(["-c", "pass"], log, 30.0) == COMPLETE and not log.exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is written here is that of a CPU")
def test_the_tiny_form_makes_the_folder_and_repeats_nothing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    assert run.main(["--tiny", "--output", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "All parts are complete" in text and "reduced form" in text and UNFINISHED not in text
    assert "not measured" in text and "this machine has no GPU" in text and "| euler_step" in text
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png"}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert run.main(["--tiny", "--output", str(folder)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} == stamps
