"""Dynamic loss scaling."""

import math

import pytest
import torch

from epg_fast.training.gradients import LossScale
from tests.ops.kernel_checks import DEVICE


def test_the_loss_scale_is_torchs_gradient_scaler():
    ours = LossScale(torch.device(DEVICE), enabled=True)
    growth = {"growth_factor": 2.0**0.001, "backoff_factor": 0.5, "growth_interval": 1}
    theirs = torch.amp.GradScaler(DEVICE, init_scale=2.0**14, **growth)
    weight = torch.zeros(3, device=DEVICE, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.0)
    for step in range(40):
        loss = (weight * (math.inf if step % 7 == 3 else 1.0)).sum()
        torch.testing.assert_close(ours(loss.detach() + 1), theirs.scale(loss.detach() + 1), equal_nan=True)
        theirs.scale(loss).backward()
        found_inf = (~weight.grad.isfinite()).any().float()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(found_inf)
        assert ours.value.item() == pytest.approx(theirs.get_scale(), rel=1e-6)
    assert ours.state_dict() == {"scale": ours.value}


def test_the_loss_scale_stays_finite_and_can_be_off():
    scale = LossScale(torch.device(DEVICE), enabled=True)
    scale.value.fill_(torch.finfo(torch.float32).max / 2)
    scale.update(torch.zeros((), device=DEVICE))
    assert scale.value.isfinite()
    off = LossScale(torch.device(DEVICE), enabled=False)
    loss = torch.ones((), device=DEVICE)
    assert off(loss) is loss and off.value is None and off.state_dict() == {}
    off.update(torch.ones((), device=DEVICE))
