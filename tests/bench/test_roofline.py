"""Work is what torch counts, floors are arithmetic on it, and nothing is called measured that was not."""

import json
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import parts, plain, roofline
from bench.parts import Job, Part
from bench.roofline import Ceilings
from epg_fast.models import EPGViT, create_model, list_presets, preset_config
from epg_fast.training.flops import step_flops
from tests.bench.files import ops_file
from tests.training.stages import JOBS, backward_of, make_config, make_stage

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 48, "decoder_depth": 3}
SMALL |= {"decoder_num_heads": 2, "image_size": 32, "patch_size": 8, "num_classes": 10}


def _counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", list_presets())
def test_a_forward_pass_has_the_operations_that_torch_counts_in_plain_pytorch(preset):
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network = plain.from_config(plain.PlainGenerator, preset_config(preset))
        size = network.image_size
        x, t, y = torch.empty(3, 3, size, size), torch.empty(3), torch.empty(3, dtype=torch.long)
        counted = _counted(lambda: network(x, t, y))
        assert parts.forward(create_model(preset), 3).products == counted


@pytest.mark.parametrize("job", JOBS)
def test_a_training_step_has_the_operations_that_torch_counts(job):
    stage = make_stage(job, make_config(job, batch_size=4))
    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        counted = _counted(lambda: backward_of(stage, images=4))
    assert parts.training(stage).products == counted == 4 * step_flops(stage, stage.config.steps - 1).total


def test_an_unconditional_network_has_no_gradient_of_its_condition():
    stage = make_stage("finetune-diffusion", make_config("finetune-diffusion", {"num_classes": 0}, batch_size=2))
    assert parts.training(stage).products == 2 * step_flops(stage, 0).total


def test_checkpointing_is_refused():
    stage = make_stage("finetune-diffusion", make_config("finetune-diffusion", activation_checkpointing=True))
    with pytest.raises(ValueError, match="wanted one without checkpointing"):
        parts.training(stage)


def test_heun_with_interval_guidance_is_seventy_four_calls():
    network = EPGViT(**SMALL)
    one, all_of_them = parts.forward(network, 2), parts.heun(network, 2)
    assert all_of_them.products == 74 * one.products
    steps = {part.name: part.times for part in all_of_them.parts if part.name.endswith("_step")}
    assert steps == {"euler_step": 31, "heun_step": 31}
    assert parts.heun(network, 2, 32, (0.0, 100.0)).products == 124 * one.products


def test_bytes_of_a_forward_pass_are_those_of_the_operations():
    """By hand, in 16 bits: a block's norms read and write once, a product reads and writes once."""
    network, batch = EPGViT(**SMALL | {"decoder_depth": 1, "depth": 1}), 3
    found = {part.name: part for part in parts.forward(network, batch).parts}
    rows, width, hidden = batch * 18, 48, 192
    assert found["decoder fc1, GELU"].bytes == 2 * (rows * width + hidden * width + rows * hidden) + 4 * hidden
    assert found["decoder norm, modulate"].times == 2
    assert found["decoder norm, modulate"].bytes == pytest.approx(2 * (2 * rows * width), rel=0.2)
    assert found["decoder attention"].bytes == 2 * 4 * rows * width + 4 * batch * 2 * 18
    assert found["adaLN of all blocks"].shape == (batch, 32, 6 * width)


def test_the_update_reads_and_writes_every_parameter_in_float32():
    stage = make_stage("pretrain", make_config("pretrain", batch_size=4))
    count = sum(p.numel() for p in stage.network.parameters())
    found = {part.name: part for part in parts.training(stage).parts if part.direction == "update"}
    assert {name: part.bytes for name, part in found.items()} == {
        "global_norm": 4 * count,
        "fused_adamw_ema": 36 * count,
    }


def test_the_floor_is_the_longer_of_products_and_memory():
    ceilings = Ceilings(100e12, 2e12, "made up")
    products, memory = Part("p", (1,), "forward", 10**12, 10**9, 3), Part("m", (1,), "forward", 0, 4 * 10**9, 2)
    assert ceilings.floor(products) == pytest.approx(0.01) and ceilings.bound(products) == "products"
    assert ceilings.floor(memory) == pytest.approx(0.002) and ceilings.bound(memory) == "memory"
    job = Job("job", 17, (products, memory))
    assert roofline.seconds(job, ceilings) == pytest.approx(0.034)
    row = roofline.summary([job], ceilings).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0.176", "0.647", "34.0", "500", "567", "88%"]
    assert ceilings.at(1) == 2e12 and ceilings.at(1000) == 100e12


