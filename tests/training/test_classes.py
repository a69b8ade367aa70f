"""Does the data have the classes of the network? Said once at the start."""

import re
from types import SimpleNamespace

import pytest

from epg_fast.training.dataset import note_classes


def stage(num_classes, before=None):
    return SimpleNamespace(
        network=SimpleNamespace(num_classes=num_classes), untrained_before=before, untrained_classes=[]
    )


def source(labels, classes=None):
    return SimpleNamespace(root="data", labels=labels, classes=classes or [str(i) for i in range(max(labels) + 1)])


@pytest.mark.parametrize(
    "labels, classes, before, untrained, said",
    [
        ([0, 1, 2], 5, None, [3, 4], r"2 of the model's 5 classes \(3-4\).*pass --model.num_classes 3 for"),
        ([1, 2, 3], 4, None, [0], r"1 of the model's 4 classes \(0\).*if labels count from 1 or have gaps"),
        ([0, 4, 9], 12, None, [1, 2, 3, 5, 6, 7, 8, 10, 11], r"\(1-3, 5-8, 10-11\): 9 stay untrained.*gaps"),
        # those of the weights to start from count as trained, and nobody can change their number
        ([0, 2], 4, [1], [1], r"2 of the model's 4 classes \(1, 3\): 1 stay untrained((?!num_classes).)*$"),
        ([0, 2], 4, [], [], "they stay as they are in --init_from"),
        # all classes, or none in the network
        ([2, 0, 1], 3, None, [], None),
        ([0, 5], 0, None, [], None),
        ([0, 0], 0, None, [], None),
    ],
)
def test_classes_without_images_are_named_with_a_remedy(log, labels, classes, before, untrained, said):
    it = stage(classes, before)
    note_classes(it, source(labels))
    assert it.untrained_classes == untrained and len(log.messages) == bool(said)
    assert not said or re.search(said, log.messages[0]), log.messages


@pytest.mark.parametrize(
    "classes, names",
    [
        (["n01440764", "n01443537"], True),
        (["1", "10", "2"], True),
        (["0", "1"], False),
        ([f"{i:03d}" for i in range(101)], False),
        (["all"], False),
    ],
)
def test_the_names_of_classes_are_noted_where_they_say_more_than_numbers(classes, names):
    it = stage(len(classes))
    note_classes(it, source(list(range(len(classes))), classes))
    assert it.class_names == (classes if names else [])


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([1, 2, 3, 4], None, "no image is of class 0: if the labels count from 1, write them from 0; or pass --model"),
        ([0, 4], None, r"data has 5 classes, but the model has 4; pass --model.num_classes 5$"),
        ([0, 0], ["all"], r"has no labels, but the model has 4 classes; wanted .*key.cls.*--model.num_classes 0"),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        note_classes(stage(4), source(labels, names))
