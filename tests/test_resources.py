"""Kernels compiled ahead of time: what of the GPU they take, and how they are named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.resources import _readable, _template_arguments
from epg_fast.ops.extension import extension_has_gemms, extension_status

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ["linear_gelu_saving", "linear_dgelu", "linear_gate_residual_bf16_narrow", "linear_fp8", "skip_linear"]
NATIVE += ["linear_gate_residual_bf16_wide_saving"]


def python(*arguments: str) -> str:
    """What a process prints in which Triton compiles."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_triton_kernel_is_among_those_that_are_compiled():
    pytest.importorskip("triton")
    from bench.launches import CALLS

    assert set(CALLS) == {path.stem for path in (ROOT / "kernels/epg_kernels").glob("[!_]*.py")}


@pytest.mark.kernels
def test_no_kernel_spills_on_sm_90():
    """By the table that `make kernels` has just made, which stops at a spill on sm_90, or by a new one."""
    made = os.environ.get("EPG_RESOURCE_TABLE")
    table = Path(made).resolve().read_text() if made else python("-m", "bench.resources", "--arch", "90")
    assert "FAIL" not in table and " sm_90 " in table and "_norm_modulate_bwd_kernel" in table
    if extension_status()[0] and extension_has_gemms():
        assert all(f"\n{name}_kernel " in table for name in NATIVE)


_DEPENDENT = """
from bench.launches import recorded

print(next(found for found in recorded(90, ["norm_linear"]) if "of 1 plain norm" in found.note).compile().asm["ptx"])
"""


@pytest.mark.kernels
def test_a_kernel_that_starts_early_waits_before_it_touches_memory():
    ptx = python("-c", _DEPENDENT)
    waits = ptx.index("griddepcontrol.wait")
    touches = [ptx.find(word) for word in ("ld.global", "st.global", "cp.async", "st.shared")]
    assert all(waits < place for place in touches if place >= 0) and "cp.async.bulk" in ptx[waits:]
    assert ptx.count("griddepcontrol.launch_dependents") == 1


@pytest.mark.kernels
def test_triton_compiles_without_a_warning():
    python("-W", "error::UserWarning", "-m", "bench.resources", "--arch", "90", "--op", "timestep_embedding")


def test_kernels_have_readable_names():
    assert _template_arguments("_ZN8epg_fast11some_kernelILi3EEEvNS_5TableIXplLi5ET_EEE") == "<3>"
    assert _template_arguments("_ZN8epg_fast11some_kernelEPfl") == "-"

    plain = "_ZN8epg_fast12_GLOBAL__N_117euler_step_kernelEPfPKfS3_NS_9EulerStepEll"
    cutlass = "_ZN7cutlass13device_kernelIN8epg_fast23linear_gelu_bf16_kernelEEEvNT_6ParamsE"
    literal = "_ZN8epg_fast11some_kernelIfLi128ELb1EEEvPT_S1_"
    assert [_readable(name) for name in (plain, cutlass, literal)] == [
        "euler_step_kernel",
        "linear_gelu_bf16_kernel",
        "some_kernel",
    ]
    assert _readable("unknown") == "unknown"
