"""The extension's CUDA kernels on a CPU: tests/emulation/README.md says how, and what that shows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels/csrc"
OPERATIONS = sorted(f.stem for f in SOURCES.glob("*.cu") if f.with_suffix(".cpp").is_file())


def emulated_sources(folder: Path) -> list[Path]:
    """Copies of the CUDA sources as C++ that registers for the CPU, and of what they include."""
    for header in [*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh"), *(ROOT / "tests/emulation").glob("*.*h")]:
        shutil.copy(header, folder)
    shutil.copy(SOURCES / "register.cpp", folder)
    for name in OPERATIONS:
        text, found = re.subn(r"IMPL\(epg_fast, CUDA,", "IMPL(epg_fast, CPU,", (SOURCES / f"{name}.cu").read_text())
        assert found == 1, f"{name}.cu does not register for CUDA once"
        (folder / f"{name}.cpp").write_text(text)
    return sorted(folder.glob("*.cpp"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested where there is a GPU")
def test_the_cuda_kernels_pass_the_operations_tests_thread_by_thread(tmp_path):
    assert {"euler_step", "fused_adamw_ema", "global_norm"} <= set(OPERATIONS)
    sources, library, package = emulated_sources(tmp_path), tmp_path / "emulated.so", Path(torch.__file__).parent
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
    flags += [f"-I{tmp_path}", "-isystem", str(package / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ['-DEPG_COMPILER="emulation"', '-DEPG_NVCC=""', '-DEPG_CUDA_ARCHITECTURES=""']
    link = [f"-L{package / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-o", str(library)]
    built = subprocess.run(["g++", *flags, *map(str, sources), *link], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr

    tests = ["tests/ops", "-k", " or ".join([*OPERATIONS, "heun_step"]), "-m", "not slow and not kernels"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"EPG_EXTENSION": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 150, done.stdout
