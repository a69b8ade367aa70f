"""What `epg-fast tune` and `--ops tune` do: from a job's configuration to a plan's file."""

from __future__ import annotations

import datetime
import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from epg_fast import distributed
from epg_fast.config import ModelConfig, RunConfig, SampleConfig, TuneConfig
from epg_fast.files import check_writable, lock_file, write_atomically
from epg_fast.plans import Machine, Plan, plans_folder, stored_plans
from epg_fast.training.stages import Stage
from epg_fast.tuning.answers import Journal
from epg_fast.tuning.candidates import site_candidates, ways_to_run
from epg_fast.tuning.job import Job, job_of
from epg_fast.tuning.tuner import Tuner, table
from epg_fast.tuning.worker import Bench

_CROWDED = 0.05  # of a GPU's memory, in use by others
log = logging.getLogger("epg_fast")


def ensure_plan(config: SampleConfig | RunConfig, stage: type[Stage] | None) -> None:
    """Make a plan for this job on this device unless there is one; stage: of a training job.

    Under torchrun the main rank does, while the others wait for it where they meet.
    """
    if not distributed.is_main():
        return
    job = job_of(config, stage, distributed.place()[1])
    here = Machine.here(job.device)
    for where, plan in stored_plans():
        if plan.case.like(job.case) and not here.differences(plan.machine):
            log.info("ops tune: a plan is there: %s", where)
            return
    _tune(job, TuneConfig())


def tune(
    config: SampleConfig | RunConfig, stage: type[Stage] | None, options: TuneConfig, model: ModelConfig | None = None
) -> Plan:
    """Make a plan, print the table of what was tried, and write the plan; a plan of before is made anew.

    model: configuration of the network to sample from, where the job has no checkpoint.
    Raises ValueError for what the user can mend, RuntimeError when not even plain code can be timed.
    """
    return _tune(job_of(config, stage, options.gpus or max(torch.cuda.device_count(), 1), model), options)


def _tune(job: Job, options: TuneConfig) -> Plan:
    draft = Plan(job.case, Machine.here(job.device))
    path = plans_folder() / draft.name
    journal, locked, targets = path.with_suffix(".part"), path.with_suffix(".lock"), [path]
    if options.output:
        targets.append(Path(options.output))
        check_writable(targets[1], "output")
        if targets[1].is_dir():
            raise ValueError(
                f"output: got the folder {options.output}, want a file, such as {options.output}/plan.json"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(locked, f"another process is making {path.name}; wait for it")
    except OSError as error:
        raise ValueError(
            f"plans are kept in {path.parent}, which cannot be made or written to ({error.strerror}); set "
            "EPG_FAST_PLANS to a folder that can"
        ) from None
    with lock:
        try:
            plan = _measured(job, options, draft, journal)
            for target in targets:
                write_atomically(target, plan.text())
                log.info("plan: %s", target)
            journal.unlink()
        finally:
            locked.unlink(missing_ok=True)  # while it is held: not that of another process
    return plan


def _measured(job: Job, options: TuneConfig, draft: Plan, path: Path) -> Plan:
    """The draft with what is fastest; path: of the journal."""
    plain, runs = ways_to_run(job)
    sites = site_candidates(job, plain)
    log.info("tuning for %s on %s, about %g minutes", job.case, draft.machine.device, options.minutes)
    total = sum(reason is None for *_, reason in sites) + 2 * len(runs) + 1
    with Bench(job, options) as bench, tqdm(total=total, desc="tune", unit="candidate", leave=False) as bar:

        def show(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        journal = Journal(bench.ask, path, job.digest)
        tuner = Tuner(journal, sites, plain, runs, 60 * options.minutes, show)
        memory = bench.ask("memory")
        if memory and memory[0] < (1 - _CROWDED) * memory[1]:
            tuner.notes.append(f"others use {(memory[1] - memory[0]) / 2**30:.1f} GiB of the GPU's memory")
        best = tuner.best()
    whole = [row for row in tuner.rows if row.unit == "whole"]
    if not any(row.milliseconds for row in whole):
        journal.forget_failures()
        reasons = "; ".join(row.note for row in whole if row.note)
        raise RuntimeError(f"tune: the whole job could not be timed ({reasons}); no plan is written")
    print("\n".join([*table(tuner.rows), *tuner.notes]))
    if best == plain:
        print("nothing is faster than plain code by 1% or more: the plan is plain code")
    else:
        print(f"{best}: {tuner.speedup:.2f}x plain code")
    return replace(
        draft,
        variant=best,
        speedup=round(tuner.speedup, 3),
        made=datetime.date.today().isoformat(),
        evidence={"rows": [asdict(row) for row in tuner.rows], "notes": tuner.notes},
    )
