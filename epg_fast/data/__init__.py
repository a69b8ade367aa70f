"""Images on disk to batches of uint8 tensors (SPEC 1).

The batch interface, which every loader keeps and training relies on:

- A loader is an infinite iterator over one rank's share of the global batches, starting at global iteration `start`.
- A batch is a dict: `x` uint8 [b, 3, H, W] (centre crop, maybe flipped), `label` int64 [b], `index` int64 [b] (position
  in the `ImageSource`) and, for pre-training, `view1` and `view2`, uint8 [b, 3, H, W]; b = global batch / ranks.
  Tensors are contiguous and may live on any device; `epg_fast.diffusion.PixelNormalization` makes them network input.
- A batch depends on nothing but the seed, the global iteration and the position in the global batch. A run resumed at
  any iteration, with any number of workers and ranks, sees the same images in the same order.
- `close()` (or leaving the `with` block) stops whatever the loader started; `bad_files` maps each file that could not
  be decoded to the reason; too many of them raise `DataError`.

Where to read: `sources/` says what the images and classes at a path are and reads them one by one, `prepare/` writes
their centre crops, and `loading/` makes the batches. `loading/loader.py` holds the order of the images, what becomes of
bad ones and what Pillow makes of the others, `dali.py` what DALI makes of them, `workers.py` the processes,
`prefetch.py` the device.
"""

from epg_fast.data.loading import make_loader, resolve_backend
from epg_fast.data.loading.dali import DaliLoader
from epg_fast.data.loading.loader import Loader, PillowLoader
from epg_fast.data.loading.prefetch import Prefetcher
from epg_fast.data.loading.views import center_crop, training_views
from epg_fast.data.prepare import prepare_digits, prepare_folder, prepare_shards, verify_shards
from epg_fast.data.sources import open_images
from epg_fast.data.sources.decoding import decode_image
from epg_fast.data.sources.faults import DataError, printable, too_many_bad_files
from epg_fast.data.sources.folder import ImageFolder
from epg_fast.data.sources.manifest import load_class_frequencies
from epg_fast.data.sources.parquet import ImageParquet
from epg_fast.data.sources.source import LABELS_WANTED, NO_LABELS, ImageSource, images_of
from epg_fast.data.sources.tars import ImageTars

__all__ = [
    "LABELS_WANTED",
    "NO_LABELS",
    "DaliLoader",
    "DataError",
    "ImageFolder",
    "ImageParquet",
    "ImageSource",
    "ImageTars",
    "Loader",
    "PillowLoader",
    "Prefetcher",
    "center_crop",
    "decode_image",
    "images_of",
    "load_class_frequencies",
    "make_loader",
    "open_images",
    "prepare_digits",
    "prepare_folder",
    "prepare_shards",
    "printable",
    "resolve_backend",
    "too_many_bad_files",
    "training_views",
    "verify_shards",
]
