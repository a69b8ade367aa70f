"""The batches of a loader: which images in which order, and what becomes of files that cannot be read."""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.config import AugmentConfig
from epg_fast.data import DataError, ImageFolder, center_crop, training_views
from epg_fast.data.loading.loader import PillowBatches
from epg_fast.data.loading.workers import WorkerStream
from epg_fast.data.sources import source
from epg_fast.data.sources.faults import ReadError
from tests.data.conftest import left_of, linux
from tests.data.images import assert_same, batches, joined, open_loader


def crop(folder, i):
    """The centre crop of image `i` as a batch has it."""
    return np.asarray(center_crop(folder.load(i), 16)).transpose(2, 0, 1)


@pytest.mark.parametrize("augment, names", [(None, {"x"}), (AugmentConfig(), {"x", "view1", "view2"})])
def test_a_batch_has_the_documented_tensors_and_the_pixels_of_its_index(make_folder, augment, names):
    folder = ImageFolder(make_folder(20))
    for batch in batches(folder, 2, augment=augment, flip_probability=0.0):
        assert batch.keys() == names | {"label", "index"}
        for name in names:
            assert batch[name].dtype == torch.uint8 and batch[name].shape == (8, 3, 16, 16)
            assert batch[name].is_contiguous()
        for name in ("label", "index"):
            assert batch[name].dtype == torch.int64 and batch[name].shape == (8,)
        for x, label, index in zip(batch["x"], batch["label"], batch["index"], strict=True):
            assert label == folder.labels[index]
            np.testing.assert_array_equal(x.numpy(), crop(folder, int(index)))


def test_a_source_keeps_what_it_was_given_in_another_process(make_folder):
    """Caches alone stay behind: a function that a source of one's own reads with is none."""
    folder = ImageFolder(make_folder(2))
    folder.decrypt = len
    assert pickle.loads(pickle.dumps(folder)).decrypt is len


def test_the_stream_is_a_function_of_seed_epoch_and_index(make_folder):
    """The contract another loader has to keep: written out with numpy alone."""
    folder = ImageFolder(make_folder(20))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = batches(folder, 10, augment=AugmentConfig())
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()

    def rng(*key):
        return np.random.default_rng(np.random.SeedSequence(3, spawn_key=key))

    for epoch in range(5):  # of two batches of 8: 4 of the 20 images are left out, others each time
        order = rng(0, epoch).permutation(20)[:16].tolist()
        assert found[2 * epoch]["index"].tolist() + found[2 * epoch + 1]["index"].tolist() == order
    index = int(found[5]["index"][6])
    views = training_views(folder.load(index), 16, rng(1, 2, index), 0.5, AugmentConfig())
    for name, view in zip(("x", "view1", "view2"), views, strict=True):
        np.testing.assert_array_equal(found[5][name][6].numpy(), view.transpose(2, 0, 1))


@pytest.mark.parametrize("workers, start", [(0, 5), (2, 1)])
def test_resuming_anywhere_with_any_number_of_workers_continues_bit_for_bit(make_folder, workers, start):
    folder = ImageFolder(make_folder(21))
    whole = batches(folder, 9, augment=AugmentConfig())
    assert_same(batches(folder, 9 - start, start=start, workers=workers, augment=AugmentConfig()), whole[start:])


def test_ranks_share_the_global_batches_of_a_single_process(make_folder):
    folder, augment = ImageFolder(make_folder(21)), AugmentConfig()
    ranks = [batches(folder, 5, rank=rank, world_size=4, augment=augment) for rank in range(4)]
    assert_same(joined(ranks), batches(folder, 5, augment=augment))


REFUSED = [
    ({"batch_size": 21}, "got 21, wanted at most the 20 images"),
    ({"world_size": 3}, "batch_size: got 8, wanted a multiple of 3"),
    ({"rank": 2, "world_size": 2}, "rank: got 2 of 2"),
    ({"world_size": 0}, "rank: got 0 of 0"),
    ({"start": -1}, "start: got -1"),
    ({"seed": -1}, "seed: got -1"),
    ({"workers": -1}, "workers: got -1"),
    ({"image_size": 0}, "image_size: got 0"),
    ({"flip_probability": 1.5}, "flip_probability: got 1.5"),
    ({"max_bad_fraction": 1.0}, "max_bad_fraction: got 1.0"),
]


