"""The page to play with: what is behind it, in any environment; the page itself where gradio and a browser are."""

import io
import os
import shutil
import signal
import socket
import sys
import types
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import epg_fast
from epg_fast import app
from epg_fast.app import Desk, make_request
from epg_fast.config import AppConfig, SampleConfig
from epg_fast.models import create_encoder, create_model
from epg_fast.sampling.outputs import quantize
from tests.commands import fails, run
from tests.networks import randomized

SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 1}
SIZES |= {"decoder_num_heads": 2, "num_classes": 3}
NAMES = ["tench, Tinca tinca", "<b>goldfish</b>", "great white shark"]
FIELDS = {"labels": "balanced", "num": 3, "seed": 7, "sampler": "heun", "steps": 5}
FIELDS |= {"guidance": 1.5, "low": 0.1, "high": 30.0, "precision": "fp32"}


def make_generator(metadata=(), **sizes):
    model = randomized(create_model("digits_32", **(SIZES | sizes)), 0.05).eval()
    model.metadata = {"normalization": "simple", **dict(metadata)}
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """Of three classes with names."""
    make_generator({"class_names": NAMES, "step": 7, "preset": "digits_32"}).save_pretrained(tmp_path / "run")
    return str(tmp_path / "run/model.safetensors")


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def asked(**changes) -> SampleConfig:
    return make_request(**(FIELDS | changes))


OFFICIAL = {"parameterization": "edm", "normalization": "imagenet"}  # whose meaning is said


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [({}, OFFICIAL), ({"labels": "2", "num": 2}, {}), ({"precision": "bf16", "sampler": "euler_sde"}, {})],
)
def test_the_page_shows_the_images_that_sample_draws(changes, meaning):
    model = make_generator()
    images, said = Desk(model, **meaning).draw(asked(**changes))
    wanted = FIELDS | changes
    labels = [0, 1, 2] if wanted["labels"] == "balanced" else [2, 2]
    options = {name: wanted[name] for name in ("seed", "sampler", "steps", "guidance", "precision")}
    want = quantize(epg_fast.sample(model, labels, interval=(0.1, 30.0), **options, **meaning)).numpy()
    assert np.array_equal(np.stack([image for image, _ in images]), want)
    assert [text for _, text in images] == [str(label) for label in labels]
    assert said.startswith(f"{len(labels)} images in ") and said.endswith(f", {wanted['precision']} on cpu")


def test_the_trajectory_of_an_image_ends_in_it():
    model = make_generator()
    desk, request = Desk(model), asked()
    frames = desk.trajectory(request, 2)
    engine = epg_fast.SamplingEngine(model, steps=5, guidance=1.5, interval=(0.1, 30.0))
    assert np.array_equal(frames[-1][0], quantize(engine([2], indices=[2], seed=7))[0].numpy())
    texts = [text for _, text in frames]
    # noise levels as guidance's interval has them, of the schedule's end points
    assert texts[0] == "clean estimate at σ = 80, class 2"
    assert texts[4:] == ["clean estimate at σ = 0.002, class 2", "the image, class 2"]
    assert not np.array_equal(frames[0][0], frames[-1][0])
    in_the_grid = desk.draw(request)[0][2][0].astype(int)
    assert abs(in_the_grid - frames[-1][0]).max() <= 1  # rounding of another batch


def test_settings_are_changed_without_another_copy_of_the_weights():
    desk = Desk(make_generator())
    desk.draw(asked())
    desk.draw(asked(steps=3, guidance=1.0))
    desk.draw(asked(precision="bf16"))
    assert list(desk._engines) == ["bf16"]
    assert desk._engine(asked(steps=7)).model is desk.model  # fp32 computes with the network that was read


def test_classes_have_their_names_and_untrained_ones_are_not_offered():
    desk = Desk(make_generator({"class_names": NAMES, "untrained_classes": [1]}))
    assert desk.classes == [("each in turn", "balanced"), ("0 tench, Tinca tinca", "0"), ("2 great white shark", "2")]
    assert [text for _, text in desk.draw(asked())[0]] == [f"{i} {NAMES[i]}" for i in (0, 2, 0)]


def test_an_unconditional_model_has_no_classes_and_a_consistency_model_one_sampler():
    desk = Desk(make_generator(num_classes=0))
    images, _ = desk.draw(asked(guidance=1.0))
    assert [text for _, text in images] == ["", "", ""] and len(desk.trajectory(asked(guidance=1.0), 1)) == 6
    desk = Desk(make_generator({"stage": "finetune-consistency", "parameterization": "edm"}))
    assert desk.samplers == ["onestep"]
    assert "1 network evaluations each" in desk.draw(asked(sampler="onestep", guidance=9.0, steps=None))[1]


