import itertools
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.config import AugmentConfig, DataConfig
from epg_fast.data import DaliLoader, DataError, ImageFolder, PillowLoader, make_loader, resolve_backend
from epg_fast.data.loading import dali
from epg_fast.data.loading.dali import dali_status
from epg_fast.ops import extension_status
from tests.data.images import OFF, assert_same, encode, joined, open_loader, touch

pytestmark = pytest.mark.skipif(
    not (dali_status()[0] and extension_status()[0]), reason="needs NVIDIA DALI and the extension"
)

CROP = replace(OFF, crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3))


def photograph(width, height, seed=0):
    """Smooth colours with edges and some noise: what resizing and blurring treat differently from plain noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse).astype(int) + rng.normal(0, 6, (height, width, 1)).round().astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 30, 60)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """24 JPEG and PNG files in three classes: landscapes, portraits, squares, small and large ones."""
    root = tmp_path_factory.mktemp("photographs")
    sizes = [(100, 75), (75, 100), (64, 64), (200, 131), (333, 251), (40, 30), (31, 200), (150, 75)]
    for i in range(24):
        path = root / f"class{i % 3}" / f"{i:03d}{'.png' if i % 4 == 3 else '.jpg'}"
        path.parent.mkdir(exist_ok=True)
        photograph(*sizes[i % len(sizes)], seed=i).save(path)
    return ImageFolder(root)


def batches(folder, count, loader=DaliLoader, dali_resizes=False, **options):
    with open_loader(folder, loader, **{"image_size": 32, **options}) as stream:
        if dali_resizes:
            stream._dali_resizes = True  # as on a GPU, here with DALI's CPU operators
        return list(itertools.islice(stream, count))


def difference(folder, dali_resizes=False, count=3, **options):
    """Return per kind of view the absolute differences between DALI and Pillow in 8-bit levels."""
    found = batches(folder, count, dali_resizes=dali_resizes, **options)
    expected = batches(folder, count, PillowLoader, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["label"], b["label"])
        assert {k: (v.dtype, v.shape) for k, v in a.items()} == {k: (v.dtype, v.shape) for k, v in b.items()}
        assert all(tensor.is_contiguous() for tensor in a.values())
    return {
        name: torch.cat([(a[name].int() - b[name].int()).abs() for a, b in zip(found, expected, strict=True)])
        for name, tensor in found[0].items()
        if tensor.dtype == torch.uint8
    }


# views


@pytest.mark.parametrize("size", [16, 300])
def test_the_centre_crop_equals_pillows(photographs, size):
    levels = difference(photographs, image_size=size)["x"]
    # Pillow 13 resamples some images along y first: a level for each rounding
    same = (levels == 0).flatten(1).all(1)
    assert same.float().mean() >= 0.5 and levels.max() <= 3 and levels.float().mean() < 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"jitter_probability": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        {"grayscale_probability": 1.0},
        {"solarize_probability": (1.0, 1.0)},
        {"flip_probability": 1.0},
    ],
)
def test_colours_and_flips_equal_pillows_on_an_image_that_is_not_resized(make_folder, changes):
    folder = ImageFolder(make_folder(16, size=(32, 32)))
    for name, levels in difference(folder, count=2, augment=replace(OFF, **changes)).items():
        assert levels.max() == 0, name


def test_the_random_resized_crop_equals_pillows_to_a_level(photographs):
    for name, levels in difference(photographs, augment=CROP).items():
        # one level where Pillow resamples along y first
        assert levels.max() <= 1 and levels.float().mean() < 0.15, name


def test_the_blur_is_a_gaussian_where_pillow_approximates_it_and_all_together_is_close(photographs):
    augment = replace(OFF, blur_probability=(1.0, 1.0))
    levels = difference(photographs, image_size=64, augment=augment)["view1"].float()
    assert 0 < levels.mean() < 0.8
    for name, levels in difference(photographs, image_size=64, augment=AugmentConfig()).items():
        # a level from the blur, at most doubled by what follows; solarisation turns a few pixels round
        assert levels.float().mean() < (0.1 if name == "x" else 1.0)


@pytest.mark.parametrize("size", [16, 300])
def test_dalis_own_resizes_are_close_to_pillows(photographs, size):
    """What a GPU runs, with DALI's CPU operators."""
    for name, levels in difference(photographs, dali_resizes=True, image_size=size, augment=CROP).items():
        assert 0 < levels.float().mean() < (1.0 if name == "x" else 0.5)


# the stream


@pytest.mark.parametrize("options, dali_resizes", [({"threads": 3, "readers": 1}, False), ({"readers": 2}, True)])
def test_resuming_anywhere_with_other_threads_and_readers_continues_bit_for_bit(photographs, options, dali_resizes):
    common = {"augment": AugmentConfig(), "dali_resizes": dali_resizes}
    whole = batches(photographs, 6, **common)
    assert_same(batches(photographs, 2, start=4, **options, **common), whole[4:])


