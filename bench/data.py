"""Images per second of the loaders, Pillow against DALI, on the same images with the same parameters.

    python -m bench.data                          # 512 synthetic photographs of about 500 x 375 pixels
    python -m bench.data --images /data/imagenet/train --views 1 --threads 16 --device cuda

Loaders take turns for `--rounds` rounds. Before that, both make the first batches and are compared: a loader that is
wrong is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measure import percentiles
from bench.results import Results, Row, header, markdown_table, significant
from epg_fast.config import AugmentConfig, DataConfig
from epg_fast.data import ImageSource, Loader, make_loader, open_images

# Mean difference in 8-bit levels that the first batches may have.
_ALLOWED = 1.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders or tars; by default synthetic photographs")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 3], choices=[1, 3])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Pillow's processes, DALI's threads")
    parser.add_argument("--readers", type=int, default=0, help="DALI's reading processes")
    parser.add_argument("--device", default="cpu", help="where DALI works")
    parser.add_argument("--seconds", type=float, default=6.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of data.json, which is written anew")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as torchrun sets it; more compete with DALI's
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = open_images(options.images or write_photographs(Path(folder), 512))
            rows = [row for views in options.views for row in measure(source, options, views)]
    except ValueError as error:
        print(f"bench.data: {error}", file=sys.stderr)
        return 2
    if options.output:
        results = Results(options.output / "data.json", header())
        for row in rows:
            results.add(row)
    print(table(rows))
    return 0


def measure(source: ImageSource, options: argparse.Namespace, views: int) -> list[Row]:
    """Rates of both loaders for `views` views per image. Raises ValueError if their batches differ."""
    difference = compare(source, options, views)
    rates: dict[str, list[float]] = {"pillow": [], "dali": []}
    for _ in range(options.rounds):
        for name, found in rates.items():
            with loader(name, source, options, views) as batches:
                found.append(rate(batches, options))
    shape = f"{options.image_size} pixels, {views} view{'s' * (views > 1)}, {options.threads} threads"
    rows = []
    for name, found in rates.items():
        p20, median, p80 = percentiles(found)
        details = {"rounds": found, "levels": difference * (name == "dali"), "device": options.device}
        numbers = {"median": median, "p20": p20, "p80": p80, "details": details}
        rows.append(Row("data", name, shape, "uint8", "images/s", **numbers))
    return rows


def table(rows: list[Row]) -> str:
    """levels: mean difference from Pillow's pixels, of 255."""
    base = {row.shape: row.median for row in rows if row.variant == "pillow"}
    cells = []
    for row in rows:
        numbers = significant(row.median), row.spread, f"{significant(row.median / base[row.shape])}x"
        cells.append((row.variant, row.shape, *numbers, significant(row.details["levels"], 2)))
    return markdown_table(("loader", "of", "images/s", "p20 to p80", "against Pillow", "levels"), cells)


def loader(name: str, source: ImageSource, options: argparse.Namespace, views: int) -> Loader:
    return make_loader(
        source,
        DataConfig(workers=options.threads, readers=options.readers, augment=AugmentConfig()),
        backend=name,
        image_size=options.image_size,
        batch_size=options.batch_size,
        seed=0,
        three_views=views == 3,
        device=options.device,
    )


def rate(batches: Loader, options: argparse.Namespace) -> float:
    """Images per second once everything is under way."""
    for _ in range(max(4, 2 * options.threads)):
        next(batches)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < options.seconds:
        next(batches)["x"].sum().item()  # waits for the GPU, if there is one
        count += options.batch_size
    return count / elapsed


def compare(source: ImageSource, options: argparse.Namespace, views: int) -> float:
    """Mean difference of the first batches in 8-bit levels; raises ValueError when it is too large."""
    found = []
    for name in ("pillow", "dali"):
        with loader(name, source, options, views) as batches:
            found.append([{k: v.cpu() for k, v in batch.items()} for batch in itertools.islice(batches, 2)])
    differences = []
    for pillow, dali in zip(*found, strict=True):
        if not torch.equal(pillow["index"], dali["index"]):
            raise ValueError("the loaders disagree about the order of the images: nothing was timed")
        pixels = [name for name, tensor in pillow.items() if tensor.dtype == torch.uint8]
        differences += [(pillow[name].float() - dali[name].float()).abs().mean().item() for name in pixels]
    if max(differences) > _ALLOWED:
        raise ValueError(f"the loaders' pixels differ by {max(differences):.2f} levels: nothing was timed")
    return max(differences)


def write_photographs(root: Path, count: int) -> Path:
    """Write JPEG files with the spectrum, sizes and weight (about 100 kB) of ImageNet's photographs."""
    rng = np.random.default_rng(0)
    sizes = [(500, 375)] * 5 + [(375, 500)] * 2 + [(500, 333)] * 2 + [(640, 480), (400, 300), (800, 600)]
    for i in range(count):
        width, height = sizes[rng.integers(len(sizes))]
        path = root / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photograph(rng, width, height)).save(path, quality=88)
    return root


def photograph(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return noise with amplitudes falling as 1/frequency and correlated colours, uint8 [height, width, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(3, height, width))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    luma, warm, cool = planes
    pixels = 118 + 55 * luma[..., None] + 22 * np.stack([warm, 0 * warm, cool], axis=-1)
    return pixels.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    raise SystemExit(main())
