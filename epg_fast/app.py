"""A page on which to play with a trained model: `epg-fast app`, on gradio."""

import contextlib
import functools
import html
import logging
import math
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np

from epg_fast.config import GUIDANCE_INTERVAL, AppConfig, SampleConfig, Sampler
from epg_fast.diffusion.schedule import shift
from epg_fast.distributed import resolve_device
from epg_fast.models import EPGViT
from epg_fast.runtime import suitable_threads
from epg_fast.sampling import SamplingEngine
from epg_fast.sampling.command import labels_for, load_generator
from epg_fast.sampling.labels import choose_labels
from epg_fast.sampling.outputs import quantize
from epg_fast.sampling.precision import PRECISIONS
from epg_fast.wording import import_extra

log = logging.getLogger("epg_fast")

MOST = {"num": 64, "steps": 256, "seed": 2**53 - 1}
"""What the page takes; a browser keeps no integer above this seed."""
_OLDEST = 6, 17  # pages of older ones fetch fonts and scripts from the internet
_SMALL = 128  # images below this size are shown pixel by pixel
_CSS = """
.grid-wrap {max-height: none !important; overflow: hidden !important; padding-top: 36px !important}
.grid-container {grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)) !important}
.grid-container {grid-auto-rows: auto !important}
.frame .image-frame, .frame img {width: 100% !important; object-fit: contain !important}
.pixels img {image-rendering: pixelated}
"""
# Said in so many words: some of these are open where gradio believes itself in a notebook or on a hub.
_CLOSED = {"share": False, "inline": False, "inbrowser": False, "allowed_paths": [], "max_file_size": 1}
_CLOSED |= {"mcp_server": False, "pwa": False, "ssr_mode": False, "enable_monitoring": False, "footer_links": []}
_CLOSED["state_session_capacity"] = 16  # pages whose trajectories are kept
_HINT = "Click an image to see how it came about."
Image = tuple[np.ndarray, str]
"""uint8 [H, W, 3] with what stands beside it."""


