"""The axes of the command line: what they mean, and what is said of those that mean nothing."""

import pytest

from epg_fast.config import SweepConfig
from epg_fast.sweep.grid import Setting, axis, grid, intervals

AXES = {
    "1.5": [1.5],
    "1.5,2, 3": [1.5, 2, 3],
    "1.5:4.0:0.25": [1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4],
    "0.03:0.15:0.02": [0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15],  # the numbers that a user would write
    "0:1:0.3333333": [0, 0.3333333, 0.6666666, 0.9999999],
    "2:2:1": [2],
    "1,1.5:2:0.5": [1, 1.5, 2],
    "1e-1:3e-1:1e-1": [0.1, 0.2, 0.3],
    "-1:1:1": [-1, 0, 1],
}


@pytest.mark.parametrize("text", AXES)
def test_an_axis_is_numbers_and_ranges_whose_stop_counts(text):
    assert axis("guidance", text) == AXES[text]


def test_null_stands_for_the_checkpoint_as_it_is():
    assert axis("sigma_rel", "null,0.05:0.10:0.05", or_null=True) == [None, 0.05, 0.1]
    with pytest.raises(ValueError, match="guidance: got 'null', want numbers such as"):
        axis("guidance", "null")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, [(0.19, 1.61)]),
        ({"interval": "0.19-1.61, .28-2.9"}, [(0.19, 1.61), (0.28, 2.9)]),
        ({"interval": "1e-3-2e1"}, [(0.001, 20)]),
        ({"interval_low": "0.1,0.2"}, [(0.1, 1.61), (0.2, 1.61)]),
        ({"interval": "0-2", "interval_high": "1:3:1"}, [(0, 1), (0, 2), (0, 3)]),
        ({"interval_low": "0,0.5", "interval_high": "1,2"}, [(0, 1), (0, 2), (0.5, 1), (0.5, 2)]),
    ],
)
def test_intervals_are_pairs_or_every_lower_end_with_every_upper_one(given, want):
    assert intervals(SweepConfig(**given)) == want


def test_every_combination_is_a_setting_and_those_of_one_width_follow_each_other():
    settings = grid(SweepConfig(guidance="1,2,3", interval="0-1,0-2", steps="4,6", sigma_rel="null,0.1"))
    # without guidance there is no interval: 1 and 2 x 2 of them
    assert len(settings) == len(set(settings)) == 2 * 2 * (1 + 2 * 2)
    assert [setting.sigma_rel for setting in settings] == [None] * 10 + [0.1] * 10
    assert Setting(0.1, 6, (0.0, 2.0), 3.0) in settings and Setting(None, 4, (0.0, 1.0), 1.0) in settings
    assert not [setting for setting in settings if setting.guidance == 1 and setting.interval != (0, 1)]


def test_a_sampler_of_one_step_has_no_axis_of_steps():
    settings = grid(SweepConfig(sampler="onestep", sigma_rel="0.05,0.1"))
    assert [setting.steps for setting in settings] == [1, 1]
    with pytest.raises(ValueError, match="sampler onestep makes one step"):
        grid(SweepConfig(sampler="onestep", steps="2,3", sigma_rel="0.05,0.1"))


MISTAKES = [
    ({"guidance": "many"}, "guidance: got 'many', want numbers such as 1.5,2 or a range start:stop:step"),
    ({"guidance": "1,,2"}, "guidance: got '', want"),
    ({"guidance": "1:2"}, "guidance: got '1:2', want"),
    ({"guidance": "inf"}, "guidance: got 'inf', want"),
    ({"guidance": "4:1.5:0.25"}, "guidance: got 4:1.5:0.25, want start <= stop and a positive step"),
    ({"guidance": "1,2,1"}, "guidance: 1 comes twice"),
    ({"guidance": "0:1:1e-9"}, "has 1000000001 values, want at most 10000; take wider steps"),
    ({"guidance": "0:1:0.001", "steps": "2:22:1"}, "the grid has 21021 settings, want at most 10000"),
    ({"guidance": "1", "interval": "0-1,0-2"}, "the grid has one setting"),
    ({"sigma_rel": "null,null"}, "sigma_rel: null comes twice"),
    ({"sigma_rel": "0.05,0.3"}, "sigma_rel is 0.3, want more than 0 and less than 0.2887"),
    ({"steps": "18,32.5"}, "steps: got 32.5, want integers"),
    ({"steps": "1,18"}, "heun needs at least 2 noise levels"),
    ({"steps": "18,32", "s_churn": 3.0}, "s_churn is 3.0: no option of heun"),
    ({"interval": "0.19"}, "interval: got '0.19', want low-high, such as 0.19-1.61"),
    ({"interval": "2-1"}, "interval: got 2-1, want low < high"),
    ({"interval": "0-1,0-1"}, "interval: 0-1 comes twice"),
    ({"interval": "0-1,0-2", "interval_low": "0,1"}, "interval: got 2 of them and --interval_low or --interval_high"),
    ({"interval_low": "0:3:1", "interval_high": "2"}, "interval: got 2-2, want low < high"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_an_axis_that_means_nothing_is_answered_in_one_line(given, message):
    with pytest.raises(ValueError) as error:
        grid(SweepConfig(**given))
    assert message in str(error.value) and "\n" not in str(error.value)
