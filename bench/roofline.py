"""The least time that the networks and their jobs can take, part by part, and how near to it operations were measured.

    python -m bench.roofline                                              # EPG-XL/16, batch 64, a nominal H200
    python -m bench.roofline --preset epg_l_16_256 --batch 128 --gpu H100
    python -m bench.roofline --measured bench_ops.json --output FOLDER    # roofline.md, roofline.json, roofline.png

A part's floor (`bench.parts`) is the longer of its matrix products at one ceiling and its bytes at the other. Ceilings
are a datasheet's, or what a large product and a large copy reached in the session of `pytest bench/ops --benchmark-only
--benchmark-json FILE`, whose operations become the points of the plot. Floors are derived from them, never measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from bench.compare import op_rows
from bench.parts import Ceilings, Job, Point, jobs_of
from bench.results import header, header_lines, markdown_table, read_json, significant, write_json, write_text
from epg_fast.training.hardware import GPUS, gpu_named


def nominal(name: str) -> Ceilings:
    """Of a datasheet. Raises ValueError for a GPU whose figures are not known."""
    gpu = gpu_named(name)
    if gpu.bandwidth is None:
        known = ", ".join(gpu.name for gpu in GPUS if gpu.bandwidth)
        raise ValueError(f"gpu {gpu.name}: its nominal memory bandwidth is not known; known: {known}, or --measured")
    source = f"nominal, {gpu.name}'s datasheet: nothing measured"
    return Ceilings(gpu.bf16 * 1e12, gpu.bandwidth * 1e12, source)


def measured(files: list[Path]) -> tuple[Ceilings, list[Point]]:
    """Ceilings and operations of pytest-benchmark's JSON files of one device.

    Raises ValueError for other files, for several devices and for files without a row that shows a ceiling.
    """
    rows, devices = [], set()
    for file in files:
        content = read_json(file)
        if "benchmarks" not in content or "machine_info" not in content:
            raise ValueError(f"{file}: want the JSON of `pytest bench/ops --benchmark-only --benchmark-json FILE`")
        rows += [info for _, info in op_rows(content, file)]
        devices.add(str(content["machine_info"].get("device") or "an unknown device"))
    names = ", ".join(map(str, files))
    if len(devices) > 1:
        raise ValueError(f"{names}: measured on {' and '.join(sorted(devices))}, wanted one device")
    copies = [100e9 * info["gbps"] / info["percent_of_copy"] for info in rows if info["percent_of_copy"] > 0]
    products = [100e12 * info["tflops"] / info["percent_of_gemm"] for info in rows if info["percent_of_gemm"] > 0]
    if not copies or not products:
        raise ValueError(f"{names}: no row with a share of the ceilings; measure operations with `pytest bench/ops`")
    files_read = ", ".join(file.name for file in files)
    source = f"measured on {devices.pop()} with the operations, a large product and a large copy ({files_read})"
    ceilings = Ceilings(statistics.median(products), statistics.median(copies), source)
    return ceilings, [_point(info, ceilings) for info in rows if info["tflops"] > 0]


def _point(info: dict, ceilings: Ceilings) -> Point:
    intensity = 1e3 * info["tflops"] / info["gbps"]
    known = {"op", "shape", "dtype", "direction", "provider"}
    numbers = {"median_us", "p20_us", "p80_us", "gbps", "percent_of_copy", "tflops", "percent_of_gemm"}
    return Point(
        op=info["op"],
        shape=str(tuple(info["shape"])),
        dtype=str(info.get("dtype", "")).removeprefix("torch."),
        direction=info.get("direction", ""),
        provider=info["provider"],
        labels=", ".join(f"{name} {info[name]}" for name in sorted(set(info) - known - numbers)),
        median_us=info["median_us"],
        intensity=intensity,
        tflops=info["tflops"],
        share=1e12 * info["tflops"] / ceilings.at(intensity),
    )


def summary(jobs: list[Job], ceilings: Ceilings) -> str:
    """A row per job."""
    rows = []
    for job in jobs:
        floor = seconds(job, ceilings)
        rows.append(
            (
                job.name,
                significant(job.products / job.images / 1e12),
                significant(job.bytes / job.images / 1e9),
                significant(1e3 * floor),
                significant(job.images / floor),
                significant(job.images * ceilings.products / job.products),
                f"{100 * job.products / ceilings.products / floor:.0f}%",
            )
        )
    columns = (
        *("job", "TFLOP/image", "GB/image", "floor, ms", "images/s at most", "products alone, images/s"),
        "products' share",
    )
    return markdown_table(columns, rows)


def seconds(job: Job, ceilings: Ceilings) -> float:
    """The floor of a job: its parts' after one another."""
    return sum(part.times * ceilings.floor(part) for part in job.parts)


