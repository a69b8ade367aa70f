import numpy as np
import pytest

from epg_fast.evaluation import class_accuracy


def test_held_out_digits_are_recognised_and_with_shuffled_labels_score_chance(arrays):
    train_x, train_y, test_x, test_y = arrays
    result = class_accuracy(test_x, test_y, train_x, train_y, reference=(test_x, test_y))
    assert 0.98 < result["accuracy"] == result["classifier_accuracy"] < 1
    assert list(result["per_class_recall"]) == list(range(10))
    shuffled = np.random.default_rng(0).permutation(test_y)
    assert 0.04 < class_accuracy(test_x, shuffled, train_x, train_y)["accuracy"] < 0.17


def test_recall_counts_each_class_by_itself(arrays):
    train_x, train_y, test_x, test_y = arrays
    zeros, ones = test_x[test_y == 0][:8], test_x[test_y == 1][:4]
    labels = np.array([0] * 6 + [3] * 2 + [1] * 4)
    result = class_accuracy(np.concatenate([zeros, ones]), labels, train_x, train_y)
    assert result["per_class_recall"] == {0: 1.0, 1: 1.0, 3: 0.0}
    assert result["accuracy"] == pytest.approx(10 / 12)
    assert result["classifier_accuracy"] is None


def test_larger_images_are_classified_as_well(arrays):
    enlarged = [x.reshape(-1, 8, 8).repeat(2, 1).repeat(2, 2).reshape(len(x), -1) for x in (arrays[0], arrays[2])]
    at_8 = class_accuracy(arrays[2], arrays[3], arrays[0], arrays[1])
    # Repeated pixels multiply squared distances by four, which the rule for gamma undoes exactly.
    assert class_accuracy(enlarged[1], arrays[3], enlarged[0], arrays[1]) == at_8


def test_mistakes_are_named(arrays):
    train_x, train_y, test_x, test_y = arrays
    for x, y, message in (
        (test_x[:2], np.array([3, 10]), r"no training image has: \[10\]"),
        (test_x, test_y[:-1], "samples: expected images"),
        (test_x[:, :16], test_y, "samples have 16 pixels, the training images 64"),
    ):
        with pytest.raises(ValueError, match=message):
            class_accuracy(x, y, train_x, train_y)
