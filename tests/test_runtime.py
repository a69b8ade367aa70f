"""How many threads a command computes with."""

import pytest
import torch

from epg_fast import runtime


@pytest.fixture
def four_threads(monkeypatch):
    """A process as it starts on four cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(runtime, "_DEFAULT_THREADS", 4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


def threads_inside(network):
    with runtime.suitable_threads(network):
        return torch.get_num_threads()


def test_a_small_network_is_computed_by_one_thread_which_is_said_and_undone(four_threads, log):
    assert threads_inside(torch.nn.Linear(8, 8)) == 1
    assert len(log.messages) == 1 and "OMP_NUM_THREADS=4" in log.messages[0]
    with pytest.raises(KeyError), runtime.suitable_threads(torch.nn.Linear(8, 8)):
        raise KeyError
    assert torch.get_num_threads() == 4


def test_a_large_network_and_one_elsewhere_keep_all_threads(four_threads, log):
    assert threads_inside(torch.nn.Linear(3000, 3000)) == 4
    assert threads_inside(torch.nn.Linear(8, 8, device="meta")) == 4
    assert not log.messages


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "torch.set_num_threads"])
def test_the_users_number_of_threads_is_kept(four_threads, log, monkeypatch, name):
    if name.startswith("torch"):
        torch.set_num_threads(2)
    else:
        monkeypatch.setenv(name, "4")
    before = torch.get_num_threads()
    assert threads_inside(torch.nn.Linear(8, 8)) == before and not log.messages


def test_training_a_small_network_takes_one_thread(four_threads, tiny_run, tmp_path, monkeypatch):
    from epg_fast.__main__ import main
    from epg_fast.training import loop

    seen, step = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: (seen.append(torch.get_num_threads()), step(*a)))
    assert main(["pretrain", *tiny_run, "--steps", "2", "--outdir", str(tmp_path / "run")]) == 0
    assert seen == [1, 1] and torch.get_num_threads() == 4
