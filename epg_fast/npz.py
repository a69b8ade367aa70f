"""npz files: read though they may be larger than memory, or broken; written image by image."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from epg_fast.files import open_atomically


class Npz:
    """The arrays of an npz file, read when asked for: whole, or row by row without holding more than a few rows.

    `names`: the arrays in the file. Compressed files work as well. Every method raises ValueError, with the name of the
    file, for what is missing, damaged or made of Python objects, which are never unpickled.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such file")
        with self._explained(), zipfile.ZipFile(path) as archive:
            self.names = sorted(name.removesuffix(".npy") for name in archive.namelist())

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of an array; its values are not read."""
        with self._open(name) as (_, shape, dtype):
            return shape, dtype

    def array(self, name: str) -> np.ndarray:
        """The whole array."""
        with self._open(name) as (file, shape, dtype):
            return np.frombuffer(self._read(file, name, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

    def batches(self, name: str, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of an array in order, `batch_size` of them at a time."""
        with self._open(name) as (file, shape, dtype):
            row = math.prod(shape[1:]) * dtype.itemsize
            for start in range(0, shape[0], batch_size):
                num = min(batch_size, shape[0] - start)
                content = self._read(file, name, num * row, last=start + num == shape[0])
                yield np.frombuffer(content, dtype).reshape(num, *shape[1:])

    def _read(self, file: BinaryIO, name: str, size: int, last: bool = True) -> bytes:
        """The next bytes of an array; the last ones end where its checksum is compared."""
        content = file.read(size) + (file.read(1) if last else b"")
        if len(content) != size:
            more = "fewer" if len(content) < size else "more"
            raise ValueError(f"{self.path}: {name} holds {more} bytes than its header says; write the file again")
        return content

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[BinaryIO, tuple[int, ...], np.dtype]]:
        if name not in self.names:
            raise ValueError(f"{self.path}: expected {name}, found {self.names}")
        with self._explained(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
            if read is None:
                raise ValueError(f"{name} has version {version} of the npy format, wanted 1.0 or 2.0")
            shape, fortran, dtype = read(file)
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, wanted numbers; save it as a plain array")
            if fortran and len(shape) > 1:
                raise ValueError(f"{name} is stored by columns; save it with np.ascontiguousarray")
            yield file, shape, dtype

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the file in whatever zipfile and numpy raise for a broken one."""
        try:
            yield
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{self.path}: expected a complete npz file ({error}); write or fetch it again") from error
        except ValueError as error:
            named = str(error) if str(error).startswith(str(self.path)) else f"{self.path}: {error}"
            raise ValueError(named) from error


def write_npz(
    path: str | os.PathLike,
    chunks: Iterable[np.ndarray],
    labels: np.ndarray,
    shape: tuple[int, int, int],
    metadata: dict,
) -> None:
    """Write samples in the layout of ADM's evaluation: `arr_0` images uint8 [N, H, W, 3], `arr_1` labels int64 [N].

    `chunks`: uint8 [n, H, W, 3], N images in all, one chunk in memory at a time. `labels`: [N]. `shape`: (H, W, 3).
    `metadata` (what JSON holds, finite numbers) becomes one JSON text in the entry `metadata`. Equal input gives equal
    bytes; the file appears whole or not at all.
    Source: https://github.com/openai/guided-diffusion/tree/main/evaluations
    """
    text = json.dumps(metadata, allow_nan=False)
    with open_atomically(path, sync=True) as file, zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "arr_0") as member:
            write_header(member, (len(labels), *shape))
            written = 0
            for chunk in chunks:
                assert chunk.dtype == np.uint8 and chunk.shape[1:] == tuple(shape)
                member.write(np.ascontiguousarray(chunk))
                written += len(chunk)
            assert written == len(labels)
        for name, array in (("arr_1", np.asarray(labels, np.int64)), ("metadata", np.array(text))):
            with _member(archive, name) as member:
                npy.write_array(member, array, allow_pickle=False)


def write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """The beginning of a npy file of uint8 values, which follow."""
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # A ZipInfo of its own has a fixed date; ZIP64, because the size is not known to the format before it is written.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