def test_nominal_ceilings_say_so_and_unknown_ones_are_refused(capsys):
    ceilings = roofline.nominal("H200")
    assert (ceilings.products, ceilings.memory) == (989.5e12, 4.8e12) and "nothing measured" in ceilings.source
    assert roofline.main(["--gpu", "B200"]) == 2
    assert "memory bandwidth is not known; known: A100" in capsys.readouterr().err
    assert roofline.main(["--preset", "epg_xl_16_25"]) == 2
    assert "did you mean 'epg_xl_16_256'" in capsys.readouterr().err
    assert roofline.main(["--batch", "0"]) == 2
    assert "batch 0" in capsys.readouterr().err


def test_measured_ceilings_are_those_of_the_session(tmp_path):
    ceilings, points = roofline.measured([ops_file(tmp_path / "ops.json", copy=4.0, gemm=800.0)])
    assert (ceilings.products, ceilings.memory) == (pytest.approx(800e12), pytest.approx(4e12))
    assert "measured on GPU A" in ceilings.source and str(tmp_path) not in ceilings.source
    norm = next(point for point in points if point.op == "layer_norm_modulate" and point.provider == "triton")
    assert norm.intensity == pytest.approx(2.25) and norm.tflops == pytest.approx(4.5)
    assert norm.share == pytest.approx(0.5)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "got a JSON list, wanted an object"),
        ("{", "not a JSON file"),
        ('{"rows": []}', "want the JSON of `pytest bench/ops"),
        ('{"benchmarks": [], "machine_info": {}}', "no row with a share of the ceilings"),
        ('{"benchmarks": [{"name": "t", "extra_info": {}}], "machine_info": {}}', "t lacks gbps"),
    ],
)
def test_other_files_are_refused_in_a_line(content, message, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    assert roofline.main(["--measured", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_files_of_two_devices_are_refused(tmp_path, capsys):
    files = [ops_file(tmp_path / f"{device}.json", device=device) for device in ("A", "B")]
    assert roofline.main(["--measured", *map(str, files)]) == 2
    assert "measured on A and B, wanted one device" in capsys.readouterr().err


def test_the_command_writes_tables_json_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, output = ops_file(tmp_path / "ops.json"), tmp_path / "new" / "folder"
    arguments = ["--preset", "digits_32", "--batch", "2", "--measured", str(file), "--output", str(output)]
    assert roofline.main(arguments) == 0
    text = (output / "roofline.md").read_text()
    assert capsys.readouterr().out == text and "## finetune-consistency" in text and "| layer_norm_modulate |" in text
    content = json.loads((output / "roofline.json").read_text())
    assert len(content["jobs"]) == 6 and len(content["points"]) == 5
    assert content["about"]["torch"] == torch.__version__ and content["ceilings"]["source"] in text
    png = (output / "roofline.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 1200
    assert {path.name for path in output.iterdir()} == {"roofline.md", "roofline.json", "roofline.png"}


def test_without_matplotlib_the_tables_are_written_and_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.roofline_plot", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["--preset", "digits_32", "--batch", "2", "--measured", str(ops_file(tmp_path / "ops.json"))]
    assert roofline.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "pip install 'epg_fast[demo]'" in capsys.readouterr().err
    assert (tmp_path / "out" / "roofline.md").is_file() and not (tmp_path / "out" / "roofline.png").exists()


def test_names_in_the_plot_never_collide_and_move_little():
    pytest.importorskip("matplotlib")
    from bench.roofline_plot import spread

    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    crowd = spread([0.5, 0.5, 0.5, 0.52, 0.9], 0.05)
    assert crowd == pytest.approx([0.43, 0.48, 0.53, 0.58, 0.9])
    for places in ([0.0, 0.0, 0.01], [1.0, 1.0, 0.999], [0.5] * 19):
        found = spread(sorted(places), 0.05)
        assert all(b - a > 0.05 - 1e-9 for a, b in zip(found, found[1:], strict=False))
        assert found[0] > 0 and found[-1] < 1
    with pytest.raises(ValueError, match="wanted 20 at most"):
        spread([0.5] * 21, 0.05)
