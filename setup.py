"""Runs CMake for the optional C++/CUDA extension; everything else is in pyproject.toml and CMakeLists.txt.

EPG_BUILD_CUDA=auto|1|0 chooses CUDA as CMakeLists.txt says. Without torch, cmake or a C++ compiler the extension is
left out, which one line says, and the package installs as pure Python; with EPG_BUILD_CUDA=1 or EPG_BUILD_EXTENSION=1
that is an error. EPG_BUILD_EXTENSION=0 leaves the extension out.
EPG_CUTLASS_DIR (a CUTLASS 4 checkout), else the installed nvidia-cutlass, has the headers for the matrix products.
MAX_JOBS bounds the number of compilers that run at once; without it, cores and free memory do.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
BYTES_PER_JOB = 4e9  # what nvcc was seen to take for CUTLASS; a tenth of that for other kernels


def torch_folder() -> Path | None:
    """The installed torch package, if its headers are new enough."""
    folder = package_folder("torch")
    return folder if folder and (folder / "include/torch/csrc/stable/library.h").is_file() else None


def cutlass_folder() -> Path | None:
    """The folder of CUTLASS that holds include/: EPG_CUTLASS_DIR, else that of the installed package, if any."""
    if chosen := os.environ.get("EPG_CUTLASS_DIR"):
        return Path(chosen).resolve()
    package = package_folder("cutlass_library")
    return package / "source" if package and (package / "source/include/cutlass/cutlass.h").is_file() else None


@functools.cache
def package_folder(name: str) -> Path | None:
    """Where a package is installed, also from inside an isolated build, which hides it.

    Outside of the build, the interpreter sees what pip itself did: user site, system site, PYTHONPATH. uv's target is
    none of these: it installs into the active environment, else into .venv of the folder it runs in.
    """
    if (spec := importlib.util.find_spec(name)) and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(*(s.submodule_search_locations if s else []))"
    parent, folder = environment_of_parent(), Path(f"/proc/{os.getppid()}/cwd").resolve()
    targets = [parent.get("VIRTUAL_ENV"), parent.get("CONDA_PREFIX"), folder / ".venv"]
    for python in (Path(sys.executable), *(Path(target, "bin/python") for target in targets if target)):
        if python.exists():
            command = [python, "-c", code]
            done = subprocess.run(command, env=parent, cwd="/", capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                return Path(done.stdout.strip())
    return None


def environment_of_parent() -> dict[str, str]:
    """The variables that the parent process, such as pip, was started with; without /proc, ours less pip's changes."""
    try:
        words = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    return dict(os.fsdecode(word).split("=", 1) for word in words if b"=" in word)


def missing() -> str | None:
    if os.environ.get("EPG_BUILD_EXTENSION") == "0":
        return "EPG_BUILD_EXTENSION=0"
    if sys.platform != "linux":
        return f"found platform {sys.platform}, wanted linux"
    if torch_folder() is None:
        return (
            "found no torch >= 2.11 in this environment; install torch first, then this package again; if torch is "
            "there, run `pip install 'setuptools>=77' cmake` and install this package with --no-build-isolation"
        )
    if shutil.which("cmake") is None:
        return "found no cmake on PATH; run `pip install cmake`"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "found no C++ compiler on PATH; install g++ or set CXX"
    return None


def job_count(max_jobs: str | None, cores: int, free_bytes: float) -> int:
    """How many compilers run at once: MAX_JOBS if it is set, else as many as cores and memory allow."""
    if not max_jobs:
        return max(1, min(cores, int(free_bytes / BYTES_PER_JOB)))
    if not max_jobs.isascii() or not max_jobs.isdigit() or int(max_jobs) < 1:
        sys.exit(f"epg_fast: found MAX_JOBS='{max_jobs}', wanted a number of at least 1; correct it or unset it")
    return int(max_jobs)


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that can be used before the machine swaps; a container's limit is not seen, MAX_JOBS is for that."""
    words = meminfo.read_text(encoding="utf-8").split() if meminfo.exists() else []
    return 1024 * int(words[words.index("MemAvailable:") + 1]) if "MemAvailable:" in words else float("inf")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = job_count(os.environ.get("MAX_JOBS"), len(os.sched_getaffinity(0)), free_memory())
        with tempfile.TemporaryDirectory(prefix="epg_fast_build_") as build:
            configure = ["cmake", "-S", str(SOURCE), "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
            configure += [f"-DEPG_TORCH_DIR={torch_folder()}", f"-DEPG_OUTPUT_DIR={build}/out"]
            configure += [f"-DEPG_BUILD_CUDA={os.environ.get('EPG_BUILD_CUDA', 'auto')}"]
            configure += [f"-DEPG_CUTLASS_DIR={cutlass_folder() or ''}"]
            for command in (configure, ["cmake", "--build", build, "--parallel", str(jobs)]):
                if subprocess.run(command, check=False).returncode != 0:
                    sys.exit(
                        f"epg_fast: `{' '.join(command)}` failed, see above; MAX_JOBS=1 needs less memory, "
                        "EPG_BUILD_CUDA=0 builds without CUDA, EPG_BUILD_EXTENSION=0 installs without the extension"
                    )
            staged = target.with_name(f"{target.name}.{os.getpid()}")
            shutil.copy(Path(build, "out", "_extension.abi3.so"), staged)
            os.replace(staged, target)


def main() -> None:
    reason = missing()
    # pip also runs this file to read metadata, before the build requirements (cmake) are there: nothing to say then.
    building = not {"bdist_wheel", "build_ext", "editable_wheel"}.isdisjoint(sys.argv)
    for name in ("EPG_BUILD_CUDA", "EPG_BUILD_EXTENSION"):
        if (value := os.environ.get(name, "auto")) not in ("auto", "1", "0"):
            sys.exit(f"epg_fast: found {name}='{value}', wanted auto, 1 or 0")
        if reason is not None and building and value == "1":
            sys.exit(f"epg_fast: {name}=1, but the extension cannot be built: {reason}")
    if reason is not None and building:
        print(f"epg_fast: installing without the C++/CUDA extension: {reason}", file=sys.stderr)
    setup(
        ext_modules=[Extension("epg_fast.ops._extension", [], py_limited_api=True)] if reason is None else [],
        cmdclass={"build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if reason is None else {},
    )


if __name__ == "__main__":
    main()
