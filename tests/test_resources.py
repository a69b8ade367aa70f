import os
import subprocess
import sys
from pathlib import Path

import pytest

from epg_fast.ops.extension import extension_has_gemms, extension_status

ROOT = Path(__file__).resolve().parents[1]


def resource_table():
    """The table that `make kernels` has just made, which stops at a spill on sm_90, or a new one."""
    if made := os.environ.get("EPG_RESOURCE_TABLE"):
        return Path(made).resolve().read_text()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.resources", "--arch", "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_triton_kernel_is_among_those_that_are_compiled():
    pytest.importorskip("triton")
    from bench.launches import CALLS

    assert set(CALLS) == {path.stem for path in (ROOT / "kernels/epg_kernels").glob("[!_]*.py")}


@pytest.mark.kernels
def test_no_kernel_spills_on_sm_90():
    pytest.importorskip("triton")
    table = resource_table()
    assert "FAIL" not in table and " sm_90 " in table
    assert "_norm_modulate_bwd_kernel" in table
    if extension_status()[0] and extension_has_gemms():
        for name in (
            "linear_gelu_saving",
            "linear_dgelu",
            "linear_gate_residual_bf16_narrow",
            "linear_gate_residual_bf16_wide_saving",
            "linear_fp8",
            "skip_linear",
        ):
            assert f"\n{name}_kernel " in table


_DEPENDENT = """
from bench.launches import recorded

print(next(found for found in recorded(90, ["norm_linear"]) if "of 1 plain norm" in found.note).compile().asm["ptx"])
"""


@pytest.mark.kernels
def test_a_kernel_that_starts_early_waits_before_it_touches_memory():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _DEPENDENT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    waits = done.stdout.index("griddepcontrol.wait")
    touches = [done.stdout.find(word) for word in ("ld.global", "st.global", "cp.async", "st.shared")]
    assert all(waits < place for place in touches if place >= 0) and "cp.async.bulk" in done.stdout[waits:]
    assert done.stdout.count("griddepcontrol.launch_dependents") == 1


@pytest.mark.kernels
def test_triton_compiles_without_a_warning():
    pytest.importorskip("triton")
    environment = os.environ.copy()
    for name in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "bench.resources", "--arch", "90"]
    command += ["--op", "timestep_embedding"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_have_readable_names():
    from bench.resources import _readable, _template_arguments

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