def test_arguments_that_cannot_work_are_refused_at_once(make_folder):
    folder = ImageFolder(make_folder(20))
    for options, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            open_loader(folder, **options)


# damaged files


def damage(folder, index, how):
    path = folder.root / folder.paths[index]
    if how == "vanished":
        path.unlink()
    elif how == "too narrow":
        Image.new("RGB", (1, 9000)).save(path)
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-100], "text": b"not an image"}[how])


@pytest.mark.parametrize("how, workers", [("truncated", 2), ("vanished", 0), ("text", 0), ("too narrow", 0)])
def test_a_damaged_file_is_replaced_by_the_next_and_logged_once(make_folder, log, workers, how):
    folder = ImageFolder(make_folder(40))
    options = {"batch_size": 10, "flip_probability": 0.0, "max_bad_fraction": 0.03}
    clean = batches(folder, 8, **options)
    damage(folder, 21, how)
    with open_loader(folder, workers=workers, **options) as loader:
        found = [next(loader) for _ in range(8)]
    assert list(loader.bad_files) == [folder.paths[21]]
    assert [folder.paths[21] in line for line in log.messages] == [True]
    hits = 0
    for before, after in zip(clean, found, strict=True):
        bad = before["index"] == 21
        hits += int(bad.sum())
        assert torch.equal(after["index"], torch.where(bad, 22, before["index"]))
        assert after["label"].tolist() == [folder.labels[i] for i in after["index"]]
        assert torch.equal(after["x"][~bad], before["x"][~bad])
        assert all(np.array_equal(x.numpy(), crop(folder, 22)) for x in after["x"][bad])
    assert hits == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_of_damaged_files_stops_with_their_names(make_folder, workers):
    folder = ImageFolder(make_folder(20))
    for index in (7, 8):
        damage(folder, index, "truncated")
    with open_loader(folder, batch_size=20, workers=workers, max_bad_fraction=0.1, flip_probability=0.0) as loader:
        wanted = sorted([0, 1, 2, 3, 4, 5, 6, 9, 9, 9, *range(10, 20)])
        assert sorted(next(loader)["index"].tolist()) == wanted  # both are replaced by the next
        processes = list(loader._stream.processes)
    assert not any(process.is_alive() for process in processes)
    loader.close()
    with open_loader(folder, batch_size=20, workers=workers) as loader:
        with pytest.raises(DataError, match=r" of 20 images \(.*%\).*at most 1.00%.*class[12]/00.*Restore or delete"):
            # the other process may have been the first to meet it, while it made the next batch
            for _ in range(workers or 1):
                next(loader)
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


@pytest.mark.parametrize("workers, mount_point", [(0, False), (1, True)])
def test_a_disk_that_goes_away_is_waited_for_and_changes_nothing(make_folder, monkeypatch, workers, mount_point):
    root = make_folder(60)
    folder = ImageFolder(root)
    expected, elsewhere = batches(folder, 3), root.with_name("elsewhere")
    root.rename(elsewhere)
    if mount_point:
        root.mkdir()  # of a disk that was mounted there, the empty folder stays
    timer = threading.Timer(0.1, lambda: elsewhere.rename(root))
    timer.start()
    assert_same(batches(folder, 3, workers=workers), expected)
    timer.join()
    # one that stays away stops training
    root.rename(elsewhere)
    monkeypatch.setattr(source, "_PATIENCE", 0.1)
    with open_loader(folder, workers=workers) as loader:
        with pytest.raises(OSError, match="could not be read for . s .*is the disk there.*same command again") as error:
            next(loader)
        assert "\n" not in str(error.value) and not loader.bad_files


FAULTS = {
    "image": {number: os.strerror(number) for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)},
    "disk": dict.fromkeys((errno.ESTALE, errno.ETIMEDOUT)),
    "machine": {
        errno.EMFILE: "Too many open files.*ulimit -n",
        errno.ENFILE: "Too many open files in system.*fs.file-max",
        errno.ENOMEM: "Cannot allocate memory.*fewer workers",
        errno.EBADF: "Bad file descriptor.*not of the image",
        errno.EUCLEAN: "Structure needs cleaning.*not of the image",
        MemoryError: "Cannot allocate memory.*fewer workers",
    },
}


