"""Labels of the images to draw."""

import json

import numpy as np
import pytest

from epg_fast.data import prepare_shards
from epg_fast.sampling.labels import choose_labels, class_index


def test_labels_are_as_frequent_as_in_the_data(tmp_path):
    frequencies = [0.5, 0.0, 0.2, 0.3]
    (tmp_path / "manifest.json").write_text(json.dumps({"complete": True, "class_frequencies": frequencies}))
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*manifest.json .*; prepare-data makes it: pass its output"),
        ({"complete": True}, "has no class_frequencies"),
        ({"complete": False, "class_frequencies": [1, 0]}, "unfinished prepare-data"),
        ([1 / 3] * 3, "frequencies of 3 classes, the model has 2"),
        *((frequencies, "no probabilities") for frequencies in ([0, 0], [-1, 2], [float("nan"), 1])),
    ],
)
def test_frequencies_that_cannot_be_used_are_refused(tmp_path, content, message):
    if isinstance(content, list):
        content = {"complete": True, "class_frequencies": content}
    if content is not None:
        (tmp_path / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        choose_labels(f"frequencies:{tmp_path}", 10, 2, 0)


def test_classes_that_were_never_trained_are_drawn_only_when_they_are_asked_for(log):
    untrained = [0, 3]
    assert choose_labels("balanced", 5, 5, 0, untrained) == [1, 2, 4, 1, 2]
    assert set(choose_labels("random", 200, 5, 0, untrained)) == {1, 2, 4}
    assert choose_labels("2,4", 2, 5, 0, untrained) == [2, 4] and not log.messages
    assert choose_labels("3,2", 2, 5, 0, untrained) == [3, 2]
    assert log.messages == ["labels: the model was trained on no image of class 3: expect noise"]


@pytest.mark.parametrize(
    ("how", "classes", "want"),
    [
        ("balanced", 3, [0, 1, 2, 0]),
        ("random", 3, np.random.default_rng(0).integers(3, size=4).tolist()),
        *((how, 3, [2, 0, 1, 2]) for how in ("2,0,1", " 2 0 1 ", "2 ,0\t1")),
        ("balanced", 0, [0, 0, 0, 0]),
    ],
)
def test_labels_are_chosen_by_a_word_or_a_list(how, classes, want):
    assert choose_labels(how, 4, classes, 0) == want


@pytest.mark.parametrize(
    ("how", "classes", "message"),
    [
        ("0,1,2,0,1", 3, "more labels than images, 5 for 4; want at most 4, or --num 5"),
        *((how, 3, "want balanced, random, frequencies:PATH") for how in ("", "0,,1", "1.5", "frequency")),
        *((how, 3, r"out of range: the model has classes 0\.\.2") for how in ("0,3", "-1")),
        *((how, 0, "the model is unconditional") for how in ("random", "0")),
    ],
)
def test_other_words_and_labels_are_refused(how, classes, message):
    with pytest.raises(ValueError, match=message):
        choose_labels(how, 4, classes, 0)


NAMES = ["tench, Tinca tinca", "goldfish", "crane", "crane, machine", "great white shark, man-eater", "n01440764"]


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("goldfish", [1]),
        ("tench,goldfish", [0, 1]),
        ("tench, Tinca tinca", [0]),
        ("TENCH,Tinca Tinca", [0]),
        ("Tinca tinca,tench , 3, goldfish,0 1", [0, 0, 3, 1, 0, 1]),
        # a whole name counts before the part of another, and the longest before its parts
        ("crane", [2]),
        ("crane,machine,crane", [3, 2]),
        ("great white shark,n01440764", [4, 5]),
    ],
)
def test_classes_are_chosen_by_their_names_beside_numbers(how, want):
    assert choose_labels(how, len(want), 6, 0, names=NAMES) == want


@pytest.mark.parametrize(
    ("how", "names", "message"),
    [
        (
            "golfish",
            NAMES,
            r"no class 'golfish' \(did you mean 'goldfish'\?\), and takes no text; want class",
        ),
        ("tinca", NAMES, "no class 'tinca'.* or names such as 'tench, Tinca tinca'$"),
        ("goldfish,", NAMES, "want balanced, .* or names of classes$"),
        ("tench,6", NAMES, r"label 6 is out of range: the model has classes 0\.\.5"),
        ("crane", ["crane, bird", "crane, machine"], r"may be 0 \('crane, bird'\) and 1 .*; give the class index"),
        ("tench", [], r"names of classes \(the checkpoint knows no names of classes\)"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(how, names, message):
    with pytest.raises(ValueError, match=message):
        choose_labels(how, 8, 6, 0, names=names)


def test_a_number_is_a_class_index_also_where_classes_are_called_so(log):
    names = ["1", "10", "2"]
    assert choose_labels("1,2", 2, 3, 0, names=names) == [1, 2]
    assert log.messages == ["labels: 1 is the class index, not the class called so, 0"]
    assert class_index("10", names, 3) == 1
