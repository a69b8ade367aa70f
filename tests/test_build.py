"""The extension's build and load: every way to go wrong is answered with one line that says what to do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from epg_fast.ops import euler_step, extension

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("cmake", "c++", "g++", "as", "ld", "ar", "make", "ninja", "uname")

needs_cmake = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and c++"
)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")


@pytest.fixture
def configure(tmp_path):
    """Run CMake up to the point where it would compile; returns (succeeded, its output in one line)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        if path := shutil.which(name):
            (tools / name).symlink_to(path)

    def run(nvcc_codes=None, torch_dir=Path(torch.__file__).parent, **environment):
        if nvcc_codes is not None:  # it lists architectures and cannot compile
            (tools / "nvcc").write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo {nvcc_codes}\n')
            (tools / "nvcc").chmod(0o755)
        definitions = {"EPG_TORCH_DIR": torch_dir, "EPG_OUTPUT_DIR": tmp_path / "out"}
        definitions["EPG_BUILD_CUDA"] = environment.pop("EPG_BUILD_CUDA", "auto")
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")]
        command += [f"-D{name}={value}" for name, value in definitions.items()]
        environment |= {"PATH": str(tools), "HOME": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode == 0, " ".join((done.stdout + done.stderr).split())

    return run


@needs_cmake
def test_without_nvcc_one_line_says_that_the_build_is_for_the_cpu(configure):
    succeeded, output = configure()
    assert succeeded and output.count("epg_fast:") == 1
    assert "epg_fast: nvcc not found, building for the CPU only (EPG_BUILD_CUDA=auto)" in output


@needs_cmake
def test_without_nvcc_a_wanted_cuda_build_is_an_error_with_the_remedy(configure):
    succeeded, output = configure(EPG_BUILD_CUDA="1")
    assert not succeeded
    assert (
        "found no nvcc on PATH, in CUDA_HOME or in CUDA_PATH, wanted one as EPG_BUILD_CUDA=1; install the CUDA"
        in output
    )


@needs_cmake
def test_cuda_can_be_left_out_although_nvcc_is_there(configure):
    succeeded, output = configure(nvcc_codes="sm_80 sm_90 sm_100", EPG_BUILD_CUDA="0")
    assert succeeded and "CUDA" not in output


@needs_cmake
def test_an_old_nvcc_builds_for_the_default_architectures_that_it_knows(configure):
    _, output = configure(nvcc_codes="sm_80 sm_90")
    assert "leaving out CUDA architecture 10.0+PTX, which" in output and "CUDA 12.8 or later does" in output
    assert "building for the CPU and CUDA" in output and "8.0;9.0a)" in output


@needs_cmake
@pytest.mark.parametrize(
    ("codes", "environment", "message"),
    [
        ("sm_80", {"EPG_BUILD_CUDA": "yes"}, "found EPG_BUILD_CUDA='yes', wanted auto, 1 or 0"),
        (
            "sm_80",
            {"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"},
            "found 'Hopper' in TORCH_CUDA_ARCH_LIST, wanted entries such as",
        ),
        ("sm_80", {"TORCH_CUDA_ARCH_LIST": "8.0 10.0"}, "found '10.0' in TORCH_CUDA_ARCH_LIST, which"),
        ("sm_30", {}, "found no CUDA architecture to build for in '8.0;9.0a;10.0+PTX', wanted one that"),
        (None, {"torch_dir": "/nowhere"}, "found no LibTorch stable headers in EPG_TORCH_DIR='/nowhere', wanted"),
    ],
)
def test_a_mistake_is_an_error_with_the_remedy(configure, codes, environment, message):
    succeeded, output = configure(codes, **environment)
    assert not succeeded and message in output


@pytest.fixture(scope="module")
def setup_file():
    spec = importlib.util.spec_from_file_location("epg_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_extension_can_be_left_out(setup_file, monkeypatch):
    monkeypatch.setenv("EPG_BUILD_EXTENSION", "0")
    assert setup_file.missing() == "EPG_BUILD_EXTENSION=0"


@pytest.mark.parametrize("name", ["EPG_BUILD_CUDA", "EPG_BUILD_EXTENSION"])
def test_a_wrong_choice_is_refused_without_cmake_too(setup_file, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(setup_file, "missing", lambda: "found no cmake")
    with pytest.raises(SystemExit, match=f"found {name}='2', wanted auto, 1 or 0"):
        setup_file.main()


@pytest.mark.parametrize("name", ["EPG_BUILD_CUDA", "EPG_BUILD_EXTENSION"])
def test_what_was_asked_for_and_cannot_be_built_is_an_error(setup_file, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(setup_file, "missing", lambda: "found no torch")
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(SystemExit, match=f"{name}=1, but the extension cannot be built: found no torch"):
        setup_file.main()


PIP = """
import os, subprocess, sys
isolated = os.environ | {"PYTHONPATH": sys.argv[1], "PYTHONNOUSERSITE": "1"}
code = "import sys; sys.path.append(sys.argv[1]); import setup; print(setup.package_folder('torch_of_the_user'))"
subprocess.run([sys.executable, "-c", code, sys.argv[2]], env=isolated, check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("there", [True, False])
def test_a_build_that_pip_isolates_finds_the_torch_that_pip_itself_sees(tmp_path, there):
    package = tmp_path / "site" / "torch_of_the_user"
    (tmp_path / "empty").mkdir()
    if there:
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", PIP, str(tmp_path / "empty"), str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(package if there else None)


def test_the_remedy_builds_without_isolation_or_says_why_not():
    assert "EPG_BUILD_EXTENSION=1 pip install --no-build-isolation --no-deps" in extension._REBUILD
    assert "pip install 'setuptools>=77' 'cmake>=3.24'" in extension._REBUILD  # which isolation had brought


def test_the_extension_is_here_if_it_can_be(setup_file):
    """Tests of its operations skip without it: a build that went wrong must not hide behind them."""
    if reason := setup_file.missing():
        pytest.skip(reason)
    available, reason = extension.extension_status()
    assert available, reason


@pytest.mark.parametrize(
    ("max_jobs", "cores", "gigabytes", "wanted"),
    [
        (None, 8, 64, 8),
        (None, 8, 10, 2),
        (None, 8, 1, 1),
        (None, 1, float("inf"), 1),
        ("", 4, 64, 4),
        ("3", 1, 1, 3),
    ],
)
def test_compilers_run_side_by_side_as_cores_and_memory_allow(setup_file, max_jobs, cores, gigabytes, wanted):
    free = min(gigabytes * 1e9, 1e15)
    assert setup_file.job_count(max_jobs, cores, free) == wanted


@pytest.mark.parametrize("max_jobs", ["0", "-1", "two", "²"])
def test_a_wrong_number_of_jobs_is_refused(setup_file, max_jobs):
    with pytest.raises(SystemExit, match=f"found MAX_JOBS='{max_jobs}', wanted a number of at least 1"):
        setup_file.job_count(max_jobs, 4, 1e12)


def compile_library(path, source):
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def use_library(monkeypatch):
    """Make a file the extension's library until the test ends; returns its status."""

    def use(path):
        monkeypatch.setattr(extension, "_LIBRARY", path)
        extension.extension_status.cache_clear()
        return extension.extension_status()

    yield use
    extension.extension_status.cache_clear()


def assert_unavailable(status, *texts):
    available, line = status
    assert not available and "\n" not in line
    for text in texts:
        assert text in line, line
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="euler_step: wants the extension, which is.*backend='plain'"):
        euler_step(x, x, 1.0, 0.5, backend="extension")
    assert torch.equal(euler_step(x, x, 1.0, 0.5), x)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library\n" * 1000], ids=["empty", "short", "text"])
def test_a_file_that_is_no_library_is_not_loaded(use_library, tmp_path, content):
    library = tmp_path / "garbage.so"
    library.write_bytes(content)
    assert_unavailable(use_library(library), "cannot be loaded", "garbage.so", "to rebuild it, run `pip install")


@needs_compiler
def test_a_library_for_another_torch_is_not_loaded(use_library, tmp_path):
    source = 'extern "C" int of_another_abi(); int f() { return of_another_abi(); }'
    library = compile_library(tmp_path / "other.so", source)
    status = use_library(library)
    assert_unavailable(
        status, f"cannot be loaded with torch {torch.__version__}", "of_another_abi", "to rebuild it, run"
    )


@pytest.mark.skipif(not extension.extension_status()[0], reason="needs the extension")
def test_a_library_whose_operators_take_something_else_is_not_used(use_library, monkeypatch):
    monkeypatch.setattr(extension, "INTERFACE", "of tomorrow")
    status = use_library(extension._LIBRARY)
    assert_unavailable(status, "from another version of epg_fast", "not of tomorrow; to rebuild it, run")


def test_every_operator_of_the_sources_is_expected_of_a_library():
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "kernels/csrc/register.cpp").read_text())
    assert defined and sorted(defined) == sorted(extension.OPERATORS)


def python(code, **environment):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


REPORT = (
    "from epg_fast.__main__ import main; main(['env']); from epg_fast.ops import extension_status as s; print(s()[0])"
)


@needs_compiler
@pytest.mark.slow
def test_env_reports_a_library_that_registers_nothing(tmp_path):
    library = compile_library(tmp_path / "empty.so", "int f() { return 1; }")
    out = python(REPORT, EPG_EXTENSION=str(library))
    assert f"not available (from another version of epg_fast: {library} has interface none, not " in out
    assert out.endswith("False\n")


@pytest.mark.slow
def test_env_reports_a_chosen_library_that_is_missing(tmp_path):
    out = python(REPORT, EPG_EXTENSION=str(tmp_path / "absent.so"))
    assert "not available (not found: EPG_EXTENSION is " in out and "absent.so, which is not a file" in out


@pytest.mark.parametrize(
    ("architectures", "capability", "wanted"),
    [
        ("8.0 9.0a 10.0+PTX", (8, 0), True),
        ("8.0 9.0a 10.0+PTX", (8, 9), True),
        ("8.0 9.0a 10.0+PTX", (9, 0), True),
        ("8.0 9.0a 10.0+PTX", (10, 3), True),
        ("8.0 9.0a 10.0+PTX", (12, 0), True),
        ("8.0 9.0a 10.0+PTX", (7, 5), False),
        ("8.0 9.0a", (10, 0), False),
        ("8.0 9.0a", (9, 1), False),
        ("8.6", (8, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_library_runs_on(architectures, capability, wanted):
    assert extension.has_code_for(architectures, capability) == wanted


@pytest.mark.parametrize(
    ("with_cuda", "message"),
    [
        (
            True,
            "on cuda:1, but the extension was built for CUDA architectures 9.0a, not for this GPU's 8.6; run `pip",
        ),
        (False, "on cuda:1, but the extension was built without CUDA; put nvcc on PATH and run `pip install"),
    ],
)
def test_a_gpu_that_the_library_was_not_built_for_is_named_with_the_remedy(monkeypatch, with_cuda, message):
    x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "loaded"))
    monkeypatch.setattr(extension, "extension_has_cuda", lambda: with_cuda)
    monkeypatch.setattr(extension, "_build_info", lambda: {"cuda_architectures": "9.0a"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    extension._lacks_code_for.cache_clear()
    try:
        with pytest.raises(ValueError, match=message):
            extension.require_extension("euler_step", x)
    finally:
        extension._lacks_code_for.cache_clear()
