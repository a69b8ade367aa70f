"""Results that are cut short keep what they have; what became slower is found, and nothing that the spread explains."""

import json
import math

import pytest
import torch

from bench import compare, results
from bench.results import UNFINISHED, Results, Row, markdown_table, read, significant

HEADER = dict.fromkeys(results._SAME, "1") | {"device": "GPU A"}


def row(variant="plain", median=100.0, spread=0.02, **changes):
    numbers = {}
    if median is not None:
        numbers = {"p20": median * (1 - spread), "median": median, "p80": median * (1 + spread)}
    identity = {"job": "pretrain", "variant": variant, "shape": "s", "dtype": "bf16", "unit": "images/s"}
    return Row(**(identity | numbers | changes))


def unmeasured(variant, note="no such GPU", **details):
    return row(variant, median=None, note=note, details=details)


def written(path, *rows, **header):
    found = Results(path, HEADER | header)
    for one in rows:
        found.add(one)
    return path


def test_what_is_written_is_read_back_and_whole_after_every_row(tmp_path):
    path = tmp_path / "new" / "train.json"
    rows = [row(peak_memory_bytes=3 * 2**30, error=1e-3, details={"mfu": 0.4}), unmeasured("fp8")]
    found = Results(path, HEADER)
    for i, one in enumerate(rows, 1):
        found.add(one)
        assert read(path) == (HEADER, rows[:i])
    with pytest.raises(ValueError, match="second row of pretrain, plain, s, bf16, images/s"):
        found.add(row(median=99.0))
    assert [p.name for p in path.parent.iterdir()] == ["train.json"]


def test_a_file_goes_on_but_for_its_unfinished_rows_and_not_on_another_machine_or_commit(tmp_path):
    path = written(tmp_path / "x.json", row(), unmeasured("late", **{UNFINISHED: True}))
    assert [one.variant for one in Results.resume(path, HEADER).rows] == ["plain"]
    with pytest.raises(ValueError, match="measured with commit 1, now it is 2; give another folder"):
        Results.resume(path, HEADER | {"commit": "2"})
    assert not Results(path, HEADER).rows


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unit": "s"}, "got unit 's', wanted one of images/s, us, ms"),
        ({"median": math.nan}, "wanted rising positive numbers"),
        ({"median": 0.0, "p20": 0.0}, "wanted rising positive numbers"),
        ({"p20": 102.0}, "wanted rising positive numbers"),
        ({"p80": None}, "wanted rising positive numbers"),
        ({"p80": math.inf}, "wanted rising positive numbers"),
        ({"median": None}, "no numbers and no note"),
    ],
)
def test_rows_that_no_measurement_gives_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        row(**changes)


def test_the_header_asks_a_gpu_and_says_none_for_what_there_is_not(monkeypatch):
    header = results.header()
    assert header["torch"] == torch.__version__ and "" not in header.values() and None not in header.values()

    class Properties:
        uuid = "1234"

    asked = []
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H200",
        "current_device": lambda: 3,
        "get_device_properties": lambda device: Properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(results, "_output", lambda *command: asked.append(command) or "700.00 W, 575.51")
    header = results.header()
    assert (header["device"], header["power_limit"], header["driver"]) == ("NVIDIA H200", "700.00 W", "575.51")
    assert any("--id=GPU-1234" in command for command in asked)
    monkeypatch.undo()
    assert results._output("no-such-command-anywhere") == "" == results._output("false")


def test_tables_align_numbers_to_the_right_and_leave_out_what_is_empty():
    table = markdown_table(
        ("variant", "images/s", "note", "of"), [("a|b", "1,234.5", "", "2.0x"), ("fp8", None, "", "95%")]
    )
    assert table == (
        "| variant | images/s |   of |\n"
        "| ------- | -------: | ---: |\n"
        "| a\\|b    |  1,234.5 | 2.0x |\n"
        "| fp8     |          |  95% |\n"
    )
    numbers = {0.0012345: "0.00123", 9.996: "10.00", 1234.5: "1,234", 0: "0", None: "", 99.95: "100.0", 12: "12.0"}
    assert {value: significant(value) for value in numbers} == numbers


