"""Plans: which one is taken, which are refused, and that runs and resumed runs compute with them."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

import epg_fast
from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig
from epg_fast.distributed import Ranks
from epg_fast.flags import parse
from epg_fast.models import generator_from_config
from epg_fast.plans import PLAIN, Case, Chosen, Machine, Plan, Variant, choose, choose_together, read_plan
from epg_fast.plans import plan as plan_module
from epg_fast.plans.plan import architecture
from epg_fast.sampling import SamplingEngine
from epg_fast.training import DiffusionStage, state
from epg_fast.training.stages import applied, network_config, training_case
from epg_fast.training.state import RunFolder

CPU = torch.device("cpu")
SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
SIZES |= {"decoder_depth": 2, "decoder_embed_dim": 40, "decoder_num_heads": 2}
with torch.device("meta"):
    CASE = Case("sample", architecture(epg_fast.EPGViT(**SIZES)), "fp32", 64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's plans."""
    monkeypatch.setenv("EPG_FAST_PLANS", str(tmp_path / "plans"))
    (tmp_path / "plans").mkdir()
    return tmp_path / "plans"


@pytest.fixture
def model():
    """The network of `CASE`."""
    made = epg_fast.EPGViT(**SIZES).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def put(folder, ops=None, case=CASE, name=None, machine=None, **run):
    """(path, plan): a plan in a folder, of this machine, for `CASE` and with the extension's steps by default."""
    variant = Variant({"steps": "extension"} if ops is None else ops, **run)
    plan = Plan(case, machine or Machine.here(CPU), variant, 1.5, "2026-01-01", {"rows": [1]})
    path = folder / (name or plan.name)
    path.write_text(plan.text())
    return path, plan


def chosen(ops="auto", kept=None, **case):
    """What runs for `CASE`, or with other fields of it."""
    return choose(str(ops), dataclasses.replace(CASE, **case), CPU, kept)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    path, plan = put(tmp_path, {"encoder.mlp": "triton"})
    assert read_plan(path) == plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged, or not JSON"),
        ('{"format": "epg_fast plan 1", "case"', "damaged, or not JSON"),
        ("[]", "not a plan of this version"),
        ('{"format": "epg_fast plan 0"}', "not a plan of this version"),
        ('{"format": "epg_fast plan 1"}', "damaged"),
        ({"variant": {"ops": {"mlp": "triton"}}}, "damaged .'mlp'"),
        ({"variant": {"ops": {"encoder.mlp": "fast"}}}, "damaged .encoder.mlp has no backend 'fast'"),
        ({"variant": {"compile": "on"}}, "damaged .compile 'on'"),
        ({"variant": {"threads": -1}}, "damaged .threads -1"),
        ({"variant": {"options": [1]}}, "damaged .options"),
        ({"speedup": "x"}, "damaged .speedup 'x'"),
    ],
)
def test_a_file_that_is_no_plan_is_an_error_by_name_and_a_warning_in_the_folder(content, message, folder, log):
    path, plan = put(folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads(plan.text()) | content)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"plan .*{message}.*epg-fast tune") as error:
        chosen(path)
    assert chosen().plan is None and log.messages == [str(error.value)]


def test_an_option_that_inductor_lacks_is_refused_before_anything_compiles(folder):
    path, _ = put(folder, options={"epilogue_fusion": False})
    assert chosen(path).options == {"epilogue_fusion": False}
    put(folder, options={"epilog": False})
    with pytest.raises(ValueError, match="plan .*: got option 'epilog', wanted one that Inductor has"):
        chosen()


def test_auto_takes_the_users_plan_then_the_packages_then_plain_code(folder, monkeypatch, tmp_path):
    assert "plain code, no plan for this job on this device; `epg-fast tune --job sample`" in chosen().why
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(plan_module, "_SHIPPED", tmp_path / "shipped")
    put(tmp_path / "shipped", {"optimizer": "fused"})
    found = chosen()
    assert found.ops["optimizer"] == "fused" and "the package's" in found.why
    put(folder)
    found = chosen()
    assert found.ops == PLAIN | {"steps": "extension"} and str(folder) in found.why and "1.50x" in found.why
    assert chosen("plain").ops == PLAIN


