"""Files that cannot be decoded, as a matter of all ranks: one list, one limit, one error."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from epg_fast.data import DataError, ImageSource, printable, too_many_bad_files
from epg_fast.distributed import Ranks

log = logging.getLogger("epg_fast")


class BadFiles:
    """What all ranks, and the earlier parts of a run, know about the files of a dataset that cannot be decoded.

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
        new = {path: reason for path, reason in own.items() if path not in self.known}
        if not self._any(bool(new)):
            return
        for part in self._ranks.gather(new):
            for path, reason in part.items():
                self.known.setdefault(path, reason)
        if self._ranks.main and self._write(self.known):
            log.warning("%d of %d images cannot be decoded: %s", len(self.known), len(self._source), self.path)
        if len(self.known) > self._max_fraction * len(self._source):
            raise too_many_bad_files(dict(sorted(self.known.items())), len(self._source), self._max_fraction)
        self._loader.add_bad_files({path: reason for path, reason in self.known.items() if path not in own})

    def listed(self, error: DataError) -> DataError:
        """Return `error` with the name of the list. Any rank writes it: one that stops alone takes the others down."""
        found = self.known | self._loader.bad_files
        return DataError(f"{error} They are listed in {self.path}.") if found and self._write(found) else error

    def _any(self, mine: bool) -> bool:
        if self._ranks.world_size == 1:
            return mine
        flag = torch.tensor(int(mine), device=self._ranks.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _write(self, found: dict[str, str]) -> bool:
        temporary = self.path.with_name(f".bad_files.tmp{self._ranks.rank}")
        try:
            with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as f:
                for path, reason in sorted(found.items()):
                    f.write(f"{printable(path)}\t{' '.join(reason.split())}\n")
            os.replace(temporary, self.path)
        except OSError as error:
            log.warning("could not write %s (%s)", self.path, error)
            return False
        return True


def still_bad(bad_files: dict[str, str], source: ImageSource) -> dict[str, str]:
    """Return those of `bad_files` that cannot be decoded now either: a restored file is part of the dataset again."""
    found = {}
    for i in [i for i, path in enumerate(source.paths) if path in bad_files] if bad_files else []:
        if source.examine(i)[1] is not None:
            found[source.paths[i]] = bad_files[source.paths[i]]
    return found
