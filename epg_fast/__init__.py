"""epg_fast: pixel-space image generation without a VAE (arXiv 2510.12586). Public names are imported on first use."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "EPGViT": "epg_fast.models",
    "DMViT": "epg_fast.models",
    "RCMViT": "epg_fast.models",
    "create_model": "epg_fast.models",
    "create_encoder": "epg_fast.models",
    "from_pretrained": "epg_fast.models",
    "list_presets": "epg_fast.models",
    "SamplingEngine": "epg_fast.sampling",
    "sample": "epg_fast.sampling",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        # `sample` is also what users call the function; the sub-package is `epg_fast.sampling`.
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'epg_fast' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
