"""A pool of processes that make files, and end with the process that started them."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from epg_fast.data.faults import ran_out, read_error

T = TypeVar("T")

_task: Callable | None = None
_stop = None


class Stopped(Exception):
    """The other processes are giving up, so does this task."""


def run(task: Callable[[int], T], items: list[int], workers: int, *, total: int, chunk: int, unit: str) -> Iterator[T]:
    """Yield `task(item)` for all items in their order, computed by `workers` processes (0: this one), with a bar.

    `total` minus the items counts as done already. `chunk` items are handed out at a time.
    """
    # disable=None: no bar in a log file
    bar = functools.partial(tqdm, total=total, initial=total - len(items), unit=unit, disable=None)
    if workers == 0 or not items:
        yield from bar(map(task, items))
        return
    # a process gets a copy of everything: what is garbage here must not be destroyed there
    gc.collect()
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        stop = context.Event()
        # each worker gets `task` once, not with every item: it holds the list of all files
        executor = ProcessPoolExecutor(
            min(workers, len(items)), mp_context=context, initializer=_start_worker, initargs=(task, os.getpid(), stop)
        )
    except OSError as error:
        raise read_error(error, "start the workers") from error
    with executor:
        try:
            yield from bar(executor.map(_call_task, items, chunksize=chunk))
        except BaseException as error:
            stop.set()
            executor.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise RuntimeError(
                    "a worker was killed, often for want of memory: use fewer --workers; the same command goes on"
                ) from error
            if ran_out(error):
                raise read_error(error, "go on") from error
            raise


def check_stopped() -> None:
    """Raise `Stopped`, in a worker, when its pool gives up: for tasks of more than a second."""
    if _stop is not None and _stop.is_set():
        raise Stopped


def _start_worker(task: Callable, parent: int, stop) -> None:
    global _task, _stop
    _task, _stop = task, stop
    gc.freeze()
    # the parent ends the pool on Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """End this process once its parent, process `parent`, is gone; for a thread of its own."""
    # a worker of concurrent.futures would wait for ever after the parent was killed
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call_task(item: int):
    return _task(item)
