"""Gather what the demo left in its folder into curves.png, probe.png, metrics.json and report.md.

Usage: python demo/report.py runs/demo
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path

STAGES = {"pretrain": "Pre-training", "diffusion": "Diffusion", "consistency": "Consistency"}
SAMPLES = {
    "diffusion": "Diffusion, guided",
    "diffusion_unguided": "Diffusion, unguided",
    "consistency": "Consistency, one step",
}
PRECISIONS = ("bf16", "fp8")
PROBES = {"probe_before": "before pre-training", "probe_after": "after pre-training"}
SAMPLE_KEYS = ("accuracy", "frechet_distance", "classifier_accuracy", "baselines", "protocol", "sampling")
PROBE_KEYS = ("accuracy", "protocol")
# (samples, figure, wanted): what AT_LEAST names is to reach the number, the others are not to exceed it.
GOALS = [
    ("diffusion", "accuracy", 0.95),
    ("diffusion", "frechet_distance", 0.30),
    ("consistency", "accuracy", 0.85),
    ("consistency", "frechet_distance", 0.50),
    ("diffusion_bf16", "psnr_db", 35.0),
    ("diffusion_fp8", "accuracy_lost", 0.01),
]
AT_LEAST = ("accuracy", "psnr_db")
FIGURES = {
    "accuracy": "accuracy",
    "frechet_distance": "Frechet distance",
    "psnr_db": "PSNR against fp32, dB",
    "accuracy_lost": "accuracy lost against fp32",
}
TITLES = SAMPLES | {f"diffusion_{precision}": f"Diffusion, guided, {precision}" for precision in PRECISIONS}


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a demo folder; exits with a message that names the first missing or unreadable file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that the demo wrote, such as runs/demo")
    run = parser.parse_args(arguments).run
    try:
        found = gather(run)
        plot_curves(found["curves"], run / "curves.png")
        plot_probe(found["evaluations"], run / "probe.png")
    except (ReportError, ImportError) as error:
        sys.exit(f"error: {error}")
    metrics = summarize(found)
    write_text(run / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(run / "report.md", render(metrics))
    for goal in metrics["goals"]:
        print(goal_line(goal))
    print(f"{run / 'report.md'}: {'all goals reached' if metrics['goals_reached'] else 'NOT every goal was reached'}")
    return 0


class ReportError(Exception):
    """Something the report needs is missing or unreadable."""


def gather(run: Path) -> dict:
    """Read everything the report needs from `run`. Raises ReportError naming the first file that is missing."""
    wanted = dict.fromkeys(SAMPLES, SAMPLE_KEYS) | dict.fromkeys(PROBES, PROBE_KEYS)
    evaluations = {name: read_json(run / "eval" / f"{name}.json", keys) for name, keys in wanted.items()}
    if len({tuple(evaluations[name]["accuracy"]) for name in PROBES}) > 1:
        raise ReportError(
            f"the probes in {run / 'eval'} have different noise levels; run the whole demo with: make demo"
        )
    evaluations["diffusion_fp8"] = read_json(run / "eval" / "diffusion_fp8.json", ("accuracy",))
    precisions = {
        f"diffusion_{name}": read_json(run / f"samples_diffusion_{name}" / "precision.json", ("psnr_db", "relative_l2"))
        for name in PRECISIONS
    }
    timings = read_json(run / "timings.json")
    for name in SAMPLES:
        existing(run / f"samples_{name}" / "grid.png")
    curves = {name: read_metrics(run / name / "metrics.jsonl") for name in STAGES}
    return {"evaluations": evaluations, "precisions": precisions, "timings": timings, "curves": curves}


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ReportError(f"{path} is missing; run the whole demo with: make demo")
    return path


def read_json(path: Path, keys: tuple[str, ...] = ()) -> dict:
    try:
        found = json.loads(existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not valid JSON ({error}); write it again with: make demo") from error
    missing = [key for key in keys if key not in found]
    if missing:
        raise ReportError(f"{path} lacks {', '.join(missing)}; write it again with: make demo")
    return found


def read_metrics(path: Path) -> list[dict]:
    """Lines of a metrics.jsonl in the order of their steps; a step logged again after a resume counts once, the last
    time.
    """
    by_step = {}
    for number, line in enumerate(existing(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            by_step[int(row["step"])] = {**row, "loss": float(row["loss"])}
        except (ValueError, KeyError, TypeError):
            # A killed run leaves half a line, and the resumed run goes on behind it.
            print(f"note: {path}, line {number} is not a line of metrics and was left out", file=sys.stderr)
    if not by_step:
        raise ReportError(f"{path} holds no line with a step and a loss; write it again with: make demo")
    return [by_step[step] for step in sorted(by_step)]


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'epg_fast[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.3, "grid.linewidth": 0.6})
    return plt


def plot_curves(curves: dict[str, list[dict]], path: Path) -> None:
    """One panel per stage: the logged loss faint, its running mean on top."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.8), layout="constrained")
    for panel, (name, rows) in zip(panels, curves.items(), strict=True):
        rows = [row for row in rows if math.isfinite(row["loss"])]
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        panel.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="logged")
        panel.plot(steps, running_mean(losses), color="C0", linewidth=2, label="smoothed")
        if losses and min(losses) > 0:
            use_log_axis(panel, losses)
        panel.set(title=STAGES[name], xlabel="step", ylabel="weighted loss" if name != "pretrain" else "loss")
        panel.legend(frameon=False)
    save(figure, path)
    plt.close(figure)


