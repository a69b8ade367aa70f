"""Does the data have the classes of the network? Said once at the start."""

import re
from types import SimpleNamespace

import pytest

from epg_fast.training.classes import note_classes


def stage(num_classes, before=None):
    return SimpleNamespace(
        network=SimpleNamespace(num_classes=num_classes), untrained_before=before, untrained_classes=[]
    )


def source(labels, classes=None):
    return SimpleNamespace(root="data", labels=labels, classes=classes or [str(i) for i in range(max(labels) + 1)])


@pytest.mark.parametrize(
    "labels, classes, untrained, said",
    [
        ([0, 1, 2], 5, [3, 4], r"2 of the model's 5 classes \(3-4\).*pass --model.num_classes 3 for"),
        ([1, 2, 3], 4, [0], r"1 of the model's 4 classes \(0\).*if labels count from 1 or have gaps"),
        ([0, 4, 9], 12, [1, 2, 3, 5, 6, 7, 8, 10, 11], r"\(1-3, 5-8, 10-11\): 9 stay untrained.*gaps"),
    ],
)
def test_classes_without_images_are_named_with_a_remedy(log, labels, classes, untrained, said):
    it = stage(classes)
    note_classes(it, source(labels))
    assert it.untrained_classes == untrained
    (line,) = log.messages
    assert re.search(said, line), line


def test_nothing_is_said_of_data_that_has_all_classes_or_of_networks_without(log):
    for network, labels in ((3, [2, 0, 1]), (0, [0, 5])):
        it = stage(network)
        note_classes(it, source(labels))
        assert it.untrained_classes == []
    note_classes(stage(0), source([0, 0], ["all"]))
    note_classes(stage(1), source([0, 0], ["all"]))
    assert not log.messages


def test_classes_of_the_weights_to_start_from_count_as_trained(log):
    it = stage(4, before=[1])
    note_classes(it, source([0, 2]))
    assert it.untrained_classes == [1] and "2 of the model's 4 classes (1, 3): 1 stay untrained" in log.messages[0]
    assert "--model.num_classes" not in log.messages[0]  # the weights to start from have their number
    it = stage(4, before=[])
    note_classes(it, source([0, 2]))
    assert it.untrained_classes == [] and "they stay as they are in --init_from" in log.messages[1]


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
