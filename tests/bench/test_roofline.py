"""Work is what torch counts, and floors are arithmetic on it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline
from bench.measure import Ceilings
from bench.plain import PlainGenerator, from_config
from bench.roofline import Op, Work
from epg_fast.models import EPGViT, create_model, list_presets, preset_config
from tests.training.stages import make_config, make_stage

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 1}
SMALL |= {"decoder_num_heads": 2, "image_size": 32, "patch_size": 8, "num_classes": 10}


def counted(call):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", list_presets())
def test_a_forward_pass_has_the_operations_that_torch_counts_in_plain_pytorch(preset):
    with torch.device("meta"), torch.no_grad():
        network = from_config(PlainGenerator, preset_config(preset))
        size = network.image_size
        x, t, y = torch.empty(3, 3, size, size), torch.empty(3), torch.empty(3, dtype=torch.long)
        assert roofline.forward(create_model(preset), 3).flops == counted(lambda: network(x, t, y))


def test_heun_with_interval_guidance_is_seventy_four_calls():
    network = EPGViT(**SMALL)
    one, all_of_them = roofline.forward(network, 2), roofline.heun(network, 2)
    assert all_of_them.flops == 74 * one.flops
    steps = {op.name: op.times for op in all_of_them.ops if op.name.endswith("_step")}
    assert steps == {"euler_step": 31, "heun_step": 31}
    assert roofline.heun(network, 2, 32, (0.0, 100.0)).flops == 124 * one.flops


def test_bytes_of_a_forward_pass_are_those_of_the_operations():
    """By hand, in 16 bits: a block's norms read and write once, a product reads and writes once."""
    network, batch = EPGViT(**SMALL), 3
    found = {op.name: op for op in roofline.forward(network, batch).ops}
    rows, width, hidden = batch * 18, 48, 192
    assert found["decoder fc1, GELU"].bytes == 2 * (rows * width + hidden * width + rows * hidden) + 4 * hidden
    assert found["decoder norm, modulate"].times == 2
    assert found["decoder norm, modulate"].bytes == pytest.approx(2 * (2 * rows * width), rel=0.2)
    assert found["decoder attention"].bytes == 2 * 4 * rows * width + 4 * batch * 2 * 18
    assert found["adaLN of all blocks"].shape == (batch, 32, 6 * width)


def test_the_update_reads_and_writes_every_parameter_in_float32():
    stage = make_stage("pretrain", make_config("pretrain", batch_size=4))
    count = sum(p.numel() for p in stage.network.parameters())
    found = {op.name: op.bytes for op in roofline.update_of(stage).ops if op.direction == "update"}
    assert found == {"global_norm": 4 * count, "fused_adamw_ema": 36 * count}


def test_the_floor_is_the_longer_of_products_and_memory():
    ceilings = Ceilings(100e12, 2e12)
    products = Op("p", "products", (1,), 10**12, 10**9, times=3)
    memory = Op("m", "norms", (1,), 0, 4 * 10**9, times=2)
    assert (products.floor(ceilings), memory.floor(ceilings)) == (pytest.approx(0.03), pytest.approx(0.004))
    work = Work(17, (products, memory))
    row = roofline.summary({"job": work}, ceilings).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0.176", "0.647", "34.0", "500", "567", "88%"]
    (first, second) = roofline.breakdown(work, ceilings).splitlines()[2:]
    assert "products" in first and "memory" in second


def test_the_command_prints_tables_of_nominal_ceilings_and_names_mistakes_in_a_line(capsys):
    assert roofline.main(["--preset", "digits_32", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "990 TFLOP/s and 4.80 TB/s" in out and "nothing measured" in out and "## finetune-consistency" in out
    for flags, message in (
        (["--gpu", "B200"], "memory bandwidth is not known; known: A100"),
        (["--preset", "epg_xl_16_25"], "did you mean 'epg_xl_16_256'"),
        (["--batch", "0"], "batch 0"),
    ):
        assert roofline.main(flags) == 2
        assert message in capsys.readouterr().err
