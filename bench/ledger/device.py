"""A Hopper GPU that is not there: PyTorch and Triton decide as on an H200, tensors have no memory, nothing runs.

`preload` starts Python again with a stand-in for the CUDA runtime (standin.c) before the real one. `prepare` then
readies PyTorch, Inductor and Triton in this process: what is compiled is compiled for compute capability 9.0, caches
are off, and the package's extension counts as built, its operators known by the schemas in its sources.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from bench.results import ROOT

_SOURCE = Path(__file__).with_name("standin.c")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "epg_fast" / "ledger"


class Unavailable(ValueError):
    """This machine cannot count: says what is missing and what to do."""


def missing() -> str | None:
    """What is not here, with the remedy; None where all is."""
    import torch

    remedy = "`make ledger` makes an environment that has it"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; want a CUDA build, e.g. `pip install torch==2.14.1`; {remedy}"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: `pip install triton`; {remedy}"
    if "standin" in os.environ.get("LD_PRELOAD", ""):
        return None
    if torch.cuda.device_count() and "counted" not in torch.cuda.get_device_name(0):
        return "there is a GPU here, which the ledger's stand-in would hide; set CUDA_VISIBLE_DEVICES= (empty)"
    if _compiler() is None:
        return "no C compiler for the stand-in of the CUDA runtime; install gcc or clang, or name one in CC"
    if _headers() is None:
        return f"no headers of CUDA {torch.version.cuda}; name a toolkit of that version in CUDA_HOME"
    return None


def preload(arguments: list[str]) -> None:
    """Go on in a Python that has the stand-in preloaded: `python -m bench.ledger arguments`. Raises Unavailable."""
    if "standin" in os.environ.get("LD_PRELOAD", ""):
        return
    libraries = [str(library()), *filter(None, [os.environ.get("LD_PRELOAD")])]
    os.environ["LD_PRELOAD"] = ":".join(libraries)
    os.execv(sys.executable, [sys.executable, "-m", "bench.ledger", *arguments])


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


def _headers() -> Path | None:
    """A folder of CUDA's headers, whole and of the major version that PyTorch was built with."""
    import torch
    import triton

    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in toolkits if home]
    folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    return next((folder for folder in folders if _major(folder) == torch.version.cuda.partition(".")[0]), None)


def _major(folder: Path) -> str | None:
    header = folder / "cuda_runtime_api.h"
    if not header.exists() or not (folder / "crt" / "host_defines.h").exists():
        return None
    found = re.search(r"define CUDART_VERSION\s+(\d+)\d{3}", header.read_text())
    return found and found[1]


def library() -> Path:
    """The stand-in, to be preloaded; compiled if it is older than its source. Raises Unavailable."""
    if reason := missing():
        raise Unavailable(reason)
    made = _CACHE / "libstandin.so"
    if made.exists() and made.stat().st_mtime > _SOURCE.stat().st_mtime:
        return made
    _CACHE.mkdir(parents=True, exist_ok=True)
    fresh = made.with_suffix(f".{os.getpid()}")
    # PyTorch opens the driver by this name, and gets what is loaded under it
    command = [_compiler(), "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{_headers()}", "-o", str(fresh)]
    done = subprocess.run([*command, str(_SOURCE)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["(no message)"]
        error = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{_SOURCE.name} does not compile: {error}; want a C compiler in CC that does")
    os.replace(fresh, made)
    return made


@functools.cache
def prepare() -> None:
    """Make this process count: once, before anything is compiled."""
    import torch
    import triton
    from torch._inductor import config
    from torch._inductor.runtime import coordinate_descent_tuner, triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    if importlib.util.find_spec("epg_kernels") is None:
        sys.path.append(str(ROOT / "kernels"))
    if not torch.cuda.is_available():
        raise Unavailable("the stand-in of the CUDA runtime is not preloaded; start with `python -m bench.ledger`")
    torch.cuda.init()
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    # Allocations begin at multiples of 512 bytes, and kernels are told so.
    fake_tensor.FakeTensor.data_ptr = lambda self: (1 << 20) + self.storage_offset() * self.element_size()
    # What Triton asks of the GPU's driver when it compiles.
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu()
    config.compile_threads = 1
    config.force_disable_caches = True
    config.joint_graph_constant_folding = False  # would compute on the GPU
    config.shape_padding = False  # would be measured, product by product: none is padded
    torch._functorch.config.enable_autograd_cache = False
    # Tuning runs kernels: the first candidate is taken, which changes configurations but neither kernels nor bytes.
    coordinate_descent_tuner.CoordescTuner.autotune_single_field = staticmethod(lambda call, start, *_, **__: start)
    _extension()


def _extension() -> None:
    """Let the operators of the C++/CUDA extension be called on tensors without memory, as if it were built."""
    import torch

    import epg_fast.ops.extension  # noqa: F401

    for module in [m for name, m in sys.modules.items() if name.startswith("epg_fast")]:
        for name, stand_in in (
            ("extension_status", lambda: (True, "counted, not built")),
            ("require_extension", lambda *_, **__: None),
            ("require_gemms", lambda *_: None),
        ):
            if hasattr(module, name):
                setattr(module, name, stand_in)
    global _fragment  # whose operators go with it
    _fragment = torch.library.Library("epg_fast", "FRAGMENT")
    for schema in schemas():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.epg_fast, name):
            _fragment.define(schema)
            torch.library.register_fake(f"epg_fast::{name}", lambda *_, **__: None, lib=_fragment)


def schemas() -> list[str]:
    """Of the extension's operators that write what they are given, read from its sources."""
    found = []
    for source in sorted((ROOT / "kernels" / "csrc").glob("*.c*")):
        for text in re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\s*\)", source.read_text()):
            found.append("".join(re.findall(r'"([^"]*)"', text)))
    return [schema for schema in found if schema.endswith("-> ()")]
