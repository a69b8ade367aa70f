"""The files of drawn images, and the parts that a command keeps until all are there.

parts/<start>_<stop>.npy   uint8 [n, H, W, 3]: a finished batch, and the only place of its images until the end
grid.png, png/<class>/<index>.png, samples.npz   made of the parts once all images are drawn; then the parts go
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from epg_fast.files import open_atomically
from epg_fast.npz import Npz, write_header, write_npz

log = logging.getLogger("epg_fast")

_GRID, _PADDING, _LARGEST_ENLARGED_TILE, _CAPTION = 100, 2, 96, 14
_CHUNK = 64


class Parts:
    """The files <start>_<stop><suffix> of a folder, each with what was made of the images start to stop - 1.

    check: raises OSError or ValueError unless the file at this path holds what it should of these images. `ranges`: the
    images of the parts that are known. Parts of several batch sizes may overlap.
    """

    def __init__(self, folder: Path, suffix: str, check: Callable[[Path, range], object]):
        self.folder, self.ranges = folder, []
        self._suffix, self._check = suffix, check

    def path(self, images: range) -> Path:
        """The file of a part."""
        return self.folder / f"{images.start:08d}_{images.stop:08d}{self._suffix}"

    def scan(self) -> None:
        """Find what is there. Parts that are damaged are named and removed, as is what a killed command began."""
        self.ranges = []
        for left in self.folder.glob(".*.tmp"):
            left.unlink()
        for path in sorted(self.folder.glob(f"*{self._suffix}")):
            match = re.fullmatch(r"(\d{8})_(\d{8})", path.name.removesuffix(self._suffix))
            if match and not self.add(range(int(match[1]), int(match[2]))):
                log.warning("%s is damaged: its images are drawn again", path)
                path.unlink()

    def add(self, images: range) -> bool:
        """Count a part, which another rank may have written; False when it is not there as a whole."""
        try:
            self._check(self.path(images), images)
        except (OSError, ValueError, EOFError):
            return False
        self.ranges.append(images)
        return True

    def lacking(self, number: int) -> np.ndarray:
        """Which of the first `number` images are in no part: bool [number]."""
        lacking = np.ones(number, bool)
        for images in self.ranges:
            lacking[images.start : images.stop] = False
        return lacking

    def in_order(self, stop: int) -> Iterator[tuple[range, slice]]:
        """Parts of the images before `stop`, and what of each is to be taken: every image once, in ascending order."""
        done = 0
        for images in sorted(self.ranges, key=lambda images: (images.start, images.stop)):
            if images.stop > done and images.start < stop:
                yield images, slice(max(0, done - images.start), stop - images.start)
                done = images.stop


def cut_at_batches(lacking: np.ndarray, batch_size: int) -> list[range]:
    """The images that are lacking, bool [N], none across a multiple of `batch_size`, whole batches first.

    A batch is the same however many ranks share the work, and so are its last bits on one kind of machine: any share of
    them, cut every `batch_size` images, falls into the same batches as long as whole ones are missing.
    """
    gaps = np.flatnonzero(lacking)
    batches = np.split(gaps, np.flatnonzero(np.diff(gaps // batch_size)) + 1)
    return sorted((run for batch in batches for run in runs(batch)), key=len, reverse=True)


def runs(values: np.ndarray) -> Iterator[range]:
    """Integers [n] as ranges, of which each goes on as long as they rise by one."""
    if len(values):
        for run in np.split(values, np.flatnonzero(np.diff(values) != 1) + 1):
            yield range(int(run[0]), int(run[-1]) + 1)


class Outputs:
    """What an output folder holds of the images 0..N-1, and what it lacks.

    labels: integers [N]. size: height and width in pixels. npz, png: whether samples.npz and PNG files are wanted
    beside grid.png. names: of the classes, for the grid.
    """

    def __init__(self, outdir: Path, labels: np.ndarray, size: int, npz: bool, png: bool, names: Sequence[str] = ()):
        self.labels, self.shape = labels, (size, size, 3)
        self.parts = Parts(outdir / "parts", ".npy", self._load)
        self.grid, self.npz = outdir / "grid.png", outdir / "samples.npz"
        self._outdir, self._wants_npz, self._wants_png, self._names = outdir, npz, png, names
        self._digits = max(4, len(str(int(labels.max())))), max(6, len(str(len(labels) - 1)))
        self._has_png = np.zeros(len(labels), bool)

    def scan(self) -> None:
        """Find out what is there. What is damaged, or was begun by a killed command, is removed; see `Parts`.

        Raises ValueError for a damaged samples.npz.
        """
        for left in [*self._outdir.glob(".*.tmp"), *self._outdir.glob("png/*/.*.tmp")]:
            left.unlink()
        self.parts.scan()
        if self.npz.exists() and not zipfile.is_zipfile(self.npz):
            raise ValueError(f"{self.npz} is damaged; delete it, and the same command makes it again")
        if (self._outdir / "png").exists():
            # a power failure can leave empty files
            paths = map(self.png_path, range(len(self.labels)))
            self._has_png[:] = [path.exists() and path.stat().st_size > 0 for path in paths]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self._lacking().any() and not self.parts.folder.exists()

    def missing(self, batch_size: int) -> list[range]:
        """The images to draw; see `cut_at_batches`."""
        lacking = self._lacking() & self.parts.lacking(len(self.labels)) & (not self.npz.exists())
        if (lacking & self._has_png).any():
            log.info("%d images are drawn again: PNG files of them are not read back", (lacking & self._has_png).sum())
        return cut_at_batches(lacking, batch_size)

    def save_part(self, start: int, pixels: np.ndarray) -> range:
        """Keep uint8 images [n, H, W, 3], of which the first has index `start`; returns which they are."""
        images = range(start, start + len(pixels))
        with open_atomically(self.parts.path(images)) as file:
            write_header(file, pixels.shape)
            file.write(np.ascontiguousarray(pixels).data)  # np.save would not say why a disk does not take it
        return images

    def finish(self, note: dict) -> None:
        """Make what is wanted and not there of the parts, or of samples.npz; then the parts go.

        note: what samples.npz says of its images. Parts that no samples.npz needs go one by one.
        """
        if not self.grid.exists():
            images = (image for _, pixels in self._read() for image in pixels)
            save_grid(np.stack(list(islice(images, _GRID))), self.grid, captions(self.labels[:_GRID], self._names))
        if self._wants_png and not self._has_png.all():
            log.info("writing PNG files to %s", self._outdir / "png")
            with ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0)))) as pool:
                for start, pixels in self._read(remove=not self._wants_npz):
                    missing = [i for i in range(len(pixels)) if not self._has_png[start + i]]
                    list(pool.map(save_png, pixels[missing], [self.png_path(start + i) for i in missing]))
        if self._wants_npz and not self.npz.exists():
            log.info("writing %s", self.npz)
            write_npz(self.npz, (pixels for _, pixels in self._read()), self.labels, self.shape, note)
        for images in self.parts.ranges:
            self.parts.path(images).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or something in it is not ours
            self.parts.folder.rmdir()

    def png_path(self, index: int) -> Path:
        """png/<class>/<index>.png, with so many digits that names sort as numbers do: readers number classes so."""
        label, number = (f"{n:0{digits}d}" for n, digits in zip((self.labels[index], index), self._digits, strict=True))
        return self._outdir / "png" / label / f"{number}.png"

    def _lacking(self) -> np.ndarray:
        """The images that a wanted file lacks: bool [N]."""
        lacking = ~self._has_png if self._wants_png else np.zeros(len(self.labels), bool)
        lacking[:_GRID] |= not self.grid.exists()
        return lacking | (self._wants_npz and not self.npz.exists())

    def _read(self, remove: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index of the first, uint8 [n, H, W, 3]) in ascending order, no image twice.

        remove: a part goes when the next one is asked for. Raises ValueError for a file that cannot be read.
        """
        if self.npz.exists():
            with _naming(self.npz):
                file = Npz(self.npz)
                self._require_images(*file.header("arr_0"), len(self.labels))
                for number, pixels in enumerate(file.batches("arr_0", _CHUNK)):
                    yield number * _CHUNK, pixels
            return
        for images, new in self.parts.in_order(len(self.labels)):
            path = self.parts.path(images)
            with _naming(path):
                pixels = self._load(path, images)
            yield images.start + new.start, pixels[new]
            if remove:
                path.unlink()

    def _load(self, path: Path, images: range) -> np.ndarray:
        pixels = np.load(path, mmap_mode="r")
        self._require_images(pixels.shape, pixels.dtype, len(images))
        if images.stop > len(self.labels):
            raise ValueError(f"got images up to {images.stop}, want {len(self.labels)} in all")
        return pixels

    def _require_images(self, shape: tuple[int, ...], dtype: np.dtype, number: int) -> None:
        if (shape, dtype) != ((number, *self.shape), np.uint8):
            raise ValueError(f"got {dtype} {list(shape)}, want uint8 {[number, *self.shape]}")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file cannot be read, and what to do."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the same command makes it again") from error


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Convert float images [N, 3, H, W] in [0, 1] to uint8 [N, H, W, 3] the way torchvision's `save_image` does.

    `x * 255 + 0.5`, clamped to [0, 255], then truncated: rounding to the nearest level with ties going up. On the
    images' device; what becomes of NaN is undefined.
    """
    # float32 also for 16-bit inputs: bfloat16 cannot hold every level between 128 and 255.
    levels = images.float().mul(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def captions(labels: Sequence[int], names: Sequence[str]) -> list[str]:
    """What stands below images of these classes: the first of a class's names, or its number; without names nothing.

    Pillow's own font has the letters of ASCII: others lose their accents, or are left out.
    """
    firsts = [unicodedata.normalize("NFKD", name.split(",")[0]) for name in names]
    known = dict(enumerate(" ".join(name.encode("ascii", "ignore").decode().split()) for name in firsts))
    return [known.get(label) or str(label) for label in map(int, labels)] if names else []


def save_grid(images: np.ndarray, path: str | os.PathLike, below: Sequence[str] = ()) -> None:
    """Write uint8 images [N, H, W, 3] as the tiles of one PNG: a square of rows, on white, small images enlarged.

    below: a text for each, cut to its width; without any there is no room for them.
    """
    num, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(num))
    scale = max(1, _LARGEST_ENLARGED_TILE // max(height, width))
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    room = _CAPTION if below else 0
    step_y, step_x = height * scale + _PADDING + room, width * scale + _PADDING
    canvas = np.full((math.ceil(num / columns) * step_y + _PADDING, columns * step_x + _PADDING, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * step_y + _PADDING, index % columns * step_x + _PADDING
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for index, text in enumerate(below):
        place = index % columns * step_x + _PADDING, (index // columns + 1) * step_y - room
        draw.text(place, _fitting(draw, text, width * scale), fill=(0, 0, 0))
    save_png(np.asarray(picture), path)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of a text as fits."""
    shown = text
    while text and draw.textlength(shown) > width:
        text = text[:-1]
        shown = f"{text}.."
    return shown


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Write one uint8 image [H, W, 3]; the file appears whole or not at all."""
    with open_atomically(path) as file:
        Image.fromarray(image).save(file, format="PNG")
