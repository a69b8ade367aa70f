import errno
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.config import AugmentConfig
from epg_fast.data import DataError, ImageFolder, PillowLoader, center_crop, source, training_views
from epg_fast.data.encoded import EncodedBatches
from epg_fast.data.faults import ReadError
from epg_fast.data.loader import DecodedBatches
from epg_fast.data.workers import WorkerStream


def batches(folder, count, **options):
    options = {"image_size": 16, "batch_size": 8, "seed": 3, "workers": 0, **options}
    with PillowLoader(folder, **options) as loader:
        return list(itertools.islice(loader, count))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


def test_a_batch_has_the_documented_tensors(make_folder):
    folder = ImageFolder(make_folder(20))
    for augment, names in ((None, {"x"}), (AugmentConfig(), {"x", "view1", "view2"})):
        (batch,) = batches(folder, 1, augment=augment)
        assert batch.keys() == names | {"label", "index"}
        for name in names:
            assert batch[name].dtype == torch.uint8 and batch[name].shape == (8, 3, 16, 16)
            assert batch[name].is_contiguous()
        for name in ("label", "index"):
            assert batch[name].dtype == torch.int64 and batch[name].shape == (8,)


def test_pixels_and_labels_belong_to_the_index(make_folder):
    folder = ImageFolder(make_folder(20))
    for batch in batches(folder, 2, flip_probability=0.0):
        for x, label, index in zip(batch["x"], batch["label"], batch["index"], strict=True):
            assert label == folder.labels[index]
            expected = np.asarray(center_crop(folder.load(int(index)), 16))
            np.testing.assert_array_equal(x.numpy(), expected.transpose(2, 0, 1))


