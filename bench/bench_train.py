"""The ladder of training: plain PyTorch, 16 bits, torch.compile, the package's update, its optimiser, CUDA graphs, FP8.

    python -m bench.bench_train --job pretrain --batch 128 --output FOLDER
    python -m bench.bench_train --job finetune-diffusion --output FOLDER           # EPG-XL/16, batch 64
    python -m bench.bench_train --job finetune-consistency --preset epg_l_16_256 --output FOLDER

An update is timed from a batch on the device to the averaged weights: forward, backward, clipping where the stage has
it, AdamW, average. The lowest rung is in the released precision: float16 with a loss scale for pre-training; for the
other stages, where the specification names none, float32. A rung's error is that of its first losses, with the same
random numbers, against those of the plain code in float32 (relative L2). Dropout is off, so that losses can be
compared. The same command with the same folder goes on with what is missing in its training.json.
"""

from __future__ import annotations

import argparse
import sys
from functools import cached_property
from pathlib import Path

import torch

from bench import measure, parts
from bench.kernel_classes import split
from bench.ladder import Ladder, NotHere, Rung, chosen, climb, default_device, open_results
from bench.results import Row, header
from bench.tables import in_order, ladder_table
from bench.train_jobs import JOBS, OurTraining, PlainTraining, Problem
from epg_fast.models.fp8 import require_fp8
from epg_fast.ops import extension_status
from epg_fast.ops.extension import extension_has_cuda, gpus_without_code

_BLOCKS = {"optimizer": "torch", "compile": "blocks"}
_NETWORK = {"optimizer": "torch", "compile": "network"}
_OURS = (
    Rung("ours", "bf16", {"optimizer": "torch", "compile": "off"}),
    Rung("ours, compiled blocks", "bf16", _BLOCKS, profiled=True),
    Rung("ours, blocks, fused optimiser", "bf16", _BLOCKS | {"optimizer": "fused"}, profiled=True),
    Rung("ours, compiled network", "bf16", _NETWORK, later=True),
    Rung("ours, network, CUDA graphs", "bf16", _NETWORK | {"cuda_graphs": True}, later=True),
    Rung("ours, blocks, Triton kernels", "bf16", _BLOCKS | {"ops": "triton"}, profiled=True),
    Rung("ours, planned", "bf16", {"optimizer": "auto", "compile": "auto", "ops": "auto"}, profiled=True),
    Rung("ours, blocks, FP8", "fp8", _BLOCKS | {"fp8": "rowwise"}, profiled=True),
)
_PLAIN_16 = (
    Rung("plain, 16 bits", "bf16", {"plain": torch.bfloat16}, profiled=True),
    Rung("plain, torch.compile", "bf16", {"plain": torch.bfloat16, "compile": "network"}),
)
RUNGS = {
    "pretrain": (Rung("plain", "fp16", {"plain": torch.float16}), *_PLAIN_16, *_OURS),
    "finetune-diffusion": (Rung("plain", "fp32", {"plain": None}), *_PLAIN_16, *_OURS),
    "finetune-consistency": (Rung("plain", "fp32", {"plain": None}), *_PLAIN_16, *_OURS),
}