def test_single_sites_override_whatever_they_follow(folder):
    put(folder, {"steps": "extension", "encoder.attention": "math"})
    both = {"encoder.attention": "flash", "decoder.attention": "flash"}
    assert chosen("attention=flash, steps=plain").ops == PLAIN | both
    assert chosen("plain,decoder.attention=math").ops == PLAIN | {"decoder.attention": "math"}
    by_mapping = choose({"attention": "math", "decoder.attention": "plain"}, CASE, CPU)
    assert by_mapping.ops == PLAIN | {"encoder.attention": "math"}


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"batch": 60}, True),
        ({"batch": 40}, True),
        ({"batch": 32}, False),
        ({"batch": 65}, False),
        ({"precision": "bf16"}, False),
        ({"job": "pretrain"}, False),
        ({"network": dict(CASE.network) | {"embed_dim": 96}}, False),
    ],
)
def test_a_plan_serves_its_job_shapes_precision_and_class_of_batches(change, taken, folder):
    path, _ = put(folder)
    found = chosen(**change)
    assert (found.plan is not None) == taken
    assert not taken or "measured with 64 images a call" in found.why
    if not taken:
        with pytest.raises(ValueError, match="made for sample in fp32, 64 images a call, .*; this is "):
            chosen(path, **change)


def test_the_plan_of_the_very_batch_goes_before_its_neighbours(folder):
    for name, batch, ops in (("a", 60, {"optimizer": "fused"}), ("b", 64, None), ("c", 50, {"optimizer": "fused"})):
        put(folder, ops, dataclasses.replace(CASE, batch=batch), f"{name}.json")
    assert chosen().ops["steps"] == "extension"


@pytest.mark.parametrize("field", ["torch", "triton", "epg_fast", "device", "capability", "extension"])
def test_a_plan_of_another_machine_is_not_used_and_the_line_says_why(field, folder):
    path, _ = put(folder, machine=dataclasses.replace(Machine.here(CPU), **{field: "other"}))
    found = chosen()
    assert found.plan is None and f"{field} other there" in found.why and "epg-fast tune" in found.why
    with pytest.raises(ValueError, match=f"made elsewhere .{field} other there, .* here"):
        chosen(path)


def test_another_driver_is_another_machine_to_nobody(folder):
    _, plan = put(folder, machine=dataclasses.replace(Machine.here(CPU), driver="12080"))
    assert chosen().plan == plan.name


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ("tritn", "did you mean 'triton'"),
        ("atention=triton", "got site 'atention' .did you mean 'attention'"),
        ("mlp=cudnn", "got mlp='cudnn', want one of plain"),
        ("plain,triton", "want one of auto, plain, triton, cuda, tune or a plan's file, then sites"),
        ("", "want one of auto"),
        ("auto,", "want one of auto"),
        ("nowhere.json", "nowhere.json: No such file.*; want a file that `epg-fast tune` made"),
        ({"atention": "math"}, "got site 'atention' .did you mean 'attention'"),
        ({"attention": "mth"}, "got attention='mth', want one of plain"),
    ],
)
def test_what_ops_does_not_mean_is_one_line(ops, message):
    with pytest.raises(ValueError, match=message):
        choose(ops, CASE, CPU)


def test_a_folder_named_like_a_plan_hides_no_plan_and_a_file_in_the_folders_place_is_said(folder, log):
    put(folder)
    (folder / "x.json").mkdir()
    assert chosen().plan is not None and not log.messages
    shutil.rmtree(folder)
    folder.write_text("")
    assert chosen().plan is None and "are not read" in log.messages[0]


