"""Whose fault it is that an image cannot be read: its own, or that of the disk, the machine or this process."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Literal

# Says something of one file, as long as the folder of all of them is there.
_OF_THE_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM),
}
# What a disk answers that may come back.
_AWAY = {
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN, errno.ENXIO),
}
_REMEDIES = {
    errno.EMFILE: "raise the limit of this process (ulimit -n 4096), or use fewer workers and readers",
    errno.ENFILE: "the whole machine has too many open: end other programs, or have fs.file-max raised",
    errno.ENOMEM: "use fewer workers and readers, a smaller batch, or raise the limit (ulimit -v, the job's memory)",
    errno.EAGAIN: "use fewer workers and readers, or raise the limit of processes (ulimit -u)",
    errno.ENOSPC: "make room, on the disk that is written to or in /dev/shm, where workers have their semaphores",
}
# Less than this is not enough to decode: a decoder that gets no memory may call the image broken.
_ROOM = 1 << 27


class DataError(ValueError):
    """Too many images of a dataset cannot be decoded."""


class ReadError(OSError):
    """Images cannot be read, and it is not their fault; one line says what to do."""


def whose_fault(error: Exception, root: Path) -> Literal["image", "disk", "machine"]:
    """Whose fault `error` is, of reading or decoding an image below `root`; a disk that is away may come back."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in _AWAY or (error.errno in _OF_THE_FILE and not _is_there(root)):
            return "disk"
        return "image" if error.errno in _OF_THE_FILE else "machine"
    # what a damaged file makes Pillow raise is no closed list
    return "machine" if isinstance(error, (MemoryError, ImportError)) or not _has_room() else "image"


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that no more memory, files or processes are to be had."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _REMEDIES)


def read_error(error: Exception, task: str) -> ReadError:
    """Return the error to raise for `error`, which kept this process from doing `task`."""
    number = getattr(error, "errno", None)
    if number is None and (isinstance(error, MemoryError) or not _has_room()):
        number = errno.ENOMEM
    reason = f"{type(error).__name__}: {error}" if number is None else os.strerror(number)
    remedy = _REMEDIES.get(number, "a fault of this machine or its disks, not of the image")
    return ReadError(f"cannot {task} ({reason}): {remedy}. Then give the same command again")


def too_many_bad_files(
    bad_files: dict[str, str],
    total: int,
    max_bad_fraction: float,
    remedy: str = "Restore or delete these files (or permit this user to read them), or let training allow more of "
    "them with --data.max_bad_fraction.",
) -> DataError:
    """Return the error that names the first few of `bad_files` (relative path -> reason) and the `remedy`."""
    first = "; ".join(f"{printable(path)} ({reason})" for path, reason in list(bad_files.items())[:3])
    more = "; ..." if len(bad_files) > 3 else ""
    return DataError(
        f"{len(bad_files)} of {total} images ({len(bad_files) / total:.2%}) cannot be decoded, wanted at most "
        f"{max_bad_fraction:.2%}: {first}{more}. {remedy}"
    )


def printable(path: str) -> str:
    """Return `path` on one line: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)


def _is_there(root: Path) -> bool:
    """Whether anything can be seen in `root`: where a disk was mounted, an empty folder is left."""
    try:
        return bool(os.listdir(root))
    except OSError:
        return False


def _has_room() -> bool:
    try:
        mmap.mmap(-1, _ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True
