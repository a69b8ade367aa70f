"""npz files larger than memory, compressed, damaged or hostile."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from epg_fast.npz import Npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_whole_and_in_batches(tmp_path, save):
    rng = np.random.default_rng(0)
    images, numbers = rng.integers(0, 256, (11, 4, 5, 3), dtype=np.uint8), rng.normal(size=(3, 3)).astype(">f8")
    save(tmp_path / "a.npz", arr_0=images, numbers=numbers, text=np.array("words"))
    file = Npz(tmp_path / "a.npz")
    assert file.names == ["arr_0", "numbers", "text"]
    assert file.header("arr_0") == ((11, 4, 5, 3), np.dtype(np.uint8))
    assert np.array_equal(file.array("numbers"), numbers) and str(file.array("text")) == "words"
    batches = list(file.batches("arr_0", 4))
    assert [len(batch) for batch in batches] == [4, 4, 3] and np.array_equal(np.concatenate(batches), images)


def test_a_large_array_is_never_in_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((400, 64, 64, 3), np.uint8))
    tracemalloc.start()
    total = sum(len(batch) for batch in Npz(tmp_path / "a.npz").batches("arr_0", 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 400 and peak < 400 * 64 * 64 * 3 / 4


def test_a_header_that_does_not_fit_the_content_is_refused(tmp_path):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (4, 3)})
    for num, message in ((11, "fewer"), (13, "more")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("arr_0.npy", member.getvalue() + b"x" * num)
        for read in (Npz.array, lambda file, name: list(file.batches(name, 3))):
            with pytest.raises(ValueError, match=rf"a\.npz: arr_0 holds {message} bytes than its header says"):
                read(Npz(tmp_path / "a.npz"), "arr_0")


def test_objects_are_refused_and_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{}, None]))
    for read in (Npz.header, Npz.array):
        with pytest.raises(ValueError, match=r"a\.npz: arr_0 holds Python objects"):
            read(Npz(tmp_path / "a.npz"), "arr_0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flipped", "CRC.*write or fetch it again"),
        ("compressed", "expected a complete npz file .*decompressing"),
        *((share, "expected a complete npz file") for share in (0, 0.99)),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    path = tmp_path / "a.npz"
    save = np.savez_compressed if damage == "compressed" else np.savez
    save(path, arr_0=np.random.default_rng(0).integers(0, 9, (40, 100)))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[2000] ^= 1
    elif damage == "compressed":
        content[30 + len("arr_0.npy") + content[28]] = 0xFF  # behind the local header and its extra field
    else:
        del content[int(damage * len(content)) :]
    path.write_bytes(content)
    for read in (Npz.array, lambda file, name: list(file.batches(name, 40))):
        with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
            read(Npz(path), "arr_0")


def test_what_is_no_array_of_rows_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, columns=np.asfortranarray(np.ones((3, 2))))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("garbage.npy", b"not an array")
        archive.writestr("future.npy", b"\x93NUMPY\x09\x00" + b"x" * 50)
    file = Npz(path)
    for name, message in (("columns", "stored by columns"), ("garbage", "magic"), ("future", r"version.*9")):
        with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
            file.array(name)
    with pytest.raises(ValueError, match=r"a\.npz: expected arr_0, found \['columns', 'future', 'garbage'\]"):
        file.array("arr_0")
    with pytest.raises(ValueError, match="nowhere: no such file"):
        Npz(tmp_path / "nowhere")
