"""What a job could run with: backends of its sites, those that cannot run here included, and ways to run the whole."""

from __future__ import annotations

from dataclasses import replace

import torch

from epg_fast.config import SampleConfig
from epg_fast.ops.attention import PACKAGES, installed
from epg_fast.ops.extension import extension_code, extension_status
from epg_fast.plans import SITES, Case, Variant
from epg_fast.tuning.job import Job

# Parts of a job that are timed for a site's sake: blocks of the encoder, of the decoder.
UNITS = {"encoder": (2, 0), "decoder": (2, 2), "ends": (1, 1)}


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
    if backend == "prologue" and case.job != "sample":
        return "has no gradient"
    if backend in ("triton", "norm", "prologue", "cuda", "cudnn", "efficient") and not cuda:
        return "needs a CUDA device"
    if backend in ("triton", "norm", "prologue") and not installed("triton"):
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
    if case.precision == "fp8" and site.partition(".")[2] in ("norm", "proj", "mlp", "skip"):
        return "reads weights past FP8's linears"
    return None


def site_candidates(job: Job, plain: Variant) -> list[tuple[str, str, str | None]]:
    """(site, backend, why it cannot run here or None) of all that are not `plain`'s, in the order to try them in."""
    return [
        (site, backend, obstacle(site, backend, job.case, job.device))
        for site in sites_of_job(job.case)
        for backend in SITES[site]
        if backend not in (plain.ops.get(site, "plain"), "math") and _is_asked(site, job)
    ]


def _is_asked(site: str, job: Job) -> bool:
    """Whether the network has the half that a site belongs to, and no flag has chosen for the site."""
    if site == "optimizer" and job.config.optimizer.backend != "auto":
        return False
    return not site.startswith("decoder.") or bool(job.case.network.get("decoder_depth"))


def ways_to_run(job: Job) -> tuple[Variant, list[Variant]]:
    """(what runs without a plan, other ways to run the whole job); what flags say is the same in all."""
    config, trains = job.config, job.stage is not None
    if job.device.type == "cuda":
        plain = Variant(compile="blocks", cuda_graphs=not trains)
        network = replace(plain, compile="network")
        runs = [network]
        if trains and config.gradient_accumulation == 1 and config.parallelism == "ddp":
            runs.append(replace(network, cuda_graphs=True))
        runs.append(replace(network, options={"coordinate_descent_tuning": True, "epilogue_fusion": False}))
    else:
        cores = torch.get_num_threads()
        # without a plan a CPU takes the fused update
        fused = trains and config.optimizer.backend == "auto" and extension_status()[0]
        plain = Variant({"optimizer": "fused"} if fused else {}, threads=1 if job.small else cores)
        runs = [replace(plain, compile=how) for how in ("blocks", "network")]
        if cores > 1:
            other = replace(plain, threads=cores if job.small else 1)
            runs += [other, *(replace(other, compile=run.compile) for run in runs)]
    if config.compile != "auto":
        plain = replace(plain, compile=config.compile)
        runs = [run for run in runs if run.compile == config.compile and run != plain]
    if isinstance(config, SampleConfig) and config.cuda_graphs is False:
        plain, runs = replace(plain, cuda_graphs=False), [replace(run, cuda_graphs=False) for run in runs]
    return plain, runs
