"""Batches decoded by NVIDIA DALI.

The order of the images and the parameters of their views are those of `PillowLoader`: nothing random is left to DALI.

- On a CPU DALI decodes; the crops and what follows are `epg_fast.ops.resized_crop` and `augment_view`, one pass each of
  the C++ extension, in Pillow's own arithmetic: DALI's resizes and colours are slower, and only similar. The batches
  equal Pillow's but for the Gaussian blur, which Pillow approximates by boxes, and a few levels here and there in
  portraits whose height shrinks much more than their width: Pillow from version 13 on resamples them along y first.
- On a GPU DALI decodes (nvJPEG) and resizes there, and `augment_view` follows there: within 0.6 levels of 255 of Pillow
  on average for crops (0.2 from 256 pixels on), when its operators are run on a CPU. It has not been run on a GPU.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging

import numpy as np
import torch

from epg_fast.data.encoded import EncodedBatches, max_halvings, parameters_dtype
from epg_fast.data.loader import Loader
from epg_fast.data.source import DataError, ImageSource
from epg_fast.data.workers import WorkerStream
from epg_fast.ops import augment_view, extension_status, resized_crop

logger = logging.getLogger("epg_fast")

# More than any image can be halved.
_LEVELS = 15


@functools.cache
def dali_status() -> tuple[bool, str]:
    """Import NVIDIA DALI if it is there; return (whether it is, its version or one line that says why it is not)."""
    install = "pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120)"
    try:
        import nvidia.dali
    except ModuleNotFoundError:
        return False, f"not installed; {install}"
    except Exception as error:
        # a library that is missing, of another version, for another machine
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return False, f"installed, but cannot be imported ({reason}); install it anew: {install}"
    return True, nvidia.dali.__version__


class DaliLoader(Loader):
    """A `Loader` whose pixels are DALI's; batches are on `device`.

    Args:
        source, options: see `Loader`.
        threads: CPU threads of DALI.
        readers: processes that read files and draw the parameters of the views; 0 does so in this process.
        device: a CUDA device decodes and augments there; "cpu" uses DALI's CPU operators.
        prefetch: batches that DALI works on ahead.

    An image that DALI cannot decode is tried with Pillow before it counts as bad. Raises ImportError without DALI and,
    on a CPU, ValueError without the extension.
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
        if not dali_status()[0]:
            raise ImportError(
                f"the DALI loader needs NVIDIA DALI, which is {dali_status()[1]}, or use --data.backend pillow"
            )
        self.device = torch.device(device)
        if self.device.type == "cpu" and not extension_status()[0]:
            raise ValueError(
                f"the DALI loader on a CPU needs the extension, which is {extension_status()[1]}; "
                "or use --data.backend pillow"
            )
        if threads < 1 or prefetch < 1:
            raise ValueError(f"threads, prefetch: got {threads}, {prefetch}, wanted at least 1")
        super().__init__(source, **options)
        self.threads, self.prefetch = threads, prefetch
        # here, or with the operations of the extension, which are for a CPU
        self._dali_resizes = self.device.type != "cpu"
        self._batches = EncodedBatches(self)
        self._stream = WorkerStream(self._batches, self.iteration, readers)
        self._dtype = parameters_dtype(len(self._batches.names) - 1)
        self._pipeline = None
        # encoded batches whose pixels have not come back, oldest first: what to do again when one of them fails
        self._under_way: collections.deque[dict] = collections.deque()
        self._again: collections.deque[dict] = collections.deque()
        self._failure: Exception | None = None
        self._has_failed = False

    def __next__(self) -> dict[str, torch.Tensor]:
        self._check_open()
        if self._pipeline is None:
            # processes are forked before DALI has threads
            self._stream.start()
            self._pipeline = self._build()
        try:
            outputs = self._run()
        except RuntimeError as error:
            self._replace_oldest(error)
            self._pipeline = self._build()
            outputs = self._run()
        encoded = self._under_way.popleft()
        self.iteration += 1
        batch = self._views(outputs, self._records(encoded))
        return batch | {"label": encoded["label"], "index": encoded["index"]}

    def close(self) -> None:
        """Stop the processes and release the pipeline; closing twice does nothing."""
        super().close()
        self._stream.close()
        self._pipeline = None
        self._under_way.clear()
        self._again.clear()

    def _views(self, outputs: tuple, records: np.ndarray) -> dict[str, torch.Tensor]:
        names = ("crop", *self._batches.names[1:])
        if self._dali_resizes:
            crops = [_to_torch(output.as_tensor()) for output in outputs]
        else:
            images = [_to_torch(image) for image in outputs[0]]
            crops = [_resized_crop(images, records[name], self.image_size) for name in names]
        views = [_augment(crop, records[name]) for crop, name in zip(crops, names, strict=True)]
        return dict(zip(self._batches.names, views, strict=True))

    def _run(self) -> tuple:
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
        try:
            return self._pipeline.run(stream)
        except StopIteration:
            # the batches before a failure of the stream have all been handed out
            failure = self._failure
            self.close()
            raise failure from None

    def _feed(self) -> list:
        """Return DALI's inputs for the next batch; DALI calls this ahead of `run`."""
        encoded = self._again.popleft() if self._again else self._next_encoded()
        if encoded is None:
            raise StopIteration
        self._under_way.append(encoded)
        content, lengths = encoded["content"].numpy(), encoded["length"].tolist()
        ends = itertools.accumulate(lengths)
        files = [content[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        return [files, *_boxes(self._records(encoded), self.image_size)] if self._dali_resizes else [files]

    def _records(self, encoded: dict) -> np.ndarray:
        return encoded["parameters"].numpy().view(self._dtype).reshape(-1)

    def _next_encoded(self) -> dict | None:
        """Return the next batch of the stream, None when it has failed: raised once the batches before are out."""
        if self._failure is not None:
            return None
        try:
            batch, bad_files = next(self._stream)
            self._report(bad_files)
        except Exception as error:
            self._failure = error
            return None
        return batch

    def _replace_oldest(self, error: RuntimeError) -> None:
        """Decode the oldest batch under way with Pillow, which says which of its files are bad; keep the others."""
        if not self._under_way:
            raise error
        if not self._has_failed:
            reason = next(
                (line for line in str(error).splitlines() if "rror" in line and "Critical" not in line), error
            )
            logger.warning(
                "DALI could not decode a batch (%s); Pillow decodes its %d files, and such batches from now on",
                reason,
                self._batches.local_size,
            )
        self._has_failed = True
        batches = EncodedBatches(self, pillow_only=True)
        replaced, bad_files = batches[self.iteration]
        try:
            self._report(bad_files)
        except DataError:
            self.close()
            raise
        self._again = collections.deque([replaced, *list(self._under_way)[1:], *self._again])
        self._under_way.clear()

    def _device_id(self) -> int | None:
        if self.device.type == "cpu":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _build(self):
        pipeline = _make_pipeline(
            self._feed,
            self.image_size,
            crops=len(self._batches.names) if self._dali_resizes else 0,
            batch_size=self._batches.local_size,
            num_threads=self.threads,
            device_id=self._device_id(),
            prefetch_queue_depth=self.prefetch,
            # nothing random is left to DALI
            seed=0,
        )
        pipeline.build()
        return pipeline


def _boxes(records: np.ndarray, size: int) -> list[np.ndarray]:
    """DALI's inputs for the crops: halvings, the size before each; then start and end (y, x) of every crop."""
    crop, *views = (records[name] for name in records.dtype.names)
    levels = np.arange(_LEVELS)
    inputs = [crop["halvings"].astype(np.int32), (crop["shape"][:, None, ::-1] >> levels[:, None]).astype(np.float32)]
    pixel = crop["box"][:, 2:] / crop["resized"]
    start = crop["offset"] * pixel
    boxes = [(start, start + size * pixel)]
    boxes += [(view["box"][:, :2], view["box"][:, 2:]) for view in views]
    return inputs + [edge[:, ::-1].astype(np.float32, order="C") for box in boxes for edge in box]


def _to_torch(tensor) -> torch.Tensor:
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

    return to_torch_tensor(tensor, copy=False)


def _tensors(records: np.ndarray, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(records[name].copy()) for name in names}


def _resized_crop(images: list[torch.Tensor], view: np.ndarray, size: int) -> torch.Tensor:
    """Decoded images and the records of one view -> [b, H, W, 3]."""
    batch, boxes = len(images), torch.from_numpy(view["box"].copy())
    if "resized" in view.dtype.names:
        crop = _tensors(view, "halvings", "resized", "offset")
        return resized_crop(images, crop["halvings"], boxes, crop["resized"], crop["offset"], size, "bicubic")
    none = torch.zeros(batch, dtype=torch.int64)
    whole = torch.full((batch, 2), size), torch.zeros(batch, 2, dtype=torch.int64)
    return resized_crop(images, none, boxes, *whole, size, "bilinear")


def _augment(crops: torch.Tensor, view: np.ndarray) -> torch.Tensor:
    """[b, H, W, 3] and the records of their views -> [b, 3, H, W]."""
    if "operations" in view.dtype.names:
        return augment_view(crops, **_tensors(view, "operations", "values", "grayscale", "sigma", "solarize", "flip"))
    batch = len(crops)
    nothing, no = {"dtype": torch.float64}, torch.zeros(batch, dtype=torch.bool)
    return augment_view(
        crops,
        torch.zeros(batch, 4, dtype=torch.int8),
        torch.zeros(batch, 4, **nothing),
        no,
        torch.zeros(batch, **nothing),
        no,
        **_tensors(view, "flip"),
    )


def _make_pipeline(feed, size: int, crops: int, **options):
    """Return the pipeline from `feed`'s inputs to decoded images, or to `crops` crops of them, [b, size, size, 3]."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

    levels = max_halvings(size)
    decoder = "cpu" if options["device_id"] is None else "mixed"
    box = np.full((2, 2), 0.25, np.float32)

    @do_not_convert
    def inputs():
        return fn.external_source(source=feed, num_outputs=1 + (2 + 2 * crops if crops else 0), batch=True)

    def resize(image, start, end, interpolation):
        return fn.resize(
            image, size=(size, size), roi_start=start, roi_end=end, interp_type=interpolation, antialias=True
        )

    def halve(image, shape, to):
        # Pillow's BOX filter: the mean of the two by two pixels whose centres lie in the larger one. The filter leaves
        # the mean of pixels (j-1, j) at j; the nearest one half a pixel on is the pair wanted, for odd sizes too.
        image = fn.filter(image, box, border="clamp", dtype=types.FLOAT)
        image = fn.resize(image, size=to, roi_start=0.5, roi_end=shape + 0.5, interp_type=types.INTERP_NN)
        # Pillow rounds halves up, once per direction: a quarter more on average than rounding once
        return fn.cast(image + 0.25, dtype=types.UINT8)

    @pipeline_def(enable_conditionals=True, **options)
    def decoded():
        (content,) = inputs()
        return fn.decoders.image(content, device=decoder, output_type=types.RGB, adjust_orientation=False)

    @pipeline_def(enable_conditionals=True, **options)
    def cropped():
        content, halvings, shapes, start, end, *views = inputs()
        image = fn.decoders.image(content, device=decoder, output_type=types.RGB, adjust_orientation=False)
        halved = image
        for level in range(levels):
            if halvings > level:
                halved = halve(halved, shapes[level], shapes[level + 1])
        outputs = [resize(halved, start, end, types.INTERP_CUBIC)]
        for view in range(crops - 1):
            outputs.append(resize(image, views[2 * view], views[2 * view + 1], types.INTERP_LINEAR))
        return tuple(outputs)

    return cropped() if crops else decoded()
