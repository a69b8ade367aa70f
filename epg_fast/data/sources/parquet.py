"""The images in parquet files, as the Hugging Face hub hands datasets out, read in place."""

from __future__ import annotations

import fnmatch
import functools
import glob
import json
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from epg_fast.data.sources.names import files_in, is_parquet, split_of, splits
from epg_fast.data.sources.source import MOST_CLASSES, NO_LABELS, ImageSource, existing, warn_of_no_labels

# Bytes of row groups that a process keeps; one row group in any case.
_CACHE = 1 << 28
# Files whose footers a process keeps.
_FOOTERS = 128

logger = logging.getLogger("epg_fast")


class ImageParquet(ImageSource):
    """The images in a folder of parquet files, in a single one, or in those of a pattern (`data/test-*.parquet`).

    The images, encoded, are the column `image`, the class indices the integer column `label`; under other names, the
    only column that can be either. An image is a struct with `bytes`, as the hub's, or bytes alone. Class names are
    those in the hub's metadata of the column (`ClassLabel`), else "0", "1", ... up to the largest. Without a label, or
    with -1 in the place of each, there is one class (`NO_LABELS`), with a warning.
    Of a folder with several splits, told by the names of the files, the training set is read, and a log line says so.

    Attributes:
        root: the folder of the files.
        paths: `<file>/<row>`, files sorted, rows from 0.
        labels: int64 array.
        classes: names.

    Parquet is read by row groups. A process keeps the newest up to 256 MiB, or one. Objects may be used by threads,
    forked and pickled. Raises ImportError without pyarrow; ValueError for files that are damaged or have no rows, other
    columns than these or several that could be meant, labels that are no class indices, and splits without a training
    set.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            message = f"{path} is parquet, and pyarrow, which reads it, cannot be imported ({error})"
            raise ImportError(f"{message}; pip install pyarrow") from None
        self.root, self._files = _find_files(path)
        tables = [_Table.read(self.root / name) for name in self._files]
        for name, table in zip(self._files, tables, strict=True):
            if table.columns != tables[0].columns:
                remedy = "pass one of them, or move the others away"
                raise ValueError(f"{self.root / name} has other columns or class names than {self._files[0]}; {remedy}")
        self.paths = [
            f"{name}/{row:06d}"
            for name, table in zip(self._files, tables, strict=True)
            for row in range(len(table.labels))
        ]
        if not self.paths:
            raise ValueError(f"no images in {path}: {len(tables)} parquet files without rows; get them again")
        self._column = tables[0].columns.image
        self.classes, self.labels = self._label(path, tables)
        groups = [(i, number, *group) for i, table in enumerate(tables) for number, group in enumerate(table.groups)]
        self._places = [(i, number) for i, number, rows, _ in groups if rows]
        rows, self._bytes = np.array([group[2:] for group in groups if group[2]], np.int64).T
        self._first = np.cumsum(rows) - rows
        if self._bytes.sum() > _CACHE and len(rows) < len(self):
            self.slow_at_random = (
                f"{path} is read by row groups (of {len(self) / len(rows):.0f} images, "
                f"{self._bytes.mean() / 1e6:.1f} MB), a whole one for almost every image; `epg-fast prepare-data "
                f"--source {path}` reads them in turn, and writes shards that are read image by image"
            )

    def read(self, i: int) -> bytes:
        """Return the encoded image `i`. Raises OSError if it has no bytes, or its row group cannot be read."""
        group = int(np.searchsorted(self._first, i, side="right")) - 1
        content = self._group(group)[int(i - self._first[group])].as_py()
        if content is None:
            raise OSError(f"the column {self._column} has no bytes in this row")
        return content

    def mixed(self, rng: np.random.Generator) -> np.ndarray:
        """See `ImageSource`: row groups are shuffled, then the images of as many as a process keeps."""
        groups = rng.permutation(len(self._bytes))
        window = np.empty(len(groups), np.int64)
        window[groups] = np.cumsum(self._bytes[groups]) // (_CACHE // 2)
        images = rng.permutation(len(self))
        of_images = window[np.searchsorted(self._first, images, side="right") - 1]
        return images[np.argsort(of_images, kind="stable")]

    def _label(self, path: str | os.PathLike, tables: list[_Table]) -> tuple[list[str], np.ndarray]:
        """Return the class names and each image's label."""
        _, column, names = tables[0].columns
        labels = np.concatenate([table.labels for table in tables])
        if (labels == -1).all():
            warn_of_no_labels(path)
            return list(NO_LABELS), np.zeros(len(labels), np.int64)
        limit = len(names) or MOST_CLASSES
        if wrong := np.flatnonzero((labels < 0) | (labels >= limit)).tolist():
            raise ValueError(
                f"{self.root / self.paths[wrong[0]]} has the {column} {labels[wrong[0]]}, wanted a class index from 0 "
                f"to {limit - 1}; mend it, or leave the row out"
            )
        return list(names) or [str(label) for label in range(labels.max() + 1)], labels

    def _read_group(self, group: int):
        """The images of a row group, a pyarrow.ChunkedArray of bytes."""
        import pyarrow.parquet as pq

        file, number = self._places[group]
        path = self.root / self._files[file]
        # Neither threads, which a fork would lose, nor files that stay open: to open one takes far less than to read.
        with pq.ParquetFile(path, metadata=self._footer(path), pre_buffer=False) as opened:
            column = opened.read_row_group(number, columns=[self._column], use_threads=False).column(0)
        return column.flatten()[0] if self._column.endswith(".bytes") else column

    @functools.cached_property
    def _group(self):
        return functools.lru_cache(max(1, _CACHE // int(self._bytes.max() + 1)))(self._read_group)

    @functools.cached_property
    def _footer(self):
        import pyarrow.parquet as pq

        return functools.lru_cache(_FOOTERS)(pq.read_metadata)


class _Columns(NamedTuple):
    """Where a file has what is wanted: the column `image` or `image.bytes`, that of the label, and the class names."""

    image: str
    label: str | None
    names: tuple[str, ...]


class _Table(NamedTuple):
    """What one file holds, without its images."""

    columns: _Columns
    labels: np.ndarray
    """Of all rows, int64, -1 where there is none."""
    groups: list[tuple[int, int]]
    """Rows, and bytes of the images, of each row group."""

    @classmethod
    def read(cls, path: Path) -> _Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                footer, columns = file.metadata, _choose_columns(file.schema_arrow, path)
                labels = np.full(footer.num_rows, -1, np.int64)
                if columns.label is not None:
                    column = file.read(columns=[columns.label], use_threads=False).column(0)
                    labels[:] = column.cast(pa.int64()).fill_null(-1).to_numpy()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); get it again (git clone leaves "
                "pointers in the place of large files: git lfs pull)"
            ) from None
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        return cls(columns, labels, [(group.num_rows, _size(group, columns.image)) for group in groups])


def _size(group, column: str) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _choose_columns(schema, path: Path) -> _Columns:
    """Those called `image` and `label`, or the only ones that can be meant."""
    import pyarrow as pa

    images, numbers = {}, {field.name: field.name for field in schema if pa.types.is_integer(field.type)}
    for field in schema:
        inner = field.type.get_field_index("bytes") if pa.types.is_struct(field.type) else -1
        kind = field.type if inner < 0 else field.type.field(inner).type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            images[field.name] = field.name if inner < 0 else f"{field.name}.bytes"
    image, label = (
        name if name in found else next(iter(found)) if len(found) == 1 else None
        for name, found in (("image", images), ("label", numbers))
    )
    if image is None or (label is None and (numbers or "label" in schema.names)):
        found = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:12]) or "none"
        raise ValueError(
            f"{path} has the columns {found}; wanted one of encoded images, `image`, and one of class indices, "
            "`label`; write it again with these names (pyarrow: `rename_columns`)"
        )
    return _Columns(images[image], label, _class_names(schema, label))


