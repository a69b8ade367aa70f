"""Items made ahead by worker processes and handed out in order."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from epg_fast.data.sources.faults import ran_out, read_error

# Items that a process may have in hand or ready.
_AHEAD = 2
# Seconds between two looks at whether a process that is silent still lives.
_LOOK = 5.0
# Bytes to which arrays are aligned.
_ALIGNMENT = 64
_TASK = "go on"

T = TypeVar("T")


class _Failure(NamedTuple):
    error: Exception
    traceback: str


class WorkerStream:
    """`make(start)`, `make(start + 1)`, ... made ahead by `workers` processes; 0: in this one, when asked for.

    torch's DataLoader is not used: it notices a killed process late or, by a signal handler, anywhere in the main
    thread, and its processes may run the destructors of what the parent was about to collect.

    Arrays come in memory without a name: there is no file or socket that could be full, left or removed.
    What making an item raises, `next` raises in its place. RuntimeError says when a process was killed or ended,
    `ReadError` when this machine has no memory, files or processes left.
    """

    def __init__(self, make: Callable[[int], T], start: int, workers: int):
        if workers < 0:
            raise ValueError(f"workers: got {workers}, wanted at least 0")
        self.workers = workers
        self.processes: list[BaseProcess] = []
        self._make, self._next = make, start
        self._connections: list[Connection] = []
        self._closed = False

    def __next__(self) -> T:
        self.start()
        try:
            item = self._receive(self._next) if self.workers else self._make(self._next)
            if isinstance(item, _Failure):
                raise item.error from RuntimeError(item.traceback)
            self._next += 1
        except BaseException as error:
            # interrupted anywhere: what comes through the pipes next may belong to another place in the stream
            self.close()
            if isinstance(error, MemoryError):
                raise read_error(error, _TASK) from error
            raise
        return item

    def start(self) -> None:
        """Start the processes, unless they run."""
        if self._closed:
            raise RuntimeError("this stream of batches is closed")
        if self.processes or not self.workers:
            return
        # A process gets a copy of everything: what is garbage here must not be destroyed there. DALI would crash.
        gc.collect()
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        # also when nobody closes it; and before multiprocessing's own hook, which would send SIGTERM and wait for ever
        self._finalizer = weakref.finalize(self, _end, self.processes, self._connections)
        atexit.register(self._finalizer)
        try:
            # Ctrl-C and a scheduler's signals reach the whole process group, but it is the parent that decides what to
            # finish first: processes end by its close(), or on their own within seconds of its death.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
            try:
                for _ in range(self.workers):
                    self._start_process(context)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number in range(self._next, self._next + _AHEAD * self.workers):
                self._connections[number % self.workers].send(number)
        except BaseException as error:
            self.close()
            if ran_out(error):
                raise read_error(error, "start a process that reads images") from error
            raise

    def close(self) -> None:
        """End the processes; closing twice does nothing."""
        self._closed = True
        if self.processes:
            self._finalizer()
            atexit.unregister(self._finalizer)

    def _start_process(self, context) -> None:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(self._make, there, os.getpid()), daemon=True)
        process.start()
        # at once, or the next process would hold it open after this one's death
        there.close()
        self.processes.append(process)
        self._connections.append(here)

    def _receive(self, number: int):
        process, connection = self.processes[number % self.workers], self._connections[number % self.workers]
        try:
            while not connection.poll(_LOOK):
                if not process.is_alive():
                    raise EOFError
            item = _receive(connection)
            connection.send(number + _AHEAD * self.workers)
        except (EOFError, OSError) as error:
            if self._closed:
                raise RuntimeError("this stream of batches was closed while it was waited for") from error
            process.join(1)
            if process.is_alive():
                raise read_error(error, _TASK) from error
            how = f"was killed (exit code {process.exitcode}), often for want of memory; use fewer workers or readers"
            if process.exitcode >= 0:
                how = f"ended by itself (exit code {process.exitcode}): a library that it called did that"
            raise RuntimeError(f"a process that reads images {how}. The same command goes on") from error
        return item


def each(task: Callable[[int], T], numbers: Sequence[int], workers: int, *, chunk: int = 1, **bar) -> Iterator[T]:
    """Yield `task(number)` for all numbers in their order, made by `workers` processes, `chunk` at a time; with a bar.

    bar: options of tqdm. The processes end, wherever they are, with this iterator.
    """
    make = functools.partial(_make_chunk, task, numbers, chunk)
    stream = WorkerStream(make, 0, min(workers, -(-len(numbers) // chunk)))
    try:
        # disable=None: no bar in a log file
        with tqdm(disable=None, **bar) as progress:
            for _ in range(0, len(numbers), chunk):
                for result in next(stream):
                    progress.update()
                    yield result
    finally:
        stream.close()


def _make_chunk(task: Callable[[int], T], numbers: Sequence[int], chunk: int, i: int) -> list[T]:
    return [task(number) for number in numbers[i * chunk : (i + 1) * chunk]]


def _work(make: Callable[[int], Any], connection: Connection, parent: int) -> None:
    """Answer every number with its item, or with the failure to make it."""
    gc.freeze()
    torch.set_num_threads(1)
    # the pipe does not tell when the parent is killed, other processes have it open; and a disk may take its time
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number = connection.recv()
            try:
                _send(connection, make(number))
            except BaseException as error:  # SystemExit, too: a library's, which would look like a process killed
                _send(connection, _failure(error, traceback.format_exc()))


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _send(connection: Connection, item: Any) -> None:
    """Send `item`; the arrays in it as a descriptor of memory that holds them one behind the other."""
    buffers: list[pickle.PickleBuffer] = []
    shared = hasattr(os, "memfd_create")
    pickled = pickle.dumps(item, protocol=5, buffer_callback=buffers.append if shared else None)
    sizes = [buffer.raw().nbytes for buffer in buffers]
    # whatever can fail does so before the first byte is sent
    with contextlib.ExitStack() as stack:
        if sum(sizes):
            file = stack.enter_context(os.fdopen(os.memfd_create("images"), "wb"))
            for buffer in buffers:
                file.write(buffer.raw())
                file.write(bytes(-file.tell() % _ALIGNMENT))
            file.flush()
            channel = stack.enter_context(socket.socket(fileno=os.dup(connection.fileno())))
        connection.send((pickled, sizes))
        if sum(sizes):
            socket.send_fds(channel, [b"\0"], [file.fileno()])


def _receive(connection: Connection) -> Any:
    """Return what `_send` sent. Raises OSError, also when this process has no descriptor left."""
    pickled, sizes = connection.recv()
    if not sum(sizes):
        return pickle.loads(pickled, buffers=[bytearray()] * len(sizes))
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        # the kernel leaves out what it has no room for
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    try:
        memory = memoryview(mmap.mmap(descriptors[0], 0))
    finally:
        os.close(descriptors[0])
    starts = itertools.accumulate((size + -size % _ALIGNMENT for size in sizes), initial=0)
    buffers = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return pickle.loads(pickled, buffers=buffers)


def _failure(error: BaseException, text: str) -> _Failure:
    """What can be sent of an exception: itself, if a copy can be made of it, or as text."""
    if ran_out(error):
        error = read_error(error, _TASK)
    try:
        if isinstance(error, (OSError, RuntimeError)):
            return _Failure(pickle.loads(pickle.dumps(error)), text)
    except Exception:
        pass
    return _Failure(RuntimeError(f"a process that reads images failed:\n{text}"), text)


def _end(processes: list[BaseProcess], connections: list[Connection]) -> None:
    """End processes at once, also those that wait for a disk with SIGTERM blocked."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)
    for connection in connections:
        connection.close()
