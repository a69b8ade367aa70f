"""From what a user asks for with `--ops` to what runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from epg_fast.distributed import Ranks
from epg_fast.ops.backends import require_triton
from epg_fast.plans.plan import Case, Machine, Plan, Variant, read_plan, stored_plans
from epg_fast.plans.sites import KINDS, PLAIN, SITES, site_choices, sites_of
from epg_fast.wording import nearest

_BASES = ("auto", *KINDS, "tune")
log = logging.getLogger("epg_fast")


@dataclass(frozen=True)
class Ops:
    """What `--ops` says: where to begin, and the sites that are named."""

    base: str
    """"auto", "tune", one of `KINDS`, or "plan" for that in `path`."""
    path: Path | None = None
    sites: Mapping[str, str] = field(default_factory=dict)


def parse_ops(text: str) -> Ops:
    """`--ops`: auto, tune, plain, triton, cuda or a plan's file, and sites with their backends, separated by commas.

    Sites alone begin from auto. Raises ValueError for anything else.
    """
    if Path(text).expanduser().is_file():
        return Ops("plan", Path(text).expanduser())
    words = [word.strip() for word in text.split(",")]
    sites = dict(word.split("=", 1) for word in words if "=" in word)
    bases = [word for word in words if "=" not in word]
    if len(bases) > 1 or "" in words:
        raise ValueError(
            f"ops {text!r}: want one of {', '.join(_BASES)} or a plan's file, then sites as attention=triton"
        )
    site_choices(sites)  # raises for what does not exist
    base = bases[0] if bases else "auto"
    if base in _BASES:
        return Ops(base, sites=sites)
    if base.endswith(".json") or "/" in base:
        return Ops("plan", Path(base).expanduser(), sites)
    hint = nearest(base, [*_BASES, *SITES])
    raise ValueError(f"ops {base!r}{hint}: want {', '.join(_BASES)}, a plan's file, or sites as attention=triton")


@dataclass(frozen=True)
class Chosen(Variant):
    """What runs: `ops` has every site. None where the job's own rule holds."""

    compile: str | None = None
    cuda_graphs: bool | None = None
    plan: str | None = None
    """Name of the plan; None without one."""
    why: str = ""
    """One line for the log."""

    @classmethod
    def of(cls, variant: Variant, plan: str, why: str = "") -> Chosen:
        """The variant of a plan."""
        return cls(**vars(variant) | {"ops": site_choices(variant.ops)}, plan=plan, why=why)

    def record(self) -> dict:
        """What settings and checkpoints keep: all but `why`, and of the sites those that are not plain."""
        ops = {site: backend for site, backend in self.ops.items() if backend != "plain"}
        return {name: value for name, value in vars(self).items() if name != "why"} | {"ops": ops}

    @classmethod
    def from_record(cls, record: Mapping, why: str = "") -> Chosen:
        """What `record` returned. Raises ValueError for a site or backend that this version lacks."""
        fields = {name: value for name, value in record.items() if name != "machine"}
        return cls(**fields | {"ops": site_choices(record["ops"])}, why=why)


def choose(ops: str | Mapping[str, str], case: Case, device: torch.device, kept: Mapping | None = None) -> Chosen:
    """What runs for `ops`, as `parse_ops` takes it or as backends by site, the others plain, on this device.

    auto takes `kept`, the record of the run that goes on, then a plan of the user's for this device, versions, job and
    shapes, then one that the package ships, then plain code; `why` says which. "tune" is as auto without `kept`:
    nothing is measured here.
    Raises ValueError for a plan's file that is damaged or made for something else, and for Triton where it cannot run.
    """
    if isinstance(ops, Mapping):
        given = site_choices(ops)  # raises for what does not exist
        asked = Ops("plain", sites={site: backend for site, backend in given.items() if backend != "plain"})
    else:
        asked = parse_ops(ops)
    if asked.base in KINDS:
        where = "" if asked.base == "plain" else " wherever there is one"
        chosen = Chosen(site_choices(asked.base), why=f"ops: {asked.base}{where}, as asked")
    elif asked.base == "plan":
        chosen = _of_file(asked.path, case, Machine.here(device))
    else:
        chosen = _automatic(case, device, kept if asked.base == "auto" else None)
    if asked.sites:
        named = ", ".join(f"{site}={backend}" for site, backend in asked.sites.items())
        merged = {site: backend for name, backend in asked.sites.items() for site in sites_of(name)}
        chosen = dataclasses.replace(chosen, ops={**chosen.ops, **merged}, why=f"{chosen.why}; {named} as asked")
    if {"triton", "norm", "prologue", "scaled_mm", "cuda"} & {*chosen.ops.values()}:
        require_triton("ops", torch.empty(1, device=device))
    _require_options(chosen)
    return chosen


