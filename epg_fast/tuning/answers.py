"""What candidates have been found to be, in a file that outlives the process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from epg_fast.child import Failed
from epg_fast.files import write_atomically
from epg_fast.plans import Variant

log = logging.getLogger("epg_fast")


def packed(ask: Callable[[], object]) -> dict:
    """What `ask` returns, or how it has Failed ("wrong" and "not here", too), for JSON."""
    try:
        return {"answer": ask()}
    except Failed as failure:
        return {"failed": failure.kind, "why": str(failure)}


def unpacked(found: dict):
    """The answer that was packed. Raises Failed if that was."""
    if "failed" in found:
        raise Failed(found["failed"], found["why"])
    return found["answer"]


class Journal:
    """Asks a bench, and keeps its answers in a file, so that an interrupted tuning asks for nothing again."""

    def __init__(self, bench: Callable, path: Path, options: str):
        """bench: as `ask`, without `again`. options: of the job; answers that were given for others do not count."""
        self._bench, self._path, self._options = bench, path, options
        self._answers = self._read()

    def ask(self, kind: str, unit: str, variants: Sequence[Variant], again: str = ""):
        """The answer to "check" or "times", see `Worker`; again: tells it from an earlier one. Raises Failed."""
        key = _key(kind, unit, variants, again)
        if key not in self._answers:
            self._answers[key] = packed(lambda: self._bench(kind, unit, variants))
            self._write()
        return unpacked(self._answers[key])

    def knows(self, kind: str, unit: str, variants: Sequence[Variant]) -> bool:
        """Whether the answer is there."""
        return _key(kind, unit, variants) in self._answers

    def forget_failures(self) -> None:
        """Try anew, the next time, what has failed."""
        self._answers = {key: found for key, found in self._answers.items() if "failed" not in found}
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps({"options": self._options, "answers": self._answers}))

    def _read(self) -> dict[str, dict]:
        try:
            found = json.loads(self._path.read_bytes())
            answers = dict(found["answers"]) if found["options"] == self._options else {}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged: measuring anew", self._path)
            return {}
        if answers:
            log.info("going on with %d measurements of before", len(answers))
        return answers


def _key(kind: str, unit: str, variants: Sequence[Variant], again: str = "") -> str:
    return json.dumps([kind, unit, [asdict(variant) for variant in variants], again], sort_keys=True)