@pytest.mark.parametrize("dali_resizes, ranks", [(False, 4), (True, 2)])
def test_ranks_share_the_batches_of_one_and_an_epoch_has_every_image_once(photographs, ranks, dali_resizes):
    common = {"augment": AugmentConfig(), "dali_resizes": dali_resizes}
    found = joined([batches(photographs, 6, rank=rank, world_size=ranks, **common) for rank in range(ranks)])
    assert_same(found, batches(photographs, 6, **common))
    for epoch in (found[:3], found[3:]):
        assert sorted(torch.cat([batch["index"] for batch in epoch]).tolist()) == list(range(24))


# unusual and damaged files


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "JPEG", exif=exif)


def sixteen_bits():
    values = np.linspace(0, 65535, 48 * 60).astype(np.uint16).reshape(48, 60)
    return encode(Image.fromarray(values), "PNG")


def with_transparent_colour(image):
    content = encode(image, "PNG")
    data = b"tRNS" + struct.pack(">HHH", 1, 2, 3)
    chunk = struct.pack(">I", 6) + data + struct.pack(">I", zlib.crc32(data))
    return content[:33] + chunk + content[33:]


def with_texts(image):
    content = encode(image, "PNG")
    data = b"zTXtworkflow\0\0" + zlib.compress(bytes(2_000_000))
    return content[:33] + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) + content[33:]


UNUSUAL = {
    "texts.png": with_texts,
    "cmyk.jpg": lambda i: encode(i.convert("CMYK"), "JPEG"),
    "gray.jpg": lambda i: encode(i.convert("L"), "JPEG"),
    "palette.png": lambda i: encode(i.quantize(32), "PNG"),
    "transparent.png": lambda i: encode(i.convert("RGBA").resize((70, 50)), "PNG"),
    "colour_key.png": with_transparent_colour,
    "sixteen.png": lambda i: sixteen_bits(),
    "turned.jpg": turned,
    "progressive.jpg": lambda i: encode(i, "JPEG", progressive=True),
    "full_chroma.jpg": lambda i: encode(i, "JPEG", subsampling=0),
    "rgb.jpg": lambda i: encode(i, "JPEG", keep_rgb=True),
    "webp.webp": lambda i: encode(i, "WEBP"),
    "is_a_jpeg.png": lambda i: encode(i, "JPEG"),
    "trailing.jpg": lambda i: encode(i, "JPEG") + b"more" * 50,
    "tiny.png": lambda i: encode(i.resize((1, 1)), "PNG"),
    "large.jpg": lambda i: encode(i.resize((1600, 1200)), "JPEG"),
}
BAD = {
    "text.png": lambda i: b"this is no image",
    "cut.jpg": lambda i: encode(i, "JPEG")[:-200],
    "narrow.png": lambda i: encode(Image.new("RGB", (9000, 2)), "PNG"),
    "header_only.jpg": lambda i: encode(i, "JPEG")[:300],
    "damaged_inside.png": lambda i: damaged(encode(i, "PNG")),
}


def damaged(content):
    middle = len(content) // 2
    return content[:middle] + bytes(200) + content[middle + 200 :]


def write_all(root, files):
    for i, (name, make) in enumerate(files.items()):
        touch(root / "a", name, content=make(photograph(90, 70, seed=i)))
    return ImageFolder(root)


@pytest.mark.parametrize("dali_resizes", [False, True])
def test_unusual_files_are_read_as_pillow_reads_them(tmp_path, dali_resizes):
    folder = write_all(tmp_path / "images", UNUSUAL)
    count = len(folder)
    levels = difference(folder, dali_resizes, count=1, batch_size=count, flip_probability=0.0)["x"].float()
    (batch,) = batches(folder, 1, batch_size=count)
    worst = {folder.paths[i]: value for i, value in zip(batch["index"], levels.mean((1, 2, 3)).tolist(), strict=True)}
    assert all(value < (2.0 if dali_resizes else 0.1) for value in worst.values()), worst


@pytest.mark.parametrize("readers", [0, 1])
def test_bad_files_are_replaced_as_with_pillow_named_once_and_skipped(tmp_path, log, readers):
    folder = write_all(tmp_path / "images", UNUSUAL | BAD)
    options = {"image_size": 32, "batch_size": 5, "max_bad_fraction": 0.5, "flip_probability": 0.0}
    expected = batches(folder, 12, PillowLoader, **options)
    log.messages.clear()
    with open_loader(folder, DaliLoader, readers=readers, **options) as loader:
        found = list(itertools.islice(loader, 12))
        assert loader.bad_files.keys() == {f"a/{name}" for name in BAD}
    assert sum(message.startswith("cannot decode") for message in log.messages) == len(BAD)
    # of the files whose ends are whole
    assert sum("Pillow decodes its 5 files" in message for message in log.messages) == 1
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["label"], b["label"])
        assert (a["x"].int() - b["x"].int()).abs().float().mean() < 0.1


