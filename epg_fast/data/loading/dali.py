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
import copy
import functools
import logging

import numpy as np
import torch
from PIL import Image

from epg_fast.data.loading.loader import Batches, Loader
from epg_fast.data.loading.views import OPERATIONS, crop_geometry, draw_parameters
from epg_fast.data.sources.decoding import decode_image, open_image, without_texts
from epg_fast.data.sources.source import ImageSource
from epg_fast.ops import augment_view, extension_status, resized_crop

# Batches that DALI works on ahead.
_AHEAD = 2
# Larger images are refused by Pillow as decompression bombs.
_LONGEST_SHORT_SIDE = 13_377
_ORIENTATION = 0x0112
# Chunks that may hold one, when the other texts are gone.
_PNG_ORIENTATION = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")

logger = logging.getLogger("epg_fast")

RECORD = np.dtype(
    [
        ("shape", "i8", 2),
        ("halvings", "i8"),
        ("box", "f8", 4),
        ("resized", "i8", 2),
        ("offset", "i8", 2),
        ("operations", "i1", 4),
        ("values", "f8", 4),
        ("grayscale", "?"),
        ("sigma", "f8"),
        ("solarize", "?"),
        ("flip", "?"),
    ]
)
"""One view: the box (left, top, right, bottom) in pixels of the image after its halvings becomes `resized`, of which
`offset` is the corner; then what `augment_view` takes. Pairs are (x, y)."""


