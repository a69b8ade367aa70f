"""A configuration to start from in tests of single augmentations."""

from epg_fast.config import AugmentConfig

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
