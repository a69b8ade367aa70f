"""Images, tars, batches and settings to make tests of."""

import io
import itertools
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.config import AugmentConfig
from epg_fast.data import PillowLoader, open_images

# Nothing happens to the image: tests switch on what they look at.
OFF = AugmentConfig(
    crop_area=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    jitter_probability=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grayscale_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
    flip_probability=0.0,
)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed):
    return encode(noise(12, 10, seed))


def touch(root, *names, content=b""):
    """Write files of these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path, members, format=tarfile.PAX_FORMAT, mode="w"):
    """Write {name: content} as the tar `path`, with Python's tarfile.

    A str is the target of a symbolic link, or of a hard one behind "hard:"; None is a directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type = tarfile.LNKTYPE if content.startswith("hard:") else tarfile.SYMTYPE
                info.linkname = content.removeprefix("hard:")
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def samples(first, count, extension="png"):
    """Members of a WebDataset shard: images with their classes, i % 3."""
    members = {}
    for i in range(first, first + count):
        members |= {f"{i:04d}.{extension}": png(i), f"{i:04d}.cls": str(i % 3).encode()}
    return members


def contents(source):
    return {path: source.read(i) for i, path in enumerate(source.paths)}


def labels(source):
    return {path: int(label) for path, label in zip(source.paths, source.labels, strict=True)}


def refused(path, *expected, use=open_images):
    """`use(path)` raises an error of one line that has these texts or matches these patterns."""
    with pytest.raises((ValueError, ImportError)) as error:
        use(path)
    line = str(error.value)
    assert "\n" not in line and all(text in line or re.search(text, line) for text in expected), line


def open_loader(source, loader=PillowLoader, **options):
    alone = {"workers": 0} if loader is PillowLoader else {"threads": 2, "readers": 0}
    return loader(source, **{"image_size": 16, "batch_size": 8, "seed": 3} | alone | options)


def batches(source, count, **options):
    """The first batches of a loader of `source`."""
    with open_loader(source, **options) as loader:
        return list(itertools.islice(loader, count))


def joined(ranks):
    """The global batches of several ranks' shares."""
    return [{key: torch.cat([share[key] for share in step]) for key in step[0]} for step in zip(*ranks, strict=True)]


def assert_same(left, right):
    """Of two lists of batches."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
