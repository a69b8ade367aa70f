"""Read npz files that may be larger than memory, or broken."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy


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

    def images(self) -> tuple[int, int, int]:
        """(N, H, W) of `arr_0`, uint8 [N, H, W, 3]: the layout of ADM's evaluation and of `epg_fast sample`."""
        shape, dtype = self.header("arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{self.path}: arr_0 must be uint8 [N, H, W, 3] with N > 0, got {dtype} {list(shape)}")
        return shape[:3]

    def array(self, name: str) -> np.ndarray:
        """The whole array."""
        with self._open(name) as (file, shape, dtype):
            size = math.prod(shape) * dtype.itemsize
            # The end of a member is where its checksum is compared.
            content = file.read(size) + file.read(1)
            return np.frombuffer(self._complete(name, content, size), dtype).reshape(shape)

    def batches(self, name: str, batch_size: int) -> Iterator[np.ndarray]:
        """The rows of an array in order, `batch_size` of them at a time."""
        with self._open(name) as (file, shape, dtype):
            row = math.prod(shape[1:]) * dtype.itemsize
            for start in range(0, shape[0], batch_size):
                num = min(batch_size, shape[0] - start)
                content = file.read(num * row) + (file.read(1) if start + num == shape[0] else b"")
                yield np.frombuffer(self._complete(name, content, num * row), dtype).reshape(num, *shape[1:])

    def _complete(self, name: str, content: bytes, size: int) -> bytes:
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
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: expected a complete npz file ({error}); write or fetch it again") from error
        except (KeyError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{self.path}: cannot be read as an npz file ({error})") from error
        except ValueError as error:
            named = str(error) if str(error).startswith(str(self.path)) else f"{self.path}: {error}"
            raise ValueError(named) from error