def _class_names(schema, label: str | None) -> tuple[str, ...]:
    """Those of a `ClassLabel` in the hub's metadata of a file; empty for anything but a list of names, each once."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return ()
    return tuple(names) if len({*names}) == len(names) else ()


def is_pattern(path: str | os.PathLike) -> bool:
    """Whether `path` is a pattern of names of parquet files in a folder."""
    name = os.path.basename(os.fspath(path))
    return is_parquet(name) and glob.escape(name) != name and not Path(path).exists()


def _find_files(path: str | os.PathLike) -> tuple[Path, list[str]]:
    """Return the folder and the sorted names of the files at `path`."""
    if is_pattern(path):
        folder, pattern = existing(Path(path).parent), Path(path).name
        names = sorted(fnmatch.filter(os.listdir(folder), pattern))
        if not names:
            raise ValueError(f"no file in {folder} has a name like {pattern}; check the spelling")
        return folder, names
    path = existing(path)
    if not path.is_dir():
        return path.parent, [path.name]
    return path, _training_set(path, files_in(path, is_parquet, "parquet files"))


def _training_set(folder: Path, names: list[str]) -> list[str]:
    """Those of the files that are read when there are several splits: the training set."""
    if not splits(name.split(".")[0] for name in names):
        return names
    training = [name for name in names if split_of(name.split(".")[0]) == "train"]
    others = [name for name in names if name not in training]
    pattern = folder / re.sub("[0-9]+", "*", others[0])
    if not training:
        raise ValueError(
            f"{folder} has the files of several splits ({others[0]}, {others[-1]}) and no training set; pass those of "
            f"one as a pattern, such as '{pattern}'"
        )
    logger.info(
        "%s: the training set is read, files such as %s (%d), and no other split, such as %s (%d): '%s' reads those",
        *(folder, training[0], len(training), others[0], len(others), pattern),
    )
    return training
