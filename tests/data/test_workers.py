"""Items made ahead by processes: their order, their failures, their end."""

import contextlib
import gc
import os
import resource
import signal
import sys
import tempfile
import time
import weakref

import numpy as np
import pytest
import torch

from epg_fast.data.faults import ReadError
from epg_fast.data.pool import run
from epg_fast.data.workers import WorkerStream

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


class Squares:
    """Items that say who made them."""

    def __getitem__(self, number):
        time.sleep(0.02 * (number % 3))
        return torch.tensor(number**2), os.getpid()


class Raises:
    def __init__(self, error):
        self.error = error

    def __getitem__(self, number):
        if number == 3:
            raise self.error
        return number


@pytest.fixture
def open_stream():
    streams = []

    def open_one(*arguments):
        streams.append(WorkerStream(*arguments))
        return streams[-1]

    yield open_one
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_items_come_in_order_from_any_start(open_stream, workers):
    stream = open_stream(Squares(), 5, workers)
    items = [next(stream) for _ in range(12)]
    assert [int(item) for item, _ in items] == [number**2 for number in range(5, 17)]
    assert len({pid for _, pid in items} - {os.getpid()}) == workers


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "error, raised, message",
    [
        (FileNotFoundError(2, "No such file or directory", "x.png"), FileNotFoundError, "x.png"),
        (RuntimeError("twelve"), RuntimeError, "^twelve$"),
        # arrives as text
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
            RuntimeError,
            "reads images failed(?s:.*)UnicodeDecodeError",
        ),
        (SystemExit(3), RuntimeError, "reads images failed(?s:.*)SystemExit: 3"),
    ],
)
def test_a_failure_is_raised_in_its_place_and_ends_the_stream(open_stream, workers, error, raised, message):
    stream = open_stream(Raises(error), 1, workers)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(raised, match=message) as caught:
        next(stream)
    assert "in __getitem__" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    assert not any(process.is_alive() for process in stream.processes)


class _NoCopy(OSError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_no_copy_can_be_made_of_arrives_as_text(open_stream):
    stream = open_stream(Raises(_NoCopy("one", "two")), 2, 2)
    assert next(stream) == 2
    with pytest.raises(RuntimeError, match="(?s)failed:.*_NoCopy: one and two"):
        next(stream)


def test_an_interrupted_stream_ends_and_hands_out_nothing_of_another_place(open_stream):
    """As after Ctrl-C in a notebook."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (0.001, 0.005, 0.02, 0.05):
            stream, items = open_stream(Squares(), 0, 2), []
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


@linux
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_killed_process_is_noticed_at_once(open_stream, pause):
    stream = open_stream(Squares(), 0, 2)
    next(stream)
    os.kill(stream.processes[1].pid, signal.SIGKILL)
    time.sleep(pause)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"killed \(exit code -9\), often for want of memory.*--data.workers"):
        for _ in range(10):
            next(stream)
    assert time.monotonic() - started < 3


class Arrays:
    """A batch of every kind of content."""

    def __getitem__(self, number):
        rng = np.random.default_rng(number)
        return {
            "x": torch.from_numpy(rng.integers(0, 256, (3, 5, 7), dtype=np.uint8)),
            "odd": torch.from_numpy(rng.random((1, 3)).astype(np.float32)),
            "transposed": torch.arange(6).reshape(2, 3).T + number,
            "none": torch.empty(0, dtype=torch.int64),
            "array": rng.integers(0, 9, 4),
        }, {"a file": f"reason {number}"}


@linux
def test_batches_go_through_no_file_and_no_socket_with_a_path(open_stream, tmp_path, monkeypatch):
    """Paths of sockets are limited to 107 bytes; /dev/shm is small in containers; and programs tidy up /tmp."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = set(os.listdir("/dev/shm"))
    stream = open_stream(Arrays(), 0, 2)
    received = []
    while len(received) < 6:
        received.append(next(stream))
        assert not os.listdir(folder) and not [n for n in set(os.listdir("/dev/shm")) - before if "torch" in n]
    stream.close()
    for number, (batch, bad_files) in enumerate(received):  # they live on, each in its own memory
        expected, reasons = Arrays()[number]
        assert bad_files == reasons and batch.keys() == expected.keys()
        for name, value in expected.items():
            assert type(batch[name]) is type(value) and batch[name].dtype == value.dtype
            assert np.array_equal(batch[name], value), name
            batch[name] += 1  # may be written to


@linux
@pytest.mark.parametrize("when", ["before the processes start", "between two batches"])
def test_no_descriptor_left_is_said_with_the_limit_to_raise(open_stream, when):
    stream, held, limits = open_stream(Arrays(), 0, 1), [], resource.getrlimit(resource.RLIMIT_NOFILE)
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


@pytest.mark.parametrize("workers", [0, 1])
def test_no_memory_left_is_said_with_what_to_use_less_of(open_stream, workers):
    with pytest.raises(ReadError, match=r"cannot hand a batch over \(Cannot allocate memory\): use fewer workers"):
        next(open_stream(Raises(MemoryError()), 3, workers))


def kill_itself(number):
    os.kill(os.getpid(), signal.SIGKILL)


@linux
def test_a_pool_says_what_it_lacks(monkeypatch):
    with pytest.raises(RuntimeError, match="a worker was killed, often for want of memory: use fewer --workers"):
        list(run(kill_itself, [0], 1, total=1, chunk=1, unit="item"))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("_multiprocessing.SemLock", full)
    with pytest.raises(ReadError, match=r"cannot start the workers .No space left on device.: make room.*/dev/shm"):
        list(run(collect, [0], 1, total=1, chunk=1, unit="item"))


class Exits:
    def __getitem__(self, number):
        os._exit(3)


@linux
def test_a_process_that_a_library_ends_was_not_killed(open_stream):
    with pytest.raises(RuntimeError, match=r"ended by itself \(exit code 3\): a library"):
        next(open_stream(Exits(), 0, 1))


@linux
def test_a_killed_process_is_noticed_when_its_pipe_is_open_elsewhere(open_stream, monkeypatch):
    monkeypatch.setattr("epg_fast.data.workers._LOOK", 0.2)
    # as a process that was forked meanwhile has it
    monkeypatch.setattr("multiprocessing.connection.Connection.close", lambda connection: None)
    stream = open_stream(Squares(), 0, 1)
    next(stream)
    os.kill(stream.processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="killed"):
        for _ in range(10):
            next(stream)
    monkeypatch.undo()


def garbage(path):
    """A cycle whose destructor writes down the process that runs it."""

    class Node:
        def __del__(self):
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")

    node = Node()
    node.itself = node
    return weakref.ref(node)


class Collects:
    def __getitem__(self, number):
        gc.collect()
        return number


def collect(number):
    gc.collect()
    return number


@linux
@pytest.mark.parametrize("who", ["stream", "pool"])
def test_no_process_destroys_what_its_parent_left_behind(open_stream, tmp_path, who):
    """DALI's pipelines crash when they are."""
    gc.disable()
    try:
        node = garbage(tmp_path / "destroyed")
        if who == "stream":
            assert next(open_stream(Collects(), 0, 1)) == 0
        else:
            assert list(run(collect, [0, 1], 1, total=2, chunk=1, unit="item")) == [0, 1]
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
    stream = open_stream(Squares(), 0, 3)
    with pytest.raises(ReadError, match="cannot start a process .*temporarily unavailable.*fewer workers.*ulimit -u"):
        next(stream)
    assert len(stream.processes) == 2 and not any(process.is_alive() for process in stream.processes)
