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
from pathlib import Path

import torch

from epg_fast.ops.extension import extension_code
from epg_fast.plans.sites import SITES

JOBS = ("sample", "pretrain", "finetune-diffusion", "finetune-consistency")
COMPILE = ("off", "blocks", "network")
_FORMAT = "epg_fast plan 1"
_SHIPPED = Path(__file__).parent / "shipped"
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
            "num_heads": _told(network.blocks[0].attn, "num_heads"),
            "hidden_dim": _told(network.blocks[0].mlp, "out_features"),
        }
    decoder = getattr(network, "decoder_blocks", None)
    if decoder is not None:
        found |= {"decoder_depth": len(decoder), "decoder_embed_dim": _told(network.out, "in_features")}
        if len(decoder):
            found["decoder_num_heads"] = _told(decoder[0].attn, "num_heads")
            found["decoder_hidden_dim"] = _told(decoder[0].mlp, "out_features")
    return found


def _told(module: torch.nn.Module, name: str) -> int:
    """An attribute of the first module that has it: an adapter may stand in the place of a layer, and hold it."""
    return next((getattr(part, name) for part in module.modules() if hasattr(part, name)), 0)


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
            name = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
            capability, driver = torch.backends.cpu.get_cpu_capability(), ""
        versions = {package: package_version(package) for package in ("triton", "epg_fast")}
        return cls(name, capability, str(torch.__version__), **versions, extension=extension_code(), driver=driver)

    def differences(self, other: Machine) -> list[str]:
        """What keeps a plan of the other from being used: "torch 2.13.0 there, 2.14.1 here"."""
        pairs = [(f.name, getattr(other, f.name), getattr(self, f.name)) for f in dataclasses.fields(self) if f.compare]
        return [
            f"{name} {there or 'none'} there, {here or 'none'} here" for name, there, here in pairs if there != here
        ]


def package_version(package: str) -> str:
    """Of an installed package; empty for one that is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def processor() -> str:
    """The CPU's name, as the system has it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


@dataclass(frozen=True)
class Variant:
    """A way to compute a job: backends of the sites that are not plain, and how the whole is run."""

    ops: Mapping[str, str] = field(default_factory=dict)
    """Site -> backend."""
    compile: str | None = "off"
    """"off", "blocks" or "network"."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Inductor's, beside the package's own."""
    cuda_graphs: bool | None = False
    threads: int | None = None
    """On a CPU; None: as many as PyTorch takes."""

    def __str__(self) -> str:
        ops = ", ".join(f"{site}={backend}" for site, backend in self.ops.items()) or "plain"
        run = [f"compile {self.compile}", *(["CUDA graphs"] if self.cuda_graphs else []), *self.options]
        run += [f"{self.threads} threads"] if self.threads else []
        return f"{ops}; {', '.join(run)}"


@dataclass(frozen=True)
class Plan:
    """The fastest variant of a job on a machine, with the measurements that led to it."""

    case: Case
    machine: Machine
    variant: Variant = Variant()
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


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises ValueError, in one line, for a file that is none."""
    again = "delete it and run `epg-fast tune` again"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"plan {path}: {error.strerror}; want a file that `epg-fast tune` made") from None
    except ValueError:
        raise ValueError(f"plan {path}: damaged, or not JSON; {again}") from None
    if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
        raise ValueError(f"plan {path}: not a plan of this version of epg_fast; {again}")
    try:
        parts = {"case": Case, "machine": Machine, "variant": Variant}
        plan = Plan(**found | {name: part(**found[name]) for name, part in parts.items()})
        _check(plan)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        what = f"{error} is missing or unknown" if isinstance(error, KeyError) else error
        raise ValueError(f"plan {path}: damaged ({what}); {again}") from None
    return plan


def _check(plan: Plan) -> None:
    """Raise for a value that no plan has."""
    case, variant = plan.case, plan.variant
    for site, backend in variant.ops.items():
        if backend not in SITES[site]:
            raise ValueError(f"{site} has no backend {backend!r}")
    for name, value, right in (
        ("job", case.job, case.job in JOBS),
        ("image_size", case.network["image_size"], isinstance(case.network["image_size"], int)),
        ("batch", case.batch, isinstance(case.batch, int)),
        ("device", plan.machine.device, isinstance(plan.machine.device, str)),
        ("compile", variant.compile, variant.compile in COMPILE),
        ("options", variant.options, isinstance(variant.options, dict)),
        ("cuda_graphs", variant.cuda_graphs, isinstance(variant.cuda_graphs, bool)),
        ("threads", variant.threads, variant.threads is None or int(variant.threads) == variant.threads > 0),
        ("speedup", plan.speedup, isinstance(plan.speedup, int | float)),
    ):
        if not right:
            raise ValueError(f"{name} {value!r}")
    str(case)  # raises for a network without its depth and width


def plans_folder() -> Path:
    """Where the user's plans are: EPG_FAST_PLANS, or epg_fast/plans in the user's cache folder."""
    if chosen := os.environ.get("EPG_FAST_PLANS"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epg_fast" / "plans"


def stored_plans() -> Iterator[tuple[str, Plan]]:
    """(where it is, plan) of the user's plans, the newest first, then of those the package ships.

    A file that cannot be read as one is left out, which one line says.
    """
    folder, own = plans_folder(), []
    try:
        if os.path.lexists(folder):
            own = [path for path in folder.iterdir() if path.suffix == ".json" and path.is_file()]
            own.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError as error:
        log.warning("plans in %s are not read: %s", folder, error)
    shipped = sorted(_SHIPPED.glob("*.json"))
    for path in (*own, *shipped):
        try:
            yield f"the package's {path.name}" if path in shipped else str(path), read_plan(path)
        except ValueError as error:
            log.warning("%s", error)
