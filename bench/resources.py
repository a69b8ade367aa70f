"""What each kernel costs on each GPU architecture, compiled ahead of time: no GPU is needed.

    python -m bench.resources [--arch 80 90 100] [--every 2] [--op layer_norm_modulate ...]

Prints one row per Triton kernel and configuration (what bench/launches.py records) and one per CUDA kernel of the
built extension: registers per thread, spills (instructions that touch local memory), bytes of
shared memory (CUTLASS's kernels get theirs at launch, which is not seen here), matrix instructions, how many of the
accesses to global memory are 16 bytes wide, and how many go through the tensor memory accelerator (TMA). Exits with
status 1 when, on sm_90, a kernel spills, is marked as a matrix kernel or is one of CUTLASS's and has no wgmma, or is
marked as vectorized and has neither 16-byte accesses nor TMA. Products of ragged rows, which no preset has, may.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("kernel", "arch", "shape", "dtype", "warps", "registers", "spills", "shared", "matrix", "16-byte", "TMA")
_MATRIX_INSTRUCTIONS = {"wgmma": r"\bHGMMA\b|\bQGMMA\b|\bIGMMA\b", "mma": r"\b[HIQ]MMA\b", "tcgen05": r"\bUTC\w*MMA\b"}


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture."""

    kernel: str
    arch: int
    shape: str
    dtype: str
    warps: str
    registers: int
    spills: int
    shared: int
    matrix: str
    wide: int  # accesses to global memory of 16 bytes each
    accesses: int  # all accesses to global memory but TMA's
    tma: int
    gemm: bool = False
    vectorized: bool = False
    judged: bool = True

    @property
    def cells(self) -> tuple:
        cost = (self.registers, self.spills, self.shared, self.matrix, f"{self.wide}/{self.accesses}", self.tma)
        return (self.kernel, f"sm_{self.arch}", self.shape, self.dtype, self.warps, *cost)

    def failure(self) -> str | None:
        if self.arch != 90 or not self.judged:
            return None
        name = f"{self.kernel} ({self.shape}, {self.dtype})"
        if self.spills:
            return f"{name} spills on sm_90: {self.spills} accesses to local memory"
        if self.gemm and "wgmma" not in self.matrix:
            return f"{name} has no wgmma on sm_90, found: {self.matrix}"
        if self.vectorized and not (self.wide or self.tma):
            return f"{name} has no 16-byte access to global memory among its {self.accesses}, and no TMA"
        return None


def main() -> int:
    known = [80, 90, 100]
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=known, choices=known, help="e.g. 90 for sm_90")
    parser.add_argument("--every", type=int, default=1, help="of other architectures than sm_90 every n-th case alone")
    parser.add_argument("--op", nargs="+", help="only these operations' Triton kernels, e.g. attention")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler
    if str(_ROOT / "kernels") not in sys.path:
        sys.path.append(str(_ROOT / "kernels"))

    from bench.launches import CALLS, recorded

    for name in set(options.op or []) - set(CALLS):
        raise SystemExit(f"--op {name}: no such operation; there are {', '.join(CALLS)}")
    found = {arch: recorded(arch, options.op) for arch in options.arch}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        futures = [
            pool.submit(_compile, launch, arch)
            for arch, launches in found.items()
            for launch in launches[:: 1 if arch == 90 else options.every]
        ]
        rows = [future.result() for future in futures]
    if options.op is None:
        rows += [row for row in _of_extension() if row.arch in options.arch]
    table = [COLUMNS, *(row.cells for row in rows)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    failures = [failure for row in rows if (failure := row.failure())]
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


def _compile(launch, arch: int) -> Usage:
    compiled, name = launch.compile(), launch.source.fn.__name__
    code = compiled.asm["ttir"]
    in_tf32 = "inputPrecision = tf32" in code and "attention" not in name  # whose tiles of queries are too small
    return Usage(
        kernel=name,
        arch=arch,
        shape=launch.note,
        dtype=launch.dtype,
        warps=str(launch.options.num_warps),
        gemm=in_tf32 or re.search(r"tt\.dot .*: tensor<\w*x(bf16|f16|f8\w*)> \*", code) is not None,
        vectorized=name != "_patch_loss_fwd_sum_kernel",
        judged="ragged" not in launch.note,
        **usage_of(compiled),
    )


def usage_of(compiled) -> dict:
    """What a `Usage` says of a kernel that Triton has compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        (usage,) = _usages(cubin.name).values()
    return usage | {"shared": compiled.metadata.shared}


def _of_extension() -> list[Usage]:
    libraries = list((_ROOT / "epg_fast" / "ops").glob("_extension*.so"))
    usages = _usages(str(libraries[0])) if libraries else {}
    if not usages:
        how = "built for the CPU alone" if libraries else "not built here"
        print(f"the extension is {how}: no CUDA kernels to report")
    # "device_kernel" is CUTLASS's, whose kernels are matrix products.
    return [
        Usage(_readable(name), arch, _template_arguments(name), "-", "-", gemm="13device_kernelI" in name, **usage)
        for (name, arch), usage in usages.items()
    ]


def _usages(path: str) -> dict[tuple[str, int], dict]:
    """(mangled name, architecture) -> what it takes, of each kernel in a cubin, or in a library that holds cubins."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=False)
    if done.returncode:
        if "does not contain device code" in done.stdout + done.stderr:
            return {}
        raise RuntimeError(f"cuobjdump {path} failed: {done.stderr.strip()}")
    numbers, listings, arch, name = {}, {}, 0, ""
    for line in done.stdout.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (?:: )?(\w+)", line):
            name = match[1]
        elif "REG:" in line:
            found = dict(re.findall(r"\b(REG|SHARED):(\d+)", line))
            numbers[name, arch] = {"registers": int(found["REG"]), "shared": int(found["SHARED"])}
        elif "/*" in line:
            listings.setdefault((name, arch), []).append(line)
    return {key: usage | _instructions("\n".join(listings[key])) for key, usage in numbers.items()}


def _readable(mangled: str) -> str:
    """The last `x_kernel` in the name: the kernel, or the type that CUTLASS's `device_kernel` is made for.

    Identifiers stand behind their lengths, and in none of ours a letter stands behind a digit.
    """
    match = re.match(r".*\d([a-z]\w*_kernel)", mangled)
    return match[1] if match else mangled


def _template_arguments(mangled: str) -> str:
    """The numbers that a kernel was made for, such as <2> for x_kernel<2>; "-" for none."""
    match = re.search(r"_kernelI((?:Li\d+E)+)E", mangled)
    return f"<{', '.join(re.findall('[0-9]+', match[1]))}>" if match else "-"


def _instructions(sass: str) -> dict:
    """LDGSTS copies from global to shared memory, as cp.async does."""
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in _MATRIX_INSTRUCTIONS.items()}
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S*", sass)
    return {
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "matrix": " ".join(f"{name}:{count}" for name, count in counts.items() if count) or "none",
        "wide": sum(".128" in access for access in accesses),
        "accesses": len(accesses),
        "tma": len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", sass)),
    }


if __name__ == "__main__":
    sys.exit(main())
