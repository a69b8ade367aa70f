import itertools
import os
import signal
import threading
import time
import traceback
import weakref

import pytest
import torch

from epg_fast.config import AugmentConfig
from epg_fast.data import ImageFolder, Prefetcher
from epg_fast.data.loading import prefetch
from tests.data.images import assert_same, batches, open_loader


class Loader:
    """Batches 0, 1, 2, ... of `count`; calls `before(i)` before it returns batch i."""

    def __init__(self, count=1000, before=lambda i: None):
        self.count, self.before = count, before
        self.drawn = self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self.count:
            raise StopIteration
        self.before(self.drawn)
        self.drawn += 1
        return {"x": torch.full((2, 3, 4, 4), self.drawn - 1, dtype=torch.uint8), "label": torch.arange(2)}

    def close(self):
        self.closed += 1


def numbers(batches):
    return [int(batch["x"][0, 0, 0, 0]) for batch in batches]


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "epg-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert wait_until(lambda: not prefetch_threads())


@pytest.mark.parametrize("depth, workers", [(1, 0), (2, 2)])
def test_the_batches_are_those_of_the_loader_bit_for_bit(make_folder, depth, workers):
    folder, augment = ImageFolder(make_folder(20)), AugmentConfig()
    with Prefetcher(open_loader(folder, workers=workers, augment=augment), "cpu", depth) as found:
        assert_same(list(itertools.islice(found, 7)), batches(folder, 7, augment=augment))


@pytest.mark.parametrize("depth", [1, 3])
def test_it_draws_depth_batches_ahead_and_no_more_and_lets_go_of_what_it_handed_out(depth):
    loader = Loader()
    with Prefetcher(loader, "cpu", depth) as batches:
        assert loader.drawn == 0
        for taken in (1, 2, 3):
            batch = next(batches)
            assert wait_until(lambda: loader.drawn == taken + depth)  # noqa: B023 (called at once)
            time.sleep(0.02)
            assert loader.drawn == taken + depth
            reference = weakref.ref(batch["x"])
            del batch
            assert wait_until(lambda: reference() is None)  # noqa: B023
    with pytest.raises(ValueError, match="depth: got 0, wanted at least 1"):
        Prefetcher(Loader(), "cpu", 0)


def _explode(i):
    if i == 3:
        raise OSError("disk on fire")


@pytest.mark.parametrize("depth", [1, 8])
def test_an_error_and_the_end_come_at_their_place_again_and_again(depth):
    with Prefetcher(Loader(before=_explode), "cpu", depth) as batches:
        got = [next(batches)]
        time.sleep(0.02)  # the error is there before the batches are asked for
        got += [next(batches), next(batches)]
        assert numbers(got) == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(OSError, match="disk on fire") as raised:
                next(batches)
            assert "_explode" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    loader = Loader(count=5)
    with Prefetcher(loader, "cpu", depth) as batches:
        assert numbers(batches) == [0, 1, 2, 3, 4]
        assert list(batches) == []
    assert loader.closed == 1 and not prefetch_threads()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_close_does_not_wait_for_a_loader_that_is_blocked(monkeypatch):
    monkeypatch.setattr(prefetch, "_GRACE", 0.2)
    reached, blocked = threading.Event(), threading.Event()
    loader = Loader(before=lambda i: i == 2 and (reached.set(), blocked.wait(60)))
    batches = Prefetcher(loader, "cpu", 2)
    next(batches)
    assert reached.wait(60)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 2 and loader.closed == 1
    (thread,) = prefetch_threads()
    assert thread.daemon
    blocked.set()
    thread.join(5)
    assert not thread.is_alive() and loader.drawn == 3


def test_a_stall_is_reported_again_and_again_until_the_batch_comes_and_the_time_lost_is_counted():
    arrived, seen = threading.Event(), []
    loader = Loader(before=lambda i: i == 1 and arrived.wait(60))

    def on_stall(seconds):
        assert threading.current_thread() is threading.main_thread()
        seen.append(seconds)
        if len(seen) == 3:
            arrived.set()

    with Prefetcher(loader, "cpu", 2, on_stall, patience=0.05) as batches:
        started = time.perf_counter()
        assert numbers([next(batches), next(batches)]) == [0, 1]
        assert len(seen) >= 3 and seen == sorted(seen) and seen[0] >= 0.05 and seen[2] >= 0.15
        lost = batches.waited
        assert seen[-1] <= lost <= time.perf_counter() - started
        time.sleep(0.2)  # the consumer's own time
        next(batches)
        assert batches.waited - lost < 0.1


def test_ctrl_c_is_not_delayed_by_a_loader_that_is_blocked():
    # a shell starts its background jobs with SIGINT ignored
    before, blocked = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Event()
    try:
        with Prefetcher(Loader(before=lambda i: i == 1 and blocked.wait(9)), "cpu", 2) as batches:
            next(batches)
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                next(batches)
            assert time.monotonic() - started < 2
            timer.join()
            blocked.set()
    finally:
        signal.signal(signal.SIGINT, before)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class RandomLoader(Loader):
    """Large random batches that follow from their number; on the device itself if `on_device`."""

    def __init__(self, on_device=False, **options):
        super().__init__(**options)
        self.on_device, self.streams = on_device, set()

    def __next__(self):
        super().__next__()
        self.streams.add(torch.cuda.current_stream().cuda_stream)
        x = random_batch(self.drawn - 1)
        if self.on_device:
            torch.cuda._sleep(20_000_000)  # what comes after is late on this stream
            x = x.cuda() + 0
        return {"x": x, "label": torch.arange(self.drawn)}


def random_batch(i):
    return torch.randint(0, 256, (8, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("on_device", [False, True])
    @pytest.mark.parametrize("depth", [1, 3])
    def test_batches_arrive_bit_for_bit_over_a_stream_of_their_own(self, depth, on_device):
        loader = RandomLoader(on_device, count=12)
        with Prefetcher(loader, "cuda", depth) as batches:
            for i, batch in enumerate(batches):
                assert batch["x"].is_cuda and batch["label"].is_cuda
                assert torch.equal(batch["x"].cpu(), random_batch(i))
                assert batch["label"].tolist() == list(range(i + 1))
        assert i == 11
        assert torch.cuda.current_stream().cuda_stream not in loader.streams

    @pytest.mark.parametrize("on_device", [False, True])
    def test_memory_is_not_reused_while_a_slow_kernel_still_reads_it(self, on_device):
        """The consumer drops each batch at once, with its work on it still queued behind a sleep."""
        sums = []
        with Prefetcher(RandomLoader(on_device, count=24), "cuda", 3) as batches:
            for batch in batches:
                torch.cuda._sleep(50_000_000)
                sums.append(batch["x"].to(torch.int64).sum())
                del batch
        assert [int(total) for total in sums] == [int(random_batch(i).to(torch.int64).sum()) for i in range(24)]

    def test_the_consumer_may_use_a_stream_of_its_own(self):
        with Prefetcher(RandomLoader(count=6), "cuda") as batches, torch.cuda.stream(torch.cuda.Stream()):
            for i, batch in enumerate(batches):
                assert torch.equal(batch["x"].cpu(), random_batch(i))


def test_the_drawing_thread_has_one_openmp_thread_and_the_consumer_keeps_its_own():
    drawing, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Prefetcher(Loader(before=lambda i: drawing.append(torch.get_num_threads())), "cpu") as batches:
            next(batches)
            assert torch.get_num_threads() == 2
            next(batches)
            assert set(drawing) == {1}
    finally:
        torch.set_num_threads(before)