def run(capsys, *arguments):
    code = compare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_lower_rate_is_slower_and_a_lower_time_is_faster(tmp_path, capsys):
    rates = [written(tmp_path / f"{rate}.json", row(median=rate)) for rate in (100.0, 90.0)]
    code, out, _ = run(capsys, *rates)
    assert code == 1 and "## Slower" in out and "-10.0%" in out and "1 slower, 0 faster" in out
    code, out, _ = run(capsys, *reversed(rates))
    assert code == 0 and "## Faster" in out and "+11.1%" in out
    times = [written(tmp_path / f"us{time}.json", row(median=time, unit="us")) for time in (100.0, 90.0)]
    assert run(capsys, *times)[0] == 0 and run(capsys, *reversed(times))[0] == 1


@pytest.mark.parametrize(
    "new, spread, percent, code", [(80, 0.25, 3, 0), (97.5, 0.001, 3, 0), (97.5, 0.001, 2, 1), (95, 0.001, 6, 0)]
)
def test_what_overlaps_or_is_below_the_threshold_does_not_count(tmp_path, capsys, new, spread, percent, code):
    old = written(tmp_path / "old.json", row(spread=0.001))
    changed = written(tmp_path / "new.json", row(median=float(new), spread=spread))
    assert run(capsys, old, changed, "--threshold", percent)[0] == code


def test_rows_that_come_and_go_are_listed_and_do_not_fail(tmp_path, capsys):
    old = written(tmp_path / "old.json", row(), row("compile"), row("fp8"), unmeasured("graphs"))
    new = written(tmp_path / "new.json", row(), unmeasured("fp8"), row("graphs", 500.0))
    code, out, _ = run(capsys, old, new)
    gone = out[out.index("## Disappeared") : out.index("## New")]
    assert code == 0 and "pretrain, compile" in gone and "not measured: no such GPU" in gone
    assert "2 disappeared, 1 new" in out and "500.0 images/s" in out[out.index("## New") :]


def test_folders_are_compared_row_by_row_and_other_json_is_left_alone(tmp_path, capsys):
    for name, median in (("old", 10.0), ("new", 15.0)):
        written(tmp_path / name / "ops.json", row("triton", median, unit="us"), row("eager", 5.0, unit="us"))
        written(tmp_path / name / "train.json", row())
        (tmp_path / name / "progress.json").write_text(json.dumps({"heun": "complete"}))
    code, out, _ = run(capsys, tmp_path / "old", tmp_path / "new")
    assert code == 1 and "3 rows compared: 1 slower" in out and "| pretrain, triton, s, bf16" in out
    written(tmp_path / "new" / "again.json", row())
    assert "has a second row of pretrain, plain" in run(capsys, tmp_path / "old", tmp_path / "new")[2]


def test_different_devices_are_refused_unless_forced(tmp_path, capsys):
    old = written(tmp_path / "old.json", row(), power_limit="700 W")
    new = written(tmp_path / "new.json", row(median=150.0), device="GPU B", power_limit="500 W")
    code, out, error = run(capsys, old, new)
    assert code == 2 and not out and "measured on GPU A" in error and "on GPU B" in error and "--force" in error
    code, out, _ = run(capsys, old, new, "--force")
    assert code == 0 and "- device: GPU A before, GPU B now" in out
    assert "- power_limit: 700 W before, 500 W now" in out and "torch" not in out


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file or folder"),
        ("{", "not a JSON file"),
        ("[1]", "got a JSON list, wanted an object"),
        ('{"schema": "epg_fast.bench/9"}', "got schema 'epg_fast.bench/9', wanted 'epg_fast.bench/1'"),
        ('{"schema": "epg_fast.bench/1", "header": {}, "rows": {}}', "wanted a header and a list of rows"),
        ('{"schema": "epg_fast.bench/1", "header": {}, "rows": [{"job": "x"}]}', "missing 4 required"),
        ('{"schema": "epg_fast.bench/1", "header": {}, "rows": [{"mean": 3}]}', "unexpected keyword argument 'mean'"),
        ('{"schema": "epg_fast.bench/1", "header": {}, "rows": []}', "does not say on which device"),
        ('{"schema": "epg_fast.bench/1", "header": {"device": "GPU A"}, "rows": []}', "no row in common"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_one_line(content, message, tmp_path, capsys):
    good, other = written(tmp_path / "good.json", row()), tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    for arguments in ((good, other), (other, good)):
        code, out, error = run(capsys, *arguments)
        assert code == 2 and not out and message in error and error.count("\n") == 1
    assert run(capsys, good, good, "--threshold", "-1")[0] == 2


def test_committed_ledgers_can_be_compared_with():
    folders = list((results.ROOT / "bench" / "results").glob("*-ledger"))
    assert folders
    for folder in folders:
        assert len(compare.load(folder)[1]) > 20