@pytest.mark.parametrize("fault, error", [(fault, error) for fault, errors in FAULTS.items() for error in errors])
def test_whose_fault_an_error_is(make_folder, monkeypatch, fault, error):
    """An image's own is a bad file, that of a disk passes, and what the machine lacks stops training."""
    folder, message = ImageFolder(make_folder(20)), FAULTS[fault][error]
    read, again = folder.read, iter([True])

    def fail(i):
        if i == 7 and (fault != "disk" or next(again, False)):
            raise MemoryError if error is MemoryError else OSError(error, os.strerror(error), "x.png")
        return read(i)

    monkeypatch.setattr(folder, "read", fail)
    made = PillowBatches(folder, image_size=16, batch_size=20, seed=0, max_bad_fraction=0.9)
    stream = WorkerStream(made, 0, workers=int(error in (errno.ENOENT, MemoryError)))
    if fault == "machine":
        with pytest.raises(ReadError, match=f"cannot read .*class1/001.png .{message}.*same command again") as caught:
            next(stream)
        assert "\n" not in str(caught.value) and not made.bad.any()
    else:
        bad_files = next(stream)[1]
        assert list(bad_files) == [folder.paths[7]] * (fault == "image")
        assert all(message in reason for reason in bad_files.values())
    stream.close()


def test_an_image_that_decodes_with_more_memory_is_not_broken(make_folder):
    """Decoders of JPEG call the data broken when they get no memory."""
    folder = ImageFolder(make_folder(3, suffix=".jpg"))

    def decode(content):
        raise OSError("broken data stream when reading image file")

    assert folder.examine(0, decode)[1] == "OSError: broken data stream when reading image file"
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 25), limits[1]))
    try:
        with pytest.raises(ReadError, match="Cannot allocate memory"):
            folder.examine(0, decode)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# processes


# One process after torch's import for each way to end, in a session of its own.
PROGRAM = """
import multiprocessing, os, signal, sys, time
from epg_fast.data import ImageFolder, PillowLoader, Prefetcher
mode = next((mode for mode in sys.argv[2:] if os.fork() == 0), None)
if mode is None:
    for _ in sys.argv[2:]:
        pid, status = os.wait()
        print("ended", pid, os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
stop = []
if mode == "finish":
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
loader = PillowLoader(ImageFolder(sys.argv[1] + mode), image_size=64, batch_size=8, seed=0, workers=2)
batches = loader if mode in ("hung", "finish") else Prefetcher(loader, "cpu")
next(batches)
if mode == "hung":
    for path in loader.source.paths:  # opening a pipe that nobody writes to hangs as a dead disk does
        os.remove(loader.source.root / path)
        os.mkfifo(loader.source.root / path)
    time.sleep(0.5)  # until they hang
print(mode, os.getpid(), *[child.pid for child in multiprocessing.active_children()], flush=True)
if mode == "exit":
    sys.exit()
while not stop:
    time.sleep(0.01) if mode == "finish" else next(batches)
for _ in range(20):
    next(batches)
"""
SIGNALS = {"ctrl-c": signal.SIGINT, "finish": signal.SIGTERM, "kill": signal.SIGKILL, "hung": signal.SIGKILL}


@linux
@pytest.mark.slow
def test_no_worker_outlives_its_parent_however_that_ends(make_folder):
    """Of a parent that could not say goodbye, workers learn within a second, also while they wait for a disk."""
    modes = ("exit", "ctrl-c", "kill", "hung", "finish")
    for mode in modes:
        root = make_folder(40, name=f"of {mode}")
    command = [sys.executable, "-c", PROGRAM, str(root.with_name("of ")), *modes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        started, ended = {}, {}
        for line in program.stdout:
            what, *numbers = line.split()
            if what == "ended":
                ended[int(numbers[0])] = int(numbers[1])
                continue
            started[what] = parent, *workers = [int(pid) for pid in numbers]
            assert len(workers) == 2
            if what in ("ctrl-c", "finish"):  # to the whole group, as a terminal and a scheduler do
                os.killpg(parent, SIGNALS[what])
            elif what != "exit":
                os.kill(parent, SIGNALS[what])
    assert ended.keys() == {pids[0] for pids in started.values()} and started.keys() == set(modes)
    # a parent that handles SIGTERM can finish with its workers
    assert [ended[started[mode][0]] for mode in ("exit", "finish", "kill", "hung")] == [0, 0, -9, -9]
    assert not left_of([pid for pids in started.values() for pid in pids])
