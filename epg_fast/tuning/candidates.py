"""Which backends a site has on a device, and which of them cannot run there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from epg_fast.ops.attention import PACKAGES, installed
from epg_fast.ops.extension import extension_code, extension_status
from epg_fast.plans import SITES, Case

# Parts of a job that are timed for a site's sake: blocks of the encoder, of the decoder.
UNITS = {"encoder": (2, 0), "decoder": (2, 2), "ends": (1, 1)}


@dataclass(frozen=True)
class Variant:
    """A way to run a job: backends of the sites that are not plain, and how the whole is run."""

    ops: dict[str, str] = field(default_factory=dict)
    compile: str = "off"
    options: dict[str, object] = field(default_factory=dict)
    cuda_graphs: bool = False
    threads: int | None = None

    def __str__(self) -> str:
        ops = ", ".join(f"{site}={backend}" for site, backend in self.ops.items()) or "plain"
        run = [f"compile {self.compile}", *(["CUDA graphs"] if self.cuda_graphs else []), *self.options]
        run += [f"{self.threads} threads"] if self.threads else []
        return f"{ops}; {', '.join(run)}"


def unit_of(site: str) -> str:
    """The unit that a site is timed in."""
    half = site.partition(".")[0]
    if half in ("encoder", "decoder"):
        return half
    return {"optimizer": "optimizer", "fp8": "decoder"}.get(site, "ends")


def sites_of_job(case: Case) -> list[str]:
    """The sites that a job asks, the largest first."""
    order = ["mlp", "attention", "proj", "skip", "norm"]
    halves = ["encoder"] if case.job == "pretrain" else ["decoder", "encoder"]
    sites = [f"{half}.{name}" for half in halves for name in order if f"{half}.{name}" in SITES]
    if case.job == "sample":
        if case.precision == "fp8":  # which asks no others within blocks
            sites = ["fp8", *(site for site in sites if site.endswith(".attention"))]
        return [*sites, "embedding", "condition", "steps"]
    loss = [] if case.job == "pretrain" else ["loss"]
    return [*sites, "embedding", "condition", *loss, "optimizer"]


def obstacle(site: str, backend: str, case: Case, device: torch.device) -> str | None:
    """Why a backend is no candidate here, None if it is one."""
    cuda = device.type == "cuda"
    if backend in ("triton", "norm", "cuda", "cudnn", "efficient") and not cuda:
        return "needs a CUDA device"
    if backend in ("triton", "norm") and not installed("triton"):
        return "Triton is not installed"
    if backend in PACKAGES and not installed(PACKAGES[backend][0]):
        return f"{PACKAGES[backend][0]} is not installed"
    if (backend in PACKAGES or (backend == "flash" and cuda)) and (not cuda or case.precision in ("fp32", "tf32")):
        return "takes 16 bits on a CUDA device"
    if backend == "cuda" and "CUTLASS" not in extension_code():
        return "the extension is built without CUTLASS"
    if backend == "cuda" and case.precision not in ("bf16", "fp8"):
        return "takes bfloat16"
    if backend in ("fused", "extension") and (not extension_status()[0] or (cuda and extension_code() == "cpu")):
        return "the extension is not built for this device"
    if backend == "apex" and not installed("amp_C"):
        return "NVIDIA's apex is not installed"
    if case.precision == "fp8" and site.partition(".")[2] in ("norm", "proj", "mlp", "skip"):
        return "reads weights past FP8's linears"
    return None