class EncodedBatches(Batches):
    """Batches of encoded images: dicts of `content` (the files one behind the other), `length` int64 [b] and `records`.

    `records` has one `RECORD` for each of the `views` of each image, [b, views].
    What DALI would read differently from Pillow (CMYK, palettes, 16 bits, transparency, EXIF rotation, other formats)
    or what may be damaged is decoded by Pillow here and travels as an uncompressed PPM file, which DALI reads exactly;
    with `pillow_only` all images do so.
    """

    def __init__(self, source, **options):
        super().__init__(source, **options)
        self.pillow_only = False
        # of the largest image there is
        self.max_halvings = max(int(np.log2(_LONGEST_SHORT_SIDE / self.image_size)), 0)

    def make(self, content: bytes, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
        content = without_texts(content)
        with open_image(content) as image:
            size, plain = image.size, not self.pillow_only and _is_plain(image, content)
        if not plain:
            image = decode_image(content)
            size, content = image.size, b"P6\n%d %d\n255\n" % image.size + image.tobytes()
        return content, self._records(*size, rng)

    def collate(self, samples: list[tuple[bytes, np.ndarray]]) -> dict[str, np.ndarray]:
        contents, records = zip(*samples, strict=True)
        lengths = np.array([len(content) for content in contents])
        return {"content": np.frombuffer(b"".join(contents), np.uint8), "length": lengths, "records": np.stack(records)}

    def _records(self, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
        """The records of a `width` x `height` image, [views]."""
        flip, augmented = draw_parameters(width, height, rng, self.flip_probability, self.augment)
        crop, records = crop_geometry(width, height, self.image_size), np.zeros(len(self.views), RECORD)
        records["shape"], records["resized"] = (width, height), self.image_size
        first = records[0]
        first["halvings"], first["box"], first["resized"] = crop.halvings, (0, 0, *crop.halved), crop.resized
        first["offset"], first["flip"] = (crop.left, crop.top), flip
        for record, view in zip(records[1:], augmented, strict=True):
            for slot, (name, value) in enumerate(view.jitter):
                record["operations"][slot], record["values"][slot] = 1 + OPERATIONS.index(name), value
            record["box"], record["grayscale"], record["sigma"] = view.box, view.grayscale, view.blur or 0.0
            record["solarize"], record["flip"] = view.solarize, view.flip
        return records


def _is_plain(image: Image.Image, content: bytes) -> bool:
    """Whether DALI decodes `content` exactly as `decode_image` does, and its end says that it is complete."""
    if image.format == "JPEG":
        # of three channels, Adobe's marker may say that they are no YCbCr
        plain = image.mode in ("RGB", "L") and image.info.get("adobe_transform", 1) == 1
        return plain and b"\xff\xd9" in content[-64:] and _is_upright(image)
    if image.format == "PNG":
        plain = [tile[3] for tile in image.tile] in (["RGB"], ["L"]) and "transparency" not in image.info
        # Pillow would decode the whole image to look for its orientation
        return plain and b"IEND" in content[-12:] and not any(name in content for name in _PNG_ORIENTATION)
    return False


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:
        # malformed EXIF data: `decode_image` knows what to do
        return False


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
        reason = str(error).partition("\n")[0] or type(error).__name__
        return False, f"installed, but cannot be imported ({reason}); install it anew: {install}"
    return True, nvidia.dali.__version__


def why_not_dali(device: torch.device | str) -> str | None:
    """What keeps DALI from making batches on `device`, in one line; None if nothing does."""
    if not dali_status()[0]:
        return f"NVIDIA DALI is {dali_status()[1]}"
    if torch.device(device).type == "cpu" and not extension_status()[0]:
        return f"on a CPU it needs the extension, which is {extension_status()[1]}"
    return None


class DaliLoader(Loader):
    """A `Loader` whose pixels are DALI's; batches are on `device`.

    Args:
        source, options: see `Batches`.
        start: see `Loader`.
        threads: CPU threads of DALI.
        readers: processes that read files and draw the parameters of the views; 0 does so in this process.
        device: a CUDA device decodes and augments there; "cpu" uses DALI's CPU operators.

    An image that DALI cannot decode is tried with Pillow before it counts as bad. Raises ValueError without DALI or, on
    a CPU, without the extension.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        start: int = 0,
        threads: int = 4,
        readers: int = 1,
        device: torch.device | str = "cpu",
        **options,
    ):
        if lacking := why_not_dali(device):
            raise ValueError(f"the DALI loader cannot run: {lacking}; or use --data.backend pillow")
        if threads < 1:
            raise ValueError(f"threads: got {threads}, wanted at least 1")
        super().__init__(EncodedBatches(source, **options), start, readers)
        self.device, self.threads = torch.device(device), threads
        # here, or with the operations of the extension, which are for a CPU
        self._dali_resizes = self.device.type != "cpu"
        self._pipeline = None
        # encoded batches whose pixels have not come back, oldest first: what to do again when one of them fails
        self._under_way: collections.deque[dict] = collections.deque()
        self._again: collections.deque[dict] = collections.deque()
        self._failure: Exception | None = None
        self._told = False

    def close(self) -> None:
        """Stop the processes and release the pipeline; closing twice does nothing."""
        super().close()
        self._pipeline = None
        self._under_way.clear()
        self._again.clear()

    def _draw(self) -> dict[str, torch.Tensor]:
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
        encoded, size = self._under_way.popleft(), self.batches.image_size
        if self._dali_resizes:
            crops = [_to_torch(output.as_tensor()) for output in outputs]
        else:
            images = [_to_torch(image) for image in outputs[0]]
            crops = [_resized_crop(images, records, size, v) for v, records in enumerate(encoded["records"].T)]
        views = [_augment(crop, records) for crop, records in zip(crops, encoded["records"].T, strict=True)]
        others = {name: torch.from_numpy(encoded[name]) for name in ("label", "index")}
        return dict(zip(self.batches.views, views, strict=True)) | others

    def _run(self) -> tuple:
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
        try:
            return self._pipeline.run(stream)
        except StopIteration:
            # the batches before a failure of the stream have all been handed out
            raise self._failure from None

    def _feed(self) -> list:
        """Return DALI's inputs for the next batch; DALI calls this ahead of `run`."""
        try:
            if self._failure is not None:
                raise self._failure
            encoded = self._again.popleft() if self._again else self._next_arrays()
        except Exception as error:
            self._failure = error
            raise StopIteration from None
        self._under_way.append(encoded)
        files = np.split(encoded["content"], np.cumsum(encoded["length"])[:-1])
        if not self._dali_resizes:
            return [files]
        return [files, *_boxes(encoded["records"], self.batches.image_size, self.batches.max_halvings)]

    def _replace_oldest(self, error: RuntimeError) -> None:
        """Decode the oldest batch under way with Pillow, which says which of its files are bad; keep the others."""
        if not self._under_way:
            raise error
        if not self._told:
            lines = (line for line in str(error).splitlines() if "rror" in line and "Critical" not in line)
            logger.warning(
                "DALI could not decode a batch (%s); Pillow decodes its %d files, and such batches from now on",
                *(next(lines, error), self.batches.local_size),
            )
        self._told = True
        batches = copy.copy(self.batches)
        batches.pillow_only = True
        replaced, bad_files = batches(self.iteration)
        self._report(bad_files)
        self._again = collections.deque([replaced, *list(self._under_way)[1:], *self._again])
        self._under_way.clear()

    def _build(self):
        device = None
        if self.device.type != "cpu":
            device = torch.cuda.current_device() if self.device.index is None else self.device.index
        pipeline = _make_pipeline(
            self._feed,
            self.batches.image_size,
            self.batches.max_halvings,
            crops=len(self.batches.views) if self._dali_resizes else 0,
            batch_size=self.batches.local_size,
            num_threads=self.threads,
            device_id=device,
            prefetch_queue_depth=_AHEAD,
            # nothing random is left to DALI
            seed=0,
        )
        pipeline.build()
        return pipeline


def _boxes(records: np.ndarray, size: int, halvings: int) -> list[np.ndarray]:
    """DALI's inputs for the crops: halvings, the size before each; then start and end (y, x) of every view."""
    crop, levels = records[:, 0], np.arange(halvings + 1)
    inputs = [crop["halvings"].astype(np.int32), (crop["shape"][:, None, ::-1] >> levels[:, None]).astype(np.float32)]
    for view in records.T:
        pixel = (view["box"][:, 2:] - view["box"][:, :2]) / view["resized"]
        start = view["box"][:, :2] + view["offset"] * pixel
        inputs += [edge[:, ::-1].astype(np.float32, order="C") for edge in (start, start + size * pixel)]
    return inputs


def _to_torch(tensor) -> torch.Tensor:
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

    return to_torch_tensor(tensor, copy=False)


def _tensors(records: np.ndarray, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(records[name].copy()) for name in names]


def _resized_crop(images: list[torch.Tensor], records: np.ndarray, size: int, view: int) -> torch.Tensor:
    """Decoded images and the records of one view -> [b, H, W, 3]."""
    interpolation = "bilinear" if view else "bicubic"
    return resized_crop(images, *_tensors(records, "halvings", "box", "resized", "offset"), size, interpolation)


def _augment(crops: torch.Tensor, records: np.ndarray) -> torch.Tensor:
    """[b, H, W, 3] and the records of their views -> [b, 3, H, W]."""
    names = ("operations", "values", "grayscale", "sigma", "solarize", "flip")
    return augment_view(crops, *_tensors(records, *names))


def _make_pipeline(feed, size: int, levels: int, crops: int, **options):
    """Return the pipeline from `feed`'s inputs to decoded images, or to `crops` crops of them, [b, size, size, 3]."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert

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