def _require_options(chosen: Chosen) -> None:
    """Raise ValueError for an option that this torch's Inductor lacks: of a plan that was edited."""
    if not chosen.options:
        return
    from torch._inductor import config

    for name in chosen.options.keys() - config.get_config_copy().keys():
        raise ValueError(
            f"plan {chosen.plan}: got option {name!r}, wanted one that Inductor has in torch {torch.__version__}; "
            "remove it, or run `epg-fast tune` again"
        )


def choose_together(ops: str, case: Case, ranks: Ranks, kept: Mapping | None = None) -> Chosen:
    """What the main rank chooses, on every rank.

    Raises ValueError on all of them, as `choose` does, and for a plan that ranks on unlike machines would share.
    """
    chosen = ranks.decide(lambda: choose(ops, case, ranks.device, kept))
    machines = ranks.gather(Machine.here(ranks.device))
    for rank, machine in enumerate(machines):
        if chosen.plan and (differences := machine.differences(machines[0])):
            raise ValueError(
                f"ops: rank {rank} is on another machine than rank 0, whose plan it cannot share "
                f"({'; '.join(differences)}); take like machines, or --ops plain"
            )
    return chosen


def _of_file(path: Path, case: Case, here: Machine) -> Chosen:
    plan = read_plan(path)
    if not plan.case.like(case):
        raise ValueError(f"plan {path}: made for {plan.case}; this is {case}; {_command(case)}")
    if differences := here.differences(plan.machine):
        raise ValueError(f"plan {path}: made elsewhere ({'; '.join(differences)}); {_command(case)}")
    return _chosen(plan, str(path), case)


def _automatic(case: Case, device: torch.device, kept: Mapping | None) -> Chosen:
    here = Machine.here(device)
    if kept is not None:
        name, differences = kept.get("plan") or "plain code", here.differences(Machine(**kept["machine"]))
        if not differences:
            return Chosen.from_record(
                kept, f"ops: {name}, which this run has used so far; --ops tune or a file changes it"
            )
        log.warning("this run has used %s on another machine (%s); choosing anew", name, "; ".join(differences))
    found = [(here.differences(plan.machine), where, plan) for where, plan in stored_plans() if plan.case.like(case)]
    why = "no plan for this job on this device"
    if found:
        differences, where, plan = min(found, key=lambda entry: (bool(entry[0]), entry[2].case.batch != case.batch))
        if not differences:
            return _chosen(plan, where, case)
        why = f"{where} is not used ({'; '.join(differences)})"
    return Chosen(PLAIN, why=f"ops: plain code, {why}; {_command(case)}")


def _chosen(plan: Plan, where: str, case: Case) -> Chosen:
    batch = "" if plan.case.batch == case.batch else f", measured with {plan.case.batch} images a call"
    faster = f"{plan.speedup:.2f}x plain code" if plan.speedup > 1 else "which found nothing faster than plain code"
    why = f"ops: plan {where} of {plan.made}, {faster}{batch}"
    return Chosen.of(plan.variant, plan.name, why)


def _command(case: Case) -> str:
    return f"`epg-fast tune --job {case.job}` measures what is faster, as does --ops tune"
