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
class Row:
    kernel: str
    arch: int
    shape: str
    dtype: str
    num_warps: str
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
        return (self.kernel, f"sm_{self.arch}", self.shape, self.dtype, self.num_warps, *cost)

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
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        choices=[80, 90, 100],
        help="compute capabilities, e.g. 90 for sm_90",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="of the other architectures than sm_90 every n-th case alone"
    )
    parser.add_argument("--op", nargs="+", help="only these operations' Triton kernels, e.g. attention")
    arguments = parser.parse_args()
    archs = arguments.arch
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler
    if str(_ROOT / "kernels") not in sys.path:
        sys.path.append(str(_ROOT / "kernels"))

    from bench.launches import CALLS, recorded

    for name in set(arguments.op or []) - set(CALLS):
        raise SystemExit(f"--op {name}: no such operation; there are {', '.join(CALLS)}")
    found = {arch: recorded(arch, arguments.op) for arch in archs}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        futures = [
            pool.submit(_compile, launch, arch)
            for arch, launches in found.items()
            for launch in launches[:: 1 if arch == 90 else arguments.every]
        ]
        rows = [future.result() for future in futures]
    if arguments.op is None:
        rows += [row for row in _extension_rows() if row.arch in archs]
    _print(rows)
    failures = [failure for row in rows if (failure := row.failure())]
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


def _compile(launch, arch: int) -> Row:
    compiled, name = launch.compile(), launch.source.fn.__name__
    code = compiled.asm["ttir"]
    in_tf32 = "inputPrecision = tf32" in code and "attention" not in name  # whose tiles of queries are too small
    return Row(
        kernel=name,
        arch=arch,
        shape=launch.note,
        dtype=launch.dtype,
        num_warps=str(launch.options.num_warps),
        gemm=in_tf32 or re.search(r"tt\.dot .*: tensor<\w*x(bf16|f16|f8\w*)> \*", code) is not None,
        vectorized=name != "_patch_loss_fwd_sum_kernel",
        judged="ragged" not in launch.note,
        **usage_of(compiled),
    )


def usage_of(compiled) -> dict:
    """What a row says of a kernel that Triton has compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        (usage,) = _usage(cubin.name)
        sass = _tool("nvdisasm", cubin.name)
    return {"registers": usage["REG"], "shared": compiled.metadata.shared, **_instructions(sass)}


def _extension_rows() -> list[Row]:
    libraries = list((_ROOT / "epg_fast" / "ops").glob("_extension*.so"))
    if not libraries:
        print("the extension is not built here: no CUDA kernels to report")
        return []
    if not _tool("cuobjdump", "-res-usage", str(libraries[0])):
        print("the extension was built for the CPU alone: no CUDA kernels to report")
        return []
    rows = []
    sass_by_kernel = _sass_by_kernel(_tool("cuobjdump", "-sass", str(libraries[0])))
    for usage in _usage(str(libraries[0])):
        sass = sass_by_kernel[usage["arch"], usage["name"]]
        rows.append(
            Row(
                kernel=_readable(usage["name"]),
                arch=usage["arch"],
                shape=_template_arguments(usage["name"]),
                dtype="-",
                num_warps="-",
                registers=usage["REG"],
                shared=usage["SHARED"],
                **_instructions(sass),
                gemm="13device_kernelI" in usage["name"],  # CUTLASS's, whose kernels are matrix products
            )
        )
    return rows


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    # a library built for the CPU alone
    if done.returncode != 0 and "does not contain device code" in done.stdout + done.stderr:
        return ""
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _usage(path: str) -> list[dict]:
    """Registers and memory of each kernel in a cubin, or in a library that holds cubins."""
    usages, arch = [], 0
    for line in _tool("cuobjdump", "-res-usage", path).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            usages.append({"name": match[1], "arch": arch})
        elif "REG:" in line:
            usages[-1] |= {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return usages


def _sass_by_kernel(dump: str) -> dict[tuple[int, str], str]:
    listings, arch, name = {}, 0, None
    for line in dump.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
            listings[arch, name] = []
        elif name is not None and "/*" in line:
            listings[arch, name].append(line)
    return {key: "\n".join(lines) for key, lines in listings.items()}


def _readable(mangled: str) -> str:
    """The last `x_kernel` in the name: the kernel, or the type that CUTLASS's `device_kernel` is made for.

    A mangled name holds identifiers behind their lengths, and numbers that are none: of substitutions and of literals.
    """
    names, position = [], 0
    while number := re.compile(r"S[0-9A-Z]*_|T[0-9]*_|L[a-z]n?\d+E|(\d+)").search(mangled, position):
        position = number.end() + int(number[1] or 0)
        names.append(mangled[number.end() : position])
    kernels = [name for name in names if re.fullmatch(r"[a-z]\w*_kernel", name)]
    return kernels[-1] if kernels else mangled


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


def _print(rows: list[Row]) -> None:
    table = [COLUMNS, *(row.cells for row in rows)]
    widths = [max(len(str(line[i])) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
