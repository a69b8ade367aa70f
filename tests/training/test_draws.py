"""Random draws: functions of seed, iteration and place in the global batch."""

import torch

from epg_fast.training.draws import Draws

CPU = torch.device("cpu")


def test_draws_repeat_and_differ_by_seed_iteration_and_stream():
    first = Draws(0, 5, 0, 8, CPU).normal("noise", 3)
    assert torch.equal(first, Draws(0, 5, 0, 8, CPU).normal("noise", 3))
    others = [Draws(1, 5, 0, 8, CPU).normal("noise", 3), Draws(0, 6, 0, 8, CPU).normal("noise", 3)]
    others.append(Draws(0, 5, 0, 8, CPU).normal("level", 3))
    assert all(not torch.equal(first, other) for other in others)


def test_ranks_draw_slices_of_the_same_global_batch():
    whole = Draws(3, 7, 0, 50, CPU)
    parts = [Draws(3, 7, start, 10, CPU) for start in range(0, 50, 10)]
    assert torch.equal(whole.normal("noise", 2, 2), torch.cat([part.normal("noise", 2, 2) for part in parts]))
    assert torch.equal(whole.uniform("label"), torch.cat([part.uniform("label") for part in parts]))
    assert {part.integer("index", 1000) for part in parts} == {whole.integer("index", 1000)}
    assert len({part.per_rank_seed("dropout") for part in parts}) == 5


def test_draws_are_those_of_every_version_of_numpy():
    """The first 64-bit word that numpy 1.21 and 2.4 generate from these keys, its last bit dropped."""
    assert Draws(0, 5, 0, 8, CPU).per_rank_seed("dropout") == 5947261389288393300
    assert Draws(3, 7, 48, 8, CPU).per_rank_seed("noise") == 7954242222143994213


def test_draws_have_the_right_distribution():
    normal = torch.cat([Draws(0, i, 0, 64, CPU).normal("noise", 64) for i in range(20)])
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    correlation = torch.corrcoef(normal[:64])
    assert (correlation - torch.eye(64)).abs().max() < 0.7
    indices = torch.tensor([Draws(0, i, 0, 1, CPU).integer("index", 4) for i in range(400)])
    assert indices.bincount(minlength=4).min() > 60 and indices.max() == 3
