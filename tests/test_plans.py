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
from epg_fast.plans import PLAIN, Case, Chosen, Machine, Plan, Variant, choose, choose_together, parse_ops, read_plan
from epg_fast.plans import plan as plan_module
from epg_fast.plans.plan import architecture
from epg_fast.sampling import SamplingEngine
from epg_fast.training import DiffusionStage, state
from epg_fast.training.planning import applied, kept_choice, training_case
from epg_fast.training.stages import network_config

CPU = torch.device("cpu")
SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
DECODER = {"decoder_depth": 2, "decoder_embed_dim": 40, "decoder_num_heads": 2, "num_classes": 5}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's plans."""
    monkeypatch.setenv("EPG_FAST_PLANS", str(tmp_path / "plans"))
    (tmp_path / "plans").mkdir()
    return tmp_path / "plans"


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = epg_fast.EPGViT(**SIZES, **DECODER).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def case_of(model, batch=64, precision="fp32"):
    return Case("sample", architecture(model), precision, batch)


def make_plan(case, ops=None, machine=None, evidence=None, made="", **run):
    """A plan of this machine, unless another is given."""
    variant = Variant({"steps": "extension"} if ops is None else ops, **run)
    return Plan(case, machine or Machine.here(CPU), variant, 1.5, made, evidence or {})


def put(folder, plan, name=None):
    path = folder / (name or plan.name)
    path.write_text(plan.text())
    return path


def test_a_plan_is_read_as_it_was_written(model, tmp_path):
    plan = make_plan(case_of(model), {"encoder.mlp": "triton"}, evidence={"rows": [1]}, made="d")
    assert read_plan(put(tmp_path, plan)) == plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or not JSON"),
        (b'{"format": "epg_fast plan 1", "case"', "damaged, or not JSON"),
        (b"[]", "not a plan of this version"),
        (b'{"format": "epg_fast plan 0"}', "not a plan of this version"),
        (b'{"format": "epg_fast plan 1"}', "damaged"),
    ],
)
def test_a_file_that_is_no_plan_is_an_error_by_name_and_a_warning_in_the_folder(content, message, folder, model, log):
    path = folder / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        choose(str(path), case_of(model), CPU)
    assert choose("auto", case_of(model), CPU).plan is None
    assert len(log.messages) == 1 and message in log.messages[0]


@pytest.mark.parametrize(
    "damage",
    [
        {"variant": {"ops": {"mlp": "triton"}}},
        {"variant": {"ops": {"encoder.mlp": "fast"}}},
        {"variant": {"compile": "on"}},
        {"variant": {"threads": -1}},
        {"variant": {"options": [1]}},
        {"speedup": "x"},
    ],
)
def test_a_plan_with_what_does_not_exist_is_damaged(damage, model, tmp_path):
    path = tmp_path / "plan.json"
    found = json.loads(make_plan(case_of(model)).text())
    found |= {name: found[name] | value if name == "variant" else value for name, value in damage.items()}
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"plan.json: damaged .*run `epg-fast tune` again"):
        read_plan(path)


def test_an_option_that_inductor_lacks_is_refused_before_anything_compiles(folder, model):
    path = put(folder, make_plan(case_of(model), options={"epilogue_fusion": False}))
    assert choose(str(path), case_of(model), CPU).options == {"epilogue_fusion": False}
    put(folder, make_plan(case_of(model), options={"epilog": False}))
    with pytest.raises(ValueError, match="plan .*: got option 'epilog', wanted one that Inductor has"):
        choose("auto", case_of(model), CPU)


def test_auto_takes_the_users_plan_then_the_packages_then_plain_code(folder, model, monkeypatch, tmp_path):
    case = case_of(model)
    assert (
        "plain code, no plan for this job on this device; `epg-fast tune --job sample`" in choose("auto", case, CPU).why
    )
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(plan_module, "_SHIPPED", shipped)
    put(shipped, make_plan(case, {"optimizer": "fused"}))
    chosen = choose("auto", case, CPU)
    assert chosen.ops["optimizer"] == "fused" and "the package's" in chosen.why
    put(folder, make_plan(case))
    chosen = choose("auto", case, CPU)
    assert chosen.ops == PLAIN | {"steps": "extension"} and str(folder) in chosen.why and "1.50x" in chosen.why
    assert choose("plain", case, CPU).ops == PLAIN


