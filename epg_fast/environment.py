"""What `epg-fast env` and `epg-fast --version` print: what a bug report needs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys

_PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors", "scikit-learn", "pyarrow", "flash-attn")
_PACKAGES += ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def report() -> str:
    """Versions, processor, GPUs and the state of the compiled extension, one `name: value` per line."""
    lines = {
        "epg_fast": _version("epg_fast"),
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "cores": str(os.cpu_count()),
        **{package: _version(package) for package in _PACKAGES},
        **_devices(),
        "extension": _extension(),
    }
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


def _extension() -> str:
    try:
        from epg_fast.ops.extension import extension_status, gpus_without_code
    except ImportError as error:
        return f"unknown ({error}: pip install torch)"
    available, reason = extension_status()
    return "; ".join([f"available ({reason})", *gpus_without_code()]) if available else f"not available ({reason})"


def _devices() -> dict[str, str]:
    """GPUs, and the plans for the one that would be taken; nothing without torch."""
    try:
        import torch

        from epg_fast.distributed import resolve_device
        from epg_fast.plans import Machine, plans_folder, stored_plans
    except ImportError:
        return {}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    here, plans = Machine.here(resolve_device()), [plan for _, plan in stored_plans()]
    used = [f"{plan.case} ({plan.speedup:.2f}x)" for plan in plans if not here.differences(plan.machine)]
    return {
        "cuda of torch": str(torch.version.cuda),
        "gpu": "; ".join(gpus) or "none visible to torch",
        "plans": "; ".join([f"{len(plans)} in {plans_folder()}, {len(used)} for this device", *used]),
    }
