"""Parameter groups and averaged weights."""

import copy

import pytest
import torch

from epg_fast.config import OptimizerConfig
from epg_fast.models import EPGViT
from epg_fast.training.optimizer import make_optimizer, set_lr, update_average


@pytest.fixture
def network():
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return EPGViT(**sizes, decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=2)


def _by_name(network, optimizer):
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_tokens_are_exempt_from_weight_decay_unless_asked(network):
    groups = _by_name(network, make_optimizer(network, OptimizerConfig(weight_decay=0.1)))
    assert set(groups) == {name for name, _ in network.named_parameters()}
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {"pos_embed", "cls_token"}
    groups = _by_name(network, make_optimizer(network, OptimizerConfig(weight_decay=0.1, decay_tokens=True)))
    assert {group["weight_decay"] for group in groups.values()} == {0.1}


def test_layer_decay_falls_towards_the_input(network):
    optimizer = make_optimizer(network, OptimizerConfig(lr=1.0, layer_decay=0.5))
    set_lr(optimizer, 0.1)
    lr = {name: group["lr"] for name, group in _by_name(network, optimizer).items()}
    assert lr["decoder_blocks.0.mlp.fc1.weight"] == lr["norm.weight"] == pytest.approx(0.1)
    assert lr["blocks.1.mlp.fc1.weight"] == pytest.approx(0.05)
    assert lr["blocks.0.mlp.fc1.weight"] == pytest.approx(0.025)
    assert lr["patch_embed.proj.weight"] == lr["pos_embed"] == pytest.approx(0.0125)


def test_average_follows_the_formula(network):
    average = copy.deepcopy(network).double()
    network = copy.deepcopy(network).double()
    before = [p.detach().clone() for p in average.parameters()]
    for p in network.parameters():
        p.data.normal_()
    update_average(average, network, 0.9)
    for old, new, got in zip(before, network.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(got, 0.9 * old + 0.1 * new)
