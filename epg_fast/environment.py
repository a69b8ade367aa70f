"""What `epg-fast env` and `epg-fast --version` print: what a bug report needs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys


def report() -> str:
    """Versions, processor, GPUs and the state of the compiled extension, one `name: value` per line."""
    lines = {
        "epg_fast": _version("epg_fast"),
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "cores": str(os.cpu_count()),
    }
    for package in (
        "torch",
        "triton",
        "numpy",
        "pillow",
        "safetensors",
        "scikit-learn",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "pyarrow",
        "flash-attn",
    ):
        lines[package] = _version(package)
    lines |= _devices() | {"extension": _extension(), "plans": _plans()}
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in lines.items())


def version() -> str:
    """Versions of the package and of torch, and whether the compiled extension is there, in one line."""
    return f"epg-fast {_version('epg_fast')}, torch {_version('torch')}, extension {_extension()}"


def versions(device) -> dict[str, str]:
    """What numbers may depend on beside settings, for JSON: versions, the device (torch.device), its driver."""
    from epg_fast.plans import Machine

    found = dataclasses.asdict(Machine.here(device))
    return found | {"numpy": _version("numpy"), "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {"gpu": "unknown (torch is not installed: pip install torch)"}
    if not torch.cuda.is_available():
        return {"cuda of torch": str(torch.version.cuda), "gpu": "none visible to torch"}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda of torch": str(torch.version.cuda), "gpu": "; ".join(names)}


def _extension() -> str:
    try:
        from epg_fast.ops.extension import extension_status, gpus_without_code
    except ImportError as error:
        return f"unknown ({error})"
    available, reason = extension_status()
    if not available:
        return f"not available ({reason})"
    return "; ".join([f"available ({reason})", *gpus_without_code()])


def _plans() -> str:
    try:
        from epg_fast.distributed import resolve_device
        from epg_fast.plans import Machine, plans_folder, stored_plans
    except ImportError as error:
        return f"unknown ({error})"
    here = Machine.here(resolve_device())
    plans = [plan for _, plan in stored_plans()]
    used = [f"{plan.case} ({plan.speedup:.2f}x)" for plan in plans if not here.differences(plan.machine)]
    return "; ".join([f"{len(plans)} in {plans_folder()}, {len(used)} for this device", *used])
