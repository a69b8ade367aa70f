"""What `epg-fast tune` and `--ops tune` do: from a job's configuration to a plan's file."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from epg_fast import distributed
from epg_fast.config import RunConfig, SampleConfig, TuneConfig
from epg_fast.distributed import resolve_device
from epg_fast.files import check_writable, lock_file, write_atomically
from epg_fast.models import load_weights, preset_config
from epg_fast.models.presets import encoder_from_config, generator_from_config
from epg_fast.models.pretrained import is_generator, model_config
from epg_fast.ops import extension_status
from epg_fast.plans import SITES, Case, Machine, Plan, plans_folder, stored_plans
from epg_fast.plans.plan import architecture
from epg_fast.runtime import is_small
from epg_fast.sampling.precision import available_precision
from epg_fast.training.planning import training_case
from epg_fast.training.stages import Stage, network_config
from epg_fast.tuning.candidates import Variant, obstacle, sites_of_job
from epg_fast.tuning.client import Client
from epg_fast.tuning.tuner import Tuner, table
from epg_fast.tuning.worker import Job

_CROWDED = 0.05  # of a GPU's memory, in use by others
log = logging.getLogger("epg_fast")


class _Work(NamedTuple):
    """What is tuned: a job's configuration, its stage if it trains, and the network."""

    config: SampleConfig | RunConfig
    stage: type[Stage] | None
    case: Case
    network: dict
    """Arguments of its constructor."""
    small: bool
    """Whether one thread computes it where nothing says otherwise."""


def ensure_plan(config: SampleConfig | RunConfig, stage: type[Stage] | None) -> None:
    """Make a plan for this job on this device unless there is one; stage: of a training job.

    Under torchrun the main rank does, while the others wait for it where they meet.
    """
    if not distributed.is_main():
        return
    work = _work(config, stage, distributed.place()[1])
    here = Machine.here(resolve_device(config.device))
    for where, plan in stored_plans():
        if plan.case.like(work.case) and not here.differences(plan.machine):
            log.info("ops tune: a plan is there: %s", where)
            return
    _tune(work, TuneConfig())


def tune(config: SampleConfig | RunConfig, stage: type[Stage] | None, options: TuneConfig, model=None) -> Plan:
    """Make a plan, print the table of what was tried, and write the plan; a plan of before is made anew.

    model: configuration of the network to sample from, where the job has no checkpoint.
    Raises ValueError for what the user can mend, RuntimeError when not even plain code can be timed.
    """
    return _tune(_work(config, stage, options.gpus or max(torch.cuda.device_count(), 1), model), options)


def _work(config, stage: type[Stage] | None, ranks: int, model=None) -> _Work:
    if stage is not None:
        if config.batch_size % (ranks * config.gradient_accumulation):
            raise ValueError(
                f"batch_size {config.batch_size} does not divide over {ranks} GPUs with "
                f"gradient_accumulation {config.gradient_accumulation}; say how many GPUs with --gpus"
            )
        network = network_config(config)
    elif config.checkpoint:
        state, metadata = load_weights(config.checkpoint)
        if not is_generator(state):
            raise ValueError(f"{config.checkpoint} holds a pre-trained encoder, which cannot draw images")
        network = model_config(state, metadata)
    else:
        overrides = asdict(model)
        network = preset_config(overrides.pop("preset"), **overrides)
    with torch.device("meta"):
        made = (encoder_from_config if stage and stage.name == "pretrain" else generator_from_config)(network)
    if stage is not None:
        case = training_case(stage.name, config, made, ranks)
    else:
        guided = config.guidance != 1 and not config.autoguidance and made.num_classes
        precision = available_precision(config.precision, resolve_device(config.device))
        case = Case("sample", architecture(made), precision, config.batch_size * (2 if guided else 1))
    return _Work(config, stage, case, network, is_small(made))


def _tune(work: _Work, options: TuneConfig) -> Plan:
    draft = Plan(work.case, Machine.here(resolve_device(work.config.device)), {}, "off")
    path = plans_folder() / draft.name
    if options.output:
        check_writable(Path(options.output), "output")
        if Path(options.output).is_dir():
            raise ValueError(
                f"output: got the folder {options.output}, want a file, such as {options.output}/plan.json"
            )
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path.with_suffix(".lock"), f"another process is making {path.name}; wait for it")
    except OSError as error:
        raise ValueError(
            f"plans are kept in {path.parent}, which cannot be made or written to ({error.strerror}); set "
            "EPG_FAST_PLANS to a folder that can"
        ) from None
    with lock:
        try:
            plan = _measured(work, options, draft, path.with_suffix(".part"))
            text = plan.text().encode()
            for target in (path, *([Path(options.output)] if options.output else [])):
                write_atomically(target, text)
                log.info("plan: %s", target)
            path.with_suffix(".part").unlink(missing_ok=True)
        finally:
            path.with_suffix(".lock").unlink(missing_ok=True)  # while it is held: not that of another process
    return plan


