"""The `sweep` command: what it finds, whoever drew it and however often it was stopped."""

import contextlib
import html
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epg_fast.__main__ import main
from epg_fast.config import EvaluateConfig, JudgeConfig, SampleConfig, SweepConfig
from epg_fast.evaluation import page
from epg_fast.evaluation.figures import difference
from epg_fast.evaluation.judge import open_judges
from epg_fast.flags import parse
from epg_fast.models import from_pretrained, load_weights
from epg_fast.sampling import SamplingEngine, sample
from epg_fast.sampling.outputs import quantize
from epg_fast.sweep import command as command_module
from epg_fast.sweep.command import sweep_labels
from epg_fast.sweep.folder import SweepFolder
from epg_fast.training.reconstruct import reconstruct
from tests.commands import Kept, ask_to_stop, fails, full_disk, on_two_ranks, python, run, snapshot
from tests.sampling.conftest import write_checkpoint
from tests.training.runs import run_command

KILLER = Path(__file__).parents[1] / "sampling" / "kill_everywhere.py"
# The interval of guidance holds levels of a grid of few steps.
FLAGS = {"num": 40, "first": 10, "batch_size": 8, "steps": "3,4", "guidance": "1,4:8:4", "interval": "0.1-20,0.1-90"}
COMPONENTS = 6  # fewer than images, so that the distance has a spread


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.safetensors")


@pytest.fixture(scope="session")
def command(checkpoint, few_digits):
    """Of ten settings in two rounds, without its folder."""
    flags = {"checkpoint": checkpoint, "device": "cpu", "train": few_digits / "train", "test": few_digits / "test"}
    flags["components"] = COMPONENTS
    return ["sweep", *(str(word) for name, value in (flags | FLAGS).items() for word in (f"--{name}", value))]


