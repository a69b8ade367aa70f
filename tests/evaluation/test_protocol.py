"""A number is never without how its images were drawn, or the word that nobody knows."""

import json

import numpy as np
import pytest

from epg_fast.evaluation.protocol import sampling_record
from tests.evaluation.samples import save_npz, save_pngs

KEYS = {
    *("source", "num", "labels", "sampler", "steps", "evaluations", "guidance", "interval", "precision", "seed"),
    "checkpoint",
}
NOTE = {"labels": "balanced", "sampler": "heun", "steps": 18, "seed": 3, "num": 6, "clamp": "official"}


@pytest.fixture
def samples(tmp_path):
    images, labels = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6)
    save_npz(images, labels, tmp_path / "noted.npz", **NOTE, s_max=float("inf"), evaluations=34)
    np.savez(tmp_path / "foreign.npz", arr_0=images, arr_1=labels)
    save_pngs(images, labels, tmp_path / "out" / "png")
    (tmp_path / "out" / "settings.json").write_text(json.dumps(NOTE))
    return tmp_path


def test_the_note_of_an_npz_or_in_or_beside_the_png_folder_is_the_record(samples, log):
    record = sampling_record(samples / "noted.npz", 6)
    assert record["source"].endswith("noted.npz: metadata")
    assert record.items() >= (NOTE | {"s_max": "inf", "evaluations": 34}).items()
    assert {*record} == KEYS | {"s_max", "clamp"} and record["guidance"] is None
    record = sampling_record(samples / "out" / "png", 6)
    assert record["source"] == str(samples / "out" / "settings.json") and record.items() >= NOTE.items()
    assert record["evaluations"] is None
    (samples / "out" / "png" / "settings.json").write_text(json.dumps(NOTE | {"seed": 4}))
    assert sampling_record(samples / "out" / "png", 6)["seed"] == 4
    assert not log.messages
    assert sampling_record(samples / "noted.npz", 5)["num"] == 5
    assert "holds 5 images" in log.messages[0] and "is about 6" in log.messages[0]


def test_samples_without_a_note_have_nulls_and_one_warning(samples, log):
    (samples / "out" / "real").mkdir()
    (samples / "png").mkdir()
    (samples / "png" / "settings.json").write_text('{"editor": "vi"}')  # something else's
    for source in ("foreign.npz", "out/real", "png"):
        log.messages.clear()
        record = sampling_record(samples / source, 6)
        assert {*record} == KEYS and record.pop("num") == 6 and not any(record.values())
        assert len(log.messages) == 1 and "cannot be attributed" in log.messages[0]


def test_a_note_cannot_say_where_it_is_and_its_numbers_are_jsons(samples):
    note = samples / "out" / "settings.json"
    note.write_text(json.dumps(NOTE | {"source": "elsewhere"})[:-1] + ', "s_max": 1e999, "guidance": NaN}')
    record = sampling_record(samples / "out" / "png", 6)
    assert record["source"] == str(note) and (record["s_max"], record["guidance"]) == ("inf", "nan")
    json.dumps(record, allow_nan=False)
    for text in ("{", "[1]", "\xff"):
        note.write_bytes(text.encode("latin1"))
        np.savez(samples / "bad.npz", arr_0=np.zeros(1), metadata=np.array(text))
        for source, name in (("out/png", r"settings\.json"), ("bad.npz", r"bad\.npz: metadata")):
            with pytest.raises(ValueError, match=rf"{name}.* mend or remove it"):
                sampling_record(samples / source, 6)
