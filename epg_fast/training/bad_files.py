"""Files that cannot be decoded, as a matter of all ranks: one list, one limit, one error."""

from __future__ import annotations

import logging
from pathlib import Path

from epg_fast.data import DataError, ImageSource, printable, too_many_bad_files
from epg_fast.distributed import Ranks
from epg_fast.files import write_atomically

log = logging.getLogger("epg_fast")


class BadFiles:
    """What all ranks, and the run before a resume, know about the files of a dataset that cannot be decoded.

    Knowing of a file earlier changes no batch (see `epg_fast.data`), so that it does not matter at which step a rank
    learns of it, nor that the loader is some batches ahead.

    Args:
        known: relative path -> reason; `exchange` adds to this very dict, which goes into the checkpoints.
        loader: this rank's.
        source: the dataset.
        max_fraction: share of bad files above which training stops.
        outdir: run folder, for bad_files.txt.
        ranks: who takes part.

    Raises DataError if `known` is over the limit.
    """

    def __init__(
        self, known: dict[str, str], loader, source: ImageSource, max_fraction: float, outdir: Path, ranks: Ranks
    ):
        self.known, self.path = known, outdir / "bad_files.txt"
        self._loader, self._source, self._max_fraction, self._ranks = loader, source, max_fraction, ranks
        if known:
            loader.add_bad_files(dict(known))

    def exchange(self) -> None:
        """Tell every rank what the others have met since the last call; all ranks call this at the same step.

        Raises DataError, the same one on every rank, when the union is over the limit.
        """
        own = self._loader.bad_files.copy()  # the thread that draws ahead may add to it meanwhile
        new = self._ranks.gather({path: reason for path, reason in own.items() if path not in self.known})
        if not any(new):
            return
        for found in reversed(new):
            self.known |= found
        if self._ranks.main and self._write(self.known):
            log.warning("%d of %d images cannot be decoded: %s", len(self.known), len(self._source), self.path)
        if len(self.known) > self._max_fraction * len(self._source):
            raise too_many_bad_files(dict(sorted(self.known.items())), len(self._source), self._max_fraction)
        self._loader.add_bad_files({path: reason for path, reason in self.known.items() if path not in own})

    def listed(self, error: DataError) -> DataError:
        """Return `error` with the name of the list. Any rank writes it: one that stops alone takes the others down."""
        found = self.known | self._loader.bad_files
        return DataError(f"{error} They are listed in {self.path}.") if found and self._write(found) else error

    def _write(self, found: dict[str, str]) -> bool:
        lines = [f"{printable(path)}\t{' '.join(reason.split())}\n" for path, reason in sorted(found.items())]
        try:
            write_atomically(self.path, "".join(lines).encode(errors="surrogateescape"))
        except OSError as error:
            log.warning("%s", error)
            return False
        return True


def still_bad(bad_files: dict[str, str], source: ImageSource) -> dict[str, str]:
    """Return those of `bad_files` that cannot be decoded now either: a restored file is part of the dataset again."""
    places = [i for i, path in enumerate(source.paths) if path in bad_files] if bad_files else []
    return {source.paths[i]: bad_files[source.paths[i]] for i in places if source.examine(i)[1] is not None}