def test_a_run_keeps_what_it_has_computed_with_unless_its_machine_is_another_or_it_asks_for_tune(folder, log):
    put(folder)
    kept = chosen("attention=math").record() | {"machine": dataclasses.asdict(Machine.here(CPU))}
    assert chosen(kept=kept).ops == chosen("plain,attention=math,steps=extension").ops
    assert chosen("tune", kept).ops == PLAIN | {"steps": "extension"} and not log.messages
    older = kept | {"machine": kept["machine"] | {"torch": "2.11.0"}}
    assert chosen(kept=older).ops == PLAIN | {"steps": "extension"}
    assert "on another machine (torch 2.11.0 there" in log.messages[-1]


@pytest.mark.parametrize("record", ["[]", "{}", '{"ops": {"nowhere": "math"}}', "{"])
def test_a_damaged_record_of_a_run_is_one_line(record, tmp_path):
    (tmp_path / "plan.json").write_text(record)
    (tmp_path / "checkpoints/step_000000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="plan.json is damaged; delete it"):
        assert RunFolder(tmp_path).choice


def test_two_ranks_take_what_the_main_one_chooses_and_unlike_machines_are_refused(monkeypatch, folder):
    _, plan = put(folder)
    here, told = Machine.here(CPU), []
    of_the_main_one = {tuple: (chosen(), None), Machine: here}

    class Two(Ranks):
        def gather(self, value):
            told.append(value)
            return [of_the_main_one[type(value)], value]

    assert choose_together("auto", CASE, Two(1, 2, CPU)).plan == plan.name
    assert told == [(None, None), here]  # this rank has not looked itself
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device: dataclasses.replace(here, device="H100")))
    with pytest.raises(ValueError, match="rank 1 is on another machine than rank 0.*device .* there, H100 here"):
        choose_together("auto", CASE, Two(1, 2, CPU))


def test_an_engine_draws_by_the_plan_and_leaves_the_network_as_it_was(folder, model, log):
    want = SamplingEngine(model, steps=4, batch_size=64)([0, 1])
    put(folder, {"encoder.attention": "math", "decoder.attention": "math"})
    engine = SamplingEngine(model, steps=4, batch_size=64)
    assert engine.chosen.ops["encoder.attention"] == "math" and model.ops == PLAIN
    assert [block.attn.backend for block in engine.model.blocks] == ["math"] * 2
    assert [block.attn.backend for block in model.blocks] == ["plain"] * 2
    torch.testing.assert_close(engine([0, 1]), want, rtol=0, atol=1e-4)
    assert "ops: plan " in log.ops[-1]
    assert SamplingEngine(model, steps=4, batch_size=64, ops="plain").model is model
    assert SamplingEngine(model, steps=4, batch_size=64, guidance=2.0).chosen.plan is None  # twice the images a call


def test_a_planned_network_in_one_piece_gives_way_to_hooks(folder, model, log):
    put(folder, {}, compile="network")
    model.blocks[0].register_forward_hook(lambda module, inputs, output: print(output.sum().item()))
    assert SamplingEngine(model, steps=4, batch_size=64).compile == "blocks"
    assert "compile: blocks, not the network as planned" in log.messages[-1]
    assert SamplingEngine(model, steps=4, batch_size=64, compile="network").compile == "network"  # as asked


def test_a_network_takes_a_plan_by_itself(folder, model):
    put(folder, {"decoder.attention": "math"}, dataclasses.replace(CASE, precision="bf16"))
    assert model.use_ops("auto", precision="bf16", batch_size=64).ops["decoder.attention"] == "math"
    assert model.use_ops("auto", precision="fp16", batch_size=64).ops == PLAIN


def case_of_run(tiny_run):
    """What the command `tiny_run` wants a plan for."""
    (config,) = parse([DiffusionConfig], [*tiny_run], "finetune-diffusion")
    return training_case("finetune-diffusion", config, generator_from_config(network_config(config)), 1)