def test_single_sites_override_whatever_they_follow(folder, model):
    put(folder, make_plan(case_of(model), {"steps": "extension", "encoder.attention": "math"}))
    chosen = choose("attention=flash, steps=plain", case_of(model), CPU)
    assert chosen.ops == PLAIN | {"encoder.attention": "flash", "decoder.attention": "flash"}
    assert choose("plain,decoder.attention=math", case_of(model), CPU).ops == PLAIN | {"decoder.attention": "math"}


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"batch": 60}, True),
        ({"batch": 40}, True),
        ({"batch": 32}, False),
        ({"batch": 65}, False),
        ({"precision": "bf16"}, False),
        ({"job": "pretrain"}, False),
        ({"network": {"embed_dim": 96}}, False),
    ],
)
def test_a_plan_serves_its_job_shapes_precision_and_class_of_batches(change, taken, folder, model):
    case = case_of(model)
    put(folder, make_plan(case))
    network = dict(case.network) | change.pop("network", {})
    chosen = choose("auto", dataclasses.replace(case, network=network, **change), CPU)
    assert (chosen.plan is not None) == taken
    assert not taken or "measured with 64 images a call" in chosen.why


def test_the_plan_of_the_very_batch_goes_before_its_neighbours(folder, model):
    put(folder, make_plan(case_of(model, 60), {"optimizer": "fused"}), "a.json")
    put(folder, make_plan(case_of(model, 64)), "b.json")
    put(folder, make_plan(case_of(model, 50), {"optimizer": "fused"}), "c.json")
    assert choose("auto", case_of(model), CPU).ops["steps"] == "extension"


@pytest.mark.parametrize("field", ["torch", "triton", "epg_fast", "device", "capability", "extension"])
def test_a_plan_of_another_machine_is_not_used_and_the_line_says_why(field, folder, model):
    other = dataclasses.replace(Machine.here(CPU), **{field: "other"})
    path = put(folder, make_plan(case_of(model), machine=other))
    chosen = choose("auto", case_of(model), CPU)
    assert chosen.plan is None and f"{field} other there" in chosen.why and "epg-fast tune" in chosen.why
    with pytest.raises(ValueError, match=f"made elsewhere .{field} other there, .* here"):
        choose(str(path), case_of(model), CPU)


def test_another_driver_is_another_machine_to_nobody(folder, model):
    plan = make_plan(case_of(model), machine=dataclasses.replace(Machine.here(CPU), driver="12080"))
    put(folder, plan)
    assert choose("auto", case_of(model), CPU).plan == plan.name


def test_a_file_for_another_job_is_refused(model, tmp_path):
    path = put(tmp_path, make_plan(case_of(model)))
    other = dataclasses.replace(case_of(model), job="pretrain")
    with pytest.raises(ValueError, match="made for sample in fp32, 64 images a call, .*; this is pretrain"):
        choose(str(path), other, CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tritn", "did you mean 'triton'"),
        ("atention=triton", "got site 'atention' .did you mean 'attention'"),
        ("mlp=cudnn", "got mlp='cudnn', want one of plain"),
        ("plain,triton", "want one of auto, plain, triton, cuda, tune or a plan's file, then sites"),
        ("", "want one of auto"),
        ("auto,", "want one of auto"),
    ],
)
def test_what_ops_does_not_mean_is_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_ops(text)


def test_a_folder_named_like_a_plan_hides_no_plan(folder, model):
    put(folder, make_plan(case_of(model)))
    (folder / "x.json").mkdir()
    assert choose("auto", case_of(model), CPU).plan is not None


