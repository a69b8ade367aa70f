"""Weights & Biases and Trackio, the real libraries without a network: what of a run arrives there."""

import contextlib
import importlib
import json
import os
import struct
import tempfile

import pytest

from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig
from epg_fast.training.metrics import open_loggers
from tests.training.runs import crashes_after_save, fails, run_command

# Trackio reads it when it is imported.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio"))
PROJECT = "digits"


@pytest.fixture(params=["wandb", "trackio"])
def library(request, tmp_path, monkeypatch):
    """Its name; it logs to files of this test."""
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    pytest.importorskip(request.param)
    in_a_new_process(request.param, monkeypatch, tmp_path / "0")
    yield request.param
    in_a_new_process(request.param, monkeypatch, tmp_path)
    if request.param == "trackio":
        importlib.import_module("trackio").delete_project(PROJECT, force=True)


def in_a_new_process(library, monkeypatch, folder):
    """What the library has in this process goes. A folder, because wandb tells runs of one id apart by the second."""
    module = importlib.import_module(library)
    if library == "wandb":
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("WANDB_DIR", str(folder))
        module.teardown()
        return
    with contextlib.suppress(RuntimeError):  # without a run
        module.finish()


def of_trackio(_):
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs(PROJECT)
    return {
        run: [{k: v for k, v in line.items() if k != "timestamp"} for line in SQLiteStorage.get_logs(PROJECT, run)]
        for run in runs
    }


def of_wandb(folder):
    """Run id -> its lines, of all files that `wandb sync` would send."""
    found = {}
    for path in sorted(folder.glob("?/wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                run = record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                line = {name: json.loads(value) for name, value in items.items() if name[0] != "_"}
                found.setdefault(run, []).append(line | {"step": json.loads(items["_step"])})
    return found


def records(path):
    """The format of LevelDB's logs: blocks of 32 KiB, records in pieces with their length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def test_a_run_that_was_killed_goes_on_as_the_same_run(library, tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = run_command(tiny_run, out, steps=5, checkpoint_every=2, **{library: PROJECT})
    crashes_after_save(command, 2)
    in_a_new_process(library, monkeypatch, tmp_path / "1")
    assert main(command) == 0
    in_a_new_process(library, monkeypatch, tmp_path)  # what is still on its way is written
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ((run, logged),) = {"wandb": of_wandb, "trackio": of_trackio}[library](tmp_path).items()
    assert run == (out / f".{library}").read_text() if library == "wandb" else run.startswith("run-")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert logged == lines


def test_folders_of_one_name_are_two_runs_and_so_is_one_that_begins_anew(library, tmp_path, monkeypatch):
    config = DiffusionConfig(**{library: PROJECT})
    for i, (folder, step) in enumerate((("a", 0), ("b", 0), ("a", 3), ("b", 0))):
        in_a_new_process(library, monkeypatch, tmp_path / f"{i}")
        (logger,) = open_loggers(config, tmp_path / folder / "run", step)
        logger.log({"loss": 1.0}, step=step + 1)
        logger.finish()
    in_a_new_process(library, monkeypatch, tmp_path)
    found = {"wandb": of_wandb, "trackio": of_trackio}[library](tmp_path)
    assert sorted([line["step"] for line in lines] for lines in found.values()) == [[1], [1], [1, 4]]


def test_a_library_that_refuses_answers_in_one_line_and_nothing_is_written(library, tiny_run, tmp_path, capsys):
    out, project = tmp_path / "run", {"wandb": "a/b:c", "trackio": "x" * 300}[library]
    command = run_command(tiny_run, out, steps=1, **{library: project})
    fails(capsys, command, f"{library}: cannot log to project", project[:20])
    assert not out.exists()
