"""Files that appear whole or not at all, and output folders that one command at a time fills and goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

log = logging.getLogger("epg_fast")

# Of macOS and Windows, of storage boxes (Synology, QNAP, NetApp), of file systems, of Python.
_JUNK = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),
    *("lost+found", "__pycache__"),
}
# What JSON's own words are to Python.
_WORDS = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left there by an operating system or a storage box."""
    return name.startswith(".") or name.lower() in _JUNK


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike, sync: bool = False) -> Iterator[BinaryIO]:
    """Open `path` for writing so that a reader, or a run after a crash, sees the whole file or none; folders are made.

    sync: wait until it is on the disk, because what it was made from will be removed.

    Raises OSError that names `path` when the disk does not take it.
    """
    path = Path(path)
    # process ids repeat between the hosts of a shared file system
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            named = OSError(f"cannot write {path}: {error.strerror or error}")
            named.errno = error.errno
            raise named from error
        raise


def write_atomically(path: str | os.PathLike, content: bytes | str, sync: bool = False) -> None:
    """Write `content` to `path`; see `open_atomically`."""
    with open_atomically(path, sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits; a file that has not changed is read once by a process."""
    found = os.stat(path)
    return _sha256(os.path.realpath(path), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path, busy: str) -> IO:
    """Open the file for this process alone: the lock is held until it is closed, or the process ends.

    Raises ValueError, which says `busy`, when another process holds it. A file system without locks is warned of.
    """
    file = open(path, "ab")  # noqa: SIM115 (held until the end)
    try:
        # lockf, not flock: decoding processes would inherit the latter and hold it when this one has been killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(busy) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): do not start this command twice", path.parent, error)
    return file


def check_writable(path: Path, option: str) -> None:
    """Raise ValueError unless a file or folder can be made at `path`, or in the folder that is there; none is left."""
    above = path
    try:
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=above if above.is_dir() or above != path else above.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: {path} cannot be written ({above}: {error.strerror}); choose another --{option}"
        ) from None


def differences(before: Mapping, now: Mapping, ignored: Collection[str] = ()) -> str:
    """What is not as before, `name was 1, now 2; ...`; empty for nothing. Mappings inside are compared item by item."""
    before, now = flat(before), flat(now)
    found = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not any(f"{name}.".startswith(f"{free}.") for free in ignored)
    ]
    return "; ".join(found[:4]) + ("; ..." if len(found) > 4 else "")


def as_json(value):
    """`value` as JSON reads it back; numbers that are not finite, for which it has no word, as text such as "inf"."""
    return json.loads(json.dumps(value), parse_constant=lambda word: _WORDS[word])


def flat(tree: Mapping, prefix: str = "") -> dict:
    """Values by their names, those of mappings inside joined by dots."""
    values = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


class OutputFolder(contextlib.ExitStack):
    """The folder that a command fills: its marker file holds the settings, and the same command goes on there.

    One process at a time may write: `lock` lasts until the `with` block ends, or the process.
    """

    def __init__(self, path: str | os.PathLike, command: str, marker: str):
        """command: whose folder it is, for messages. marker: name of the file that says so."""
        super().__init__()
        self.path, self.command = Path(path), command
        self.marker = self.path / marker
        self._lock: IO | None = None

    def check(self) -> bool:
        """Whether the folder is one of this command; ValueError for anything but that and a new or empty folder."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"outdir: {self.path} is a file, wanted a folder; choose another --outdir")
        if self.marker.exists():
            return True
        check_writable(self.path, "outdir")
        for _, folders, files in os.walk(self.path):
            if not all(map(is_junk, files)):
                raise ValueError(
                    f"outdir: {self.path} is not empty and not a folder of {self.command} (no {self.marker.name}); "
                    "choose another --outdir"
                )
            folders[:] = [name for name in folders if not is_junk(name)]
        return False

    def require_same(self, before: Mapping, now: Mapping, ignored: Collection[str] = ()) -> None:
        """Raise ValueError, which says what differs, unless the settings are those of `before`."""
        if changed := differences(before, now, ignored):
            raise ValueError(
                f"outdir: {self.path} was made with other settings ({changed}); "
                "give those again, or choose another --outdir"
            )

    def unreadable(self, why: object, path: Path | None = None) -> ValueError:
        """What to raise when a file of the folder, by default the marker, cannot be read."""
        where = path or self.marker
        return ValueError(f"outdir: {where} cannot be read ({why}); restore it, or choose another --outdir")

    def read(self, name: str | None = None) -> dict:
        """What the marker, or another JSON file of the folder, says; nothing if it is not there.

        Raises ValueError when it is damaged.
        """
        path = self.path / (name or self.marker.name)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise self.unreadable(error, path) from None
        if not isinstance(content, dict):
            raise self.unreadable("no mapping", path)
        return content

    def write(self, name: str, content: dict) -> None:
        """Write a JSON file of the folder."""
        write_atomically(self.path / name, json.dumps(content, indent=2) + "\n", sync=True)

    def lock(self) -> bool:
        """Make the folder and lock it; returns whether it was not locked yet.

        Raises ValueError when another process has locked it, OSError when it cannot be written.
        """
        if self._lock is not None and not self._lock.closed:
            return False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            busy = f"another {self.command} is at work in {self.path}; wait for it, stop it or choose another --outdir"
            self._lock = self.enter_context(lock_file(self.path / ".lock", f"outdir: {busy}"))
        except OSError as error:
            raise OSError(f"cannot write to {self.path}: {error.strerror}; choose another --outdir") from error
        return True