def test_guidance_without_a_noise_level_is_said_to_do_nothing():
    desk = Desk(make_generator())
    assert "guidance does nothing" in desk.draw(asked(low=100.0, high=200.0))[1]
    assert "guidance does nothing" not in desk.draw(asked(guidance=1.0))[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "seed is empty, want a number"),
        ({"high": None}, "up to σ is empty, want a number"),
        ({"num": 65}, "num is 65, want at most 64 on this page"),
        ({"steps": 1}, "heun needs at least 2 noise levels"),
        ({"seed": 2**53}, "seed is 9007199254740992, want at most"),
        ({"low": 3.0, "high": 2.0}, r"interval is \(3.0, 2.0\), want low <= high"),
        ({"labels": "9"}, "label 9 is out of range"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(changes, message):
    with pytest.raises(ValueError, match=message):
        Desk(make_generator()).draw(asked(**changes))


def test_a_model_that_diverged_has_no_image():
    model = make_generator()
    torch.nn.init.constant_(model.out.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        Desk(model).draw(asked())
    with pytest.raises(ValueError, match="NaN"):
        Desk(model).trajectory(asked(), 0)


def test_without_gradio_or_with_one_that_asks_the_internet_a_line_says_what_to_install(
    checkpoint, port, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    want = "this needs gradio: pip install 'epg_fast[app]'"
    fails(capsys, ["app", "--checkpoint", checkpoint, "--port", port], want)
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(__version__="6.9.0"))
    want = "gradio is 6.9.0, want at least 6.17: pip install -U 'epg_fast[app]'"
    fails(capsys, ["app", "--checkpoint", checkpoint, "--port", port], want)


def test_an_address_that_cannot_be_taken_is_a_line(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = f"cannot listen at 127.0.0.1:{port} (Address already in use); say another --port"
        fails(capsys, ["app", "--checkpoint", checkpoint, "--port", port], said)
    fails(capsys, ["app", "--checkpoint", checkpoint, "--host", "192.0.2.1"], "cannot listen at 192.0.2.1:7860")
    fails(capsys, ["app", "--checkpoint", checkpoint, "--port", "65536"], "port is 65536, want 1 to 65535")
    fails(capsys, ["app"], "checkpoint is missing; say it with --checkpoint")


# From here on with the real gradio.


@pytest.fixture
def gradio(monkeypatch):
    """Gradio in an environment that would open everything and report."""
    for name, value in {"ALLOWED_PATHS": "/", "SHARE": "True", "SERVER_NAME": "0.0.0.0", "MCP_SERVER": "True"}.items():
        monkeypatch.setenv(f"GRADIO_{name}", value)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    return pytest.importorskip("gradio")


@pytest.fixture
def connections(monkeypatch):
    """Hosts that this process connects to or looks up."""
    hosts, connect, look_up = [], socket.socket.connect, socket.getaddrinfo

    def watched_connect(self, address):
        hosts.append(address[0])
        return connect(self, address)

    def watched_look_up(host, *arguments, **more):
        hosts.append(host)
        return look_up(host, *arguments, **more)

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_look_up)
    return hosts


def status(address, path, content=None, kind="application/json"):
    request = urllib.request.Request(f"{address}{path}", content, {"Content-Type": kind})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_page_is_for_this_machine_shows_no_file_and_tells_nobody(gradio, connections, checkpoint, port, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    before = dict(os.environ)
    with app.serving(AppConfig(checkpoint=checkpoint, port=port, device="cpu")) as address:
        assert address == f"http://127.0.0.1:{port}/"
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert status(address, "") == 200
        for path in (tmp_path / "secret.txt", "/etc/passwd", checkpoint, Path(app.__file__)):
            assert status(address, f"gradio_api/file={path}") in (403, 404)
        form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\ntwo\r\n--b--\r\n'
        assert status(address, "gradio_api/upload", form, "multipart/form-data; boundary=b") == 413
        assert status(address, "monitoring") == 403
        assert {*connections} == {"127.0.0.1"}
        with pytest.raises(ConnectionRefusedError):  # another address of this machine
            socket.create_connection(("127.0.0.2", port))
    assert dict(os.environ) == before and not folder.exists()


@pytest.fixture
def browser(gradio):
    """A page of headless Chromium, which remembers whom it asks."""
    driver = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    with driver.sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = chrome.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(100_000)  # of milliseconds, on a machine with much else to do
        page.asked = []
        page.on("request", lambda request: page.asked.append(urllib.parse.urlsplit(request.url)))
        yield page
        chrome.close()


def press_draw(page):
    page.get_by_role("button", name="Draw").click()


def pixels(page, picture) -> np.ndarray:
    """What a picture of the page shows: uint8 [H, W, 3]."""
    content = page.request.get(picture.get_attribute("src")).body()
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.slow
def test_a_visitor_draws_images_and_looks_at_a_trajectory(browser, checkpoint, port):
    page, thumbnails = browser, browser.locator("button.thumbnail-item")
    with app.serving(AppConfig(checkpoint=checkpoint, port=port, device="cpu")) as address:
        page.goto(address)
        page.get_by_text("digits_32, 32 x 32 pixels, 3 classes, step 7").wait_for()
        page.get_by_label("Class").click()
        page.get_by_role("option", name="1 <b>goldfish</b>").click()
        page.get_by_label("Images").fill("2")
        page.get_by_label("Noise levels").fill("4")
        press_draw(page)
        page.get_by_text("2 images in ").wait_for()
        want, _ = Desk(epg_fast.from_pretrained(checkpoint)).draw(SampleConfig(labels="1", num=2, steps=4))
        assert thumbnails.count() == 2 and thumbnails.first.inner_text() == "1 <b>goldfish</b>"
        for thumbnail, (image, _) in zip(thumbnails.all(), want, strict=True):
            assert np.array_equal(pixels(page, thumbnail.locator("img")), image)

        thumbnails.nth(1).click()
        page.get_by_text("the image, class 1 <b>goldfish</b>", exact=True).wait_for()
        slider, frame = page.locator("input[type=range]"), page.locator(".frame img")
        assert slider.get_attribute("max") == "5" and abs(pixels(page, frame).astype(int) - want[1][0]).max() <= 1
        slider.fill("1")
        page.get_by_text("clean estimate at σ = 80").wait_for()
        assert not np.array_equal(pixels(page, frame), want[1][0])

        page.get_by_label("Seed").fill("")
        press_draw(page)
        page.get_by_text("seed is empty, want a number").wait_for()
        assert thumbnails.count() == 2  # what was drawn is still there
        page.get_by_label("Seed").fill("5")
        page.get_by_label("above σ").fill("9")
        press_draw(page)
        page.get_by_text("interval is (9, 1.61), want low <= high").wait_for()

        page.get_by_label("Sampler").click()
        page.get_by_role("option", name="onestep").click()
        page.get_by_label("Noise levels").wait_for(state="hidden")
        assert not page.get_by_label("Guidance").is_visible()
        press_draw(page)
        page.get_by_text("1 network evaluations each").wait_for()
        assert not slider.is_visible()

        page.set_viewport_size({"width": 380, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        assert {url.netloc for url in page.asked if url.scheme != "data"} == {f"127.0.0.1:{port}"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unconditional", "consistency"])
def test_a_model_is_asked_for_nothing_that_it_does_not_take(kind, browser, tmp_path, port):
    sizes = SIZES | ({"num_classes": 0} if kind == "unconditional" else {})
    stage = "finetune-consistency" if kind == "consistency" else "finetune-diffusion"
    make_generator({"stage": stage}, **sizes).save_pretrained(tmp_path)
    with app.serving(AppConfig(checkpoint=str(tmp_path), port=port, device="cpu")) as address:
        browser.goto(address)
        press_draw(browser)
        browser.get_by_text("16 images in ").wait_for()
        fields = ["Class", "Images", "Seed", "Sampler", "Noise levels", "Guidance", "above σ", "Precision"]
        seen = [name for name in fields if browser.get_by_label(name).is_visible()]
        hidden = {"unconditional": {"Class", "Guidance", "above σ"}}
        hidden["consistency"] = {"Sampler", "Noise levels", "Guidance", "above σ"}
        assert seen == [name for name in fields if name not in hidden[kind]]


@pytest.mark.slow
def test_the_command_ends_with_a_signal_and_leaves_nothing(gradio, checkpoint, port, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)

    def look_and_end():
        assert status(f"http://127.0.0.1:{port}/", "") == 200
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal, "pause", look_and_end)
    run("app", "--checkpoint", checkpoint, "--port", port, "--device", "cpu")
    signal.signal(signal.SIGTERM, handler)
    assert f"{checkpoint} is at http://127.0.0.1:{port}/ (Ctrl-C ends it)" in capsys.readouterr().err
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))
    encoder = Path(checkpoint).with_name("encoder")
    create_encoder("digits_32", embed_dim=32, depth=1, num_heads=2).save_pretrained(encoder)
    fails(capsys, ["app", "--checkpoint", encoder, "--port", port], "holds a pre-trained encoder")
