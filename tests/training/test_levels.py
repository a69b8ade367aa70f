"""The loss by noise level: right means, the same bits after a resume, and no bins that nothing fell into."""

import json

import pytest
import torch

from epg_fast.__main__ import main
from epg_fast.diffusion import NoiseSchedule
from epg_fast.training.levels import LEVELS, names_by_level, sums_by_level
from epg_fast.training.metrics import Metrics
from tests.training.stages import JOBS, loss_of, make_config, make_stage


def test_means_are_those_of_the_samples_in_each_part_of_the_grid():
    values, level = torch.rand(300), torch.rand(300) * 0.8  # nothing in the cleanest part
    sums, counts = sums_by_level(values, level).tolist()
    found = {i: total / count for i, (total, count) in enumerate(zip(sums, counts, strict=True)) if count}
    wanted = {}
    for value, place in zip(values.double().tolist(), level.tolist(), strict=True):
        wanted.setdefault(int(place * LEVELS), []).append(value)
    assert found.keys() == wanted.keys() and 7 not in found
    assert found == {i: pytest.approx(sum(part) / len(part), rel=1e-5) for i, part in wanted.items()}


def test_levels_at_and_beyond_the_ends_count_to_the_ends():
    sums = sums_by_level(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-0.3, 0.0, 1.0, 1.2], dtype=torch.float64))
    assert sums.tolist() == [[3, 0, 0, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 0, 0, 2]]


def test_one_level_for_the_whole_batch():
    sums = sums_by_level(torch.tensor([1.0, 2.0]), torch.tensor(0.5))
    assert sums.tolist() == [[0, 0, 0, 0, 3, 0, 0, 0], [0, 0, 0, 0, 2, 0, 0, 0]]


def test_the_place_of_a_level_is_its_index_over_the_last():
    schedule = NoiseSchedule(41)
    places = schedule.place(schedule.sigmas(dtype=torch.float64))
    torch.testing.assert_close(places, torch.arange(41, dtype=torch.float64) / 40)


@pytest.mark.parametrize("job", JOBS)
def test_every_objective_says_at_which_level_its_samples_are(job):
    stage = make_stage(job, make_config(job), perceptual=False)
    loss = loss_of(stage, images=8)
    sums, counts = sums_by_level(loss.terms[stage.by_level], loss.level)
    assert counts.sum() == 8
    torch.testing.assert_close(sums.sum(), loss.terms[stage.by_level].sum())
    if job == "finetune-diffusion":
        assert torch.equal(loss.level, loss.terms["index"] / 1279)


def _metrics(outdir):
    return Metrics(outdir, True, 0, False, None, {})


def _update(metrics, i, made=True):
    generator = torch.Generator().manual_seed(i)
    values, level = (torch.rand(16, generator=generator) for _ in range(2))
    sums, counts = sums_by_level(values, level if made else level * float("nan"))
    names = ("loss", *names_by_level("x"))
    sums, counts = torch.cat([values.mean()[None], sums]), torch.cat([torch.ones(1), counts])
    metrics.add(names, sums if made else sums * float("nan"), counts, torch.tensor(made))


def test_an_interval_cut_by_a_checkpoint_gives_the_same_bits(tmp_path):
    whole, first, second = (_metrics(tmp_path) for _ in range(3))
    for i in range(9):
        _update(whole, i)
        _update(first if i < 4 else second, i)
        if i == 3:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    lines = [{k: v for k, v in m.write(9).items() if "loss" in k or "level" in k} for m in (whole, second)]
    assert lines[0] == lines[1] and len(lines[0]) == 1 + LEVELS
    _update(whole, 9)
    assert whole.write(10)["x_by_level/0"] != lines[0]["x_by_level/0"]


def test_a_skipped_update_leaves_no_trace(tmp_path):
    one, other = _metrics(tmp_path), _metrics(tmp_path)
    for i in range(3):
        _update(one, i)
        _update(other, i)
        _update(other, i + 10, made=False)
    timings = ("images_per_second", "data_wait")
    lines = [{k: v for k, v in metrics.write(3).items() if k not in timings} for metrics in (one, other)]
    assert lines[0] == lines[1]


def test_a_line_that_cannot_be_written_is_named(tmp_path):
    metrics = _metrics(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="could not write .*metrics.jsonl.*the same command goes on"):
        metrics.write(1)


def test_parts_of_a_run_with_other_values_share_a_line(tmp_path):
    metrics = _metrics(tmp_path)
    for names, value in ((("loss",), 1.0), (("loss", "perceptual"), 2.0), (("loss",), 3.0)):
        values = torch.full((len(names),), value)
        metrics.add(names, values, torch.ones_like(values), torch.tensor(True))
    line = metrics.write(3)
    assert (line["loss"], line["perceptual"]) == (2.0, 2.0)


def test_a_checkpoint_from_before_there_were_groups_begins_its_interval_anew(tmp_path):
    metrics = _metrics(tmp_path)
    metrics.load_state_dict({"sums": {"loss": torch.tensor(2.0)}, "counts": {"loss": 1}})
    metrics.add(("loss",), torch.tensor([4.0]), torch.ones(1), torch.tensor(True))
    assert metrics.write(2)["loss"] == 4.0


def test_a_run_logs_them_and_they_add_up_to_the_mean(tiny_run, tmp_path):
    command = ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--steps", "2"]
    assert main([*command, "--preview.every", "0", "--outdir", str(tmp_path / "run")]) == 0
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        parts = {k: v for k, v in line.items() if k.startswith("squared_error_by_level/")}
        assert 1 < len(parts) <= LEVELS
        assert min(parts.values()) <= line["squared_error"] <= max(parts.values())
