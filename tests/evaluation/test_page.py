"""The HTML page of a result: it needs nothing else, shows what is there and lets nothing in a file become markup."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from epg_fast.evaluation import page
from tests.commands import run
from tests.evaluation.samples import pictures, save_npz

_VOID = {"meta", "img", "br", "hr", "link", "input", "wbr"}
_LOADS = {"src", "href", "srcset", "poster", "action", "data", "background"}
NOTE = {"sampler": "heun", "steps": 18, "guidance": 1.5, "seed": 7, "labels": "balanced", "weights_sha256": "ab" * 32}
NASTY = "<script>alert(1)</script>&amp;\"'><img src=x onerror=alert(2)>"
NAMES = ["tench, Tinca tinca", NASTY, *map(str, range(7))]  # of ten classes one too few


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), and its text; everything that is opened is closed, nothing fetched."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert not self._open, self._open
        for tag, attributes in self.elements:
            for name in _LOADS & {*attributes}:
                assert attributes[name].startswith("data:image/png;base64,"), (tag, attributes[name][:60])
            assert not any(name.startswith("on") for name in attributes)
        assert not re.search(r"url\(|@import|https?://", text)
        assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in self.elements}

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_inception):
    """Samples and the result and page that a command has made of them."""
    folder = tmp_path_factory.mktemp("page") / "<script>alert(1)<"  # a path may look like this
    folder.mkdir()
    save_npz(pictures(0, 60), np.arange(60) % 10, folder / "s.npz", **NOTE, checkpoint=NASTY, class_names=NAMES)
    save_npz(pictures(1, 60), np.arange(60) % 10, folder / "t.npz", **NOTE)
    save_npz(pictures(2, 80), np.arange(80) % 10, folder / "real.npz")
    words = ["evaluate", "--samples", folder / "s.npz", "--reference", folder / "real.npz", "--device", "cpu"]
    words += ["--inception", tiny_inception, "--bootstrap", 2, "--repeats", 2, "--compare", folder / "t.npz"]
    run(*words, "--page", folder / "page.html", "--output", folder / "result.json")
    return folder


@pytest.fixture
def result(folder):
    return json.loads((folder / "result.json").read_text())


def shown(image):
    return Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))


def test_the_page_shows_figures_plots_and_the_protocol(folder, result):
    text = (folder / "page.html").read_text()
    parsed = Page(text)
    assert text.startswith("<!DOCTYPE html>") and parsed.of("html") == [{"lang": "en"}]
    assert parsed.of("meta")[2]["content"] == "width=device-width, initial-scale=1"
    for name in ("fid", "fid_infinity", "inception_score", "precision", "recall"):
        assert f'<th scope="row">{name}</th><td>{result[name]:.5g}</td>' in text
    for title in ("Figures", "Images", "Plots", "Comparison", "Repeats", "Protocol", "To repeat it"):
        assert f"<h2>{title}</h2>" in text
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.of("th"))
    # a wide one scrolls by itself, not with the page; a long name is broken between its parts
    assert text.count('<div class="scroll" tabindex="0"') == len(parsed.of("table")) == len(parsed.of("caption")) == 6
    assert "weights_<wbr>sha256</th>" in text
    drawings = parsed.of("img")[48:]
    assert len(drawings) == 2 and f"{result['fid_infinity']:.4g} at infinity" in drawings[0]["alt"]
    for drawing in drawings:
        pixels = np.asarray(shown(drawing).convert("L"))
        assert min(pixels.shape) > 300 and len(np.unique(pixels)) > 20
    # quoted for a shell, then escaped
    assert "epg-fast evaluate --protocol &#x27;" in text and NOTE["weights_sha256"] in text


def test_images_are_those_of_the_file_with_the_names_of_their_classes(folder, result):
    text = (folder / "page.html").read_text()
    images = Page(text).of("img")[:48]
    for image, pixels in zip(images, pictures(0, 60), strict=False):
        assert np.array_equal(np.asarray(shown(image)), pixels)
        assert (image["width"], image["height"]) == ("32", "32")
    assert [image["alt"] for image in images[8:12]] == [
        *("image 8, 8 6", "image 9, class 9"),
        *("image 10, 0 tench, Tinca tinca", f"image 11, 1 {NASTY}"),
    ]
    assert "<figcaption>0 tench, Tinca tinca</figcaption>" in text
    assert "class_names" not in result["protocol"]["sampling"]
    text = page.images(pictures(0, 3, size=300))
    first = Page(text).of("img")[0]
    assert shown(first).size == (128, 128) and first["alt"] == "image 0"
    assert "reduced from 300x300 to 128x128 pixels" in text


def test_what_comes_from_files_stays_text(folder):
    text = (folder / "page.html").read_text()
    assert NASTY in Page(text).text and "<script" not in text and "onerror=alert(2)>" not in text
    assert f"Evaluation of {folder}" in Page(text).text
    everywhere = page.document(NASTY, [
        page.section(NASTY, page.paragraph(NASTY), page.command(NASTY), page.picture(b"PNG", NASTY, NASTY)),
        page.table(NASTY, (NASTY, NASTY), [(NASTY, [NASTY]), (NASTY, {"a": NASTY})]),
    ])  # fmt: skip
    parsed = Page(everywhere)
    assert parsed.text.count("<script>alert(1)</script>") == 13
    assert [image["alt"] for image in parsed.of("img")] == [NASTY]
    assert "a\\udcff" in page.document("a\udcff", []).encode().decode()  # a name that is no UTF-8


def test_without_matplotlib_the_page_has_tables_and_says_so(result, monkeypatch):
    def missing(name):
        raise ImportError(f"this needs {name}")

    monkeypatch.setattr(page, "import_extra", missing)
    parsed = Page(page.result_page(result))
    assert len(parsed.of("img")) == 48 and "no plots, which need matplotlib: pip install" in parsed.text
    assert len(parsed.of("table")) == 6


def test_what_a_result_lacks_is_explained(folder, result, monkeypatch):
    monkeypatch.setattr(page, "drawn", lambda *_, **__: b"")
    np.savez(folder / "bare.npz", arr_0=pictures(0, 60))
    result |= {"samples": str(folder / "bare.npz"), "precision": None, "missing": {"precision": "no images"}}
    result["protocol"]["sampling"] = {"sampler": None}
    text = page.result_page(result)
    parsed = Page(text)
    assert len(parsed.of("img")) == 48 + 1 and parsed.of("img")[0]["alt"] == "image 0"
    assert "figcaption>class" not in text and "<pre>" not in text
    assert "do not say how they were drawn, so that they cannot be drawn again" in parsed.text
    assert '<th scope="row">precision</th><td>&ndash;</td>' in text and "precision: no images." in parsed.text


def test_what_a_repeated_result_differs_in_is_on_its_page(result, monkeypatch):
    monkeypatch.setattr(page, "drawn", lambda *_, **__: b"")
    fid = {"then": 1.0, "now": 3.5, "spread": [0.3, 0.4], "difference": 2.5, "standard_errors": 5.0}
    images = {"then": "a", "now": "b", "same": None, "why": "those of then are not there any more"}
    changes = ["versions.torch was '2.11', now '2.13'"]
    repeated = {"protocol": changes, "figures": {"fid": fid}, "images": images}
    parsed = Page(page.result_page(result | {"repeated": repeated}))
    for part in ("versions.torch", "'2.11', now '2.13'", "not known: those of then are not there any more", "3.5"):
        assert part in parsed.text
