"""The images that an output folder holds: in samples.npz, in parts (`parts/<start>_<stop>.npy`) or as PNG files.

`parts/<start>_<stop>.done` stands for a batch that is kept as PNG files only. Until all images are drawn, PNG files
alone do not count: a batch of which a killed command has written some is drawn again as a whole, since the last bits of
an image depend on those beside it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from epg_fast.files import open_atomically
from epg_fast.sampling.writers import png_path, save_png

log = logging.getLogger("epg_fast")

_PART = re.compile(r"(\d{8})_(\d{8})\.(npy|done)")
_PNG = re.compile(r"(\d{6,})\.png")
_CHUNK = 64


def runs(values: np.ndarray) -> Iterator[range]:
    """Ascending integers [n] as ranges without gaps."""
    if len(values):
        for run in np.split(values, np.flatnonzero(np.diff(values) != 1) + 1):
            yield range(int(run[0]), int(run[-1]) + 1)


class Images:
    """Where each of the images 0..N-1 of an output folder is. Images that two files hold are equal but for rounding.

    labels: integers [N]. size: height and width in pixels.
    """

    def __init__(self, outdir: Path, labels: np.ndarray, size: int):
        self.npz, self.grid, self.parts, self.png = (outdir / n for n in ("samples.npz", "grid.png", "parts", "png"))
        self.outdir, self.labels, self.shape = outdir, labels, (size, size, 3)
        self._classes = int(labels.max()) + 1
        self.has_png = np.zeros(len(labels), bool)
        self._done = np.zeros(len(labels), bool)
        self._ranges: list[range] = []

    def scan(self) -> None:
        """Find out what is there. Parts that are damaged are named and removed, as are files a killed run began."""
        for folder in (self.outdir, self.parts, *self._class_folders()):
            for left in folder.glob(".*.tmp"):
                left.unlink()
        self._scan_pngs()
        self._done[:] = self.grid.exists() or self.has_png.all()
        self._ranges = []
        for path in sorted(self.parts.glob("*")):
            match = _PART.fullmatch(path.name)
            if match is None:
                continue
            images = range(int(match[1]), int(match[2]))
            if match[3] == "done":
                self._done[images.start : images.stop] = True
            elif self._is_whole(path, images):
                self._ranges.append(images)
            else:
                log.warning("%s is damaged: its images are drawn again", path)
                path.unlink()

    def finished(self, npz: bool, png: bool) -> bool:
        """Whether the wanted files are there and nothing else is left to do."""
        self._scan_pngs()
        if self.npz.exists() and not zipfile.is_zipfile(self.npz):
            raise ValueError(f"{self.npz} is damaged; delete it, and the same command makes it again")
        wanted = (not npz or self.npz.exists()) and (not png or self.has_png.all())
        return bool(wanted and self.grid.exists() and not self.parts.exists())

    def held(self) -> np.ndarray:
        """Which images there are: bool [N]."""
        return self._owners() >= 0 if not self.npz.exists() else np.ones(len(self.labels), bool)

    def missing(self, batch_size: int) -> list[range]:
        """The images to draw, none across a multiple of `batch_size`, whole batches first.

        A batch is the same however many ranks share the work, and so are its last bits on one kind of machine: any
        share of them, cut every `batch_size` images, falls into the same batches as long as whole ones are missing.
        """
        gaps = np.flatnonzero(~self.held())
        batches = np.split(gaps, np.flatnonzero(np.diff(gaps // batch_size)) + 1)
        return sorted((run for batch in batches for run in runs(batch)), key=len, reverse=True)

    def save_part(self, start: int, pixels: np.ndarray) -> None:
        """Keep uint8 images [n, H, W, 3], of which the first has index `start`."""
        with open_atomically(self._part(range(start, start + len(pixels)))) as file:
            file.write(self._header(len(pixels)))
            file.write(np.ascontiguousarray(pixels).data)  # np.save would not say why a disk does not take it

    def save_done(self, images: range) -> None:
        """Note that these images are finished as PNG files."""
        with open_atomically(self._part(images).with_suffix(".done")):
            pass

    def save_png(self, index: int, pixels: np.ndarray) -> None:
        """Write one uint8 image [H, W, 3] as a PNG file."""
        save_png(pixels, self._png(index))

    def take_in(self, images: range, part: bool, png: bool) -> bool:
        """Count images that some rank has written as a part, as PNG files or as both; False if they are not there."""
        if part and not self._is_whole(self._part(images), images):
            return False
        # By name: the listing of a folder on another machine may be older than its files.
        if png and not all(self._png(i).exists() for i in images):
            return False
        self._ranges += [images] if part else []
        if png:
            self.has_png[images.start : images.stop] = self._done[images.start : images.stop] = True
        return True

    def read(self, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index of the first, uint8 [n, H, W, 3]) of the images `wanted` (bool [N]) in order, a part at a time.

        Raises ValueError for a file that cannot be read.
        """
        if self.npz.exists():
            yield from self._read_npz(wanted)
            return
        owners = self._owners()
        chosen = np.flatnonzero(wanted)
        breaks = (np.diff(chosen) != 1) | (np.diff(owners[chosen]) != 0)
        for run in np.split(chosen, np.flatnonzero(breaks) + 1):
            if not len(run):
                continue
            owner, start = owners[run[0]], int(run[0])
            assert owner >= 0
            if owner < len(self._ranges):
                images = self._ranges[owner]
                with _naming(self._part(images)):
                    pixels = np.load(self._part(images), mmap_mode="r")
                yield start, pixels[start - images.start :][: len(run)]
            else:
                for index in run.tolist():
                    yield index, self._read_png(index)[None]

    def discard_parts(self) -> None:
        """Remove the parts, once what was to be made of them is written."""
        for path in self.parts.glob("*"):
            if _PART.fullmatch(path.name):
                path.unlink()
        with contextlib.suppress(OSError):  # not there, or something in it is not ours
            self.parts.rmdir()

    def _owners(self) -> np.ndarray:
        """Which of `_ranges` has image i, len(_ranges) for a PNG file, -1 for none: int64 [N]."""
        owners = np.where(self.has_png & self._done, len(self._ranges), -1)
        for k, images in enumerate(self._ranges):
            owners[images.start : images.stop] = k
        return owners

    def _part(self, images: range) -> Path:
        return self.parts / f"{images.start:08d}_{images.stop:08d}.npy"

    def _png(self, index: int) -> Path:
        return png_path(self.png, int(self.labels[index]), index, self._classes, len(self.labels))

    def _header(self, number: int) -> bytes:
        buffer = io.BytesIO()
        shape = (number, *self.shape)
        np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return buffer.getvalue()

    def _is_whole(self, path: Path, images: range) -> bool:
        """Whether the file is a part of these images, by its header and its length."""
        if not images or images.stop > len(self.labels):
            return False
        header = self._header(len(images))
        try:
            with open(path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                return file.read(len(header)) == header and length == len(header) + len(images) * math.prod(self.shape)
        except OSError:
            return False

    def _class_folders(self) -> list[Path]:
        return [path for path in self.png.glob("*") if path.is_dir()]

    def _scan_pngs(self) -> None:
        self.has_png[:] = False
        for folder in self._class_folders():
            for entry in os.scandir(folder):
                match = _PNG.fullmatch(entry.name)
                index = int(match[1]) if match else len(self.labels)
                # An empty file is what a power failure can leave.
                if index < len(self.labels) and self._png(index).parent == folder and entry.stat().st_size:
                    self.has_png[index] = True

    def _read_png(self, index: int) -> np.ndarray:
        with _naming(self._png(index)):
            with Image.open(self._png(index)) as file:
                pixels = np.asarray(file)
            if pixels.shape != self.shape or pixels.dtype != np.uint8:
                raise ValueError(f"got {pixels.dtype} {list(pixels.shape)}, want uint8 {list(self.shape)}")
        return pixels

    def _read_npz(self, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        bytes_each = math.prod(self.shape)
        with _naming(self.npz), zipfile.ZipFile(self.npz) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if (shape, dtype) != ((len(self.labels), *self.shape), np.uint8):
                raise ValueError(f"got {dtype} {list(shape)}, want uint8 {[len(self.labels), *self.shape]}")
            first = member.tell()
            for run in runs(np.flatnonzero(wanted)):
                for start in range(run.start, run.stop, _CHUNK):
                    number = min(_CHUNK, run.stop - start)
                    member.seek(first + start * bytes_each)
                    pixels = np.frombuffer(member.read(number * bytes_each), np.uint8)
                    yield start, pixels.reshape(number, *self.shape)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file cannot be read, and what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the same command makes it again") from error