class Training(Ladder):
    """job: one of `JOBS`; batch: images of an update; seconds: of a rung's repetitions; compared: losses."""

    unit = "images/s"

    def __init__(
        self,
        job: str = "finetune-diffusion",
        preset: str = "epg_xl_16_256",
        batch: int = 64,
        *,
        seconds: float = 4.0,
        compared: int = 3,
        device: str | None = None,
        threads: int = 1,
        rungs: list[str] | None = None,
    ):
        self.job, self.preset, self.images, self.shape = job, preset, batch, f"{preset}, batch {batch}"
        self.seconds, self.compared, self.threads = seconds, compared, threads
        self.device = torch.device(device or default_device())
        self.rungs = chosen(RUNGS[job], rungs)

    @cached_property
    def plan(self) -> parts.Job:
        stage = next(s for s in parts.training_stages(self.preset, self.images) if s.name == self.job)
        return parts.training(stage)

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.job, self.preset, self.images, self.device)

    @cached_property
    def reference(self) -> torch.Tensor:
        """The first losses in float32: [compared] float64."""
        return torch.tensor(PlainTraining(self.problem, None, recompute=True).losses(self.compared)).double()

    def measure(self, rung: Rung) -> Row:
        _ = self.reference, self.ceilings  # neither in the peak nor in the time
        left = measure.start_afresh(self.device)
        made = self._made(rung)
        losses = torch.tensor(made.losses(self.compared)).double()
        error = ((losses - self.reference).norm() / self.reference.norm()).item()
        made.step()
        once = measure.rounds(made.step, self.device, 0.0, least=1)[0]
        # an update is launched while the one before it is computed
        calls = max(1, min(10, round(0.2 * self.seconds / once))) if self.device.type == "cuda" else 1
        timed = measure.rounds(made.step, self.device, self.seconds, calls=calls)
        row = self.row(rung, timed, error, allocated_before=left, first_losses=losses.tolist(), dropout=0.0)
        if rung.profiled:
            typical = measure.percentiles(timed)[1]
            row.details["split"] = {"of": "an update"} | split(made.step, self.device, typical).as_json()
        return row

    def _made(self, rung: Rung) -> PlainTraining | OurTraining:
        options = dict(rung.options)
        if "plain" in options:
            return PlainTraining(self.problem, options["plain"], compiled="compile" in options)
        cuda = self.device.type == "cuda"
        if not cuda and (options.get("ops") == "triton" or {"cuda_graphs", "fp8"} & set(options)):
            raise NotHere("needs a CUDA device")
        if "fp8" in options:
            try:
                require_fp8(self.device)
            except ValueError as reason:
                raise NotHere(str(reason)) from None
        if options["optimizer"] == "fused" and (reason := _no_extension(self.device)):
            raise NotHere(reason)
        made = OurTraining(self.problem, **options)
        if options.get("ops") == "auto" and made.state.stage.chosen.plan is None:
            raise NotHere(made.state.stage.chosen.why)
        return made


def _no_extension(device: torch.device) -> str | None:
    """Why the extension does nothing on this device, None where it does."""
    available, reason = extension_status()
    if not available:
        return f"the extension is {reason}"
    if device.type == "cuda" and not extension_has_cuda():
        return "the extension is built without CUDA"
    if device.type == "cuda" and gpus_without_code():
        return "the extension holds no code for this GPU"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_train", description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=list(JOBS), default="finetune-diffusion")
    parser.add_argument("--preset", default="epg_xl_16_256")
    parser.add_argument("--batch", type=int, default=64, help="images of an update")
    parser.add_argument("--rungs", nargs="+", help=f"some of: {'; '.join(r.name for r in RUNGS['pretrain'])}")
    parser.add_argument("--seconds", type=float, default=4.0, help="of repetitions per rung (default: 4)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all (default: 540)")
    parser.add_argument("--rung_limit", type=float, default=150.0, help="seconds for a rung (default: 150)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's on a CPU (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="folder of training.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        ladder = Training(
            options.job,
            options.preset,
            options.batch,
            seconds=options.seconds,
            threads=options.threads,
            rungs=options.rungs,
        )
        _ = ladder.plan  # an unknown preset
        found = open_results(options.output / "training.json", header())
    except ValueError as error:
        print(f"bench.bench_train: {error}", file=sys.stderr)
        return 2
    done = climb(ladder, found, limit=options.limit, rung_limit=options.rung_limit)
    rows = [row for row in found.rows if (row.job, row.shape) == (ladder.job, ladder.shape)]
    print(ladder_table(in_order(rows, [rung.name for rung in RUNGS[ladder.job]])))
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