@pytest.fixture
def arguments(command, tmp_path):
    """That command with a folder for one test, `s`."""
    return [*command, "--outdir", str(tmp_path / "s")]


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """The folder of that command."""
    folder = tmp_path_factory.mktemp("finished") / "s"
    assert main([*command, "--outdir", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def _nothing_rendered(monkeypatch):
    """Plots take as long as the rest; those of `finished` are whole, and test_report.py has the others."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page, "drawn", lambda *_, **__: b"")


@pytest.fixture
def saved(monkeypatch):
    """(setting, images) of the rows that are kept."""
    kept, save = Kept(), SweepFolder.save

    def note(folder, number, images, rows, seconds):
        save(folder, number, images, rows, seconds)
        kept.append((number, images))

    monkeypatch.setattr(SweepFolder, "save", note)
    return kept


def found(folder):
    """What sweep.json says, but for times and who drew."""
    state = json.loads((Path(folder) / "sweep.json").read_text())
    del state["drawn_with"], state["settings"]["checkpoint"]
    for this in state["rounds"]:
        for result in this["results"].values():
            assert result.pop("seconds_per_image") > 0
    return state


@pytest.fixture(scope="session")
def by_hand(checkpoint, few_digits):
    """Figures of the first images of a setting, drawn and judged without a sweep."""
    model = from_pretrained(checkpoint)
    labels = torch.from_numpy(sweep_labels(SweepConfig(num=FLAGS["num"]), model))
    config = JudgeConfig(train=str(few_digits / "train"), test=str(few_digits / "test"), components=COMPONENTS)
    judges = open_judges(config, (32, 32), torch.device("cpu"))

    def judge(setting, images):
        drawn = {"steps": setting["steps"], "guidance": setting["guidance"], "interval": tuple(setting["interval"])}
        pixels = quantize(sample(model, labels[:images], batch_size=FLAGS["batch_size"], **drawn))
        return judges.figures(judges.rows(pixels.permute(0, 3, 1, 2).contiguous(), labels[:images]))

    return judge


def test_the_figures_are_those_of_every_setting_drawn_and_judged_by_hand(finished, by_hand):
    state = found(finished)
    assert [this["images"] for this in state["rounds"]] == [16, 40] and len(state["grid"]) == 10
    assert (state["figure"], state["best"]) == ("frechet_distance", "low")
    for this in state["rounds"]:
        want = {int(n): by_hand(state["grid"][int(n)], this["images"]) for n in this["results"]}
        distances = {n: figures["frechet_distance"] for n, figures in want.items()}
        assert this["order"] == sorted(distances, key=lambda n: (distances[n].value, n))
        best = distances[this["order"][0]]
        for n, figures in want.items():
            result = this["results"][str(n)]
            for name, value in result["figures"].items():
                assert value == pytest.approx(figures[name].value, rel=1e-9), name
            apart = difference(distances[n], best, paired=True)
            assert (result["difference"], result["difference_spread"]) == pytest.approx(apart, rel=1e-6, abs=1e-9)
    first, last = state["rounds"]
    assert set(first["results"]["0"]["figures"]) == {"frechet_distance"}  # others cost more
    assert set(last["results"][str(state["result"])]["figures"]) == {"frechet_distance", "accuracy"}
    assert sorted(last["order"]) == sorted(first["kept"]) and 3 <= len(first["kept"]) <= 5
    assert state["result"] == last["order"][0]


def test_the_figures_of_a_network_are_those_of_sample_and_evaluate(checkpoint, tiny_inception, tmp_path):
    drawn = ["--checkpoint", checkpoint, "--num", 40, "--batch_size", 8, "--labels", 3, "--device", "cpu"]
    run("sample", *drawn, "--steps", 3, "--guidance", 8, "--interval", "[0.1,20]", "--outdir", tmp_path / "i")
    run("sample", *drawn, "--steps", 2, "--seed", 5, "--outdir", tmp_path / "reference")
    judges = ["--reference", tmp_path / "reference" / "samples.npz", "--inception", tiny_inception, "--device", "cpu"]
    judged = ["--samples", tmp_path / "i" / "samples.npz", *judges, "--bootstrap", 0]
    run("evaluate", *judged, "--output", tmp_path / "want.json")
    grid = ["--steps", 3, "--guidance", "1,4,8", "--interval", "0.1-20", "--first", 16]
    run("sweep", *drawn, *judges, *grid, "--outdir", tmp_path / "s")
    state, want = found(tmp_path / "s"), json.loads((tmp_path / "want.json").read_text())
    got = state["rounds"][-1]["results"]["2"]
    assert state["figure"] == "fid" and {"fid", "inception_score", "precision", "recall"} <= got["figures"].keys()
    for name, value in got["figures"].items():
        assert value == pytest.approx(want[name], rel=1e-6), name
    assert list((tmp_path / "s" / "reference").iterdir())


def test_the_first_images_are_fair_to_all_classes(checkpoint):
    model = from_pretrained(checkpoint)
    labels = sweep_labels(SweepConfig(num=2000), model)
    assert np.bincount(labels).tolist() == [200] * 10
    assert (abs(np.bincount(labels[:200]) - 20) < 15).all()
    assert np.array_equal(labels, sweep_labels(SweepConfig(num=2000), model))


def test_a_grid_draws_all_of_every_setting_and_halving_begins_like_it(command, finished, tmp_path):
    assert main([*command, "--search", "grid", "--outdir", str(tmp_path / "grid")]) == 0
    state, halving = found(tmp_path / "grid"), found(finished)
    (this,) = state["rounds"]
    assert (this["images"], len(this["order"])) == (40, 10)
    for number, result in halving["rounds"][1]["results"].items():
        assert this["results"][number]["figures"] == pytest.approx(result["figures"], rel=1e-9)


def test_the_folder_says_what_is_best_and_holds_nothing_else(finished):
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()} - {".lock"}
    assert files == {"sweep.json", "sweep.md", "sweep.html", "guidance.png", "interval.png", "steps.png"}
    text, state = (finished / "sweep.md").read_text(), found(finished)
    shown = (finished / "sweep.html").read_text()
    assert shown.count("data:image/png") == 3 and html.escape(state["protocol"]["text"]) in shown
    assert state["protocol"]["sampling"]["weights_sha256"] == state["settings"]["weights_sha256"]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 2 + sum(len(this["order"]) for this in state["rounds"])
    best = state["grid"][state["result"]]
    assert rows[1].startswith(f"| {best['guidance']:g} | as it is | ") and f"| {best['steps']} |" in rows[1]
    assert "Round 2: " in text and "40 images of each" in text and "equal numbers of images only" in text
    for name in ("guidance", "interval", "steps"):
        with Image.open(finished / f"{name}.png") as image:
            assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_the_commands_that_it_ends_with_draw_and_judge_the_best(command, finished, tmp_path, capsys):
    whole = shutil.copytree(finished, tmp_path / "whole")
    assert main([*command, "--outdir", str(whole)]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert f"{first}\n{second}\n" in (whole / "sweep.md").read_text()
    best, words = found(whole)["grid"][found(whole)["result"]], [shlex.split(line) for line in (first, second)]
    assert [line[:2] for line in words] == [["epg-fast", "sample"], ["epg-fast", "evaluate"]]
    (drawn,), (judged,) = parse([SampleConfig], words[0][2:], ""), parse([EvaluateConfig], words[1][2:], "")
    assert (drawn.num, drawn.steps, drawn.guidance) == (50_000, best["steps"], best["guidance"])
    assert drawn.interval == tuple(best["interval"]) and drawn.batch_size == 8
    assert drawn.seed == 1  # the images that it was chosen by would flatter it
    assert (drawn.checkpoint, judged.train) == (command[2], command[6])
    assert main([*words[0][1:], "--num", "20"]) == 0
    assert main(words[1][1:]) == 0
    assert "frechet_distance" in (whole / "best.json").read_text()


def test_settings_that_guide_at_the_same_levels_are_drawn_once(command, tmp_path, capsys, log):
    flags = ["--interval", "0.1-20,0.2-19,0.3-0.4", "--guidance", "1,3", "--steps", "3", "--num", "10"]
    assert main([*command, *flags, "--outdir", str(tmp_path / "s")]) == 0
    grid = [(setting["guidance"], setting["interval"]) for setting in found(tmp_path / "s")["grid"]]
    assert grid == [(1.0, [0.1, 20.0]), (3.0, [0.1, 20.0])]
    assert "2 of 4 settings guide at the same noise levels as others and are left out" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_finds_the_same(command, finished, tmp_path):
    flags = ["--batch_size", "12", "--guidance", "1,3,6,9", "--interval", "0.1-20", "--steps", "3", "--first", "12"]
    commands = [[*command, *flags, "--outdir", str(tmp_path / name)] for name in ("whole", "killed")]
    assert main(commands[0]) == 0
    modules = ["epg_fast.sweep.command", "matplotlib.figure", "sklearn.svm"]
    done = python(KILLER, json.dumps(commands[1:]), *modules)
    assert min(json.loads(done.stdout.splitlines()[-1])) >= 6
    assert found(tmp_path / "killed") == found(tmp_path / "whole")
    assert snapshot(tmp_path / "killed").keys() == snapshot(tmp_path / "whole").keys()


@pytest.mark.parametrize("after", [20, 23])
def test_a_signal_keeps_what_is_finished_and_damaged_rows_are_drawn_again(
    arguments, finished, tmp_path, capsys, saved, after
):
    """In the last batch of the first round, and in the second round."""
    saved.stop = {after: ask_to_stop}
    assert main(arguments) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err
    number, images = saved[-1]
    broken = tmp_path / "s" / "rows" / f"{number:04d}" / f"{images.start:08d}_{images.stop:08d}.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert main(arguments) == 0
    assert f"{broken} is damaged: its images are drawn again" in capsys.readouterr().err
    assert len(saved) == len(set(saved)) + 1 > after + 1
    assert found(tmp_path / "s") == found(finished)


def test_another_batch_size_goes_on_where_the_first_had_come(arguments, finished, tmp_path, saved):
    saved.stop = {5: ask_to_stop}
    assert main(arguments) == 128 + signal.SIGTERM
    assert main([*arguments, "--batch_size", "7"]) == 0
    drawn = sorted((number, i) for number, images in saved for i in images)
    assert len(drawn) == len(set(drawn))
    got, want = found(tmp_path / "s"), found(finished)
    assert got["rounds"][0]["images"] == 16 and got["result"] == want["result"]
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())["drawn_with"]
    assert [using["batch_size"] for using in written] == [8, 7]


@pytest.mark.parametrize(("place", "flags"), [("open_judges", "--guidance 3,4,5 --seed 7"), ("write_report", "")])
def test_stopped_before_anything_is_drawn_it_takes_other_settings_and_in_the_end_it_draws_nothing(
    arguments, finished, tmp_path, saved, place, flags
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_module, place, ask_to_stop)
        assert main([*arguments, *flags.split()]) == 128 + signal.SIGTERM
    drawn = len(saved)
    assert not (tmp_path / "s" / "sweep.md").exists()
    assert main(arguments) == 0
    assert bool(drawn) == (len(saved) == drawn) == (place == "write_report") and found(tmp_path / "s") == found(
        finished
    )
    assert snapshot(tmp_path / "s").keys() == snapshot(finished).keys()


def test_a_share_of_less_than_a_batch_is_filled_up_where_sizes_are_compiled(command, finished, tmp_path, monkeypatch):
    sizes, draw = set(), SamplingEngine._draw

    def note(engine, inputs):
        sizes.add(len(inputs[0]))
        return draw(engine, inputs)

    monkeypatch.setattr(SamplingEngine, "_draw", note)
    monkeypatch.setattr(SamplingEngine, "fills_batches", True)
    assert main([*command, "--num", "36", "--first", "20", "--outdir", str(tmp_path / "s")]) == 0
    assert sizes == {8}
    (this,) = found(tmp_path / "s")["rounds"]
    assert this["images"] == 36 and len(this["results"]) == 10


@pytest.mark.parametrize(("after", "failing"), [(3, "rows/0001/00000008_00000016.safetensors"), (20, "sweep.json")])
def test_a_full_disk_is_named_and_nothing_is_lost(arguments, finished, tmp_path, capsys, saved, after, failing):
    """While rows are written, and when the first round is decided."""
    capsys.readouterr()
    with contextlib.ExitStack() as stack:
        saved.stop = {after: lambda: stack.enter_context(full_disk(200))}
        code = main(arguments)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and f"{failing}: File too large; what is finished stays" in said and "goes on" in said
    assert len(saved) == after and not list((tmp_path / "s").rglob("*.tmp"))
    assert main(arguments) == 0
    assert len(saved) == len(set(saved)) and found(tmp_path / "s") == found(finished)


def test_a_folder_of_other_settings_is_refused_and_left_alone(command, finished, tmp_path, capsys):
    whole = shutil.copytree(finished, tmp_path / "whole")
    before, arguments = snapshot(whole), [*command, "--outdir", whole]
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    for flags, expected in {
        "--guidance 1,4": "guidance was '1,4:8:4', now '1,4'",
        "--num 44": "num was 40, now 44",
        "--seed 3": "seed was 0, now 3",
        "--figure accuracy": "figure was None, now 'accuracy'",
        f"--checkpoint {other}": "weights_sha256 was",
        "--components 7": "components was 6, now 7",
    }.items():
        fails(capsys, [*arguments, *flags.split()], f"outdir: {whole} was made with other settings", expected)
    assert snapshot(whole) == before
    (whole / "sweep.json").write_text("{")
    fails(capsys, arguments, "sweep.json cannot be read")


MISTAKES = {
    "--figure fid": "figure 'fid': the judges have accuracy, frechet_distance",
    "--figure acuracy": "figure 'acuracy' (did you mean 'accuracy'?)",
    "--figure fid --train= --test= --reference {x} --dinov2 {x}": "figure 'fid': the judges have fd_dinov2, ",
    "--num 1": "the judges want at least 2; raise --first or --num",
    "--guidance 2 --steps 3 --interval 0-9": "the grid has one setting",
    "--interval 0.3-0.4 --guidance 2,3 --steps 3": "no noise level lies in its guidance intervals",
    "--sigma_rel 0.05,0.1": "posthoc_ema holds no snapshots",
    "--ops tune": "sweep measures no plan; run `epg-fast tune --job sample` first",
    "--checkpoint nowhere": "nowhere",
    "--checkpoint=": "--checkpoint and --outdir are needed",
    "--checkpoint {x}": "guidance is 4.0, which needs a class-conditional network",
    "--train= --test= --reference {reference} --inception {inception} --figure fid_infinity --steps 3 --num 100 "
    "--first 5 --batch_size 5": "fid_infinity: the first round's 10 images are too few for it",
}


def test_a_mistake_is_answered_before_anything_is_drawn(command, tmp_path, capsys, saved, tiny_inception, monkeypatch):
    paths = {"x": write_checkpoint(tmp_path / "model.safetensors", num_classes=0), "inception": tiny_inception}
    paths["reference"] = tmp_path / "reference.npz"
    np.savez(paths["reference"], arr_0=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
    for flags, message in MISTAKES.items():
        fails(capsys, [*command, "--outdir", tmp_path / "s", *flags.format(**paths).split()], message)
        assert not saved and not (tmp_path / "s" / "rows").exists()
    shutil.rmtree(tmp_path / "s")
    monkeypatch.setattr(command_module.sampling, "load_generator", lambda *_, **__: pytest.fail("was read"))
    fails(capsys, [*command, "--outdir", tmp_path / "s", "--figure", "fid"], "figure 'fid'")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, [*command, "--outdir", tmp_path / "s"], "needs matplotlib: pip install 'epg_fast[demo]'")
    assert not (tmp_path / "s").exists()


def test_a_setting_whose_images_are_not_finite_is_out_and_the_others_go_on(command, tmp_path, capsys):
    flags = ["--clamp", "none", "--guidance", "1,2,3,4,1e38", "--interval", "0.1-20", "--steps", "3", "--num", "10"]
    assert main([*command, *flags, "--outdir", str(tmp_path / "s")]) == 0
    assert "images contain NaN" in capsys.readouterr().err
    (this,) = found(tmp_path / "s")["rounds"]
    assert this["diverged"] == [4] and sorted(this["order"]) == [0, 1, 2, 3]
    assert "Images that are not finite: guidance 1e+38" in (tmp_path / "s" / "sweep.md").read_text()


@pytest.mark.slow
def test_widths_are_made_once_and_drawn_as_any_checkpoint(command, tiny_run, few_digits, tmp_path, monkeypatch):
    flags = {"steps": 6, "posthoc_ema.sigma_rel": "[0.05,0.10]", "posthoc_ema.every": 1}
    folder = tmp_path / "run"
    assert main(run_command(tiny_run, folder, "finetune-diffusion", **flags)) == 0
    flags = ["--sigma_rel", "null,0.06:0.1:0.04", "--guidance", "1,4", "--steps", "3", "--interval", "0.1-90"]
    arguments = [*command, *flags, "--checkpoint", str(folder), "--outdir", str(tmp_path / "s"), "--num", "10"]
    assert main(arguments) == 0
    state = found(tmp_path / "s")
    assert state["step"] == 6 and {setting["sigma_rel"] for setting in state["grid"]} == {None, 0.06, 0.1}
    assert (tmp_path / "s" / "guidance_sigma_rel.png").exists()
    wide = tmp_path / "s" / "weights" / "sigma_rel_0.06.safetensors"
    (got, _), (want, _) = load_weights(wide), reconstruct(folder, 0.06)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    alone = [*command, "--checkpoint", str(wide), *flags[2:], "--outdir", str(tmp_path / "alone"), "--num", "10"]
    assert main(alone) == 0
    numbers = [n for n, setting in enumerate(state["grid"]) if setting["sigma_rel"] == 0.06]
    for own, number in enumerate(numbers):
        got, want = (s["rounds"][0]["results"] for s in (state, found(tmp_path / "alone")))
        assert got[str(number)]["figures"] == pytest.approx(want[str(own)]["figures"], rel=1e-9)
    monkeypatch.setattr(command_module, "reconstruct_file", None)
    assert main(arguments) == 0


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(command, tiny_inception, tmp_path, saved):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    judges = {"reference": f"{tmp_path}/reference.npz", "inception": str(tiny_inception), "train": "", "test": ""}
    arguments = [*command, *(f"--{name}={value}" for name, value in judges.items()), "--outdir"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    saved.stop = {len(saved) + 7: ask_to_stop}
    assert main([*arguments, str(tmp_path / "two")]) == 128 + signal.SIGTERM
    shutil.rmtree(tmp_path / "two" / "reference")  # which the ranks then share
    done = on_two_ranks([*arguments, tmp_path / "two"])
    assert "sweep (2 processes): 100%" in done.stderr and "160/160" in done.stderr
    one, two = found(tmp_path / "one"), found(tmp_path / "two")
    assert one["rounds"][0]["order"] == two["rounds"][0]["order"] and one["result"] == two["result"]
    for this, want in zip(two["rounds"], one["rounds"], strict=True):
        for number, result in want["results"].items():
            # the reference is summed in another order
            assert this["results"][number]["figures"] == pytest.approx(result["figures"], rel=1e-9)
    written = json.loads((tmp_path / "two" / "sweep.json").read_text())["drawn_with"]
    assert [using["processes"] for using in written] == [1, 2]


def test_ranks_share_all_units_by_their_cost_and_meet_few_settings():
    costs = np.repeat(np.random.default_rng(0).integers(30, 130, size=12), 10) * 64.0
    for world_size in (1, 2, 3, 8, 100):
        shares = [range(120)[command_module._share(costs, rank, world_size)] for rank in range(world_size)]
        assert [unit for share in shares for unit in share] == list(range(120))
        assert max(costs[share].sum() for share in shares) <= costs.sum() / world_size + costs.max()
        assert command_module._share([], 0, world_size) == slice(0, 0)
