"""Checks and times candidates, in a process of its own: a candidate may crash it or hang in it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Sequence
from functools import partial

import torch

from epg_fast.child import Child, Failed
from epg_fast.config import TuneConfig
from epg_fast.plans import Variant
from epg_fast.tuning.answers import packed, unpacked
from epg_fast.tuning.job import Job
from epg_fast.tuning.workloads import Sampling, Training, checked_batch, errors, worst

_PAIRS = (5, 60)  # at least, at most
_ROUNDING = {"bf16": 2**-8, "fp16": 2**-11, "tf32": 2**-11, "fp32": 1e-6, "fp8": 2**-4}
_SAME = {"fp32": 1e-2, "tf32": 3e-2}  # of the whole job; 16 bits: 0.3
_FLUSHED = 1 << 28  # bytes, several times a GPU's L2


class Worker:
    """Answers requests; keeps the networks of the two variants that were used last."""

    def __init__(self, job: Job, seconds: float):
        """seconds: of timing, for a pair of variants."""
        self.job, self.device, self._seconds = job, job.device, seconds
        self._threads = torch.get_num_threads()
        self._made: dict[tuple, Sampling | Training] = {}
        self._results: dict[tuple, dict] = {}
        # every variant compiles the blocks' code anew, and falls back to eager code without a word beyond the limit
        for name in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, name, 10_000)

    def __call__(self, kind: str, unit: str, variants: list[Variant]) -> dict:
        """What the method `kind` returns or raises, packed."""
        try:
            return packed(lambda: getattr(self, kind)(unit, variants))
        except Exception as error:  # whatever a candidate raises: it is out, and the rest goes on
            text = " ".join(str(error).split())[:300]
            with contextlib.suppress(RuntimeError):
                self._forget()
            return {"failed": "crashed", "why": f"{type(error).__name__}: {text}"}

    def memory(self, *_) -> list[int]:
        """[free, all] bytes of the GPU, [] on a CPU."""
        return list(torch.cuda.mem_get_info(self.device)) if self.device.type == "cuda" else []

    def check(self, unit: str, variants: list[Variant]) -> dict:
        """{result: [error, error of plain code]} of a variant. Raises Failed for one that is wrong."""
        (variant,) = variants
        try:
            return self._checked(unit, variant)
        except torch.OutOfMemoryError:  # beside the networks of before
            pass
        self._forget()
        return self._checked(unit, variant)

    def times(self, unit: str, variants: list[Variant]) -> list[list[float]]:
        """Seconds of a step of each variant, taken in turn; one after the other where memory holds but one."""
        try:
            return self._in_turn(unit, variants)
        except torch.OutOfMemoryError:
            if len(variants) == 1:
                raise
        found: list[list[float]] = [[] for _ in variants]
        for times, variant in 2 * list(zip(found, variants, strict=True)):
            self._forget()
            times += self._in_turn(unit, [variant])[0]
        count = min(map(len, found))
        return [times[:count] for times in found]

    def _checked(self, unit: str, variant: Variant) -> dict:
        precision = "fp8" if getattr(self.job.config, "fp8", None) else self.job.config.precision
        if unit == "whole":
            return self._same_as_plain(variant, _SAME.get(precision, 0.3))
        batch = checked_batch(self.job.batch, self.device)
        plain = Variant(threads=variant.threads)
        exact = self._reference(unit, plain, batch, "fp32" if unit == "optimizer" else "fp64")
        in_precision = self._reference(unit, plain, batch, None)
        found = errors(self._make(unit, variant, batch).results(), in_precision, exact)
        wrong = worst(found, 1e-5 if unit == "optimizer" else _ROUNDING[precision])
        if wrong is not None:
            raise Failed("wrong", "{}: error {:.2g}, {:.2g} is allowed".format(*wrong))
        return dict(list(found.items())[:8])

    def _same_as_plain(self, variant: Variant, allowed: float) -> dict:
        """The whole job is compared with plain code in the same precision: blocks have been with exact results."""
        # a GPU that compiled blocks fill would not hold what eager ones keep
        plain = Variant(compile="blocks" if self.device.type == "cuda" else "off", threads=variant.threads)
        wanted = self._reference("whole", plain, self.job.batch, None)
        found = errors(self._make("whole", variant, self.job.batch).results(), wanted, wanted)
        total = max(found["images" if "images" in found else "loss"][0], 0.0)
        if not total <= allowed or any(own != own for own, _ in found.values()):
            raise Failed("wrong", f"{total:.2g} off plain code, {allowed:.2g} is allowed")
        return {"whole": [total, 0.0]}

    def _in_turn(self, unit: str, variants: list[Variant]) -> list[list[float]]:
        workloads = [(self._make(unit, variant, self.job.batch), variant) for variant in variants]
        found: list[list[float]] = [[] for _ in workloads]
        for workload, variant in workloads:
            for _ in range(2):
                self._time(workload, variant)
        fewest, most = _PAIRS
        end = time.perf_counter() + self._seconds
        while len(found[0]) < fewest or (time.perf_counter() < end and len(found[0]) < most):
            order = list(enumerate(workloads))
            for i, (workload, variant) in order if len(found[0]) % 2 else reversed(order):
                found[i].append(self._time(workload, variant))
        return found

    def _time(self, workload, variant: Variant) -> float:
        if self.device.type != "cuda":
            torch.set_num_threads(variant.threads or self._threads)
            start = time.perf_counter()
            workload.step()
            return time.perf_counter() - start
        torch.empty(_FLUSHED, dtype=torch.int8, device=self.device).zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        workload.step()
        marks[1].record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3

    def _reference(self, unit: str, variant: Variant, batch: int, precision: str | None) -> dict:
        key = (unit, batch, precision)
        if key not in self._results:
            self._results = {k: v for k, v in self._results.items() if k[0] == unit}
            workload = self._new(unit, variant, batch, precision)
            self._results[key] = workload.results()
            del workload
            self._collect()
        return self._results[key]

    def _make(self, unit: str, variant: Variant, batch: int):
        key = (unit, batch, json.dumps(dataclasses.asdict(variant), sort_keys=True))
        if key not in self._made:
            if variant.threads:
                torch.set_num_threads(variant.threads)
            while len(self._made) > 1 or any(k[0] != unit for k in self._made):
                self._made.pop(next(iter(self._made)))
            self._collect()
            self._made[key] = self._new(unit, variant, batch, None)
        self._made[key] = self._made.pop(key)  # the newest last
        return self._made[key]

    def _new(self, unit: str, variant: Variant, batch: int, precision: str | None):
        job = self.job
        if precision is not None:
            plain = {"precision": "fp32"} | ({"fp8": None} if job.stage else {})
            job = dataclasses.replace(job, config=dataclasses.replace(job.config, **plain))
        dtype = torch.float64 if precision == "fp64" else None
        return (Training if job.stage else Sampling)(job, unit, variant, batch, dtype)

    def _forget(self) -> None:
        self._made.clear()
        self._results.clear()
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Bench(Child):
    """A worker in a process of its own."""

    def __init__(self, job: Job, options: TuneConfig):
        super().__init__(partial(Worker, job, options.seconds))
        self._limit = options.limit

    def ask(self, kind: str, unit: str = "", variants: Sequence[Variant] = ()):
        """What the method `kind` of `Worker` returns. Raises Failed as it does, or for a crash or too long a time."""
        return unpacked(super().ask(kind, unit, list(variants), seconds=self._limit))
