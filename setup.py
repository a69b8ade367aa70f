"""Runs CMake for the optional C++/CUDA extension; everything else is in pyproject.toml and CMakeLists.txt.

EPG_BUILD_CUDA=auto|1|0 chooses CUDA as CMakeLists.txt says. Without torch, cmake or a C++ compiler the extension is
left out, which one line says, and the package installs as pure Python; with EPG_BUILD_CUDA=1 that is an error.
EPG_CUTLASS_DIR (a CUTLASS 4 checkout), else the installed nvidia-cutlass, has the headers for the matrix products.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent


def torch_folder() -> Path | None:
    """The installed torch package, also from inside pip's isolated build, whose sys.path hides it."""
    folders = [Path(folder, "torch") for folder in _site_packages()]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    return next((folder for folder in folders if (folder / "include/torch/csrc/stable/library.h").is_file()), None)


def cutlass_folder() -> Path | None:
    """The folder of CUTLASS that holds include/: EPG_CUTLASS_DIR, else that of the installed package, if any."""
    if chosen := os.environ.get("EPG_CUTLASS_DIR"):
        return Path(chosen).resolve()
    folders = [Path(folder, "cutlass_library", "source") for folder in (*_site_packages(), *sys.path)]
    return next((folder for folder in folders if (folder / "include/cutlass/cutlass.h").is_file()), None)


def _site_packages() -> list[str]:
    return [sysconfig.get_path(key) for key in ("purelib", "platlib")]


def missing() -> str | None:
    if sys.platform != "linux":
        return f"found platform {sys.platform}, wanted linux"
    if torch_folder() is None:
        return "found no torch >= 2.11 in this environment; install torch first, then this package again"
    if shutil.which("cmake") is None:
        return "found no cmake on PATH; run `pip install cmake`"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "found no C++ compiler on PATH; install g++ or set CXX"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(min(4, os.cpu_count() or 1))
        with tempfile.TemporaryDirectory(prefix="epg_fast_build_") as build:
            configure = ["cmake", "-S", str(SOURCE), "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
            configure += [f"-DEPG_TORCH_DIR={torch_folder()}", f"-DEPG_OUTPUT_DIR={build}/out"]
            configure += [f"-DEPG_BUILD_CUDA={os.environ.get('EPG_BUILD_CUDA', 'auto')}"]
            configure += [f"-DEPG_CUTLASS_DIR={cutlass_folder() or ''}"]
            for command in (configure, ["cmake", "--build", build, "--parallel", jobs]):
                if subprocess.run(command, check=False).returncode != 0:
                    sys.exit(f"epg_fast: `{' '.join(command)}` failed, see above; EPG_BUILD_CUDA=0 builds without CUDA")
            staged = target.with_name(f"{target.name}.{os.getpid()}")
            shutil.copy(Path(build, "out", "_extension.abi3.so"), staged)
            os.replace(staged, target)


reason = missing()
# pip also runs this file to read metadata, before the build requirements (cmake) are there: nothing to say then.
building = not {"bdist_wheel", "build_ext", "editable_wheel"}.isdisjoint(sys.argv)
if reason is not None and building:
    if os.environ.get("EPG_BUILD_CUDA") == "1":
        sys.exit(f"epg_fast: EPG_BUILD_CUDA=1, but the extension cannot be built: {reason}")
    print(f"epg_fast: installing without the C++/CUDA extension: {reason}", file=sys.stderr)

setup(
    ext_modules=[Extension("epg_fast.ops._extension", [], py_limited_api=True)] if reason is None else [],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if reason is None else {},
)
