"""What all outputs of `prepare-data` share: the crop, the folder that is claimed, the manifest that is finished."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path

from epg_fast.data.loading.views import center_crop
from epg_fast.data.sources import open_images
from epg_fast.data.sources.decoding import decode_image
from epg_fast.data.sources.faults import too_many_bad_files
from epg_fast.data.sources.manifest import MANIFEST, count_classes, read_manifest, write_manifest
from epg_fast.data.sources.source import ImageSource, images_of
from epg_fast.files import OutputFolder

MAX_BAD_FRACTION = 0.01


def open_source(source: Path, outdir: Path, image_size: int, workers: int) -> ImageSource:
    """Return the images of `source`. Raises ValueError for sizes without meaning and an `outdir` in `source`."""
    if image_size < 1 or workers < 0:
        raise ValueError(f"image_size, workers: got {image_size}, {workers}, wanted at least 1 and at least 0")
    if outdir.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"outdir: {outdir} is or lies in the source {source}; choose a folder outside")
    with images_of("source"):
        return open_images(source)


@contextlib.contextmanager
def claimed(outdir: Path, source: Path, images: ImageSource, settings: dict) -> Iterator[tuple[dict, dict | None]]:
    """Lock `outdir`; gives a new manifest, and that of an earlier run with the same images and settings, if any.

    Raises ValueError for a folder with anything else, or in which another process is at work.
    """
    now = settings | {"source": str(source.resolve()), "source_fingerprint": images.fingerprint()}
    with OutputFolder(outdir, "prepare-data", MANIFEST) as folder:
        before = None
        if folder.check():
            before = read_manifest(outdir)
            if before is None:
                raise folder.unreadable("it was not written by prepare-data")
            # a source that moved is the same; and one that grew gets the crops that a folder lacks
            ignored = {"source"} if before["source_fingerprint"] == now["source_fingerprint"] else set()
            if settings["layout"] == "folder" and before.get("source") == now["source"]:
                ignored = {"source_fingerprint"}
            folder.require_same({name: before.get(name) for name in now}, now, ignored)
        folder.lock()
        _remove_leftovers(outdir)
        try:
            yield (
                {"complete": False, **now, "classes": images.classes, "bad_files": {}, **count_classes([], [])},
                before,
            )
        except BaseException:
            _remove_leftovers(outdir)  # of processes that were ended
            raise


def _remove_leftovers(outdir: Path) -> None:
    for leftover in outdir.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def finish_manifest(outdir: Path, manifest: dict, total: int, max_bad_fraction: float) -> None:
    """Write `manifest`, which is complete unless too many of the `total` images are bad: `DataError` is raised then."""
    bad = len(manifest["bad_files"])
    manifest["complete"] = bad <= max_bad_fraction * total and bad < total
    write_manifest(outdir, manifest)
    if not manifest["complete"]:
        # rounded up, so that it is enough
        flag = f", or leave them out with --max_bad_fraction {math.ceil(1000 * bad / total) / 1000}"
        remedy = f"Restore these files{flag if bad < total else ''}; then give the command again."
        raise too_many_bad_files(manifest["bad_files"], total, max_bad_fraction, remedy)


def crop_and_encode(content: bytes, image_size: int, **options) -> bytes:
    """Return the centre crop of an encoded image as a file; `options` are those of Pillow's `save`."""
    crop = center_crop(decode_image(content), image_size)
    # colour profile and the like would be copied into the file
    crop.info.clear()
    buffer = io.BytesIO()
    crop.save(buffer, **options)
    return buffer.getvalue()
