"""The whole method on handwritten digits, as a user would type it: `python demo/run.py [folder]` (default runs/demo).

Every step is an `epg-fast` command, printed before it runs. Run again, it resumes where it stopped.
"""

import json
import shlex
import sys
import time
from pathlib import Path

from report import main as write_report

from epg_fast.__main__ import main as epg_fast

OUTDIR = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
DIGITS = f"--config digits --data.path {OUTDIR}/data/train"
REAL = f"--train {OUTDIR}/data/train --test {OUTDIR}/data/test"
# Guidance reaches to much noisier levels than on ImageNet, because an upsampled digit is redundant.
GUIDANCE = "--guidance 1.6 --interval [0.19,20.0]"

STEPS = {
    "data": [f"prepare-data --outdir {OUTDIR}/data"],
    "probe before": [
        f"evaluate --probe digits_32 --normalization simple {REAL} --output {OUTDIR}/eval/probe_before.json"
    ],
    "pretrain": [f"pretrain {DIGITS} --config digits_pretrain --outdir {OUTDIR}/pretrain"],
    "probe after": [f"evaluate --probe {OUTDIR}/pretrain {REAL} --output {OUTDIR}/eval/probe_after.json"],
    "diffusion": [
        f"finetune-diffusion {DIGITS} --config digits_diffusion --init_from {OUTDIR}/pretrain "
        f"--outdir {OUTDIR}/diffusion"
    ],
    "consistency": [
        f"finetune-consistency {DIGITS} --config digits_consistency --init_from {OUTDIR}/diffusion "
        f"--outdir {OUTDIR}/consistency"
    ],
    "sample": [
        f"sample --checkpoint {OUTDIR}/diffusion --num 500 --batch_size 250 --steps 18 {GUIDANCE} "
        f"--outdir {OUTDIR}/samples_diffusion",
        f"sample --checkpoint {OUTDIR}/diffusion --num 500 --batch_size 250 --steps 18 "
        f"--outdir {OUTDIR}/samples_diffusion_unguided",
        f"sample --checkpoint {OUTDIR}/consistency --num 500 --batch_size 250 --sampler onestep "
        f"--outdir {OUTDIR}/samples_consistency",
    ],
    # A CPU shows what these precisions do to the images, not how fast they are.
    "precisions": [
        f"sample --checkpoint {OUTDIR}/diffusion --num {num} --batch_size 100 --steps 18 {GUIDANCE} "
        f"--precision {precision} --error_images 100 --outdir {OUTDIR}/samples_diffusion_{precision}"
        for precision, num in (("bf16", 100), ("fp8", 500))
    ],
    "evaluate": [
        f"evaluate --samples {OUTDIR}/samples_{name}/samples.npz {REAL} --output {OUTDIR}/eval/{name}.json"
        for name in ("diffusion", "diffusion_unguided", "consistency", "diffusion_fp8")
    ],
}


def run() -> int:
    """All steps, then the report. Returns the exit code of the first command that fails, else 0."""
    timings_file = OUTDIR / "timings.json"
    timings = json.loads(timings_file.read_text()) if timings_file.exists() else {}
    for name, commands in STEPS.items():
        started = time.perf_counter()
        for command in commands:
            print(f"\n$ epg-fast {command}", flush=True)
            code = epg_fast(shlex.split(command))
            if code:
                return code
        # A resumed demo adds to the time of the part that was interrupted.
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - started
        timings_file.write_text(json.dumps(timings, indent=2) + "\n")
    print()
    return write_report([str(OUTDIR)]) or 0


if __name__ == "__main__":
    sys.exit(run())
