"""What the sweeps of these tests are judged by."""

import shutil

import pytest


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory):
    """Folder with train/ and test/ of eight digits of each class: a classifier learns them at once."""
    folder = tmp_path_factory.mktemp("few")
    for part in ("train", "test"):
        for images in (digits / part).iterdir():
            (folder / part / images.name).mkdir(parents=True)
            for path in sorted(images.iterdir())[:8]:
                shutil.copy(path, folder / part / images.name)
    return folder
