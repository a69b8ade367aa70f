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
from epg_fast.training.loggers import open_loggers
from tests.training.runs import crash_after_save, fails, run_command

# Trackio reads it when it is imported.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio"))
PROJECT = "digits"


@pytest.fixture(params=["wandb", "trackio"])
def library(request, tmp_path, monkeypatch):
    """Its name; it logs to files of this test."""
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    module = pytest.importorskip(request.param)
    yield request.param
    if request.param == "wandb":
        module.teardown()  # it would keep to the first folder
        return
    with contextlib.suppress(RuntimeError):  # without a run
        module.finish()
    module.delete_project(PROJECT, force=True)


def of_trackio(_):
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs(PROJECT)
    return {
        run: [{k: v for k, v in line.items() if k != "timestamp"} for line in SQLiteStorage.get_logs(PROJECT, run)]
        for run in runs
    }


def of_wandb(folder):
    """Run id -> its lines, of all files that `wandb sync` would send, oldest first."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getctime):
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
    with monkeypatch.context() as patch:
        crash_after_save(patch, 2)
        assert main(command) == 1
    importlib.import_module(library).finish()
    assert main(command) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ((run, logged),) = {"wandb": of_wandb, "trackio": of_trackio}[library](tmp_path).items()
    assert run == (out / f".{library}").read_text() if library == "wandb" else run.startswith("run-")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert logged == lines


def test_folders_of_one_name_are_two_runs_and_so_is_one_that_begins_anew(library, tmp_path):
    config = DiffusionConfig(**{library: PROJECT})
    for folder, step in (("a", 0), ("b", 0), ("a", 3), ("b", 0)):
        (logger,) = open_loggers(config, tmp_path / folder / "run", step)
        logger.log({"loss": 1.0}, step=step + 1)
        logger.finish()
    found = {"wandb": of_wandb, "trackio": of_trackio}[library](tmp_path)
    assert sorted([line["step"] for line in lines] for lines in found.values()) == [[1], [1], [1, 4]]


def test_a_library_that_refuses_answers_in_one_line_and_nothing_is_written(library, tiny_run, tmp_path, capsys):
    out, project = tmp_path / "run", {"wandb": "a/b:c", "trackio": "x" * 300}[library]
    command = run_command(tiny_run, out, steps=1, **{library: project})
    fails(capsys, command, f"{library}: cannot log to project", project[:20])
    assert not out.exists()
