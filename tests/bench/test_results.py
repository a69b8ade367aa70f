"""Results that are cut short keep what they have, and cannot hold what nobody measured."""

import json
import math

import pytest
import torch

from bench import results
from bench.results import Results, Row, markdown_table, significant

HEADER = {"device": "GPU A", "torch": "2"}


def _row(rung="plain", **changes):
    numbers = {"median": 100.0, "p20": 98.0, "p80": 101.0}
    return Row(
        **({"job": "pretrain", "rung": rung, "shape": "s", "dtype": "bf16", "unit": "images/s"} | numbers | changes)
    )


def test_what_is_written_is_read_back(tmp_path):
    written = Results(tmp_path / "new" / "train.json", HEADER)
    rows = (
        _row(peak_memory_bytes=3 * 2**30, error=1e-3, details={"mfu": 0.4}),
        _row("fp8", median=None, p20=None, p80=None, note="needs a GPU of compute capability 8.9"),
    )
    for row in rows:
        written.add(row)
    run = results.read(written.path)
    assert run.rows == rows and run.header == HEADER


def test_the_file_is_whole_after_every_row_and_has_one_of_each(tmp_path):
    written = Results(tmp_path / "train.json", HEADER)
    written.add(_row())
    assert len(results.read(written.path).rows) == 1
    with pytest.raises(ValueError, match="second row of pretrain, plain, s, bf16, images/s"):
        written.add(_row(median=99.0))
    written.add(_row(unit="ms"))
    assert len(results.read(written.path).rows) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    written = Results(tmp_path / "train.json", HEADER)
    written.add(_row())
    before = written.path.read_text()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(OSError):
        written.add(_row("compile"))
    assert written.path.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["train.json"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unit": "s"}, "got unit 's', wanted one of images/s, us, ms"),
        ({"median": math.nan}, "wanted rising positive numbers"),
        ({"median": 0.0, "p20": 0.0}, "wanted rising positive numbers"),
        ({"p20": 102.0}, "wanted rising positive numbers"),
        ({"p80": 99.0}, "wanted rising positive numbers"),
        ({"p80": None}, "wanted rising positive numbers"),
        ({"p80": math.inf}, "wanted rising positive numbers"),
        ({"median": None, "p20": None, "p80": None}, "no numbers and no note"),
    ],
)
def test_rows_that_no_measurement_gives_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _row(**changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c | {"schema": "epg_fast.bench/9"}, "got schema 'epg_fast.bench/9', wanted 'epg_fast.bench/1'"),
        (lambda c: c | {"rows": {}}, "wanted a header and a list of rows"),
        (lambda c: c | {"rows": [{"job": "x"}]}, "a row lacks dtype, rung, shape, unit"),
        (lambda c: c | {"rows": [c["rows"][0] | {"mean": 3}]}, "a row has mean, wanted"),
        (lambda c: c | {"rows": [c["rows"][0] | {"median": "fast"}]}, "wanted rising positive numbers"),
    ],
)
def test_other_content_is_refused_with_the_name_of_the_file(change, message, tmp_path):
    written = Results(tmp_path / "train.json", HEADER)
    written.add(_row())
    written.path.write_text(json.dumps(change(json.loads(written.path.read_text()))))
    with pytest.raises(ValueError, match=message) as error:
        results.read(written.path)
    assert str(written.path) in str(error.value)


def test_the_header_says_what_there_is_and_none_for_what_there_is_not():
    header = results.header()
    assert list(header)[:5] == ["device", "gpu", "power_limit", "driver", "cuda"]
    assert header["torch"] == torch.__version__ and header["threads"] == torch.get_num_threads()
    assert "" not in header.values() and None not in header.values()
    if not torch.cuda.is_available():
        assert header["gpu"] == header["power_limit"] == header["driver"] == "none"
        assert header["device"] == header["cpu"] == results.processor()
    json.dumps(header, allow_nan=False)


def test_the_header_of_a_gpu_asks_for_its_limit_and_driver(monkeypatch):
    class Properties:
        uuid = "1234"

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(results, "_output", lambda *command: asked.append(command) or "700.00 W, 575.51")
    header = results.header()
    assert (header["device"], header["power_limit"], header["driver"]) == ("NVIDIA H200", "700.00 W", "575.51")
    assert any("--id=GPU-1234" in command for command in asked)
    monkeypatch.setattr(results, "_output", lambda *command: "")
    header = results.header()
    assert header["power_limit"] == header["driver"] == header["commit"] == "none"


def test_a_command_that_is_not_there_gives_nothing():
    assert results._output("no-such-command-anywhere") == "" == results._output("false")


def test_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    first, second = results.new_folder(tmp_path / "results"), results.new_folder(tmp_path / "results")
    assert first.is_dir() and second.is_dir() and second.name == first.name + "-2"
    assert first.name.endswith("-nvidia-h100-80gb-hbm3") and first.name[:2] == "20"


def test_tables_align_numbers_to_the_right():
    table = markdown_table(("rung", "images/s", "of eager"), [("a|b", "1,234.5", "2.0x"), ("fp8", None, "95%")])
    assert table == (
        "| rung | images/s | of eager |\n"
        "| ---- | -------: | -------: |\n"
        "| a\\|b |  1,234.5 |     2.0x |\n"
        "| fp8  |          |      95% |\n"
    )
    with pytest.raises(ValueError, match="cells for 2 columns"):
        markdown_table(("a", "b"), [("1",)])


@pytest.mark.parametrize(
    "value, text",
    [(0.0012345, "0.00123"), (9.996, "10.00"), (1234.5, "1,234"), (0, "0"), (None, ""), (99.95, "100.0"), (12, "12.0")],
)
def test_three_digits_of_a_number(value, text):
    assert significant(value) == text
