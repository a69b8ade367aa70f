"""The script for a GPU machine, with a stand-in for Python that notes what it is called with."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.sh"
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c import "*) for missing in $MISSING; do [ "$2" = "import $missing" ] && exit 1; done; exit 0 ;;
esac
echo "$*" >>"$CALLS"
echo "did $*"
for failing in $FAILING; do case " $* " in *" $failing "*) exit 7 ;; esac; done
for cut in $CUT; do case " $* " in *" $cut "*) exit 3 ;; esac; done
exit 0
"""


@pytest.fixture
def check(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*parts, folder=tmp_path / "out", **how):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "MISSING": "", "FAILING": "", "CUT": ""}
        done = subprocess.run(
            ["bash", str(SCRIPT), str(folder), *parts],
            env=environment | how,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_everything_runs_the_most_valuable_first_and_is_in_the_archive(check, tmp_path):
    code, out, calls = check()
    assert code == 0 and "failed" not in out
    order = [line.removeprefix("== ") for line in out.splitlines() if line.startswith("== ")]
    assert order[:6] == ["build", "env", "sampling", "tests", "training", "tune_heun"]
    assert order.index("tune_fp8") < order.index("heun") < order.index("diffusion")
    assert sum("epg_fast tune --minutes" in call for call in calls) == 6
    assert any("tests/test_gpu_sampling.py" in call for call in calls) and order[-1] == "resources"
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"out/logs/heun.log", "out/logs/resources.log", "out/complete"} <= set(archive.getnames())


def test_complete_parts_are_not_repeated_and_one_cut_short_is_no_failure(check):
    assert check("heun", CUT="heun")[0] == 0
    code, out, _ = check("env", "heun", "data", FAILING="data", CUT="heun")
    assert code == 1 and "data failed with exit code 7" in out and "heun was cut short" in out
    code, out, calls = check("env", "heun", "data")
    assert code == 0 and "env: complete already" in out
    assert [call.split("--parts ")[1].split()[0] for call in calls] == ["heun", "data"]


def test_what_is_missing_is_left_out_and_said(check):
    code, out, calls = check(MISSING="pytest")
    assert code == 0 and "tests: left out, pytest is not installed" in out
    assert not any("-m pytest" in call for call in calls) and any("--parts heun" in call for call in calls)
    _, _, calls = check("sampling", MISSING="xdist")
    assert calls and "-n 8" not in calls[0]


def test_a_part_that_is_none_is_refused_before_anything_runs(check, tmp_path):
    code, out, calls = check("heun", "huen")
    assert code == 2 and "part huen: wanted some of: build env" in out and not calls
