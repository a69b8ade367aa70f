"""Batches decoded and resized by NVIDIA DALI: on the GPU with one (nvJPEG), by its CPU operators without.

The order of the images and the parameters of their views are those of `PillowLoader`: nothing random is left to DALI.
What follows the random resized crop is `epg_fast.ops.augment_view`: one pass of the extension on a CPU. Differences
from Pillow in 8-bit levels (`tests/data/test_dali.py` holds them to these):

    decoding                          none
    centre crop                       mean 0.3 (the resizes round at other places)
    random resized crop               mean 0.2
    jitter, grayscale, solarisation   none on the same crop
    Gaussian blur                     mean 0.6 on the same crop (Pillow approximates the Gaussian by boxes)
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import logging

import numpy as np
import torch

from epg_fast.data.encoded import EncodedBatches, max_halvings, parameters_dtype
from epg_fast.data.loader import Loader, WorkerStream
from epg_fast.data.source import ImageSource
from epg_fast.ops import augment_view

logger = logging.getLogger("epg_fast")


def dali_is_installed() -> bool:
    """Whether `nvidia.dali` can be imported; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class DaliLoader(Loader):
    """A `Loader` whose pixels are DALI's; batches are on `device`.

    Args:
        source, options: see `Loader`.
        threads: CPU threads of DALI.
        readers: processes that read files and draw the parameters of the views; 0 does so in this process.
        device: a CUDA device decodes and augments there; "cpu" uses DALI's CPU operators.
        prefetch: batches that DALI works on ahead.

    An image that DALI cannot decode is tried with Pillow before it counts as bad. Raises ImportError without DALI.
    """

    backend = "dali"

    def __init__(
        self,
        source: ImageSource,
        *,
        threads: int = 4,
        readers: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        **options,
    ):
        if not dali_is_installed():
            raise ImportError(
                "the DALI loader needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130 "
                "(or -cuda120), or use --data.backend pillow"
            )
        if threads < 1 or prefetch < 1:
            raise ValueError(f"threads, prefetch: got {threads}, {prefetch}, wanted at least 1")
        super().__init__(source, **options)
        self.threads, self.prefetch = threads, prefetch
        self.device = torch.device(device)
        self._batches = EncodedBatches(self)
        self._stream = WorkerStream(self._batches, self.iteration, readers)
        self._dtype = parameters_dtype(len(self._batches.names) - 1)
        self._pipeline = None
        # encoded batches whose pixels have not come back, oldest first: what to do again when one of them fails
        self._under_way: collections.deque[dict] = collections.deque()
        self._again: collections.deque[dict] = collections.deque()
        self._failure: Exception | None = None

    def __next__(self) -> dict[str, torch.Tensor]:
        self._check_open()
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            outputs = self._run()
        except RuntimeError as error:
            logger.debug("DALI failed", exc_info=error)
            self._replace_oldest()
            self._pipeline = self._build()
            outputs = self._run()
        encoded = self._under_way.popleft()
        self.iteration += 1
        batch = {name: _to_torch(output) for name, output in zip(self._batches.names, outputs, strict=True)}
        records = self._records(encoded)
        for name in self._batches.names[1:]:
            batch[name] = _augment(batch[name], records[name])
        return batch | {"label": encoded["label"], "index": encoded["index"]}

    def close(self) -> None:
        """Stop the processes and release the pipeline; closing twice does nothing."""
        super().close()
        self._stream.close()
        self._pipeline = None
        self._under_way.clear()
        self._again.clear()

    def _run(self) -> tuple:
        try:
            return self._pipeline.run()
        except StopIteration:
            # the batches before a failure of the stream have all been handed out
            self._pipeline = None
            failure, self._failure = self._failure, None
            raise failure from None

    def _feed(self) -> list:
        """Return DALI's inputs for the next batch; DALI calls this ahead of `run`."""
        if self._failure is not None:
            raise StopIteration
        try:
            encoded = self._again.popleft() if self._again else self._next_encoded()
        except Exception as error:
            self._failure = error
            raise StopIteration from None
        self._under_way.append(encoded)
        content, lengths = encoded["content"].numpy(), encoded["length"].tolist()
        ends = itertools.accumulate(lengths)
        files = [content[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        records = self._records(encoded)
        return [files, *(np.ascontiguousarray(records[group][name]) for group, name in _inputs(self._dtype))]

    def _records(self, encoded: dict) -> np.ndarray:
        return encoded["parameters"].numpy().view(self._dtype).reshape(-1)

    def _next_encoded(self) -> dict:
        batch, bad_files = next(self._stream)
        self._report(bad_files)
        return batch

    def _replace_oldest(self) -> None:
        """Decode the oldest batch under way with Pillow, which says which of its files are bad; keep the others."""
        if not self._under_way:
            raise RuntimeError("DALI failed before it had a batch")
        batches = EncodedBatches(self, pillow_only=True)
        replaced, bad_files = batches[self.iteration]
        self._report(bad_files)
        self._again = collections.deque([replaced, *list(self._under_way)[1:], *self._again])
        self._under_way.clear()

    def _build(self):
        pipeline = _make_pipeline(
            self._feed,
            self._dtype,
            self.image_size,
            batch_size=self._batches.local_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
            prefetch_queue_depth=self.prefetch,
            # nothing random is left to DALI
            seed=0,
        )
        pipeline.build()
        return pipeline


def _inputs(dtype: np.dtype) -> list[tuple[str, str]]:
    """The fields of a record that DALI takes, as (view, name)."""
    crop, *views = dtype.names
    names = [(crop, name) for name in ("halvings", "sizes", "start", "end", "flip")]
    return names + [(view, name) for view in views for name in ("start", "end")]


def _to_torch(output) -> torch.Tensor:
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

    return to_torch_tensor(output.as_tensor(), copy=False)


def _augment(crops: torch.Tensor, view: np.ndarray) -> torch.Tensor:
    """[b, H, W, 3] and the records of their views -> [b, 3, H, W]."""
    names = ("operations", "values", "grayscale", "sigma", "solarize", "flip")
    return augment_view(crops, **{name: torch.from_numpy(np.ascontiguousarray(view[name])) for name in names})


def _make_pipeline(feed, dtype: np.dtype, size: int, **options):
    """Return the pipeline from `feed`'s inputs to the centre crop [b, 3, size, size], the views [b, size, size, 3]."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

    names, levels = _inputs(dtype), max_halvings(size)
    box = np.full((2, 2), 0.25, np.float32)
    decoder = "cpu" if options["device_id"] is None else "mixed"

    @do_not_convert
    def inputs():
        content, *columns = fn.external_source(source=feed, num_outputs=1 + len(names), batch=True)
        p = {group: {} for group in dtype.names}
        for (group, name), column in zip(names, columns, strict=True):
            p[group][name] = column
        return content, p

    def resize(image, p, interpolation):
        box = {"roi_start": p["start"], "roi_end": p["end"]}
        return fn.resize(image, size=(size, size), interp_type=interpolation, antialias=True, **box)

    def halve(image, shape, to):
        # Pillow's BOX filter: the mean of the two by two pixels whose centres lie in the larger one. The filter leaves
        # the mean of pixels (j-1, j) at j; the nearest one half a pixel on is the pair wanted, for odd sizes too.
        image = fn.filter(image, box, border="clamp", dtype=types.FLOAT)
        image = fn.resize(image, size=to, roi_start=0.5, roi_end=shape + 0.5, interp_type=types.INTERP_NN)
        # Pillow rounds halves up, once per direction: a quarter more on average than rounding once
        return fn.cast(image + 0.25, dtype=types.UINT8)

    def center_crop(image, p):
        for level in range(levels):
            if p["halvings"] > level:
                image = halve(image, p["sizes"][level], p["sizes"][level + 1])
        image = resize(image, p, types.INTERP_CUBIC)
        return fn.crop_mirror_normalize(
            image, mirror=p["flip"], dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0]
        )

    @pipeline_def(enable_conditionals=True, **options)
    def views():
        content, p = inputs()
        image = fn.decoders.image(content, device=decoder, output_type=types.RGB, adjust_orientation=False)
        outputs = [center_crop(image, p["crop"])]
        for group in dtype.names[1:]:
            outputs.append(resize(image, p[group], types.INTERP_LINEAR))
        return tuple(outputs)

    return views()