def use_log_axis(panel, losses: list[float]) -> None:
    """Log axis with plain numbers, also where the values span less than a decade and the default draws no labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(max(losses) / min(losses))
    # Contrastive losses start near the log of the batch and fall by a small factor: a log axis would hide nothing and
    # show nothing.
    if decades < 0.7:
        panel.set_ylim(bottom=0)
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def running_mean(values: list[float]) -> list[float]:
    """Centred mean over a tenth of the curve; at the ends, over the part of the window that lies on the curve."""
    reach = max(1, len(values) // 20)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_probe(evaluations: dict, path: Path) -> None:
    """Probe accuracy by noise level, before and after pre-training."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    positions = range(len(evaluations["probe_after"]["accuracy"]))
    for (name, label), color in zip(PROBES.items(), ("0.6", "C0"), strict=True):
        accuracy = evaluations[name]["accuracy"]
        panel.plot(positions, [100 * value for value in accuracy.values()], "o-", color=color, label=label)
    # Evenly spaced levels: the clean level is orders of magnitude below the others, even on a log axis.
    panel.set_xticks(positions, list(evaluations["probe_after"]["accuracy"]))
    panel.set(title="Linear probe of the encoder", xlabel="noise level sigma (unshifted)", ylabel="accuracy, %")
    panel.set_ylim(0, 102)
    panel.legend(frameon=False)
    save(figure, path)
    plt.close(figure)


def summarize(found: dict) -> dict:
    """All figures in one place, with goals and whether each is reached."""
    evaluations, precisions = found["evaluations"], found["precisions"]
    lost = evaluations["diffusion"]["accuracy"] - evaluations["diffusion_fp8"]["accuracy"]
    precisions["diffusion_fp8"]["accuracy_lost"] = lost
    goals = [judge((evaluations | precisions)[name], name, figure, wanted) for name, figure, wanted in GOALS]
    return {
        "goals_reached": all(goal["reached"] for goal in goals),
        "goals": goals,
        "samples": {name: evaluations[name] for name in SAMPLES},
        "precisions": precisions,
        "probe": {name: evaluations[name] for name in PROBES},
        "training": {name: training_figures(rows) for name, rows in found["curves"].items()},
        "timings_s": found["timings"],
        "total_s": sum(found["timings"].values()),
        "machine": machine(),
    }


def judge(evaluation: dict, name: str, figure: str, wanted: float) -> dict:
    value = evaluation[figure]
    reached = value >= wanted if figure in AT_LEAST else value <= wanted
    return {"samples": name, "figure": figure, "wanted": wanted, "value": value, "reached": bool(reached)}


def training_figures(rows: list[dict]) -> dict:
    last = {key: rows[-1][key] for key in ("images_per_second", "elapsed_s") if key in rows[-1]}
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    # Strict JSON has no NaN: a run whose every loss diverged shows null.
    return {"steps": rows[-1]["step"], "last_loss": running_mean(losses)[-1] if losses else None, **last}


def machine() -> dict:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_model(), "cores": cores, "gpu": gpu, "torch": torch.__version__}


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def render(metrics: dict) -> str:
    """The text of report.md."""
    sections = ["# Demo report", *goals_table(metrics), *scale_remarks(metrics), *pictures(metrics), *costs(metrics)]
    return "\n\n".join(sections) + "\n"