def test_a_plan_that_is_not_there_is_one_line(model):
    with pytest.raises(ValueError, match="nowhere.json: No such file.*; want a file that `epg-fast tune` made"):
        choose("nowhere.json", case_of(model), CPU)


def test_an_engine_draws_by_the_plan_and_leaves_the_network_as_it_was(folder, model, log):
    want = SamplingEngine(model, steps=4, batch_size=64)([0, 1])
    put(folder, make_plan(case_of(model), {"encoder.attention": "math", "decoder.attention": "math"}))
    engine = SamplingEngine(model, steps=4, batch_size=64)
    assert engine.chosen.ops["encoder.attention"] == "math" and model.ops == PLAIN
    assert [block.attn.backend for block in engine.model.blocks] == ["math"] * 2
    assert [block.attn.backend for block in model.blocks] == ["plain"] * 2
    torch.testing.assert_close(engine([0, 1]), want, rtol=0, atol=1e-4)
    assert "ops: plan " in log.ops[-1]
    assert SamplingEngine(model, steps=4, batch_size=64, ops="plain").model is model
    assert SamplingEngine(model, steps=4, batch_size=64, guidance=2.0).chosen.plan is None  # twice the images a call


def test_a_planned_network_in_one_piece_gives_way_to_hooks(folder, model, log):
    put(folder, make_plan(case_of(model), {}, compile="network"))
    model.blocks[0].register_forward_hook(lambda module, inputs, output: print(output.sum().item()))
    assert SamplingEngine(model, steps=4, batch_size=64).compile == "blocks"
    assert "compile: blocks, not the network as planned" in log.messages[-1]
    assert SamplingEngine(model, steps=4, batch_size=64, compile="network").compile == "network"  # as asked


def test_a_network_takes_a_plan_by_itself(folder, model):
    put(folder, make_plan(case_of(model, precision="bf16"), {"decoder.attention": "math"}))
    assert model.use_ops("auto", precision="bf16", batch_size=64).ops["decoder.attention"] == "math"
    assert model.use_ops("auto", precision="fp16", batch_size=64).ops == PLAIN


def training_plan(tiny_run, ops, **run):
    """A plan for the command `tiny_run`."""
    (config,) = parse([DiffusionConfig], [*tiny_run], "finetune-diffusion")
    network = generator_from_config(network_config(config))
    return make_plan(training_case("finetune-diffusion", config, network, 1), ops, **run)


def test_a_run_records_its_plan_and_keeps_it_when_it_goes_on(tiny_run, folder, tmp_path, caplog):
    command = ["finetune-diffusion", *tiny_run, "--outdir", str(tmp_path / "run"), "--checkpoint_every", "2"]
    plan = training_plan(tiny_run, {"encoder.attention": "math", "optimizer": "plain"})
    put(folder, plan)
    assert main([*command, "--steps", "4"]) == 0
    record = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert record["plan"] == plan.name and record["ops"] == {"encoder.attention": "math"}
    first, *lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 0, "plan": record} and all("loss" in line for line in lines)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["plan"] == record

    # another plan that has been made since does not change what the run computes
    put(folder, training_plan(tiny_run, {"decoder.attention": "math"}))
    shutil.rmtree(newest)
    assert main([*command, "--steps", "4"]) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == record
    shutil.rmtree(newest)
    assert main([*command, "--steps", "4", "--ops", "plain"]) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["ops"] == {}


def test_a_plan_gives_way_to_flags(tiny_run, folder):
    put(folder, training_plan(tiny_run, {}, compile="network"))
    for flags, how in ((["--compile", "blocks"], "blocks"), ([], "network"), (["--ops", "plain"], "auto")):
        (config,) = parse([DiffusionConfig], [*tiny_run, *flags], "finetune-diffusion")
        assert DiffusionStage(config, Ranks(0, 1, CPU)).config.compile == how