def test_a_run_records_its_plan_and_keeps_it_when_it_goes_on(tiny_run, folder, tmp_path, caplog):
    command = ["finetune-diffusion", *tiny_run, "--outdir", str(tmp_path / "run"), "--checkpoint_every", "2"]
    case = case_of_run(tiny_run)
    _, plan = put(folder, {"encoder.attention": "math", "optimizer": "plain"}, case)
    assert main([*command, "--steps", "4"]) == 0
    record = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert record["plan"] == plan.name and record["ops"] == {"encoder.attention": "math"}
    first, *lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 0, "plan": record} and all("loss" in line for line in lines)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["plan"] == record

    # another plan that has been made since does not change what the run computes
    put(folder, {"decoder.attention": "math"}, case)
    shutil.rmtree(newest)
    assert main([*command, "--steps", "4"]) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == record
    shutil.rmtree(newest)
    assert main([*command, "--steps", "4", "--ops", "plain"]) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["ops"] == {}


def test_a_plan_gives_way_to_flags(tiny_run, folder):
    put(folder, {}, case_of_run(tiny_run), compile="network")
    for flags, how in ((["--compile", "blocks"], "blocks"), ([], "network"), (["--ops", "plain"], "auto")):
        (config,) = parse([DiffusionConfig], [*tiny_run, *flags], "finetune-diffusion")
        assert DiffusionStage(config, Ranks(0, 1, CPU)).config.compile == how


def test_a_damaged_plan_on_the_command_line_is_exit_code_2(tiny_run, tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{}")
    command = ["finetune-diffusion", *tiny_run, "--outdir", str(tmp_path / "run"), "--ops", str(tmp_path / "plan.json")]
    assert main(command) == 2
    assert "not a plan of this version" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*command[:-1], "trition"]) == 2
    assert "did you mean 'triton'" in capsys.readouterr().err


def test_the_report_names_the_plans_of_this_device(folder, capsys):
    put(folder)
    logging.getLogger("epg_fast").setLevel(logging.ERROR)
    assert main(["env"]) == 0
    assert "1 for this device" in capsys.readouterr().out


@pytest.mark.parametrize("job", ["finetune-diffusion", "sample"])
def test_tune_waits_for_no_measurement_to_refuse_a_command(job, tiny_run, folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    flags = tiny_run if job == "finetune-diffusion" else ["--checkpoint", "nowhere"]
    assert main([job, *flags, "--outdir", str(tmp_path / "run"), "--ops", "tune"]) == 2
    assert "choose another --outdir" in capsys.readouterr().err and not list(folder.iterdir())


def test_a_plan_for_whole_networks_gives_way_to_sharding(tiny_run, folder, caplog):
    (config,) = parse([DiffusionConfig], [*tiny_run, "--parallelism", "fsdp"], "finetune-diffusion")
    with caplog.at_level("INFO", "epg_fast"):
        assert applied(config, Chosen(PLAIN, compile="network", cuda_graphs=True), 1).compile == "blocks"
    assert "sharded networks" in caplog.text


def test_an_optimiser_that_is_named_without_a_plan_is_taken(tiny_run, folder, tmp_path, monkeypatch):
    planned, make = [], state.make_optimizer
    monkeypatch.setattr(state, "make_optimizer", lambda *a: planned.append(a[-1]) or make(*a))
    flags = ["--outdir", str(tmp_path / "run"), "--steps", "1", "--ops", "plain,optimizer=fused"]
    assert main(["finetune-diffusion", *tiny_run, *flags]) == 0
    assert planned == ["fused"]


@pytest.mark.parametrize("place", ["out", "blocks.0.attn", "blocks.0.mlp", "blocks.0.mlp.fc1", "decoder_blocks.0.mlp"])
def test_a_network_with_an_adapter_has_the_plan_of_its_shapes(place):
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

    model = epg_fast.EPGViT(**SIZES)
    want = architecture(model)
    model.set_submodule(place, Adapter(model.get_submodule(place)))
    assert architecture(model) == want