def test_a_file_that_only_dali_cannot_decode_is_decoded_by_pillow(photographs, monkeypatch):
    """Whatever makes DALI fail: here a file that is called plain, but of a format that DALI does not know."""
    gif = encode(photograph(64, 48), "GIF")
    content = {i: photographs.read(i) for i in range(len(photographs))} | {5: gif}
    monkeypatch.setattr(photographs, "read", content.__getitem__, raising=False)
    monkeypatch.setattr("epg_fast.data.loading.dali._is_plain", lambda image, content: True)
    assert difference(photographs)["x"].flatten(1).float().mean(1).max() < 0.3


def test_batches_before_too_many_bad_files_are_handed_out_and_known_ones_skipped_without_a_word(tmp_path, log):
    folder = write_all(tmp_path / "images", {f"{i:02d}.jpg": UNUSUAL["full_chroma.jpg"] for i in range(40)})
    good = batches(folder, 5)
    bad = int(good[3]["index"][0])
    (folder.root / folder.paths[bad]).write_bytes(b"")
    options = {"image_size": 32, "threads": 1, "readers": 1}
    with open_loader(folder, DaliLoader, **options) as loader:
        assert_same([next(loader) for _ in range(3)], good[:3])
        readers = list(loader._stream.processes)
        with pytest.raises(DataError, match="1 of 40 images"):
            next(loader)
        assert not any(reader.is_alive() for reader in readers)
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)
    log.messages.clear()
    known = {folder.paths[bad]: "found by another rank"}
    with open_loader(folder, DaliLoader, max_bad_fraction=0.05, **options) as loader:
        loader.add_bad_files(known)
        found = [next(loader) for _ in range(4)]
        assert_same(found[:3], good[:3])  # which nothing overwrote
        assert found[3]["index"][0] == (bad + 1) % 40 and loader.bad_files == known and not log.messages
        with pytest.raises(DataError):
            loader.add_bad_files(dict.fromkeys(folder.paths[:3], ""))
    with pytest.raises(ValueError, match="threads: got 0, wanted at least 1"):
        open_loader(folder, DaliLoader, threads=0)


# choosing and refusing


LACKS = [  # what is patched, what it says, and the devices that need it
    ("extension_status", "not built: no compiler", ["cpu"]),
    ("dali_status", "not installed; pip install nvidia-dali-cuda130", ["cpu", "cuda"]),
]


@pytest.mark.parametrize("status, reason, devices", LACKS)
def test_auto_takes_dali_where_it_can_run_and_says_why_not(monkeypatch, log, status, reason, devices):
    assert resolve_backend("auto") == "dali" and resolve_backend("pillow") == "pillow"
    with pytest.raises(ValueError, match="got 'dalli', wanted auto, dali or pillow"):
        resolve_backend("dalli")
    monkeypatch.setattr(dali, status, lambda: (False, reason))
    for device in ("cpu", "cuda"):
        assert resolve_backend("auto", device) == ("pillow" if device in devices else "dali")
    assert len(log.messages) == len(devices) and all(reason in line for line in log.messages)
    with pytest.raises(ValueError, match=f"{reason}.*--data.backend pillow"):
        resolve_backend("dali", devices[-1])


@pytest.mark.parametrize("backend, kind", [("dali", DaliLoader), ("pillow", PillowLoader)])
def test_make_loader_passes_every_setting_on(photographs, backend, kind):
    config = DataConfig(workers=3, readers=2, flip_probability=0.25, max_bad_fraction=0.2)
    options = {"image_size": 16, "batch_size": 8, "seed": 7, "rank": 1, "world_size": 2, "start": 5}
    loader = make_loader(photographs, config, backend=backend, three_views=True, **options)
    assert type(loader) is kind
    made = loader.batches
    assert (made.image_size, made.batch_size, made.seed, made.local_size, loader.iteration) == (16, 8, 7, 4, 5)
    assert made.flip_probability == 0.25 and made.max_bad_fraction == 0.2 and made.augment is config.augment
    if backend == "dali":
        assert loader.threads == 3 and loader._stream.workers == 2
    loader.close()


# on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [64, 256])
def test_a_gpu_makes_nearly_the_same_views_there(photographs, size):
    options = {"image_size": size, "augment": AugmentConfig()}
    expected = batches(photographs, 3, **options)
    found = batches(photographs, 3, device="cuda", **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["index"].cpu(), b["index"])
        for name in ("x", "view1", "view2"):
            assert a[name].is_cuda and a[name].is_contiguous()
            # nvJPEG's own inverse cosine transform and chroma upsampling come on top of the resizes
            assert (a[name].cpu().int() - b[name].int()).abs().float().mean() < 3.0, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too_a_resumed_stream_is_the_same_bit_for_bit_and_bad_files_are_replaced(tmp_path):
    folder = write_all(tmp_path / "images", UNUSUAL | BAD)
    options = {"batch_size": 5, "max_bad_fraction": 0.5, "augment": AugmentConfig(), "device": "cuda"}
    whole = batches(folder, 8, **options)
    assert_same(batches(folder, 5, start=3, threads=4, readers=2, **options), whole[3:])
    assert [b["index"].tolist() for b in whole] == [
        b["index"].tolist() for b in batches(folder, 8, PillowLoader, batch_size=5, max_bad_fraction=0.5)
    ]
