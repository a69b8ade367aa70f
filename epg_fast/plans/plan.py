"""A plan, what it is for and where it was made, and the folders that hold plans."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch

from epg_fast.plans.sites import SITES

JOBS = ("sample", "pretrain", "finetune-diffusion", "finetune-consistency")
COMPILE = ("off", "blocks", "network")
_FORMAT = "epg_fast plan 1"
_SHIPPED = resources.files("epg_fast") / "plans" / "shipped"
log = logging.getLogger("epg_fast")


@dataclass(frozen=True)
class Case:
    """What a plan is for. A plan holds for no other job, network or precision."""

    job: str
    """One of `JOBS`."""
    network: Mapping[str, int]
    """The widths, depths and sizes that shapes follow from; see `architecture`."""
    precision: str
    """As the job's option says; training with `--fp8` is "fp8"."""
    batch: int
    """Images per call of the network, the unconditional ones of guidance included."""

    @property
    def batch_class(self) -> int:
        """The power of two up to which numbers of images share a plan."""
        return 1 << max(self.batch - 1, 0).bit_length()

    def like(self, other: Case) -> bool:
        """Whether a plan of the other serves."""
        same = (self.job, self.precision, dict(self.network)) == (other.job, other.precision, dict(other.network))
        return same and self.batch_class == other.batch_class

    def __str__(self) -> str:
        n = self.network
        decoder = f", decoder {n['decoder_depth']}x{n['decoder_embed_dim']}" if n.get("decoder_depth") else ""
        shape = f"{n['image_size']} px, encoder {n['depth']}x{n['embed_dim']}{decoder}"
        return f"{self.job} in {self.precision}, {self.batch} images a call, {shape}"


def architecture(network: torch.nn.Module) -> dict[str, int]:
    """The numbers that the shapes of an EPGViT or RCMViT follow from."""
    found = {
        "image_size": network.image_size,
        "patch_size": network.patch_size,
        "channels": network.in_chans,
        "tokens": network.tokens,
        "embed_dim": network.embed_dim,
        "depth": len(network.blocks),
    }
    if len(network.blocks):
        found |= {
            "num_heads": network.blocks[0].attn.num_heads,
            "hidden_dim": network.blocks[0].mlp.fc1.weight.shape[0],
        }
    decoder = getattr(network, "decoder_blocks", None)
    if decoder is not None:
        found |= {"decoder_depth": len(decoder), "decoder_embed_dim": network.out.weight.shape[1]}
        if len(decoder):
            found["decoder_num_heads"] = decoder[0].attn.num_heads
            found["decoder_hidden_dim"] = decoder[0].mlp.fc1.weight.shape[0]
    return found


@dataclass(frozen=True)
class Machine:
    """Where a plan was measured. What it says of speed is worth nothing on another."""

    device: str
    capability: str
    torch: str
    triton: str
    epg_fast: str
    extension: str
    """What the compiled extension has code for."""
    driver: str = field(default="", compare=False)

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """That of this process and `device`."""
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            driver = str(getattr(torch._C, "_cuda_getDriverVersion", str)())
        else:
            name = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
            capability, driver = torch.backends.cpu.get_cpu_capability(), ""
        versions = {package: _version(package) for package in ("triton", "epg_fast")}
        return cls(name, capability, str(torch.__version__), **versions, extension=_extension(), driver=driver)

    def differences(self, other: Machine) -> list[str]:
        """What keeps a plan of the other from being used: "torch 2.13.0 there, 2.14.1 here"."""
        names = [f.name for f in dataclasses.fields(self) if f.compare]
        pairs = [(name, getattr(other, name), getattr(self, name)) for name in names]
        return [
            f"{name} {theirs or 'none'} there, {ours or 'none'} here" for name, theirs, ours in pairs if theirs != ours
        ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _extension() -> str:
    from epg_fast.ops.extension import extension_code

    return extension_code()


@dataclass(frozen=True)
class Plan:
    """Backends by site, and how the whole is run, with the measurements that led to them."""

    case: Case
    machine: Machine
    ops: Mapping[str, str]
    """Site -> backend; the sites that are not named are plain."""
    compile: str
    """"off", "blocks" or "network"."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Inductor's, beside the package's own."""
    cuda_graphs: bool = False
    threads: int | None = None
    """On a CPU; None: as many as PyTorch takes."""
    speedup: float = 1.0
    """Of the whole job, over what runs without a plan."""
    made: str = ""
    """Date."""
    evidence: Mapping[str, object] = field(default_factory=dict)
    """The table of all candidates and what may have disturbed the clock."""

    @property
    def name(self) -> str:
        """Of its file."""
        machine = dataclasses.replace(self.machine, driver="")
        c, digest = self.case, hashlib.sha256(repr((dict(self.case.network), machine)).encode()).hexdigest()[:8]
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.machine.device).strip("-")[:60]
        return f"{c.job}_{c.precision}_b{c.batch}_{c.network['image_size']}px_{device}_{digest}.json"

    def text(self) -> str:
        """The plan as JSON."""
        return json.dumps({"format": _FORMAT} | dataclasses.asdict(self), indent=2, default=dict) + "\n"