def run(config: AppConfig) -> None:
    """Show the page until Ctrl-C or SIGTERM. Raises what `serving` does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(config) as address, contextlib.suppress(KeyboardInterrupt):
        log.info("%s is at %s (Ctrl-C ends it)", config.checkpoint, address)
        while True:
            signal.pause()


@contextlib.contextmanager
def serving(config: AppConfig) -> Iterator[str]:
    """The address of the page, which is there inside.

    Raises ValueError for a checkpoint that draws nothing and for an address that cannot be taken, ImportError without
    gradio.
    """
    _require_free(config.host, config.port)
    if config.host not in ("127.0.0.1", "localhost"):
        log.warning("host %s: whoever reaches this address can draw images here; there is no password", config.host)
    with tempfile.TemporaryDirectory() as folder, _own_settings(folder):
        gradio = _gradio()
        model = load_generator(config.checkpoint, resolve_device(config.device))
        desk = Desk(model, config.parameterization, config.normalization)
        page = make_page(gradio, desk, Path(config.checkpoint).resolve().name)
        with suitable_threads(model):
            where = {"server_name": config.host, "server_port": config.port, "prevent_thread_lock": True}
            _, address, _ = page.queue(max_size=16).launch(css=_CSS, quiet=True, **where, **_CLOSED)
            try:
                yield address
            finally:
                page.close(verbose=False)


class Desk:
    """What is behind the page: the choices of a model, its images, and the trajectory of one of them."""

    def __init__(self, model: EPGViT, parameterization: str = "auto", normalization: str = "auto"):
        self.model, metadata = model, model.metadata
        meaning = {"parameterization": parameterization, "normalization": normalization}
        self._meaning = {name: value for name, value in meaning.items() if value != "auto"}
        self.samplers = ["onestep"] if metadata.get("stage") == "finetune-consistency" else list(get_args(Sampler))
        self._names = metadata.get("class_names") or []
        self._untrained = metadata.get("untrained_classes", [])
        trained = [label for label in range(model.num_classes) if label not in self._untrained]
        self.classes = [("each in turn", "balanced"), *((self.name(label), str(label)) for label in trained)]
        self._engines: dict[str, SamplingEngine] = {}

    def name(self, label: int) -> str:
        """Number of a class, and its name where the checkpoint knows it; nothing for an unconditional model."""
        if not self.model.num_classes:
            return ""
        return f"{label} {self._names[label]}" if label < len(self._names) else str(label)

    def draw(self, request: SampleConfig) -> tuple[list[Image], str]:
        """(the images that `sample` draws, with their classes; what was done). Raises ValueError."""
        engine, begun = self._engine(request), time.perf_counter()
        labels = self._labels(request)
        parts = engine.stream(labels_for(engine, labels), seed=request.seed, as_uint8=True)
        images = [image for _, pixels in parts for image in pixels]
        seconds = time.perf_counter() - begun
        said = f"{len(images)} images in {seconds:.1f} s: {engine.evaluations} network evaluations each, "
        said += f"{engine.precision} on {engine.device.type}"
        if request.guidance != 1 and not engine.guided:
            said += "; guidance does nothing, since no noise level lies in its interval"
        return list(zip(images, map(self.name, labels), strict=True)), said

    def trajectory(self, request: SampleConfig, place: int) -> list[Image]:
        """The clean estimates on the way to one of these images, then the image, each with its noise level.

        It is drawn for itself, so that its last bits may differ from those in the batch. Raises ValueError.
        """
        label = self._labels(request)[place]
        engine = self._engine(request)
        images, estimates = engine.trajectory(labels_for(engine, [label]), [place], request.seed)
        if images.isnan().any():
            raise ValueError("the image contains NaN: the model or the sampler diverged")
        levels = [f"clean estimate at σ = {sigma / shift(self.model.image_size):.3g}" for sigma in estimates]
        known = f", class {self.name(label)}" if self.model.num_classes else ""
        return [
            (quantize(image)[0].numpy(), text + known)
            for image, text in zip([*estimates.values(), images], [*levels, "the image"], strict=True)
        ]

    def _labels(self, request: SampleConfig) -> list[int]:
        return choose_labels(request.labels, request.num, self.model.num_classes, request.seed, self._untrained)

    def _engine(self, request: SampleConfig) -> SamplingEngine:
        """Weights are kept in one precision, that of the last images."""
        if request.precision not in self._engines:
            self._engines.clear()
            # nothing is compiled or recorded, which takes longer than a few images
            self._engines[request.precision] = SamplingEngine(
                self.model, precision=request.precision, compile="off", cuda_graphs=False, **self._meaning
            )
        settings = {name: getattr(request, name) for name in ("sampler", "steps", "guidance", "interval")}
        return self._engines[request.precision].with_settings(**settings)


def make_request(labels, num, seed, sampler, steps, guidance, low, high, precision) -> SampleConfig:
    """What the fields of the page ask for. Raises ValueError for empty ones, and numbers that are out of bounds."""
    if sampler == "onestep":  # whose page does not show these
        steps, guidance, (low, high) = SampleConfig.steps, 1.0, GUIDANCE_INTERVAL
    numbers = {"num": num, "seed": seed, "steps": steps, "guidance": guidance, "above σ": low, "up to σ": high}
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{name} is empty, want a number")
        if value > MOST.get(name, math.inf):
            raise ValueError(f"{name} is {value}, want at most {MOST[name]} on this page")
    settings = {"sampler": sampler, "steps": int(steps), "guidance": guidance, "interval": (low, high)}
    return SampleConfig(labels=labels, num=int(num), seed=int(seed), precision=precision, **settings)


def make_page(gr: ModuleType, desk: Desk, title: str):
    """The page as gradio's Blocks. What uses the device waits in one queue."""
    model, start = desk.model, SampleConfig()
    conditional, several = model.num_classes > 0, desk.samplers != ["onestep"]
    look = ["pixels"] if model.image_size < _SMALL else []

    def told(function: Callable) -> Callable:
        """What is wrong, in one line that leaves the page as it is; an error of gradio's covers the images."""

        @functools.wraps(function)
        def call(*values):
            try:
                return function(*values)
            except (ValueError, RuntimeError) as error:
                gr.Warning(html.escape(" ".join(str(error).split())))
                return gr.skip()

        return call

    def number(value, label):
        return gr.Number(value, label=label, precision=0 if isinstance(value, int) else None, min_width=80)

    @told
    def draw(*values):
        request = make_request(*values)
        images, said = desk.draw(request)
        columns = max(4, math.ceil(math.sqrt(len(images))))
        if columns > 4:  # captions would cover them
            images = [image for image, _ in images]
        return gr.update(value=images, columns=columns), said, request, None, gr.update(visible=False), _HINT

    @told
    def show_trajectory(request: SampleConfig, event: gr.SelectData):
        frames = desk.trajectory(request, event.index)
        count = len(frames)
        return frames, gr.update(maximum=count, value=count, visible=True), *show_frame(frames, count)

    def show_frame(frames, place):
        image, text = frames[min(int(place), len(frames)) - 1]  # the slider may still be where a longer one was
        return image, html.escape(text)

    tab = f"{title} - epg-fast"
    with gr.Blocks(title=tab, analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as page:
        gr.Markdown(f"## {title}\n{describe(model)}")
        asked, frames = gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                labels = gr.Dropdown(desk.classes, value="balanced", label="Class", visible=conditional)
                with gr.Row():
                    num = number(16, "Images")
                    seed = number(0, "Seed")
                sampler = gr.Dropdown(desk.samplers, value=desk.samplers[0], label="Sampler", visible=several)
                with gr.Column(visible=several) as stepped:
                    steps = number(start.steps, "Noise levels")
                    with gr.Row(visible=conditional):
                        guidance = number(start.guidance, "Guidance")
                        low = number(start.interval[0], "above σ")
                        high = number(start.interval[1], "up to σ")
                precision = gr.Dropdown(list(PRECISIONS), value=start.precision, label="Precision")
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=4, min_width=300):
                plain = {"allow_preview": False, "buttons": ["download_all"], "elem_classes": look}
                gallery = gr.Gallery(label="Images", format="png", columns=4, object_fit="contain", **plain)
                said = gr.Markdown()
            with gr.Column(scale=3, min_width=280, visible=several):
                plain = {"show_label": False, "buttons": ["download"], "elem_classes": ["frame", *look]}
                frame = gr.Image(format="png", interactive=False, **plain)
                place = gr.Slider(1, 2, value=1, step=1, label="Step", visible=False, buttons=[])
                text = gr.Markdown(_HINT)

        values = [labels, num, seed, sampler, steps, guidance, low, high, precision]
        device = {"concurrency_limit": 1, "concurrency_id": "device", "api_visibility": "private"}
        shown = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        button.click(draw, values, [gallery, said, asked, frame, place, text], show_progress_on=gallery, **device)
        device |= {"scroll_to_output": True, "show_progress_on": frame}
        gallery.select(show_trajectory, [asked], [frames, place, frame, text], **device)
        place.change(show_frame, [frames, place], [frame, text], trigger_mode="always_last", **shown)
        sampler.change(lambda name: gr.update(visible=name != "onestep"), [sampler], [stepped], **shown)
    return page


