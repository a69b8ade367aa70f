"""All benchmarks into one folder: `make bench`, or

    python -m bench                                       # bench/results/<date>-<device>/
    python -m bench --output FOLDER --parts heun cpu      # some parts; what is complete in FOLDER is not repeated

On a GPU: the ladders of sampling and training, the operations, loading and the comparison on the CPU, in under ten
minutes. Without one a reduced form, of small networks and few compiled rungs, shows in under four minutes that
everything runs; of its numbers the comparison on the CPU is worth reading. Every part has its share of the time, and
what others leave. What was cut short goes on when the same folder is given again.

Writes JSON files, README.md, roofline.md and PNG files. Exits with 1 if a part failed, 3 if one was cut short.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench import report, roofline
from bench.bench_sample import Sampling
from bench.bench_train import Training
from bench.ladder import Ladder, climb, open_results
from bench.results import ROOT, Row, header, new_folder, read, read_json, write_json

COMPLETE = "complete"
CUT_SHORT = "cut short: the same command with this folder goes on"


@dataclass(frozen=True)
class Part:
    """`work(folder, seconds)` says how it ended. seconds: of the time, in proportion to those of the other parts."""

    name: str
    seconds: float
    work: Callable[[Path, float], str]


def gpu_parts() -> list[Part]:
    """The most valuable first."""
    return [
        Part("heun", 190, partial(ladder, Sampling(), 120)),
        Part("latency", 40, partial(ladder, Sampling("epg_l_16_256", "onestep", 1, seconds=2), 90)),
        Part("onestep", 40, partial(ladder, Sampling("epg_l_16_256", "onestep", 64, seconds=2), 90)),
        Part("diffusion", 80, partial(ladder, Training(), 120)),
        Part("pretrain", 60, partial(ladder, Training("pretrain", batch=128), 120)),
        Part("consistency", 50, partial(ladder, Training("finetune-consistency", "epg_l_16_256"), 120)),
        Part("operations", 60, partial(operations, ["--main-shapes"])),
        Part("cpu", 20, partial(cpu, ["--seconds", "1"])),
        Part("data", 20, partial(data, ["--device", "cuda", "--readers", "4"])),
        Part("roofline", 10, partial(roof, "epg_xl_16_256", 64)),
    ]


def cpu_parts() -> list[Part]:
    """The reduced form; torch.compile takes half a minute per network, and is tried in sampling alone."""
    names, size = ["plain", "plain, 16 bits", "ours"], {"preset": "digits_32", "batch": 16, "seconds": 1.5}
    jobs = {"diffusion": "finetune-diffusion", "pretrain": "pretrain", "consistency": "finetune-consistency"}
    return [
        Part("cpu", 75, partial(cpu, ["--seconds", "10"])),
        Part("heun", 60, partial(ladder, Sampling("digits_32", "heun", 8, steps=18, seconds=2), 60)),
        Part("onestep", 10, partial(ladder, Sampling("digits_32", "onestep", 8, seconds=1, rungs=names), 30)),
        *(Part(name, 14, partial(ladder, Training(job, **size, rungs=names), 30)) for name, job in jobs.items()),
        Part("operations", 45, partial(operations, ["--without", "compile"])),
        Part("data", 30, partial(data, ["--threads", "2"])),
        Part("roofline", 10, partial(roof, "digits_32", 8)),
    ]


def tiny_parts() -> list[Part]:
    """Of the tests."""
    sampling = Sampling("digits_32", "heun", 2, steps=3, seconds=0, device="cpu", rungs=["plain", "ours"])
    training = Training(preset="digits_32", batch=2, seconds=0, compared=1, device="cpu", rungs=["ours"])
    return [
        Part("heun", 60, partial(ladder, sampling, 60)),
        Part("diffusion", 60, partial(ladder, training, 60)),
        Part("operations", 60, partial(operations, ["--ops", "euler_step", "--variants", "eager"])),
        Part("cpu", 60, partial(cpu, ["--seconds", "0", "--batch", "8", "--steps", "3"])),
        Part("roofline", 60, partial(roof, "digits_32", 2)),
    ]


def ladder(climbed: Ladder, rung_limit: float, folder: Path, seconds: float) -> str:
    """Sampling's rows are in sampling.json, training's in training.json."""
    name = "sampling.json" if climbed.job.startswith("sample") else "training.json"
    done = climb(climbed, open_results(folder / name, header()), limit=seconds, rung_limit=rung_limit)
    return COMPLETE if done else CUT_SHORT


def operations(flags: list[str], folder: Path, seconds: float) -> str:
    """The rows of bench.ops as the report and the roofline read them, also where the time was too short for all."""
    if importlib.util.find_spec("pytest") is None:
        return "not here: pytest is not installed, with which results are checked"
    rows = folder / "rows.json"
    outcome = _command(["-m", "bench.ops", *flags, "--output", str(rows.resolve())], folder / "ops.log", seconds)
    if rows.exists():
        found = read(rows)
        write_json(folder / "ops.json", {"machine_info": found.header, "benchmarks": list(map(_benchmark, found.rows))})
        rows.unlink()
    return outcome


def _benchmark(row: Row) -> dict:
    shape, _, rest = row.shape.partition("], ")
    direction, _, form = rest.partition(", ")
    info = {"op": row.job, "shape": json.loads(f"{shape}]"), "dtype": row.dtype, "direction": direction}
    info |= {"provider": row.rung, "median_us": row.median, "p20_us": row.p20, "p80_us": row.p80} | row.details
    return {"name": f"{row.job}, {row.shape}, {row.rung}", "extra_info": info | ({"form": form} if form else {})}


def cpu(flags: list[str], folder: Path, seconds: float) -> str:
    return _command(["-m", "bench.cpu_compare", *flags, "--output", str(folder.resolve())], folder / "cpu.log", seconds)


def data(flags: list[str], folder: Path, seconds: float) -> str:
    if importlib.util.find_spec("nvidia.dali") is None:
        return "not here: NVIDIA DALI is not installed"
    flags = [*flags, "--rounds", "2", "--seconds", "2", "--views", "1"]
    return _command(
        ["-m", "bench.bench_data", *flags, "--output", str(folder / "data.json")], folder / "data.log", seconds
    )


def roof(preset: str, batch: int, folder: Path, seconds: float) -> str:
    """The roofline with the operations that were measured."""
    if not (folder / "ops.json").exists():
        return "not here: no operation was measured"
    arguments = ["--preset", preset, "--batch", str(batch), "--measured", str(folder / "ops.json")]
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = roofline.main([*arguments, "--output", str(folder)])
    return f"failed: {said.getvalue().strip()}" if code else COMPLETE


def _command(arguments: list[str], log: Path, seconds: float) -> str:
    """Run Python in a process of its own with what it prints in `log`; interrupted, then killed, when time is up."""
    with open(log, "w", encoding="utf-8") as output:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return CUT_SHORT
        finally:
            process.kill()
            process.wait()
    if code:
        return f"failed: exit code {code}, see {log.name}"
    log.unlink()
    return COMPLETE


def run(parts: list[Part], folder: Path, seconds: float) -> dict[str, str]:
    """How every part ended, by its name; parts that are complete already are not repeated."""
    notes = folder / "progress.json"
    progress = read_json(notes) if notes.exists() else {}
    pending = [part for part in parts if progress.get(part.name, {}).get("outcome") != COMPLETE]
    began, total, planned = time.monotonic(), sum(part.seconds for part in pending), 0.0
    for part in pending:
        planned += seconds * part.seconds / total
        started = time.monotonic()
        print(f"== {part.name}", file=sys.stderr, flush=True)
        # with what the parts before have left of their shares
        outcome = _outcome(part, folder, planned - (started - began))
        print(f"{part.name}: {outcome}", file=sys.stderr, flush=True)
        progress[part.name] = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
        write_json(notes, progress)
    try:
        report.write(folder)
    except ValueError as nothing:  # no part has measured anything
        print(f"bench: {nothing}", file=sys.stderr)
    return {part.name: progress[part.name]["outcome"] for part in parts}


def _outcome(part: Part, folder: Path, seconds: float) -> str:
    if seconds <= 0:
        return CUT_SHORT
    try:
        return part.work(folder, seconds)
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def chosen(parts: list[Part], names: list[str] | None) -> list[Part]:
    """Raises ValueError for a name that none has."""
    known = [part.name for part in parts]
    for name in names or ():
        if name not in known:
            raise ValueError(f"part {name!r}: wanted one of {', '.join(known)}")
    return [part for part in parts if names is None or part.name in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder (default: a new one under bench/results)")
    parser.add_argument("--parts", nargs="+", help=f"some of: {', '.join(part.name for part in gpu_parts())}")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (default: 570)")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU: whether everything works")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        # more threads wait for cores that others keep busy
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts = tiny_parts() if options.tiny else gpu_parts() if torch.cuda.is_available() else cpu_parts()
    try:
        parts = chosen(parts, options.parts)
        folder = options.output or new_folder()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = run(parts, folder, options.seconds)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(f"{folder}/README.md")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        return 1
    return 3 if CUT_SHORT in outcomes.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