def test_an_epoch_has_every_image_at_most_once_and_the_next_another_order(make_folder):
    folder = ImageFolder(make_folder(27))
    loader = PillowLoader(folder, image_size=8, batch_size=8, seed=0, workers=0)
    assert loader.iterations_per_epoch == 3
    epochs = [torch.cat([next(loader)["index"] for _ in range(3)]).tolist() for _ in range(40)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 40
    # the images dropped at the end of an epoch are others each time
    assert set().union(*epochs) == set(range(27))
    assert loader.iteration == 120


def test_views_of_an_image_change_from_epoch_to_epoch_and_with_the_seed(make_folder):
    folder = ImageFolder(make_folder(8))

    def view_of_image_0(seed, iteration):
        (batch,) = batches(folder, 1, seed=seed, start=iteration, augment=AugmentConfig())
        return batch["view1"][batch["index"] == 0].numpy().tobytes()

    assert len({view_of_image_0(seed, iteration) for seed in (0, 1) for iteration in (0, 1)}) == 4


def test_the_stream_is_a_function_of_seed_epoch_and_index(make_folder):
    """The contract another loader has to keep: written out with numpy alone."""
    folder = ImageFolder(make_folder(20))
    batch = batches(folder, 1, start=5, augment=AugmentConfig())[0]  # two iterations an epoch: epoch 2, second half

    def rng(*key):
        return np.random.default_rng(np.random.SeedSequence(3, spawn_key=key))

    indices = rng(0, 2).permutation(20)[8:16]
    assert batch["index"].tolist() == indices.tolist()
    views = training_views(folder.load(int(indices[6])), 16, rng(1, 2, int(indices[6])), 0.5, AugmentConfig())
    for name, view in zip(("x", "view1", "view2"), views, strict=True):
        np.testing.assert_array_equal(batch[name][6].numpy(), view.transpose(2, 0, 1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resuming_anywhere_with_any_number_of_workers_continues_bit_for_bit(make_folder, workers):
    folder = ImageFolder(make_folder(21))
    whole = batches(folder, 9, augment=AugmentConfig())
    for start in (0, 1, 2, 5):
        assert_same(batches(folder, 9 - start, start=start, workers=workers, augment=AugmentConfig()), whole[start:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batches_of_a_single_process(make_folder, world_size):
    folder = ImageFolder(make_folder(21))
    whole = batches(folder, 5, augment=AugmentConfig())
    ranks = [
        batches(folder, 5, rank=rank, world_size=world_size, augment=AugmentConfig()) for rank in range(world_size)
    ]
    joined = [
        {key: torch.cat([share[key] for share in shares]) for key in shares[0]} for shares in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_neither_used_nor_touched(make_folder, workers):
    folder = ImageFolder(make_folder(20))
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = batches(folder, 2, workers=workers, augment=AugmentConfig())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(2)
    assert_same(batches(folder, 2, workers=workers, augment=AugmentConfig()), first)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 21}, "got 21, wanted at most the 20 images"),
        ({"world_size": 3}, "got 8 for 3 ranks, wanted a multiple of 3"),
        ({"rank": 2, "world_size": 2}, "rank: got 2 of 2"),
        ({"start": -1}, "start: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"workers": -1}, "workers: got -1"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"flip_probability": 1.5}, "flip_probability: got 1.5"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction: got 1.0"),
        ({"augment": AugmentConfig(hue=2.0)}, "augment.hue: got 2.0"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(make_folder, options, message):
    folder = ImageFolder(make_folder(20))
    with pytest.raises(ValueError, match=message):
        PillowLoader(folder, **{"image_size": 16, "batch_size": 8, "seed": 0, **options})


# damaged files


def damage(folder, index, how):
    path = folder.root / folder.paths[index]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "vanished":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"not an image"}[how])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "vanished", "empty", "text"])
def test_a_damaged_file_is_replaced_by_the_next_and_logged_once(make_folder, caplog, workers, how):
    folder = ImageFolder(make_folder(100))
    clean = batches(folder, 20, batch_size=25, flip_probability=0.0)
    damage(folder, 41, how)
    with (
        caplog.at_level(logging.WARNING, "epg_fast"),
        PillowLoader(folder, image_size=16, batch_size=25, seed=3, flip_probability=0.0, workers=workers) as loader,
    ):
        found = list(itertools.islice(loader, 20))
    assert list(loader.bad_files) == [folder.paths[41]]
    assert [folder.paths[41] in record.getMessage() for record in caplog.records] == [True]
    replacement = torch.from_numpy(np.asarray(center_crop(folder.load(42), 16)).transpose(2, 0, 1).copy())
    hits = 0
    for before, after in zip(clean, found, strict=True):
        bad = before["index"] == 41
        hits += int(bad.sum())
        assert torch.equal(after["index"], torch.where(bad, 42, before["index"]))
        assert after["label"].tolist() == [folder.labels[i] for i in after["index"]]
        assert torch.equal(after["x"][~bad], before["x"][~bad])
        assert all(torch.equal(x, replacement) for x in after["x"][bad])
    assert hits == 5


def test_neighbouring_damaged_files_in_one_batch_are_both_replaced(make_folder):
    folder = ImageFolder(make_folder(12))
    for index in (10, 11):
        damage(folder, index, "empty")
    (batch,) = batches(folder, 1, batch_size=12, max_bad_fraction=0.2)
    assert sorted(batch["index"].tolist()) == [0, 0, 0, *range(1, 10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_of_damaged_files_stops_with_their_names(make_folder, workers):
    folder = ImageFolder(make_folder(20))
    damage(folder, 7, "truncated")
    with PillowLoader(folder, image_size=16, batch_size=20, seed=0, workers=workers) as loader:
        with pytest.raises(
            DataError, match=r"1 of 20 images \(5.00%\).*at most 1.00%.*class1/001.png.*Restore or delete"
        ):
            # the other process may have been the first to meet it, while it made the next batch
            for _ in range(workers or 1):
                next(loader)
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mount_point", [False, True])
def test_a_disk_that_goes_away_is_waited_for_and_changes_nothing(make_folder, workers, mount_point):
    root = make_folder(60)
    folder = ImageFolder(root)
    expected = batches(folder, 6)
    root.rename(root.with_name("elsewhere"))
    if mount_point:
        root.mkdir()  # of a disk that was mounted there, the empty folder stays

    def come_back():
        root.with_name("elsewhere").rename(root)

    timer = threading.Timer(0.5, come_back)
    timer.start()
    assert_same(batches(folder, 6, workers=workers), expected)
    timer.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_stays_away_stops_training_with_one_line(make_folder, monkeypatch, workers):
    root = make_folder(60)
    folder = ImageFolder(root)
    root.rename(root.with_name("elsewhere"))
    monkeypatch.setattr(source, "_PATIENCE", 0.2)
    with PillowLoader(folder, image_size=16, batch_size=60, seed=0, workers=workers) as loader:
        with pytest.raises(OSError, match="could not be read for . s .*is the disk there.*same command again") as error:
            next(loader)
        assert "\n" not in str(error.value) and not loader.bad_files


def test_a_passing_error_of_a_network_disk_makes_no_file_bad(make_folder, monkeypatch):
    folder = ImageFolder(make_folder(20))
    expected = batches(folder, 4)
    read, failures = folder.read, iter([errno.ESTALE, errno.ETIMEDOUT])

    def unsteady(i):
        for number in failures:
            raise OSError(number, os.strerror(number))
        return read(i)

    monkeypatch.setattr(folder, "read", unsteady)
    assert_same(batches(folder, 4), expected)


FAULTS = {
    errno.EMFILE: "Too many open files.*ulimit -n",
    errno.ENFILE: "Too many open files in system.*fs.file-max",
    errno.ENOMEM: "Cannot allocate memory.*fewer workers",
    errno.EBADF: "Bad file descriptor.*not of the image",
    errno.EUCLEAN: "Structure needs cleaning.*not of the image",
}


@pytest.mark.parametrize("make, workers", [(DecodedBatches, 1), (EncodedBatches, 0)])
@pytest.mark.parametrize(
    "error, message",
    [
        *((OSError(number, os.strerror(number), "x.png"), message) for number, message in FAULTS.items()),
        (MemoryError(), "Cannot allocate memory.*fewer workers"),
    ],
)
def test_what_the_process_or_the_machine_lacks_is_no_images_fault(
    make_folder, monkeypatch, make, workers, error, message
):
    folder = ImageFolder(make_folder(20))

    def fail(i):
        raise error

    monkeypatch.setattr(folder, "read", fail)
    with PillowLoader(folder, image_size=16, batch_size=20, seed=0, workers=0, max_bad_fraction=0.9) as loader:
        stream = WorkerStream(make(loader), 0, workers)
        with pytest.raises(ReadError, match=f"cannot read .*class./0...png .{message}.*same command again") as caught:
            next(stream)
        assert "\n" not in str(caught.value) and not loader._bad.any()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP])
def test_what_is_wrong_with_one_file_is_its_own_fault(make_folder, monkeypatch, number):
    folder = ImageFolder(make_folder(20))
    read = folder.read

    def fail(i):
        if i == 7:
            raise OSError(number, os.strerror(number), folder.paths[i])
        return read(i)

    monkeypatch.setattr(folder, "read", fail)
    with PillowLoader(folder, image_size=16, batch_size=20, seed=0, workers=0, max_bad_fraction=0.1) as loader:
        next(loader)
        assert list(loader.bad_files) == [folder.paths[7]] and os.strerror(number) in loader.bad_files[folder.paths[7]]


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


def test_an_image_too_narrow_to_crop_is_a_bad_file(make_folder):
    folder = ImageFolder(make_folder(20))
    Image.new("RGB", (1, 9000)).save(folder.root / folder.paths[7])
    with PillowLoader(folder, image_size=64, batch_size=20, seed=0, workers=0, max_bad_fraction=0.1) as loader:
        next(loader)
        assert list(loader.bad_files) == [folder.paths[7]] and "too narrow" in loader.bad_files[folder.paths[7]]


# processes


def test_a_reader_that_is_killed_stops_training_with_a_remedy(make_folder):
    with PillowLoader(ImageFolder(make_folder(20)), image_size=16, batch_size=8, seed=0, workers=1) as loader:
        next(loader)
        os.kill(loader._stream.processes[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"killed \(exit code -9\).*fewer --data.workers") as error:
            for _ in range(20):
                next(loader)
        assert "\n" not in str(error.value)


PROGRAM = """
import gc, multiprocessing, os, signal, sys, time
from epg_fast.data import ImageFolder, PillowLoader
loader = PillowLoader(ImageFolder(sys.argv[1]), image_size=64, batch_size=8, seed=0, workers=2)
next(loader)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if sys.argv[2] == "exit":
    sys.exit()
if sys.argv[2] == "dropped":
    loader.itself = loader  # a cycle: only the garbage collector ends it
    del loader
    gc.collect()
    sys.exit()
if sys.argv[2] == "hung":
    for path in loader.source.paths:  # opening a pipe that nobody writes to hangs as a dead disk does
        os.remove(loader.source.root / path)
        os.mkfifo(loader.source.root / path)
if sys.argv[2] == "finish":
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    for _ in range(20):
        next(loader)
    print("saved", flush=True)
    sys.exit()
while True:
    next(loader)
"""


def worker_pids(program):
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    return workers


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_no_worker_outlives_its_parent_however_that_ends(make_folder, start_python, wait_until_gone):
    modes = ("exit", "dropped", "ctrl-c", "kill", "hung")
    programs = {mode: start_python(PROGRAM, make_folder(20, name=mode), mode) for mode in modes}
    workers = {mode: worker_pids(program) for mode, program in programs.items()}
    os.killpg(programs["ctrl-c"].pid, signal.SIGINT)
    programs["kill"].kill()
    time.sleep(0.5)
    programs["hung"].kill()
    for program in programs.values():
        program.wait(60)
    assert programs["exit"].returncode == 0
    assert programs["dropped"].returncode == 0
    assert not wait_until_gone(workers["exit"] + workers["dropped"] + workers["ctrl-c"], 20)
    # of a parent that could not say goodbye, workers learn within a second, also while they wait for a disk
    assert not wait_until_gone(workers["kill"] + workers["hung"], 20)


@pytest.mark.skipif(sys.platform != "linux", reason="signals a process group")
def test_a_parent_that_handles_sigterm_can_finish_with_its_workers(make_folder, start_python, wait_until_gone):
    program = start_python(PROGRAM, make_folder(20), "finish")
    workers = worker_pids(program)
    assert program.stdout.readline() == "ready\n"
    os.killpg(program.pid, signal.SIGTERM)
    assert program.stdout.readline() == "saved\n"
    assert program.wait(60) == 0
    assert not wait_until_gone(workers, 20)


def test_close_stops_the_workers_at_once_and_can_be_repeated(make_folder):
    loader = PillowLoader(ImageFolder(make_folder(20)), image_size=16, batch_size=8, seed=0, workers=2)
    next(loader)
    workers = list(loader._stream.processes)
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