def describe(model: EPGViT) -> str:
    """Size, classes and training of a model in a line."""
    metadata, size = model.metadata, model.image_size
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    known = [metadata.get("preset"), f"{size} x {size} pixels", classes, metadata.get("stage")]
    step = f"step {metadata['step']}" if "step" in metadata else None
    return ", ".join(str(word) for word in [*known, step] if word)


def _gradio() -> ModuleType:
    """Gradio. Raises ImportError where it is not, and for one whose pages load from elsewhere."""
    gradio = import_extra("gradio")
    if tuple(map(int, gradio.__version__.split(".")[:2])) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise ImportError(f"gradio is {gradio.__version__}, want at least {wanted}: pip install -U 'epg_fast[app]'")
    return gradio


def _require_free(host: str, port: int) -> None:
    """Raise ValueError for an address that cannot be listened at."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that has just ended holds no port
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port} ({error.strerror}); say another --port or --host") from None


@contextlib.contextmanager
def _own_settings(folder: str) -> Iterator[None]:
    """Gradio's variables of the environment are ours alone: others could share the page, open folders and report."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("GRADIO_"):
            del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": folder}
    # it asks for its own page, which a proxy would not find
    passed_by = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = ",".join(filter(None, [passed_by, "127.0.0.1", "localhost"]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