def breakdown(job: Job, ceilings: Ceilings) -> str:
    """A row per part, the largest first."""
    total, rows = seconds(job, ceilings), []
    for part in sorted(job.parts, key=lambda part: -part.times * ceilings.floor(part)):
        floor = ceilings.floor(part)
        work = significant(part.products / 1e9) if part.products else ""
        rows.append(
            (
                part.name,
                part.direction,
                " x ".join(map(str, part.shape)),
                part.times,
                work,
                significant(part.bytes / 1e6),
                ceilings.bound(part),
                significant(1e6 * floor),
                significant(1e3 * part.times * floor),
                f"{100 * part.times * floor / total:.1f}%",
            )
        )
    columns = ("part", "direction", "shape", "calls", "GFLOP", "MB", "bound by", "floor, us", "all calls, ms", "share")
    return markdown_table(columns, rows)


def points_table(points: list[Point]) -> str:
    """A row per measured operation, those of an operation together and the nearest to the ceilings first."""
    rows = [
        (
            point.op,
            point.shape,
            point.dtype,
            point.direction,
            point.provider,
            point.labels,
            significant(point.median_us),
            significant(point.intensity),
            significant(point.tflops),
            f"{100 * point.share:.0f}%",
        )
        for point in sorted(points, key=lambda point: (point.op, point.direction, point.shape, -point.share))
    ]
    columns = (
        "op",
        "shape",
        "dtype",
        "direction",
        "provider",
        "more",
        "median, us",
        "FLOP/byte",
        "TFLOP/s",
        "of the roof",
    )
    return markdown_table(columns, rows)


def report(preset: str, batch: int, jobs: list[Job], ceilings: Ceilings, points: list[Point], about: dict) -> str:
    """The whole in markdown."""
    parts = [
        f"# Roofline of {preset}, batch {batch}\n",
        f"Ceilings: {significant(ceilings.products / 1e12)} TFLOP/s of matrix products in 16 bits, "
        f"{significant(ceilings.memory / 1e12)} TB/s of memory; {ceilings.source}.\n",
        "Floors are derived: matrix products and bytes of each part at these ceilings, one part after another.\n",
        summary(jobs, ceilings),
    ]
    for job in jobs:
        if job.name == "sample-onestep":
            continue  # is one forward pass
        parts += [f"## {job.name}\n", breakdown(job, ceilings)]
    if points:
        parts += ["## Measured operations\n", points_table(points)]
    return "\n".join([*parts, "## This report\n", header_lines(about)])


def as_json(preset: str, batch: int, jobs: list[Job], ceilings: Ceilings, points: list[Point], about: dict) -> dict:
    """The same for programs."""
    return {
        "about": about,
        "preset": preset,
        "batch": batch,
        "ceilings": asdict(ceilings),
        "jobs": [
            {
                "name": job.name,
                "products": job.products,
                "bytes": job.bytes,
                "floor_seconds": seconds(job, ceilings),
                "parts": [
                    asdict(part) | {"floor_seconds": ceilings.floor(part), "bound": ceilings.bound(part)}
                    for part in job.parts
                ],
            }
            for job in jobs
        ],
        "points": [asdict(point) for point in points],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="epg_xl_16_256")
    parser.add_argument("--batch", type=int, default=64, help="images per call and per update (default: 64)")
    ceilings = parser.add_mutually_exclusive_group()
    ceilings.add_argument("--gpu", help=f"its nominal ceilings: {', '.join(g.name for g in GPUS)} (default: H200)")
    ceilings.add_argument("--measured", type=Path, nargs="+", help="JSON of `pytest bench/ops`: ceilings and points")
    parser.add_argument("--output", type=Path, help="folder for roofline.md, roofline.json and roofline.png")
    options = parser.parse_args(arguments)
    try:
        write(options)
    except ValueError as error:
        print(f"bench.roofline: {error}", file=sys.stderr)
        return 2
    return 0


def write(options: argparse.Namespace) -> None:
    """Print the report; with an output folder, write it, and the plot if anything was measured."""
    if options.batch < 1:
        raise ValueError(f"batch {options.batch}: wanted 1 or more images")
    ceilings, points = measured(options.measured) if options.measured else (nominal(options.gpu or "H200"), [])
    content = (options.preset, options.batch, jobs_of(options.preset, options.batch), ceilings, points, header())
    text = report(*content)
    print(text, end="")
    if options.output is None:
        return
    write_text(options.output / "roofline.md", text)
    write_json(options.output / "roofline.json", as_json(*content))
    if not points:
        return
    try:
        from bench.roofline_plot import draw
    except ImportError:
        print("roofline.png needs matplotlib: pip install 'epg_fast[demo]'", file=sys.stderr)
        return
    draw(points, ceilings, options.output / "roofline.png")


if __name__ == "__main__":
    raise SystemExit(main())
