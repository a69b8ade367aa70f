"""The extension's build and load: every way to go wrong is answered with one line that says what to do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import venv
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
def test_cmake_builds_for_what_nvcc_knows_and_says_in_one_line_what_it_leaves_out(configure):
    succeeded, output = configure()
    assert succeeded and output.count("epg_fast:") == 1
    assert "epg_fast: nvcc not found, building for the CPU only (EPG_BUILD_CUDA=auto)" in output
    succeeded, output = configure(nvcc_codes="sm_80 sm_90 sm_100", EPG_BUILD_CUDA="0")
    assert succeeded and "CUDA" not in output
    _, output = configure(nvcc_codes="sm_80 sm_90")
    assert "leaving out CUDA architecture 10.0+PTX, which" in output and "CUDA 12.8 or later does" in output
    assert "building for the CPU and CUDA" in output and "8.0;9.0a)" in output


MISTAKES = [
    (None, {"EPG_BUILD_CUDA": "1"}, "found no nvcc on PATH, in CUDA_HOME or in CUDA_PATH, wanted one as EPG_"),
    ("sm_80", {"EPG_BUILD_CUDA": "yes"}, "found EPG_BUILD_CUDA='yes', wanted auto, 1 or 0"),
    ("sm_80", {"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "found 'Hopper' in TORCH_CUDA_ARCH_LIST, wanted entries such as"),
    ("sm_80", {"TORCH_CUDA_ARCH_LIST": "8.0 10.0"}, "found '10.0' in TORCH_CUDA_ARCH_LIST, which"),
    ("sm_30", {}, "found no CUDA architecture to build for in '8.0;9.0a;10.0+PTX', wanted one that"),
    (None, {"torch_dir": "/nowhere"}, "found no LibTorch stable headers in EPG_TORCH_DIR='/nowhere', wanted"),
]


@needs_cmake
@pytest.mark.parametrize(("codes", "environment", "message"), MISTAKES)
def test_a_mistake_is_an_error_with_the_remedy(configure, codes, environment, message):
    succeeded, output = configure(codes, **environment)
    assert not succeeded and message in output


@pytest.fixture(scope="module")
def setup_file():
    spec = importlib.util.spec_from_file_location("epg_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wrong_choices_are_refused_without_cmake_too_and_so_is_what_cannot_be_built(setup_file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with monkeypatch.context() as patch:
        patch.setenv("EPG_BUILD_EXTENSION", "0")
        assert setup_file.missing() == "EPG_BUILD_EXTENSION=0"
    monkeypatch.setattr(setup_file, "missing", lambda: "found no cmake")
    for name in ("EPG_BUILD_CUDA", "EPG_BUILD_EXTENSION"):
        for value, message in (
            ("2", f"found {name}='2', wanted auto, 1 or 0"),
            ("1", f"{name}=1, but the extension cannot be built: found no cmake"),
        ):
            with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
                patch.setenv(name, value)
                setup_file.main()
    for jobs in ("0", "-1", "two", "²"):
        with pytest.raises(SystemExit, match=f"found MAX_JOBS='{jobs}', wanted a number of at least 1"):
            setup_file.job_count(jobs, 4, 1e12)


FRONT_END = """
import os, subprocess, sys
isolated = os.environ | {"PYTHONPATH": sys.argv[1], "PYTHONNOUSERSITE": "1", "VIRTUAL_ENV": sys.argv[1]}
code = "import sys; sys.path.append(sys.argv[1]); import setup; print(setup.package_folder('torch_of_the_user'))"
subprocess.run([sys.executable, "-c", code, sys.argv[2]], env=isolated, check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("place", ["pip's interpreter", "active environment", ".venv", "nowhere"])
def test_an_isolated_build_finds_the_torch_of_the_target_of_pip_and_of_uv(tmp_path, place):
    (tmp_path / "empty").mkdir()
    site, environment = tmp_path / "site", dict(os.environ)
    environment.pop("VIRTUAL_ENV", None)
    if place in ("active environment", ".venv"):
        target = tmp_path / ("other" if place == "active environment" else ".venv")
        venv.create(target)
        site = target / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    if place == "active environment":
        environment["VIRTUAL_ENV"] = str(target)
    if place == "pip's interpreter":
        environment["PYTHONPATH"] = str(site)
    package = site / "torch_of_the_user"
    if place != "nowhere":
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    command = [sys.executable, "-c", FRONT_END, str(tmp_path / "empty"), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(None if place == "nowhere" else package)


def test_a_source_archive_holds_what_a_build_reads_and_no_tests(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    environment = os.environ | {"EPG_BUILD_EXTENSION": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    listed = (tmp_path / "epg_fast.egg-info/SOURCES.txt").read_text().splitlines()
    packages = [path for folder in ("epg_fast", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in packages if path.suffix not in (".pyc", ".so")}
    top = "CMakeLists.txt LICENSE MANIFEST.in README.md constraints.txt pyproject.toml setup.py"
    assert {name for name in listed if not name.startswith(str(tmp_path))} == wanted | set(top.split())


def test_the_extension_is_here_if_it_can_be(setup_file):
    """Tests of its operations skip without it: a build that went wrong must not hide behind them."""
    if reason := setup_file.missing():
        pytest.skip(reason)
    available, reason = extension.extension_status()
    assert available, reason


@pytest.mark.parametrize(
    ("max_jobs", "cores", "gigabytes", "wanted"),
    [(None, 8, 64, 8), (None, 8, 10, 2), (None, 8, 1, 1), (None, 1, 1e6, 1), ("", 4, 64, 4), ("3", 1, 1, 3)],
)
def test_compilers_run_side_by_side_as_cores_and_memory_allow(setup_file, max_jobs, cores, gigabytes, wanted):
    assert setup_file.job_count(max_jobs, cores, gigabytes * 1e9) == wanted


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
    assert all(text in line for text in texts), line
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="euler_step: wants the extension, which is.*backend='plain'"):
        euler_step(x, x, 1.0, 0.5, backend="extension")
    assert torch.equal(euler_step(x, x, 1.0, 0.5), x)


def compile_library(path, source):
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


OF_ANOTHER_TORCH = 'extern "C" int of_another_abi(); int f() { return of_another_abi(); }'


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library\n" * 1000, OF_ANOTHER_TORCH], ids=len)
def test_a_file_that_is_not_our_library_is_not_loaded(use_library, tmp_path, content):
    library = tmp_path / "other.so"
    if isinstance(content, bytes):
        library.write_bytes(content)
    else:
        compile_library(library, content)
    why = "of_another_abi" if content == OF_ANOTHER_TORCH else "other.so"
    assert_unavailable(
        use_library(library), f"cannot be loaded with torch {torch.__version__}", why, "to rebuild it, run `pip install"
    )


@pytest.mark.skipif(not extension.extension_status()[0], reason="needs the extension")
def test_a_library_whose_operators_take_something_else_is_not_used(use_library, monkeypatch):
    monkeypatch.setattr(extension, "INTERFACE", "of tomorrow")
    status = use_library(extension._LIBRARY)
    assert_unavailable(status, "from another version of epg_fast", "not of tomorrow; to rebuild it, run")


def test_every_operator_of_the_sources_is_expected_of_a_library():
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "kernels/csrc/register.cpp").read_text())
    assert defined and sorted(defined) == sorted(extension.OPERATORS)


@needs_compiler
@pytest.mark.slow
def test_env_reports_a_library_that_registers_nothing(tmp_path):
    library = tmp_path / "other.so"
    compile_library(library, "int f() { return 1; }")
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "EPG_EXTENSION": str(library)}
    command = [sys.executable, "-m", "epg_fast", "env"]
    out = subprocess.check_output(command, cwd=ROOT, env=os.environ | environment, text=True)
    assert f"not available (from another version of epg_fast: {library} has interface none, not " in out


def test_a_library_that_is_missing_is_named(use_library, tmp_path, monkeypatch):
    absent = tmp_path / "absent.so"
    for chosen, why in (
        (str(absent), "not found: EPG_EXTENSION is "),
        (None, "to build it, run"),
    ):
        monkeypatch.setattr(extension, "_CHOSEN", chosen)
        assert_unavailable(use_library(absent), str(absent), why)


@pytest.mark.parametrize(
    ("architectures", "runs", "lacks"),
    [
        ("8.0 9.0a 10.0+PTX", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)], [(7, 5)]),
        ("8.0 9.0a", [(8, 0), (9, 0)], [(9, 1), (10, 0)]),
        ("8.6", [(8, 6)], [(8, 0)]),
        ("8.0+PTX", [(9, 0)], []),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_which_gpus_a_library_runs_on(architectures, runs, lacks):
    assert all(extension.has_code_for(architectures, capability) for capability in runs)
    assert not any(extension.has_code_for(architectures, capability) for capability in lacks)


def test_a_gpu_that_the_library_was_not_built_for_is_named_with_the_remedy(monkeypatch):
    x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    monkeypatch.setattr(extension, "extension_status", lambda: (True, "loaded"))
    monkeypatch.setattr(extension, "_build_info", lambda: {"cuda_architectures": "9.0a"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for with_cuda, message in (
        (True, "built for CUDA architectures 9.0a, not for this GPU's 8.6; run `pip"),
        (False, "built without CUDA; put nvcc on PATH and run `pip install"),
    ):
        monkeypatch.setattr(extension, "extension_has_cuda", lambda with_cuda=with_cuda: with_cuda)
        extension._lacks_code_for.cache_clear()
        with pytest.raises(ValueError, match=f"on cuda:1, but the extension was {message}"):
            extension.require_extension("euler_step", x)
    extension._lacks_code_for.cache_clear()