def _measured(work: _Work, options: TuneConfig, draft: Plan, part: Path) -> Plan:
    config, stage, case = work.config, work.stage, work.case
    device = resolve_device(config.device)
    batch = config.batch_size if stage is None else case.batch
    job, digest = Job(config, stage, work.network, batch, options.seconds), _digest(config)
    plain, runs = _runs(stage, device, config, work.small)
    candidates = [
        (site, backend, obstacle(site, backend, case, device))
        for site in sites_of_job(case)
        for backend in SITES[site]
        if backend not in (plain.ops.get(site, "plain"), "math") and _is_asked(site, case, config)
    ]
    log.info("tuning for %s on %s, about %g minutes", case, draft.machine.device, options.minutes)
    total = sum(reason is None for *_, reason in candidates) + 2 * len(runs) + 1
    with Client(job) as client, tqdm(total=total, desc="tune", unit="candidate", leave=False) as bar:

        def show(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        tuner = Tuner(
            client,
            candidates,
            plain,
            runs,
            60 * options.minutes,
            _read_part(part, config),
            lambda measured: write_atomically(part, json.dumps({"options": digest, "measured": measured}).encode()),
            show,
            request=options.limit,
        )
        memory = client.memory(options.limit)
        if memory and memory[0] < (1 - _CROWDED) * memory[1]:
            tuner.notes.append(f"others use {(memory[1] - memory[0]) / 2**30:.1f} GiB of the GPU's memory")
        best = tuner.best()
    if not any(row.unit == "whole" and row.milliseconds for row in tuner.rows):
        reasons = "; ".join(row.note for row in tuner.rows if row.unit == "whole" and row.note)
        left = {key: found for key, found in tuner.measured.items() if "failed" not in found}
        write_atomically(part, json.dumps(left).encode())  # what failed now is tried anew
        raise RuntimeError(f"tune: the whole job could not be timed ({reasons}); no plan is written")
    lines = [*table(tuner.rows), *tuner.notes]
    print("\n".join(lines))
    if best == plain:
        print("nothing is faster than plain code by 1% or more: the plan is plain code")
    else:
        print(f"{best}: {tuner.speedup:.2f}x plain code")
    return Plan(
        case,
        draft.machine,
        best.ops,
        best.compile,
        best.options,
        best.cuda_graphs,
        best.threads,
        round(tuner.speedup, 3),
        datetime.date.today().isoformat(),
        {"rows": [asdict(row) for row in tuner.rows], "notes": tuner.notes},
    )


def _is_asked(site: str, case: Case, config) -> bool:
    """Whether the network has the half that a site belongs to, and no flag has chosen for the site."""
    if site == "optimizer" and config.optimizer.backend != "auto":
        return False
    return not site.startswith("decoder.") or bool(case.network.get("decoder_depth"))


def _runs(stage, device: torch.device, config, small: bool) -> tuple[Variant, list[Variant]]:
    """(what runs without a plan, other ways to run the whole job). small: a network that one thread computes then."""
    if device.type == "cuda":
        graphs = stage is None
        plain = Variant(compile="blocks", cuda_graphs=graphs)
        runs = [Variant(compile="network", cuda_graphs=graphs)]
        if stage is not None and config.gradient_accumulation == 1 and config.parallelism == "ddp":
            runs.append(Variant(compile="network", cuda_graphs=True))
        tuned = {"coordinate_descent_tuning": True, "epilogue_fusion": False}
        return _as_asked(config, plain, [*runs, Variant(compile="network", options=tuned, cuda_graphs=graphs)])
    cores = torch.get_num_threads()
    # without a plan a CPU takes the fused update
    fused = stage is not None and config.optimizer.backend == "auto" and extension_status()[0]
    plain = Variant({"optimizer": "fused"} if fused else {}, threads=1 if small else cores)
    runs = [replace(plain, compile=how) for how in ("blocks", "network")]
    if cores > 1:
        other = replace(plain, threads=cores if small else 1)
        runs += [other, *(replace(other, compile=run.compile) for run in runs)]
    return _as_asked(config, plain, runs)


def _as_asked(config, plain: Variant, runs: list[Variant]) -> tuple[Variant, list[Variant]]:
    """The same, but with what flags of the job say: the job obeys them, whatever a plan has."""
    if config.compile != "auto":
        plain = replace(plain, compile=config.compile)
        runs = [run for run in runs if run.compile == config.compile and run != plain]
    if isinstance(config, SampleConfig) and config.cuda_graphs is False:
        plain, runs = replace(plain, cuda_graphs=False), [replace(run, cuda_graphs=False) for run in runs]
    return plain, runs


def _digest(config) -> str:
    """Of the options that measurements may depend on."""
    return hashlib.sha256(repr(replace(config, outdir="")).encode()).hexdigest()


def _read_part(part: Path, config) -> dict:
    """What an interrupted tuning of the same options has measured."""
    try:
        found = json.loads(part.read_bytes())
        if found["options"] != _digest(config):
            return {}
        measured = dict(found["measured"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: measuring anew", part)
        return {}
    log.info("going on with %d measurements of before", len(measured))
    return measured
