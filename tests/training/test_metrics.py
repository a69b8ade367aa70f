"""Lines of metrics: right means, also by noise level, the same bits after a resume, nothing left of what is redone."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from epg_fast.training import metrics as metrics_module
from epg_fast.training.metrics import LEVELS, Metrics, figures_at, names_by_level, open_tensorboard, sums_by_level
from tests.training.stages import JOBS, Training, loss_of, make_config, make_stage


def test_means_are_those_of_the_samples_in_each_range_of_the_grid():
    """The ends and what lies beyond count to the outer ranges; nothing is in the cleanest."""
    values, level = torch.rand(300), torch.rand(300) * 0.8
    level[:3] = torch.tensor([-0.3, 0.0, 0.125])
    sums, counts = sums_by_level(values, level).tolist()
    wanted = {i: [] for i in range(LEVELS)}
    for value, place in zip(values.double().tolist(), level.tolist(), strict=True):
        wanted[max(int(place * LEVELS), 0)].append(value)
    assert counts == [len(own) for own in wanted.values()] and counts[7] == 0
    assert sums == pytest.approx([sum(own) for own in wanted.values()], rel=1e-5)
    ends = sums_by_level(torch.tensor([3, 4]), torch.tensor([1.0, 1.2]))
    assert ends.tolist() == [[0] * 7 + [7], [0] * 7 + [2]]
    whole_batch = sums_by_level(torch.tensor([1, 2]), torch.tensor(0.5, dtype=torch.float64))
    assert whole_batch[:, 4].tolist() == [3, 2] == whole_batch.sum(1).tolist()


@pytest.mark.parametrize("job", JOBS)
def test_every_objective_says_at_which_level_its_samples_are(job):
    stage = make_stage(job, make_config(job), perceptual=False)
    loss = loss_of(stage, images=8)
    sums, counts = sums_by_level(loss.terms[stage.by_level], loss.level)
    assert counts.sum() == 8
    torch.testing.assert_close(sums.sum(), loss.terms[stage.by_level].sum())
    if job == "finetune-diffusion":
        assert torch.equal(loss.level, loss.terms["index"] / 1279)


@pytest.mark.parametrize("job", JOBS)
def test_an_update_logs_levels_around_its_mean(job):
    training = Training(job)
    training.updated(2)
    line, name = training.metrics.write(2), training.stage.by_level
    levels = [value for key, value in line.items() if key.startswith(f"{name}_by_level/")]
    assert 1 <= len(levels) <= LEVELS
    assert min(levels) * (1 - 1e-5) <= line[name] <= max(levels) * (1 + 1e-5)


def _update(metrics, i, made=True):
    generator = torch.Generator().manual_seed(i)
    values, level = (torch.rand(16, generator=generator) for _ in range(2))
    sums, counts = sums_by_level(values, level if made else level * float("nan"))
    names = ("loss", *names_by_level("x"))
    sums, counts = torch.cat([values.mean()[None], sums]), torch.cat([torch.ones(1), counts])
    metrics.add(names, sums if made else sums * float("nan"), counts, torch.tensor(made))


def _means(metrics, step):
    return {k: v for k, v in metrics.write(step).items() if k not in ("images_per_second", "data_wait")}


def test_an_interval_cut_by_a_checkpoint_gives_the_same_bits(tmp_path):
    whole, first, second = (Metrics(tmp_path) for _ in range(3))
    for i in range(9):
        _update(whole, i)
        _update(first if i < 4 else second, i)
        if i == 3:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    lines = [_means(metrics, 9) for metrics in (whole, second)]
    assert lines[0] == lines[1] and len(lines[0]) == 2 + LEVELS
    _update(whole, 9)
    assert _means(whole, 10)["x_by_level/0"] != lines[0]["x_by_level/0"]


def test_a_skipped_update_leaves_no_trace(tmp_path):
    one, other = Metrics(tmp_path), Metrics(tmp_path)
    for i in range(3):
        _update(one, i)
        _update(other, i)
        _update(other, i + 10, made=False)
    assert _means(one, 3) == _means(other, 3)


def test_updates_with_other_values_share_a_line(tmp_path):
    metrics = Metrics(tmp_path)
    for names, value in ((("loss",), 1.0), (("loss", "perceptual"), 2.0), (("loss",), 3.0)):
        values = torch.full((len(names),), value)
        metrics.add(names, values, torch.ones_like(values), torch.tensor(True))
    assert _means(metrics, 3) == {"step": 3, "loss": 2.0, "perceptual": 2.0}


def test_lines_that_a_resumed_run_will_write_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(tmp_path)
    first.begin_with({"plan": "fast"})
    for step in (5, 10, 15):
        first.write(step)
    with open(path, "ab") as file:  # what a crash may leave
        file.write(b'\0\xff\n3\nnull\n[1]\n{"step": "x"}\n{"step": 2')
    resumed = Metrics(tmp_path, 10)
    resumed.begin_with({"plan": "another"})
    resumed.write(20)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10, 20] and lines[0]["plan"] == "fast"


def test_a_run_knows_which_figures_of_its_step_are_missing(tmp_path):
    """Those of later steps go with their lines; half a line is none."""
    assert figures_at(tmp_path, 10) == set()
    first = Metrics(tmp_path)
    first.write(10)
    first.write_figures(10, {"fid": 3.0})
    first.write_figures(12, {"accuracy": 0.5})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 10, "kid": 1')
    Metrics(tmp_path, 10)
    assert figures_at(tmp_path, 10) == {"step", "images_per_second", "data_wait", "fid"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[1] == {"step": 10, "fid": 3.0}


def test_a_pause_counts_in_no_rate(tmp_path, monkeypatch):
    """100 images and 1 s of waiting in 2 + 3 s, with pauses of 10 and 20 s, the second ended by an error."""
    now = iter([0.0, 2.0, 12.0, 12.0, 32.0, 35.0, 35.0])
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    metrics = Metrics(tmp_path)
    metrics.count(100, 1.0)
    with metrics.paused():
        pass
    with pytest.raises(ValueError), metrics.paused():
        raise ValueError
    line = metrics.write(1)
    assert line["images_per_second"] == 20.0 and line["data_wait"] == 0.2


def test_other_ranks_write_nothing(tmp_path):
    metrics = Metrics(None)
    _update(metrics, 0)
    metrics.begin_with({"plan": "fast"})
    assert metrics.write(1)["loss"] > 0 and not list(tmp_path.iterdir())


def test_loggers_get_the_lines_and_tensorboard_forgets_what_is_done_again(tmp_path):
    events, logger = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator"), mock.Mock()
    for start, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0,))):
        metrics = Metrics(tmp_path, start, [*open_tensorboard(tmp_path, start), logger])
        for step, value in enumerate(values, start + 1):
            metrics.write_figures(step, {"fid": value})
        metrics.close()
    assert logger.log.call_args == mock.call({"fid": 20.0}, step=2) and logger.finish.call_count == 2
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("fid")] == [(1, 1.0), (2, 20.0)]


def test_a_line_that_cannot_be_written_is_named(tmp_path):
    metrics = Metrics(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="could not write .*metrics.jsonl.*the same command goes on"):
        metrics.write(1)
