"""Gather what the demo left in its folder into curves.png, probe.png, metrics.json and report.md.

Usage: python demo/report.py runs/demo
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from epg_fast.evaluation import page
from epg_fast.files import write_atomically
from epg_fast.plans import Machine
from epg_fast.wording import markdown_table

STAGES = {"pretrain": "Pre-training", "diffusion": "Diffusion", "consistency": "Consistency"}
SAMPLES = {
    "diffusion": "Diffusion, guided",
    "diffusion_unguided": "Diffusion, unguided",
    "consistency": "Consistency, one step",
    "diffusion_bf16": "Diffusion, guided, bf16",
    "diffusion_fp8": "Diffusion, guided, fp8",
}
SHOWN = ("diffusion", "diffusion_unguided", "consistency")
PROBES = {"probe_before": "before pre-training", "probe_after": "after pre-training"}
FIGURES = {
    "accuracy": ("accuracy", ".1%"),
    "frechet_distance": ("Frechet distance", ".3f"),
    "psnr_db": ("PSNR against fp32, dB", ".1f"),
    "relative_l2": ("relative L2 error against fp32", ".2g"),
    "accuracy_lost": ("accuracy lost against fp32", ".1%"),
}
# (samples, figure, relation, goal); None for a figure that is shown and not judged.
GOALS = [
    ("diffusion", "accuracy", ">=", 0.95),
    ("diffusion", "frechet_distance", "<=", 0.30),
    ("consistency", "accuracy", ">=", 0.85),
    ("consistency", "frechet_distance", "<=", 0.50),
    ("diffusion_bf16", "psnr_db", ">=", 35.0),
    ("diffusion_fp8", "accuracy_lost", "<=", 0.01),
    ("diffusion_unguided", "accuracy", None, None),
    ("diffusion_unguided", "frechet_distance", None, None),
    ("diffusion_bf16", "relative_l2", None, None),
    ("diffusion_fp8", "relative_l2", None, None),
]


class ReportError(Exception):
    """Something the report needs is missing or unreadable."""


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a demo folder; exits with a message that names the first missing or unreadable file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        sys.exit("usage: python demo/report.py FOLDER")
    run = Path(arguments[0])
    try:
        metrics, curves = gather(run)
        pictures = {
            "curves.png": page.drawn(lambda panels: draw_curves(panels[0], curves), 4.6, 3.8, columns=len(curves)),
            "probe.png": page.drawn(lambda panels: draw_probes(panels[0, 0], metrics["probe"]), 5.6, 3.8),
        }
    except (ReportError, ImportError) as error:
        sys.exit(f"error: {error}")
    texts = {"metrics.json": json.dumps(metrics, indent=2) + "\n", "report.md": render(metrics)}
    for name, content in (pictures | texts).items():
        write_atomically(run / name, content)
    for goal in metrics["goals"]:
        if goal["relation"]:
            name = f"{SAMPLES[goal['samples']]}: {FIGURES[goal['figure']][0]}"
            verdict = "yes" if goal["reached"] else "NO"
            wanted = f"(goal {goal['relation']} {shown(goal, 'wanted')})"
            print(f"{name:<52} {shown(goal, 'value'):>7} {wanted}  reached: {verdict}")
    print(f"{run / 'report.md'}: {'all goals reached' if metrics['goals_reached'] else 'NOT every goal was reached'}")
    return 0


def gather(run: Path) -> tuple[dict, dict[str, list[dict]]]:
    """(all figures, the lines of metrics of each stage). Raises ReportError naming the first file that is missing."""
    samples = {name: read_json(run / "eval" / f"{name}.json") for name in (*SHOWN, "diffusion_fp8")}
    probes = {name: read_json(run / "eval" / f"{name}.json") for name in PROBES}
    for name in ("diffusion_bf16", "diffusion_fp8"):
        samples.setdefault(name, {}).update(read_json(run / f"samples_{name}" / "precision.json"))
    curves = {name: read_metrics(run / name / "metrics.jsonl") for name in STAGES}
    timings = read_json(run / "timings.json")
    for name in SHOWN:
        existing(run / f"samples_{name}" / "grid.png")
    try:
        samples["diffusion_fp8"]["accuracy_lost"] = (
            samples["diffusion"]["accuracy"] - samples["diffusion_fp8"]["accuracy"]
        )
        goals = [judged(samples[name][figure], name, figure, *goal) for name, figure, *goal in GOALS]
        if probes["probe_before"]["accuracy"].keys() != probes["probe_after"]["accuracy"].keys():
            raise ReportError(
                f"the probes in {run / 'eval'} have different noise levels; run the whole demo: make demo"
            )
    except KeyError as error:
        raise ReportError(f"a file in {run / 'eval'} lacks {error}; write it again with: make demo") from None
    metrics = {
        "goals_reached": all(goal["reached"] for goal in goals),
        "goals": goals,
        "samples": samples,
        "probe": probes,
        "training": {name: training_figures(rows) for name, rows in curves.items()},
        "timings_s": timings,
        "total_s": sum(timings.values()),
        "machine": machine(),
    }
    return metrics, curves


def judged(value: float, samples: str, figure: str, relation: str | None, wanted: float | None) -> dict:
    reached = relation is None or (value >= wanted if relation == ">=" else value <= wanted)
    goal = {"samples": samples, "figure": figure, "relation": relation, "wanted": wanted, "value": value}
    return goal | {"reached": bool(reached)}


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ReportError(f"{path} is missing; run the whole demo with: make demo")
    return path


def read_json(path: Path) -> dict:
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not valid JSON ({error}); write it again with: make demo") from error


def read_metrics(path: Path) -> list[dict]:
    """Lines of a metrics.jsonl by step; the last one of a step counts, which a resumed run logs again."""
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


def training_figures(rows: list[dict]) -> dict:
    last = {key: rows[-1][key] for key in ("images_per_second", "elapsed_s") if key in rows[-1]}
    losses = finite(rows)[1]
    # Strict JSON has no NaN: a run whose every loss diverged shows null.
    return {"steps": rows[-1]["step"], "last_loss": running_mean(losses)[-1] if losses else None, **last}


def finite(rows: list[dict]) -> tuple[list[int], list[float]]:
    kept = [(row["step"], row["loss"]) for row in rows if math.isfinite(row["loss"])]
    return [step for step, _ in kept], [loss for _, loss in kept]


def running_mean(values: list[float]) -> list[float]:
    """Centred mean over a tenth of the curve; at the ends, over the part of the window that lies on the curve."""
    reach = max(1, len(values) // 20)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_curves(panels, curves: dict[str, list[dict]]) -> None:
    """The loss of each stage, logged and smoothed."""
    for panel, (name, rows) in zip(panels, curves.items(), strict=True):
        steps, losses = finite(rows)
        panel.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="logged")
        panel.plot(steps, running_mean(losses), color="C0", linewidth=2, label="smoothed")
        # Contrastive losses start near the log of the batch and fall by a small factor, which a log axis would hide.
        if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.set(title=STAGES[name], xlabel="step", ylabel="loss" if name == "pretrain" else "weighted loss")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)


def draw_probes(panel, probes: dict) -> None:
    """The probe's accuracy by noise level."""
    for (name, label), color in zip(PROBES.items(), ("0.6", "C0"), strict=True):
        # Evenly spaced levels: the clean one is orders of magnitude below the others, even on a log axis.
        levels, values = zip(*probes[name]["accuracy"].items(), strict=True)
        panel.plot(levels, [100 * value for value in values], "o-", color=color, label=label)
    panel.set(title="Linear probe of the encoder", xlabel="noise level sigma (unshifted)", ylabel="accuracy, %")
    panel.set_ylim(0, 102)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def machine() -> dict:
    found = {"cpu": Machine.here(torch.device("cpu")).device, "gpu": None, "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def shown(goal: dict, key: str) -> str:
    return format(goal[key], FIGURES[goal["figure"]][1])


def render(metrics: dict) -> str:
    """The text of report.md."""
    samples, probe = metrics["samples"], metrics["probe"]
    goals = []
    for goal in metrics["goals"]:
        wanted, reached = "none set", ""
        if goal["relation"]:
            wanted = f"{'at least' if goal['relation'] == '>=' else 'at most'} {shown(goal, 'wanted')}"
            reached = "yes" if goal["reached"] else "**no**"
        name = SAMPLES[goal["samples"]], FIGURES[goal["figure"]][0]
        goals.append((*name, shown(goal, "value"), wanted, reached))

    base = samples["diffusion"]["baselines"]
    real = f"{base['num_images']} real training digits lie at Frechet distance {base['real_frechet_distance']:.3f} "
    real += "from the held-out ones"
    if (resized := base["real_resized_frechet_distance"]) is not None:
        real += f", and {resized:.3f} after the way up to the samples' size and down again"
    remarks = [
        f"The same classifier recognises {samples['diffusion']['classifier_accuracy']:.1%} of the held-out digits.",
        f"{real}: samples in this range cannot be told from real ones by this figure.",
        f"Judge both figures: the mean image of each class scores {base['class_means_accuracy']:.0%} accuracy, and "
        f"only its Frechet distance of {base['class_means_frechet_distance']:.2f} gives it away.",
        "Pre-training shows in the probe below. It brings no measurable gain in samples at this scale.",
    ]
    pictures = []
    for name in SHOWN:
        drawn = samples[name]["protocol"]["sampling"]
        settings = ", ".join(f"{k} {drawn[k]}" for k in ("sampler", "steps", "guidance") if drawn.get(k) is not None)
        pictures += [f"**{SAMPLES[name]}** ({settings})", f"![{SAMPLES[name]}](samples_{name}/grid.png)"]

    probes = [
        (label, *(f"{value:.1%}" for value in probe[name]["accuracy"].values())) for name, label in PROBES.items()
    ]
    costs = [(name, f"{seconds:.0f}") for name, seconds in metrics["timings_s"].items()]
    costs.append(("total", f"{metrics['total_s']:.0f}"))
    steps = ", ".join(f"{STAGES[name].lower()} {figures['steps']}" for name, figures in metrics["training"].items())
    here = metrics["machine"]
    sections = [
        "# Demo report",
        markdown_table(("samples", "figure", "value", "goal", "reached"), goals),
        samples["diffusion"]["protocol"]["text"],
        "How to read the figures:",
        "\n".join(f"- {line}" for line in remarks),
        "## Samples",
        *pictures,
        "## Encoder",
        probe["probe_after"]["protocol"]["text"],
        markdown_table(("sigma", *probe["probe_after"]["accuracy"]), probes),
        "![Linear probe](probe.png)",
        "## Training",
        "![Loss curves](curves.png)",
        "The diffusion and consistency losses are divided by the distance of two noise levels: their fall means "
        "something, their size does not.",
        "## Cost",
        markdown_table(("stage", "seconds"), costs),
        f"Steps: {steps}. Machine: {here['cpu']}, {here['gpu'] or 'no GPU'}; torch {here['torch']}.",
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.exit(main())
