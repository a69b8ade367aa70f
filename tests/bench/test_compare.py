"""What became slower is found, and nothing that the spread explains."""

import json

import pytest

from bench import compare
from bench.results import Results, Row
from tests.bench.files import op_row, ops_file


def _ladder(path, rates, unit="images/s", device="GPU A", spread=0.01, **header):
    """Write a ladder with one row per rung; a rate of None was not measured."""
    results = Results(path, {"device": device} | header)
    for rung, rate in rates.items():
        numbers = {"note": "no such GPU"}
        if rate is not None:
            numbers = {"median": rate, "p20": rate * (1 - spread), "p80": rate * (1 + spread)}
        results.add(Row("pretrain", rung, "batch 64", "bf16", unit, **numbers))
    return path


def _run(capsys, *arguments):
    code = compare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_lower_rate_is_slower_and_a_lower_time_is_faster(tmp_path, capsys):
    rates = [_ladder(tmp_path / f"{i}.json", {"compile": rate}) for i, rate in enumerate((100.0, 90.0))]
    code, out, _ = _run(capsys, *rates)
    assert code == 1 and "## Slower" in out and "-10.0%" in out and "1 slower, 0 faster" in out
    code, out, _ = _run(capsys, *reversed(rates))
    assert code == 0 and "## Faster" in out and "+11.1%" in out
    times = [_ladder(tmp_path / f"us{i}.json", {"compile": time}, "us") for i, time in enumerate((100.0, 90.0))]
    assert _run(capsys, *times)[0] == 0 and _run(capsys, *reversed(times))[0] == 1


def test_what_overlaps_or_is_below_the_threshold_does_not_count(tmp_path, capsys):
    old = _ladder(tmp_path / "old.json", {"plain": 100.0})
    noisy = _ladder(tmp_path / "noisy.json", {"plain": 80.0}, spread=0.25)
    assert _run(capsys, old, noisy)[0] == 0
    little = _ladder(tmp_path / "little.json", {"plain": 97.5}, spread=0.001)
    code, out, _ = _run(capsys, old, little)
    assert code == 0 and "1 within their spread or 3 percent" in out
    assert _run(capsys, old, little, "--threshold", "2")[0] == 1
    assert _run(capsys, old, _ladder(tmp_path / "less.json", {"plain": 95.0}, spread=0.001), "--threshold", "6")[0] == 0


def test_rows_that_come_and_go_are_listed_and_do_not_fail(tmp_path, capsys):
    old = _ladder(tmp_path / "old.json", {"plain": 100.0, "compile": 200.0, "fp8": 300.0, "graphs": None})
    new = _ladder(tmp_path / "new.json", {"plain": 100.0, "graphs": 500.0, "fp8": None})
    code, out, _ = _run(capsys, old, new)
    gone = out[out.index("## Disappeared") : out.index("## New")]
    assert code == 0 and "pretrain, compile" in gone and "not measured: no such GPU" in gone
    assert "2 disappeared, 1 new" in out and "500.0 images/s" in out[out.index("## New") :]


def test_operations_are_matched_by_what_they_are(tmp_path, capsys):
    old = [
        op_row(median=10.0),
        op_row(provider="eager", median=50.0),
        op_row(direction="forward+backward", median=30.0),
    ]
    new = [
        op_row(provider="eager", median=50.0),
        op_row(direction="forward+backward", median=30.0),
        op_row(median=12.0),
    ]
    files = ops_file(tmp_path / "old.json", old), ops_file(tmp_path / "new.json", new)
    code, out, _ = _run(capsys, *files)
    assert code == 1 and "+20.0%" in out and "1 slower, 0 faster, 2 within" in out
    assert "layer_norm_modulate, [64, 258, 1584], torch.bfloat16, forward, triton" in out
    labelled = ops_file(tmp_path / "labelled.json", [op_row(median=10.0), op_row(median=20.0, output="fp8")])
    assert "output=fp8" in _run(capsys, files[0], labelled)[1]


def test_folders_are_compared_file_by_file_and_other_json_is_left_alone(tmp_path, capsys):
    for name, median in (("old", 10.0), ("new", 15.0)):
        folder = tmp_path / name
        folder.mkdir()
        ops_file(folder / "ops.json", [op_row(median=10.0)])
        ops_file(folder / "ops_main.json", [op_row(median=median)])
        _ladder(folder / "train.json", {"plain": 100.0})
        (folder / "roofline.json").write_text(json.dumps({"jobs": []}))
    code, out, _ = _run(capsys, tmp_path / "old", tmp_path / "new")
    assert code == 1 and "ops_main.json" not in out and "3 rows compared: 1 slower" in out
    code, _, error = _run(capsys, tmp_path / "old", tmp_path / "new" / "ops.json")
    assert code == 2 and "has a second row of layer_norm_modulate" in error


def test_different_devices_are_refused_unless_forced(tmp_path, capsys):
    old = _ladder(tmp_path / "old.json", {"plain": 100.0}, power_limit="700 W", torch="2.11")
    new = _ladder(tmp_path / "new.json", {"plain": 150.0}, device="GPU B", power_limit="500 W", torch="2.11")
    code, out, error = _run(capsys, old, new)
    assert code == 2 and not out and "measured on GPU A" in error and "on GPU B" in error and "--force" in error
    code, out, _ = _run(capsys, old, new, "--force")
    assert code == 0 and "- device: GPU A before, GPU B now" in out
    assert "- power_limit: 700 W before, 500 W now" in out and "torch" not in out


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file or folder"),
        ("{", "not a JSON file"),
        ("{}", "holds no results"),
        ('{"schema": "epg_fast.bench/9"}', "wanted 'epg_fast.bench/1'"),
        ('{"benchmarks": [{"name": "t", "extra_info": {"op": "x"}}], "machine_info": {}}', "t lacks gbps"),
        ('{"benchmarks": [], "machine_info": {}}', "does not say on which device"),
        ('{"benchmarks": [], "machine_info": {"device": "GPU A"}}', "no row in common"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_one_line(content, message, tmp_path, capsys):
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    for arguments in ((_ladder(tmp_path / "good.json", {"plain": 1.0}), other), (other, tmp_path / "good.json")):
        code, out, error = _run(capsys, *arguments)
        assert code == 2 and not out and message in error and error.count("\n") == 1


def test_a_row_with_impossible_numbers_and_a_negative_threshold_are_refused(tmp_path, capsys):
    good, bad = ops_file(tmp_path / "good.json"), ops_file(tmp_path / "bad.json", [op_row(p20_us=99.0)])
    code, _, error = _run(capsys, good, bad)
    assert code == 2 and "test_layer_norm_modulate[0]: got p20, median and p80 of 99.0" in error
    assert _run(capsys, good, good, "--threshold", "-1")[0] == 2
