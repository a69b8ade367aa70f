"""The package against the plain code on a CPU, in float32: a forward pass, an update of each stage, sampling.

    python -m bench.cpu_compare --output FOLDER            # the digits' network, one thread, about a minute

Both take turns and every turn gives a ratio of two times that lie beside each other, so that a machine that is busy for
a while spoils a few ratios and not their median. Outputs (losses of updates) are compared before: what differs is not
timed. The package is as it comes on a CPU: nothing compiled, its own optimiser where the extension is built; or as a
plan says that `epg-fast tune` has made for the job ("planned").
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.bench_sample import GUIDANCE, INTERVAL, Sampling
from bench.ladder import open_results
from bench.measure import percentiles
from bench.results import Results, Row, header, markdown_table, significant
from bench.tables import error_text
from bench.train_jobs import JOBS, OurTraining, PlainTraining, Problem
from epg_fast import SamplingEngine

_ALLOWED = 1e-3


@dataclass(frozen=True)
class Pair:
    """One job done twice: calls without arguments, and the relative L2 of the one's output against the other's."""

    job: str
    shape: str
    plain: Callable[[], object]
    ours: Callable[[], object]
    error: float
    plan: str | None = None
    """By which ours computes, if `epg-fast tune` has made one for this processor and shape."""


def pairs(preset: str, batch: int, steps: int) -> Iterator[Pair]:
    """All jobs of a preset, each made when it is asked for; `steps`: levels of Heun's method."""
    shape = f"{preset}, batch {batch}"
    ladder = Sampling(preset, "heun", batch, steps=steps, device="cpu")
    noise, labels = ladder.start
    yield _forward(ladder, shape)
    sampler = ladder.plain_sampler(None)
    options = {"sampler": "heun", "steps": steps, "guidance": GUIDANCE, "interval": INTERVAL, "batch_size": batch}
    engine = SamplingEngine(ladder.model, parameterization="x0", normalization="imagenet", **options)
    calls = partial(sampler, noise, labels), partial(engine, labels, noise=noise)
    error = _error(calls[1](), calls[0]())
    yield Pair("sample-heun", f"{shape}, {steps} levels", *calls, error, engine.chosen.plan)
    for job in JOBS:
        problem = Problem(job, preset, batch, torch.device("cpu"))
        plain, ours = PlainTraining(problem, None), OurTraining(problem, "auto", precision="fp32")
        losses = [torch.tensor(training.losses(3)) for training in (ours, plain)]
        yield Pair(job, shape, plain.step, ours.step, _error(*losses), ours.state.stage.chosen.plan)


def _forward(ladder: Sampling, shape: str) -> Pair:
    noise, labels = ladder.start
    network, model = ladder.plain_sampler(None).network, ladder.model
    inputs = noise, torch.linspace(-1000, 1000, len(noise)), labels
    with torch.inference_mode():
        error = _error(model(*inputs), network(*inputs))
    return Pair("forward", shape, partial(_inferred, network, *inputs), partial(_inferred, model, *inputs), error)


@torch.inference_mode()
def _inferred(network: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return network(*inputs)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).double().norm() / want.double().norm()).item()


def compare(pair: Pair, seconds: float, least: int = 5) -> tuple[Row, Row]:
    """Rows of the plain code and of the package; the latter's details hold the ratio of times, plain over ours."""
    identity = {"job": pair.job, "shape": pair.shape, "dtype": "fp32", "unit": "ms"}
    if not pair.error <= _ALLOWED:
        note = f"not timed: outputs differ by {pair.error:.1e}, {_ALLOWED:.0e} is allowed"
        return tuple(Row(rung=rung, note=note, **identity) for rung in ("plain", "ours"))
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    calls = {"plain": pair.plain, "ours": pair.ours}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while len(times["ours"]) < least or time.perf_counter() - began < seconds:
        # whoever comes second finds the caches as the other left them
        for rung in sorted(calls, reverse=len(times["ours"]) % 2 == 0):
            start = time.perf_counter()
            calls[rung]()
            times[rung].append(time.perf_counter() - start)
    low, middle, high = percentiles([a / b for a, b in zip(times["plain"], times["ours"], strict=True)])
    count = {"repetitions": len(times["ours"])}
    details = {"plain": count, "ours": count | {"ratio": {"median": middle, "p20": low, "p80": high}}}
    rows = []
    for rung in calls:
        p20, median, p80 = (1e3 * value for value in percentiles(times[rung]))
        error = pair.error if rung == "ours" else None
        numbers = {"median": median, "p20": p20, "p80": p80, "error": error}
        note = "planned" if pair.plan and rung == "ours" else ""
        rows.append(Row(rung=rung, details=details[rung], note=note, **numbers, **identity))
    return tuple(rows)


def run(found: Results, preset: str, batch: int, steps: int, seconds: float) -> None:
    """Add the rows of all pairs. seconds: of a pair."""
    for pair in pairs(preset, batch, steps):
        for row in compare(pair, seconds):
            found.add(row)


def table(rows: list[Row]) -> str:
    """A row per job."""
    cells = []
    for ours in (row for row in rows if row.rung == "ours"):
        plain = next(row for row in rows if row.rung == "plain" and (row.job, row.shape) == (ours.job, ours.shape))
        ratio = ours.details.get("ratio", {})
        spread = f"{significant(ratio['p20'])}x to {significant(ratio['p80'])}x" if ratio else ""
        middle = f"{significant(ratio['median'])}x" if ratio else ""
        numbers = significant(plain.median), significant(ours.median), middle, spread, error_text(ours.error)
        cells.append((ours.job, ours.shape, *numbers, ours.note))
    columns = ("job", "shape", "plain, ms", "ours, ms", "plain / ours", "p20 to p80 of pairs", "error", "note")
    if not any(row[-1] for row in cells):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    return markdown_table(columns, cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_compare", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits_32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=18, help="levels of Heun's method (default: 18)")
    parser.add_argument("--seconds", type=float, default=8.0, help="per job (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's; more wait for busy cores (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="folder of cpu.json, which is written anew")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    (options.output / "cpu.json").unlink(missing_ok=True)
    try:
        found = open_results(options.output / "cpu.json", header())
        run(found, options.preset, options.batch, options.steps, options.seconds)
    except ValueError as error:
        print(f"bench.cpu_compare: {error}", file=sys.stderr)
        return 2
    print(table(found.rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
