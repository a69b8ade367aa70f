"""Images for a feature network: the same from an npz file, class folders and a flat folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.evaluation.sources import open_stream
from tests.evaluation.samples import save_npz, save_pngs


def colors(num=7, height=6, width=6):
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def everything(path, batch_size=3):
    stream = open_stream(path)
    parts, batches = zip(*stream.batches(batch_size), strict=True)
    assert all(batch.dtype == torch.uint8 and len(batch) <= batch_size for batch in batches)
    images = torch.cat(batches)
    assert stream.num == len(images) and stream.size == images.shape[2:]
    assert np.array_equal(np.concatenate([np.arange(stream.num)[part] for part in parts]), np.arange(stream.num))
    # every third batch, as one of three ranks takes them
    for first in range(3):
        for part, batch in stream.batches(batch_size, first, 3):
            assert part.start // batch_size % 3 == first and torch.equal(batch, images[part])
    return images.permute(0, 2, 3, 1).numpy()


def test_npz_class_folders_and_flat_folder_hold_the_same_images(tmp_path):
    images = colors()
    save_npz(images, np.arange(7), tmp_path / "samples.npz")
    save_pngs(images, np.arange(7) // 3, tmp_path / "png")
    save_pngs(images, np.zeros(7, int), tmp_path / "flat")
    for path in ("samples.npz", "png", "flat/0000"):
        assert np.array_equal(everything(tmp_path / path), images), path


def test_oblong_and_gray_images_are_read_as_they_are(tmp_path):
    images = colors(2, height=4, width=6)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    assert np.array_equal(everything(tmp_path), images[..., :1].repeat(3, axis=3))


def test_broken_images_and_those_of_different_sizes_are_refused_by_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: the image is 8x9, the first one 8x8"):
        everything(tmp_path)
    (tmp_path / "b.png").write_bytes(b"\x89PNG half a file")
    with pytest.raises(ValueError, match=r"b\.png: cannot be decoded"):
        everything(tmp_path)


@pytest.mark.parametrize(
    "array",
    [colors().astype(np.float32), colors()[..., :1], colors()[0], colors()[:0], colors().transpose(0, 3, 1, 2).copy()],
)
def test_other_arrays_are_refused(tmp_path, array):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(ValueError, match=r"a\.npz: arr_0 must be uint8 \[N, H, W, 3\] with N > 0, got"):
        open_stream(tmp_path / "a.npz")


def test_missing_and_empty_sources_and_output_folders_of_sample_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        open_stream(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty"):
        open_stream(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    save_npz(colors(), np.arange(7), tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"holds samples\.npz.*pass its samples\.npz"):
        open_stream(tmp_path)


def test_a_flat_folder_stays_the_flat_folder_whatever_lies_in_subfolders(tmp_path):
    images = colors()
    save_pngs(images, np.zeros(7, int), tmp_path)
    flat = tmp_path / "0000"
    (flat / "logs").mkdir()
    (flat / "logs" / "log.txt").write_text("x")
    save_pngs(images[::-1], np.zeros(7, int), flat / "@eaDir")
    assert np.array_equal(everything(flat), images)
    save_pngs(images[:2], np.zeros(2, int), flat / "grids")
    with pytest.raises(
        ValueError, match=r"7 images itself and 2 in its folders \(grids, \.\.\.\), wanted one of these"
    ):
        open_stream(flat)
