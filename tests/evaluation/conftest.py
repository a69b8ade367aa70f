import pytest


@pytest.fixture(scope="session")
def arrays(digits):
    """(train pixels, train labels, test pixels, test labels) of the digits, pixels in [0, 1]."""
    from epg_fast.evaluation import load_images

    return *load_images(digits / "train", 8), *load_images(digits / "test", 8)