def test_two_ranks_take_what_the_main_one_chooses_and_unlike_machines_are_refused(monkeypatch, folder, model):
    plan = make_plan(case_of(model))
    put(folder, plan)
    here, told = Machine.here(CPU), []
    of_the_main_one = {tuple: (choose("auto", plan.case, CPU), None), Machine: here}

    class Two(Ranks):
        def gather(self, value):
            told.append(value)
            return [of_the_main_one[type(value)], value]

    assert choose_together("auto", plan.case, Two(1, 2, CPU)).plan == plan.name
    assert told == [(None, None), here]  # this rank has not looked itself
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device: dataclasses.replace(here, device="H100")))
    with pytest.raises(ValueError, match="rank 1 is on another machine than rank 0.*device .* there, H100 here"):
        choose_together("auto", plan.case, Two(1, 2, CPU))


def test_a_damaged_plan_on_the_command_line_is_exit_code_2(tiny_run, tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{}")
    command = ["finetune-diffusion", *tiny_run, "--outdir", str(tmp_path / "run"), "--ops", str(tmp_path / "plan.json")]
    assert main(command) == 2
    assert "not a plan of this version" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*command[:-1], "trition"]) == 2
    assert "did you mean 'triton'" in capsys.readouterr().err


def test_the_report_names_the_plans_of_this_device(folder, model, capsys):
    plan = make_plan(case_of(model))
    put(folder, plan)
    logging.getLogger("epg_fast").setLevel(logging.ERROR)
    assert main(["env"]) == 0
    assert "1 for this device" in capsys.readouterr().out


def test_backends_by_site_are_checked_and_a_half_that_is_plain_stays_plain(model):
    case = case_of(model)
    halves = choose({"attention": "math", "decoder.attention": "plain"}, case, CPU).ops
    assert (halves["encoder.attention"], halves["decoder.attention"]) == ("math", "plain")
    for wrong in ({"atention": "math"}, {"attention": "mth"}):
        with pytest.raises(ValueError, match="want one of"):
            choose(wrong, case, CPU)


def test_a_run_that_goes_on_with_other_versions_chooses_anew_and_says_why(folder, model, log):
    put(folder, make_plan(case_of(model)))
    machine = dataclasses.asdict(Machine.here(CPU))
    kept = choose("attention=math", case_of(model), CPU).record()
    assert choose("auto", case_of(model), CPU, kept | {"machine": machine}).ops["encoder.attention"] == "math"
    older = kept | {"machine": machine | {"torch": "2.11.0"}}
    assert choose("auto", case_of(model), CPU, older).ops == PLAIN | {"steps": "extension"}
    assert "on another machine (torch 2.11.0 there" in log.messages[-1]


@pytest.mark.parametrize("job", ["finetune-diffusion", "sample"])
def test_tune_waits_for_no_measurement_to_refuse_a_command(job, tiny_run, folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    flags = tiny_run if job == "finetune-diffusion" else ["--checkpoint", "nowhere"]
    assert main([job, *flags, "--outdir", str(tmp_path / "run"), "--ops", "tune"]) == 2
    assert "choose another --outdir" in capsys.readouterr().err and not list(folder.iterdir())


def test_a_run_that_goes_on_and_asks_for_tune_takes_the_plan_that_was_made(folder, model):
    case = case_of(model)
    put(folder, make_plan(case, {"encoder.attention": "math"}))
    kept = choose("plain", case, CPU).record() | {"machine": dataclasses.asdict(Machine.here(CPU))}
    assert choose("auto", case, CPU, kept).plan is None
    assert choose("tune", case, CPU, kept).ops["encoder.attention"] == "math"


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


@pytest.mark.parametrize("record", ["[]", "{}", '{"ops": {"nowhere": "math"}}', "{"])
def test_a_damaged_record_of_a_run_is_one_line(record, tmp_path):
    (tmp_path / "plan.json").write_text(record)
    with pytest.raises(ValueError, match="plan.json is damaged; delete it"):
        kept_choice(tmp_path)


def test_plans_that_are_a_file_are_said_not_to_be_read(folder, model, log):
    folder.rmdir()
    folder.write_text("")
    assert choose("auto", case_of(model), CPU).plan is None
    assert "are not read" in log.messages[0]
