"""Batches decoded and augmented by NVIDIA DALI: on the GPU with one (nvJPEG), by its CPU operators without.

The order of the images and the parameters of their views are those of `PillowLoader`; DALI only executes them. Against
Pillow, in 8-bit levels (`tests/data/test_dali.py` checks these bounds):

    decoding                         equal
    centre crop                      mean 0.3 (halving and bicubic resize round at other places)
    random resized crop              mean 0.2
    brightness, contrast, saturation at most 1
    hue                              mean 3: a rotation about the gray axis, not a shift in HSV
    grayscale, solarisation, flip    at most 1
    Gaussian blur                    mean 0.6 (Pillow approximates a Gaussian by boxes)
"""

from __future__ import annotations

import collections
import importlib.util
import logging

import numpy as np
import torch

from epg_fast.data.encoded import EncodedBatches, max_halvings, parameters_dtype
from epg_fast.data.loader import Loader, WorkerStream
from epg_fast.data.source import ImageSource

logger = logging.getLogger("epg_fast")

_INVERTED_ABOVE_127 = [float(level if level < 128 else 255 - level) for level in range(256)]


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
        ends = torch.cumsum(encoded["length"], 0).tolist()
        content = encoded["content"].numpy()
        files = [content[end - length : end] for end, length in zip(ends, encoded["length"].tolist(), strict=True)]
        records = encoded["parameters"].numpy().view(self._dtype).reshape(-1)
        return [files, *(np.ascontiguousarray(column) for column in _columns(records))]

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


def _columns(records: np.ndarray) -> list[np.ndarray]:
    """The fields of nested records, in the order of `_names`."""
    return [records[group][name] for group in records.dtype.names for name in records.dtype[group].names]


def _to_torch(output) -> torch.Tensor:
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

    return to_torch_tensor(output.as_tensor(), copy=False)


def _make_pipeline(feed, dtype: np.dtype, size: int, **options):
    """Return the pipeline from `feed`'s inputs to the views, uint8 [b, 3, size, size] each."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

    on_gpu = options["device_id"] is not None
    levels = max_halvings(size)

    def chw(image, flip):
        return fn.crop_mirror_normalize(
            image, mirror=flip, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0]
        )

    def centre_crop(image, p):
        for level in range(levels):
            if p["halvings"] > level:
                # at half the size, bilinear without antialiasing is the mean of two by two pixels
                image = fn.resize(image, size=p["halved"][level], interp_type=types.INTERP_LINEAR, antialias=False)
        return resize(image, p, types.INTERP_CUBIC)

    def resize(image, p, interpolation):
        return fn.resize(
            image,
            size=(size, size),
            roi_start=p["start"],
            roi_end=p["end"],
            interp_type=interpolation,
            antialias=True,
        )

    def gray(image):
        return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)

    def adjust(image, brightness, contrast):
        center = fn.reductions.mean(gray(image))
        if on_gpu:
            center = center.cpu()
        return fn.brightness_contrast(image, brightness=brightness, contrast=contrast, contrast_center=center)

    def view(image, p):
        image = resize(image, p, types.INTERP_LINEAR)
        if p["jitter"]:
            image = adjust(image, p["brightness0"], p["contrast0"])
            image = fn.coord_transform(image, M=p["matrix"], dtype=types.UINT8)
            image = adjust(image, p["brightness1"], p["contrast1"])
        if p["grayscale"]:
            luma = gray(image)
            image = fn.cat(luma, luma, luma, axis=2)
        if p["blur"]:
            image = fn.gaussian_blur(image, sigma=p["sigma"])
        if p["solarize"]:
            image = fn.lookup_table(image, keys=list(range(256)), values=_INVERTED_ABOVE_127, dtype=types.UINT8)
        return chw(image, p["flip"])

    names = [(group, name) for group in dtype.names for name in dtype[group].names]

    @do_not_convert
    def inputs():
        content, *columns = fn.external_source(source=feed, num_outputs=1 + len(names), batch=True)
        p = {group: {} for group in dtype.names}
        for (group, name), column in zip(names, columns, strict=True):
            p[group][name] = column
        return content, p

    @pipeline_def(enable_conditionals=True, **options)
    def views():
        content, p = inputs()
        image = fn.decoders.image(
            content, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        outputs = [chw(centre_crop(image, p["crop"]), p["crop"]["flip"])]
        for group in dtype.names[1:]:
            outputs.append(view(image, p[group]))
        return tuple(outputs)

    return views()
