"""All benchmarks into one folder: `make bench`, or

    python -m bench                                       # bench/results/<date>-<device>/
    python -m bench --output FOLDER --parts heun data     # some parts; what is complete in FOLDER is not repeated
    python -m bench --output FOLDER --job sample-onestep --preset epg_l_16_256 --batch 1     # one ladder of this size

On a GPU: the ladders of sampling and training, the operations and loading. Without one: the package and the plain code
in turns, the operations and loading. Every part has its share of `--seconds`, under ten minutes as a rule, and what
others leave. What was cut short goes on when the same folder is given again.

Writes JSON files, README.md and PNG files. Exits with 1 if a part failed, 3 if one was cut short.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from bench import report
from bench.ladder import Ladder, climb, in_turns
from bench.results import ROOT, Results, header, read_json
from bench.roofline import STAGES
from bench.sample import Sampling
from bench.train import Training
from epg_fast.files import write_atomically

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
    small = "epg_l_16_256"
    return [
        Part("heun", 190, partial(ladder, Sampling())),
        Part("latency", 40, partial(ladder, Sampling("sample-onestep", small, 1, seconds=2))),
        Part("onestep", 40, partial(ladder, Sampling("sample-onestep", small, seconds=2))),
        Part("diffusion", 80, partial(ladder, Training())),
        Part("pretrain", 60, partial(ladder, Training("pretrain", batch=128))),
        Part("consistency", 50, partial(ladder, Training("finetune-consistency", small))),
        Part("operations", 60, partial(operations, ["--main-shapes"])),
        Part("data", 20, partial(data, ["--device", "cuda", "--readers", "4"])),
    ]


def cpu_parts() -> list[Part]:
    return [
        Part("turns", 75, partial(turns, "digits_32", 32, 18)),
        Part("operations", 90, partial(operations, ["--without", "compile"])),
        Part("data", 40, partial(data, ["--threads", "2"])),
    ]


def ladder(climbed: Ladder, folder: Path, seconds: float) -> str:
    """Sampling's rows are in sampling.json, training's in training.json."""
    name = "sampling.json" if climbed.job.startswith("sample") else "training.json"
    done = climb(climbed, Results.resume(folder / name, header()), seconds=seconds, each=120)
    return COMPLETE if done else CUT_SHORT


def turns(preset: str, batch: int, steps: int, folder: Path, seconds: float) -> str:
    """Sampling and an update of each stage, into turns.json, which is written anew."""
    found = Results(folder / "turns.json", header())
    options = {"preset": preset, "batch": batch, "device": "cpu", "seconds": 0.5 * seconds / (1 + len(STAGES))}
    for job in (Sampling(steps=steps, **options), *(Training(job, **options) for job in STAGES)):
        for row in in_turns(job):
            found.say(row)
    return COMPLETE


def operations(flags: list[str], folder: Path, seconds: float) -> str:
    if importlib.util.find_spec("pytest") is None:
        return "not here: pytest is not installed, with which results are checked"
    flags = [*flags, "--output", str((folder / "ops.json").resolve())]
    return _command(["-m", "bench.ops", *flags], folder / "ops.log", seconds)


def data(flags: list[str], folder: Path, seconds: float) -> str:
    if importlib.util.find_spec("nvidia.dali") is None:
        return "not here: NVIDIA DALI is not installed"
    flags = [*flags, "--rounds", "2", "--seconds", "2", "--views", "1", "--output", str(folder.resolve())]
    return _command(["-m", "bench.data", *flags], folder / "data.log", seconds)


def _command(arguments: list[str], log: Path, seconds: float) -> str:
    """Run Python in a process of its own with what it prints in `log`; killed when time is up."""
    with open(log, "w", encoding="utf-8") as output:
        command = [sys.executable, *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return CUT_SHORT
    if done.returncode:
        return f"failed: exit code {done.returncode}, see {log.name}"
    log.unlink()
    return COMPLETE


def run(parts: list[Part], folder: Path, seconds: float) -> dict[str, str]:
    """How every part ended, by its name; parts that are complete already are not repeated."""
    notes = folder / "progress.json"
    progress = read_json(notes) if notes.exists() else {}
    pending = [part for part in parts if progress.get(part.name) != COMPLETE]
    began, total, planned = time.monotonic(), sum(part.seconds for part in pending), 0.0
    for part in pending:
        planned += seconds * part.seconds / total
        print(f"== {part.name}", file=sys.stderr, flush=True)
        # with what the parts before have left of their shares
        left = planned - (time.monotonic() - began)
        try:
            progress[part.name] = part.work(folder, left) if left > 0 else CUT_SHORT
        except Exception as error:
            lines = str(error).splitlines() or [""]
            progress[part.name] = f"failed: {type(error).__name__}: {lines[0]}"
        print(f"{part.name}: {progress[part.name]}", file=sys.stderr, flush=True)
        write_atomically(notes, json.dumps(progress, indent=1) + "\n")
    with contextlib.suppress(ValueError):  # no part has measured anything
        report.write(folder)
    return {part.name: progress[part.name] for part in parts}


def one_ladder(job: str, preset: str, batch: int, variants: list[str] | None) -> Part:
    """Raises ValueError for a preset or a variant that is none."""
    make = Sampling if job.startswith("sample") else Training
    made = make(job, preset, batch, variants=variants)
    _ = made.work  # an unknown preset
    return Part(f"{made.job}: {made.shape}", 1, partial(ladder, made))


def main(arguments: list[str] | None = None) -> int:
    parts = gpu_parts() if torch.cuda.is_available() else cpu_parts()
    known = [part.name for part in parts]
    jobs = ["sample-heun", "sample-onestep", *STAGES]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/<date>-<device>)")
    parser.add_argument("--parts", nargs="+", choices=known, metavar="PART", help=f"some of: {', '.join(known)}")
    parser.add_argument("--job", choices=jobs, help="one ladder in their place, of this job")
    parser.add_argument("--preset", default="epg_xl_16_256", help="of --job's network (default: epg_xl_16_256)")
    parser.add_argument("--batch", type=int, default=64, help="of --job (default: 64); of 1 image the latency is shown")
    parser.add_argument("--variants", nargs="+", help="some of --job's; a wrong name lists them")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (default: 570)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        # more threads wait for cores that others keep busy
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    stem = "-".join("".join(c if c.isalnum() else " " for c in header()["device"]).lower().split())
    folder = options.output or ROOT / "bench" / "results" / f"{datetime.now().date()}-{stem}"
    try:
        if options.job:
            parts = [one_ladder(options.job, options.preset, options.batch, options.variants)]
        elif options.parts:
            parts = [part for part in parts if part.name in options.parts]
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
