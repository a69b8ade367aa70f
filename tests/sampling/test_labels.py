"""Labels of the images to draw."""

import json

import numpy as np
import pytest

from epg_fast.data import prepare_shards
from epg_fast.sampling.labels import choose_labels


def write(path, **manifest):
    path.write_text(json.dumps({"complete": True, **manifest}))
    return path


def test_labels_are_as_frequent_as_in_the_data(tmp_path):
    frequencies = [0.5, 0.0, 0.2, 0.3]
    write(tmp_path / "manifest.json", class_frequencies=frequencies)
    labels = choose_labels(f"frequencies:{tmp_path}", 20_000, 4, 7)
    assert set(map(type, labels)) == {int}
    np.testing.assert_allclose(np.bincount(labels, minlength=4) / 20_000, frequencies, atol=0.015)
    assert 1 not in labels
    assert labels == choose_labels(f"frequencies:{tmp_path / 'manifest.json'}", 20_000, 4, 7)
    assert labels != choose_labels(f"frequencies:{tmp_path}", 20_000, 4, 8)


def test_the_manifest_of_prepare_data_fits(tmp_path):
    from PIL import Image

    for name, count in (("cat", 3), ("dog", 0), ("owl", 1)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "in" / name / f"{i}.png")
    prepare_shards(tmp_path / "in", tmp_path / "out", 8, workers=0)
    labels = choose_labels(f"frequencies:{tmp_path / 'out'}", 4000, 3, 0)
    np.testing.assert_allclose(np.bincount(labels, minlength=3) / 4000, [0.75, 0, 0.25], atol=0.03)


def test_frequencies_that_cannot_be_used_are_refused(tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message):
            choose_labels(f"frequencies:{path}", 10, 2, 0)

    refused(tmp_path / "nowhere.json", "cannot read .*nowhere.json")
    refused(tmp_path, "cannot read .*manifest.json .*; prepare-data makes it: pass its output")
    refused("", "cannot read")
    refused(write(tmp_path / "a.json", class_frequencies=[1 / 3] * 3), "frequencies of 3 classes, the model has 2")
    refused(write(tmp_path / "b.json"), "has no class_frequencies")
    refused(write(tmp_path / "c.json", class_frequencies=[1, 0], complete=False), "unfinished prepare-data")
    for values in ([0, 0], [-1, 2], [float("nan"), 1]):
        refused(write(tmp_path / "d.json", class_frequencies=values), "no probabilities")
    (tmp_path / "e.json").write_text("not json")
    refused(tmp_path / "e.json", "has no class_frequencies")
    with pytest.raises(ValueError, match="want balanced, random, frequencies:PATH"):
        choose_labels("frequency", 10, 2, 0)


def test_the_other_ways_are_as_before():
    assert choose_labels("balanced", 5, 3, 0) == [0, 1, 2, 0, 1]
    assert choose_labels("2,0", 3, 3, 0) == [2, 0, 2]
    assert choose_labels("random", 4, 3, 0) == np.random.default_rng(0).integers(3, size=4).tolist()


def test_classes_that_were_never_trained_are_drawn_only_when_they_are_asked_for(log):
    untrained = [0, 3]
    assert choose_labels("balanced", 5, 5, 0, untrained) == [1, 2, 4, 1, 2]
    assert set(choose_labels("random", 200, 5, 0, untrained)) == {1, 2, 4}
    assert choose_labels("2,4", 2, 5, 0, untrained) == [2, 4] and not log.messages
    assert choose_labels("3,2", 2, 5, 0, untrained) == [3, 2]
    assert log.messages == ["labels: the model was trained on no image of class 3: expect noise"]


def test_a_list_may_have_spaces_and_is_no_longer_than_the_images():
    for how in ("2,0,1", "2, 0, 1", " 2 0 1 ", "2 ,0\t1"):
        assert choose_labels(how, 4, 3, 0) == [2, 0, 1, 2]
    with pytest.raises(ValueError, match="more labels than images, 4 for 3; want at most 3, or --num 4"):
        choose_labels("0,1,2,0", 3, 3, 0)
    for how in ("", "0,", "0,,1", "1.5", "0;1"):
        with pytest.raises(ValueError, match="want balanced, random"):
            choose_labels(how, 4, 3, 0)
    for how in ("0,3", "-1"):
        with pytest.raises(ValueError, match=r"out of range: the model has classes 0\.\.2"):
            choose_labels(how, 4, 3, 0)


def test_a_model_without_classes_takes_no_labels():
    assert choose_labels("balanced", 3, 0, 0) == [0, 0, 0]
    for how in ("random", "0", "frequencies:x"):
        with pytest.raises(ValueError, match="the model is unconditional"):
            choose_labels(how, 3, 0, 0)
