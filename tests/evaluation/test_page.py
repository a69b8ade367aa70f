"""The HTML page of a result: it needs nothing else, shows what is there and lets nothing in a file become markup."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from epg_fast.__main__ import main
from epg_fast.evaluation import page
from tests.commands import fails, run
from tests.evaluation.samples import pictures, save_npz

_VOID = {"meta", "img", "br", "hr", "link", "input", "wbr"}
_LOADS = {"src", "href", "srcset", "poster", "action", "data", "background"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), its text, and whether everything that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert not self._open, self._open

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


NOTE = {"sampler": "heun", "steps": 18, "guidance": 1.5, "seed": 7, "labels": "balanced", "weights_sha256": "ab" * 32}
NASTY = "<script>alert(1)</script>&amp;\"'><img src=x onerror=alert(2)>"


@pytest.fixture
def judged(tmp_path, tiny_inception):
    """The words of a command that judges images, and the folder of its files."""
    folder = tmp_path / "<script>alert(1)<"  # a path may look like this
    folder.mkdir()
    save_npz(pictures(0, 60), np.arange(60) % 10, folder / "s.npz", **NOTE, checkpoint=NASTY)
    save_npz(pictures(1, 60), np.arange(60) % 10, folder / "t.npz", **NOTE)
    save_npz(pictures(2, 80), np.arange(80) % 10, folder / "real.npz")
    words = ["evaluate", "--samples", folder / "s.npz", "--reference", folder / "real.npz", "--device", "cpu"]
    return folder, [*words, "--inception", tiny_inception, "--bootstrap", 2, "--page", folder / "page.html"]


def shown(image):
    return Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))


def read(folder):
    text = (folder / "page.html").read_text()
    parsed = Page(text)
    for tag, attributes in parsed.elements:
        for name in _LOADS & {*attributes}:
            # inside the page or in it: nothing is fetched
            assert attributes[name].startswith("data:image/png;base64,"), (tag, attributes[name][:60])
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in parsed.elements}
    return text, parsed


def test_the_page_shows_images_figures_plots_and_the_protocol(judged):
    folder, words = judged
    run(*words, "--repeats", 2, "--compare", folder / "t.npz", "--output", folder / "result.json")
    result = json.loads((folder / "result.json").read_text())
    text, parsed = read(folder)
    assert text.startswith("<!DOCTYPE html>") and parsed.of("html") == [{"lang": "en"}]
    assert parsed.of("meta")[2]["content"] == "width=device-width, initial-scale=1"
    for name in ("fid", "fid_infinity", "inception_score", "precision", "recall"):
        assert f'<th scope="row">{name}</th><td>{result[name]:.5g}</td>' in text
    for title in ("Figures", "Images", "Plots", "Comparison", "Repeats", "Protocol", "To repeat it"):
        assert f"<h2>{title}</h2>" in text
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.of("th"))
    assert len(parsed.of("caption")) == len(parsed.of("table"))
    # a wide one scrolls by itself, not with the page; a long name is broken between its parts
    assert text.count('<div class="scroll" tabindex="0"') == text.count("<table") == len(parsed.of("table"))
    assert "weights_<wbr>sha256</th>" in text
    drawings = parsed.of("img")[48:]
    assert len(drawings) == 2 and f"{result['fid_infinity']:.4g} at infinity" in drawings[0]["alt"]
    for drawing in drawings:
        pixels = np.asarray(shown(drawing).convert("L"))
        assert min(pixels.shape) > 300 and len(np.unique(pixels)) > 20
    # quoted for a shell, then escaped
    assert "epg-fast evaluate --protocol &#x27;" in text and NOTE["weights_sha256"] in text


def test_images_are_those_of_the_file_and_say_what_they_are(judged):
    folder, words = judged
    run(*words)
    _, parsed = read(folder)
    images = parsed.of("img")[:48]
    assert images[13]["alt"] == "image 13, class 3"
    for image, pixels in zip(images, pictures(0, 60), strict=False):
        assert np.array_equal(np.asarray(shown(image)), pixels)
        assert (image["width"], image["height"]) == ("32", "32")


def test_classes_have_the_names_that_the_samples_say_in_captions_alone(judged):
    folder, words = judged
    names = ["tench, Tinca tinca", NASTY, *map(str, range(7))]  # one too few
    save_npz(pictures(0, 60), np.arange(60) % 10, folder / "s.npz", **NOTE, class_names=names)
    run(*words, "--output", folder / "result.json")
    text, parsed = read(folder)
    assert [image["alt"] for image in parsed.of("img")[8:12]] == [
        *("image 8, 8 6", "image 9, class 9"),
        *("image 10, 0 tench, Tinca tinca", f"image 11, 1 {NASTY}"),
    ]
    assert "<figcaption>0 tench, Tinca tinca</figcaption>" in text
    assert "class_names" not in json.loads((folder / "result.json").read_text())["protocol"]["sampling"]


def test_large_images_are_reduced():
    text = page.images(pictures(0, 3, size=300))
    first = Page(text).of("img")[0]
    assert shown(first).size == (128, 128) and first["alt"] == "image 0"
    assert "reduced from 300x300 to 128x128 pixels" in text


def test_what_comes_from_files_stays_text(judged):
    folder, words = judged
    run(*words)
    text, parsed = read(folder)
    assert NASTY in parsed.text and "<script" not in text and "onerror=alert(2)>" not in text
    assert f"Evaluation of {folder}" in parsed.text
    everywhere = page.document(NASTY, [
        page.section(NASTY, page.paragraph(NASTY), page.command(NASTY), page.picture(b"PNG", NASTY, NASTY)),
        page.table(NASTY, (NASTY, NASTY), [(NASTY, [NASTY]), (NASTY, {"a": NASTY})]),
    ])  # fmt: skip
    parsed = Page(everywhere)
    assert not parsed.of("script") and parsed.text.count("<script>alert(1)</script>") == 13
    assert [image["alt"] for image in parsed.of("img")] == [NASTY]


def test_a_name_that_is_no_utf8_can_be_written():
    assert "a\\udcff" in page.document("a\udcff", []).encode().decode()


def test_without_matplotlib_the_page_has_tables_and_says_so(judged, monkeypatch):
    folder, words = judged

    def missing(name):
        raise ImportError(f"this needs {name}")

    monkeypatch.setattr(page, "import_extra", missing)
    run(*words)
    text, parsed = read(folder)
    assert len(parsed.of("img")) == 48 and "no plots, which need matplotlib: pip install" in parsed.text
    assert len(parsed.of("table")) == 4


def test_samples_without_a_record_have_a_page_and_are_not_said_to_be_repeatable(judged):
    folder, words = judged
    np.savez(folder / "s.npz", arr_0=pictures(0, 60))
    run(*words)
    text, parsed = read(folder)
    assert parsed.of("img")[0]["alt"] == "image 0" and "figcaption>class" not in text
    assert "do not say how they were drawn, so that they cannot be drawn again" in parsed.text
    assert "<pre>" not in text


def test_figures_that_are_missing_are_explained(judged):
    folder, words = judged
    np.savez(folder / "real.npz", mu=np.full(6, 100.0), sigma=np.eye(6))
    run(*words)
    text, parsed = read(folder)
    assert '<th scope="row">precision</th><td>&ndash;</td>' in text and "holds statistics but no images" in parsed.text
    assert len(parsed.of("img")) == 48 + 1


def test_what_a_repeated_result_differs_in_is_on_its_page(judged):
    folder, words = judged
    run(*words, "--output", folder / "result.json")
    result = json.loads((folder / "result.json").read_text())
    fid = {"then": 1.0, "now": 3.5, "spread": [0.3, 0.4], "difference": 2.5, "standard_errors": 5.0}
    images = {"then": "a", "now": "b", "same": None, "why": "those of then are not there any more"}
    changes = ["versions.torch was '2.11', now '2.13'"]
    repeated = {"protocol": changes, "figures": {"fid": fid}, "images": images}
    parsed = Page(page.result_page(result | {"repeated": repeated}))
    for part in ("versions.torch", "'2.11', now '2.13'", "not known: those of then are not there any more", "3.5"):
        assert part in parsed.text


def test_a_page_that_cannot_be_written_is_refused_before_the_work_starts(judged, capsys, monkeypatch):
    folder, words = judged
    (folder / "file").write_text("")
    monkeypatch.setattr(page, "result_page", None)
    fails(capsys, [*words[:-1], folder / "file" / "page.html"], "page: ", "choose another --page")
    assert main(["evaluate", "--probe", "digits_32", "--page", "p.html"]) == 2
    assert "got --page with --probe" in capsys.readouterr().err
