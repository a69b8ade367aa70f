"""Items made ahead by processes: their order, their failures, their end."""

import contextlib
import gc
import os
import resource
import signal
import tempfile
import time
import weakref

import numpy as np
import pytest

from epg_fast.data.loading.workers import WorkerStream, each
from epg_fast.data.sources.faults import ReadError
from tests.data.conftest import linux


def squares(number):
    """Items that say who made them."""
    time.sleep(0.005 * (number % 3))
    return np.array(number**2), os.getpid()


def raises(error):
    def make(number):
        if number == 3:
            raise error
        return number

    return make


@pytest.fixture
def open_stream():
    streams = []

    def open_one(*arguments):
        streams.append(WorkerStream(*arguments))
        return streams[-1]

    yield open_one
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_items_come_in_order_from_any_start(open_stream, workers):
    stream = open_stream(squares, 5, workers)
    items = [next(stream) for _ in range(12)]
    assert [int(item) for item, _ in items] == [number**2 for number in range(5, 17)]
    assert len({pid for _, pid in items} - {os.getpid()}) == workers


class _NoCopy(OSError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (FileNotFoundError(2, "No such file or directory", "x.png"), FileNotFoundError, "x.png"),
        # these arrive as text
        (SystemExit(3), RuntimeError, "reads images failed(?s:.*)SystemExit: 3"),
        (_NoCopy("one", "two"), RuntimeError, "reads images failed(?s:.*)_NoCopy: one and two"),
        (MemoryError(), ReadError, r"cannot go on \(Cannot allocate memory\): use fewer workers"),
    ],
)
def test_a_failure_is_raised_in_its_place_and_ends_the_stream(open_stream, error, raised, message):
    stream = open_stream(raises(error), 1, 2)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(raised, match=message) as caught:
        next(stream)
    assert "in make" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    assert not any(process.is_alive() for process in stream.processes)
    if isinstance(error, MemoryError):  # without a process too
        with pytest.raises(raised, match="Cannot allocate memory"):
            next(open_stream(raises(error), 3, 0))


def test_an_interrupted_stream_ends_and_hands_out_nothing_of_another_place(open_stream):
    """As after Ctrl-C in a notebook."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (0.001, 0.01):
            stream, items = open_stream(squares, 0, 2), []
            items.append(next(stream)[0])
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(KeyboardInterrupt):
                while True:
                    items.append(next(stream)[0])
            assert [int(item) for item in items] == [number**2 for number in range(len(items))]
            try:
                # interrupted between two items, or with one in hand
                assert int(next(stream)[0]) in (len(items) ** 2, (len(items) + 1) ** 2)
            except RuntimeError as error:
                assert "closed" in str(error)
            stream.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@linux
@pytest.mark.parametrize(
    "end, open_elsewhere, message",
    [
        (kill_itself, False, r"was killed \(exit code -9\), often for want of memory; use fewer"),
        (kill_itself, True, r"was killed \(exit code -9\)"),
        (lambda: os._exit(3), False, r"ended by itself \(exit code 3\): a library"),
    ],
    ids=["killed", "killed while its pipe is open elsewhere", "ended"],
)
def test_a_process_that_is_gone_is_noticed_at_once(open_stream, monkeypatch, end, message, open_elsewhere):
    if open_elsewhere:  # as a process that was forked meanwhile has it
        monkeypatch.setattr("epg_fast.data.loading.workers._LOOK", 0.1)
        monkeypatch.setattr("multiprocessing.connection.Connection.close", lambda connection: None)
    stream = open_stream(lambda number: end() if number == 2 else number, 0, 2)
    assert [next(stream), next(stream)] == [0, 1]
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=message) as error:
        next(stream)
    assert time.monotonic() - started < 3 and "\n" not in str(error.value)
    monkeypatch.undo()


def arrays(number):
    """A batch of every kind of content."""
    rng = np.random.default_rng(number)
    return {
        "x": rng.integers(0, 256, (3, 5, 7), dtype=np.uint8),
        "odd": rng.random((1, 3)).astype(np.float32),
        "transposed": np.arange(6).reshape(2, 3).T + number,
        "none": np.empty(0, np.int64),
        "record": np.zeros(2, [("a", "i1"), ("b", "f8", 4)]),
    }, {"a file": f"reason {number}"}


@linux
def test_batches_go_through_no_file_and_no_socket_with_a_path(open_stream, tmp_path, monkeypatch):
    """Paths of sockets are limited to 107 bytes; /dev/shm is small in containers; and programs tidy up /tmp."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = set(os.listdir("/dev/shm"))
    stream = open_stream(arrays, 0, 2)
    received = []
    while len(received) < 6:
        received.append(next(stream))
        assert not os.listdir(folder) and not [n for n in set(os.listdir("/dev/shm")) - before if "torch" in n]
    stream.close()
    for number, (batch, bad_files) in enumerate(received):  # they live on, each in its own memory
        expected, reasons = arrays(number)
        assert bad_files == reasons and batch.keys() == expected.keys()
        for name, value in expected.items():
            assert batch[name].dtype == value.dtype and np.array_equal(batch[name], value), name
            batch[name][:] = 1  # may be written to


@linux
@pytest.mark.parametrize("when", ["before the processes start", "between two batches"])
def test_no_descriptor_left_is_said_with_the_limit_to_raise(open_stream, when):
    stream, held, limits = open_stream(arrays, 0, 1), [], resource.getrlimit(resource.RLIMIT_NOFILE)
    if when == "between two batches":
        next(stream)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(ReadError, match=r"cannot .* \(Too many open files\): raise .*ulimit -n") as caught:
            for _ in range(4):
                next(stream)
        assert "\n" not in str(caught.value)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("workers, chunk", [(0, 4), (2, 4)])
def test_each_number_is_done_once_in_order_and_the_processes_end(workers, chunk):
    results = each(lambda number: (number**2, os.getpid()), range(10), workers, chunk=chunk, unit="item")
    found = list(results)
    assert [square for square, _ in found] == [number**2 for number in range(10)]
    assert len({pid for _, pid in found} - {os.getpid()}) == workers
    assert list(each(abs, [], workers)) == []


def garbage(path):
    """A cycle whose destructor writes down the process that runs it."""

    class Node:
        def __del__(self):
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")

    node = Node()
    node.itself = node
    return weakref.ref(node)


def collect(number):
    gc.collect()
    return number


@linux
def test_no_process_destroys_what_its_parent_left_behind(tmp_path):
    """DALI's pipelines crash when they are."""
    gc.disable()
    try:
        node = garbage(tmp_path / "destroyed")
        assert list(each(collect, [0, 1], 1)) == [0, 1]
        gc.collect()
    finally:
        gc.enable()
    assert node() is None
    assert (tmp_path / "destroyed").read_text().split() == [str(os.getpid())]


@linux
def test_a_process_that_cannot_be_started_leaves_none_behind(open_stream, monkeypatch):
    real, started = os.fork, []

    def fork():
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(None)
        return real()

    monkeypatch.setattr("os.fork", fork)
    stream = open_stream(squares, 0, 3)
    with pytest.raises(ReadError, match="cannot start a process .*temporarily unavailable.*fewer workers.*ulimit -u"):
        next(stream)
    assert len(stream.processes) == 2 and not any(process.is_alive() for process in stream.processes)