def goals_table(metrics: dict) -> list[str]:
    rows = ["| samples | figure | value | goal | reached |", "|---|---|---|---|---|"]
    for goal in metrics["goals"]:
        value, wanted = shown(goal, "value"), shown(goal, "wanted")
        sign = "at least" if goal["figure"] in AT_LEAST else "at most"
        reached = "yes" if goal["reached"] else "**no**"
        rows.append(
            f"| {TITLES[goal['samples']]} | {FIGURES[goal['figure']]} | {value} | {sign} {wanted} | {reached} |"
        )
    unguided = metrics["samples"]["diffusion_unguided"]
    for figure in ("accuracy", "frechet_distance"):
        value = shown({"figure": figure, "value": unguided[figure]}, "value")
        rows.append(f"| {SAMPLES['diffusion_unguided']} | {FIGURES[figure]} | {value} | none set | |")
    rows += [
        f"| {TITLES[name]} | relative L2 error against fp32 | {error['relative_l2']:.2g} | none set | |"
        for name, error in metrics["precisions"].items()
    ]
    return ["\n".join(rows), metrics["samples"]["diffusion"]["protocol"]]


def scale_remarks(metrics: dict) -> list[str]:
    evaluation = metrics["samples"]["diffusion"]
    base = evaluation["baselines"]
    near, resized = base["real_frechet_distance"], base["real_resized_frechet_distance"]
    real = f"{base['num_images']} real training digits lie at Frechet distance {near:.3f} from the held-out ones"
    if resized is not None:
        real += f", and {resized:.3f} after the way up to the samples' size and down again"
    lines = [
        f"The same classifier recognises {evaluation['classifier_accuracy']:.1%} of the held-out real digits.",
        f"{real}: samples in this range cannot be told from real ones by this figure.",
        f"Judge both figures: the mean image of each class scores {base['class_means_accuracy']:.0%} accuracy, and "
        f"only its Frechet distance of {base['class_means_frechet_distance']:.2f} gives it away.",
        "Pre-training shows in the probe below. It brings no measurable gain in samples at this scale, and none is "
        "claimed.",
    ]
    return ["How to read the figures:", "\n".join(f"- {line}" for line in lines)]


def pictures(metrics: dict) -> list[str]:
    parts = ["## Samples"]
    for name, title in SAMPLES.items():
        drawn = metrics["samples"][name]["sampling"]
        keys = ("sampler", "steps", "guidance")
        settings = ", ".join(f"{key} {drawn[key]}" for key in keys if drawn.get(key) is not None)
        parts.append(f"**{title}**{f' ({settings})' if settings else ''}\n\n![{title}](samples_{name}/grid.png)")
    levels = metrics["probe"]["probe_after"]["accuracy"]
    rows = ["| sigma | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for name, label in PROBES.items():
        rows.append(
            f"| {label} | " + " | ".join(f"{v:.1%}" for v in metrics["probe"][name]["accuracy"].values()) + " |"
        )
    return [
        *parts,
        "## Encoder",
        metrics["probe"]["probe_after"]["protocol"],
        "\n".join(rows),
        "![Linear probe](probe.png)",
        "## Training",
        "![Loss curves](curves.png)",
        "The diffusion and consistency losses are divided by the distance of two noise levels: their fall means "
        "something, their size does not.",
    ]


def costs(metrics: dict) -> list[str]:
    machine = metrics["machine"]
    rows = ["| stage | seconds |", "|---|---|"]
    rows += [f"| {name} | {seconds:.0f} |" for name, seconds in metrics["timings_s"].items()]
    rows.append(f"| total | {metrics['total_s']:.0f} |")
    steps = ", ".join(f"{STAGES[name].lower()} {figures['steps']}" for name, figures in metrics["training"].items())
    return [
        "## Cost",
        "\n".join(rows),
        f"Steps: {steps}. Machine: {machine['cpu']}, {machine['cores']} cores"
        f"{', ' + machine['gpu'] if machine['gpu'] else ', no GPU'}; torch {machine['torch']}.",
    ]


def shown(goal: dict, key: str) -> str:
    formats = {"accuracy": ".1%", "accuracy_lost": ".1%", "psnr_db": ".1f"}
    return format(goal[key], formats.get(goal["figure"], ".3f"))


def goal_line(goal: dict) -> str:
    sign = ">=" if goal["figure"] in AT_LEAST else "<="
    verdict = "yes" if goal["reached"] else "NO"
    name = f"{TITLES[goal['samples']]}: {FIGURES[goal['figure']]}"
    return f"{name:<52} {shown(goal, 'value'):>7} (goal {sign} {shown(goal, 'wanted')})  reached: {verdict}"


def save(figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