def read_plan(path: Path, content: bytes | None = None) -> Plan:
    """The plan in a file. Raises ValueError, in one line, for a file that is none."""
    try:
        found = json.loads(path.read_bytes() if content is None else content)
    except OSError as error:
        raise ValueError(f"plan {path}: {error.strerror}; want a file that `epg-fast tune` made") from None
    except ValueError:
        raise ValueError(f"plan {path}: damaged, or not JSON; delete it and run `epg-fast tune` again") from None
    if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
        raise ValueError(f"plan {path}: not a plan of this version of epg_fast; run `epg-fast tune` again")
    try:
        case, machine = Case(**found.pop("case")), Machine(**found.pop("machine"))
        plan = Plan(case, machine, **found)
        _check(plan)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        what = f"{error} is missing or unknown" if isinstance(error, KeyError) else error
        raise ValueError(f"plan {path}: damaged ({what}); delete it and run `epg-fast tune` again") from None
    return plan


def _check(plan: Plan) -> None:
    for site, backend in plan.ops.items():
        if backend not in SITES[site]:
            raise ValueError(f"{site} has no backend {backend!r}")
    if plan.compile not in COMPILE or plan.case.job not in JOBS:
        raise ValueError(f"compile {plan.compile!r}, job {plan.case.job!r}")
    kinds = {"batch": int, "network": dict, "device": str, "options": dict, "cuda_graphs": bool, "speedup": int | float}
    for name, kind in kinds.items():
        value = {**vars(plan), **vars(plan.machine), **vars(plan.case)}[name]
        if not isinstance(value, kind):
            raise ValueError(f"{name} {value!r}")
    if plan.threads is not None and not (isinstance(plan.threads, int) and plan.threads > 0):
        raise ValueError(f"threads {plan.threads!r}")
    if not isinstance(plan.case.network["image_size"], int):
        raise ValueError(f"image_size {plan.case.network['image_size']!r}")
    str(plan.case)  # raises for a network without its depth and width


def plans_folder() -> Path:
    """Where the user's plans are: EPG_FAST_PLANS, or epg_fast/plans in the user's cache folder."""
    if chosen := os.environ.get("EPG_FAST_PLANS"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epg_fast" / "plans"


def stored_plans() -> Iterator[tuple[str, Plan]]:
    """(where it is, plan) of the user's plans, the newest first, then of those the package ships.

    A file that cannot be read as one is left out, which one line says.
    """
    files: list[tuple[str, bytes]] = []
    try:
        own = list(plans_folder().iterdir()) if os.path.lexists(plans_folder()) else []  # glob is silent about a file
        own = [path for path in own if path.suffix == ".json" and path.is_file()]
        own.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in own:
            try:
                files.append((str(path), path.read_bytes()))
            except OSError as error:
                log.warning("plan %s is not read: %s", path, error.strerror)
    except OSError as error:
        log.warning("plans in %s are not read: %s", plans_folder(), error)
    if _SHIPPED.is_dir():
        shipped = sorted(_SHIPPED.iterdir(), key=lambda file: file.name)
        files += [(f"the package's {file.name}", file.read_bytes()) for file in shipped if file.name.endswith(".json")]
    for where, content in files:
        try:
            yield where, read_plan(Path(where), content)
        except ValueError as error:
            log.warning("%s", error)
