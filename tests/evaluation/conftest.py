import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folders train/ and test/ of scikit-learn's digits as 8 x 8 PNG files in class folders."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images / 16 * 255).astype(np.uint8).reshape(-1, 8, 8)
    parts = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    for split, x, y in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        for label in range(10):
            (root / split / f"{label:04d}").mkdir(parents=True)
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            Image.fromarray(image).save(root / split / f"{label:04d}" / f"{i:06d}.png")
    return root


@pytest.fixture(scope="session")
def arrays(digits):
    """(train pixels, train labels, test pixels, test labels) of the digits, pixels in [0, 1]."""
    from epg_fast.evaluation import load_images

    return *load_images(digits / "train", 8), *load_images(digits / "test", 8)
