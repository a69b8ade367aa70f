# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A pixel-space generator of handwritten digits
#
# A small network is trained on the digits inside scikit-learn, drawn from, timed and judged. It needs
# `pip install 'epg_fast[demo]'`. Every figure below is computed here; with `SMALL` they only show that the cells run.

# %%
import os
import shlex
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from epg_fast import SamplingEngine, from_pretrained
from epg_fast.__main__ import main
from epg_fast.config import EvaluateConfig
from epg_fast.evaluation import evaluate_images
from epg_fast.ops import extension_status

SMALL = bool(os.environ.get("EPG_NOTEBOOK_SMALL"))
FOLDER = Path("runs/notebook_small" if SMALL else "runs/notebook")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # on a CPU the network is too small for more, which would wait for each other


def epg_fast(command):
    """The command line `epg-fast ...`, in this process."""
    print("$ epg-fast", command)
    begun = time.perf_counter()
    if main(shlex.split(command)):
        raise RuntimeError(f"failed: epg-fast {command}")
    print(f"{time.perf_counter() - begun:.1f} s")


def show(images, titles=(), columns=10):
    """Images [N, 3, H, W] in [0, 1], row by row."""
    rows = -(-len(images) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(columns, 1.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image.permute(1, 2, 0))
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, fontsize=8)
    plt.show()


# %% [markdown]
# ## Train
# First the encoder, by itself, then encoder and decoder as a diffusion model. The same commands resume what was
# interrupted, and leave alone what is finished.

# %%
steps = {"pretrain": 4, "diffusion": 8} if SMALL else {"pretrain": 180, "diffusion": 1800}
tiny = "--model.embed_dim 32 --model.depth 1 --model.num_heads 2 --model.hidden_dim 32 --model.output_dim 16 "
tiny += "--model.decoder_embed_dim 48 --model.decoder_depth 1 --model.decoder_num_heads 2 --batch_size 16"
data = (
    f"--config digits --data.path {FOLDER}/data/train --data.backend pillow --tensorboard false {tiny if SMALL else ''}"
)

epg_fast(f"prepare-data --source digits --outdir {FOLDER}/data")
epg_fast(f"pretrain {data} --config digits_pretrain --steps {steps['pretrain']} --outdir {FOLDER}/pretrain")
epg_fast(
    f"finetune-diffusion {data} --config digits_diffusion --steps {steps['diffusion']} "
    f"--init_from {FOLDER}/pretrain --outdir {FOLDER}/diffusion"
)

# %% [markdown]
# ## Draw
# A checkpoint is a run folder, a file or a repository of the hub. It says itself how its output and its pixels are
# meant. An engine is made once for many images.

# %%
model = from_pretrained(FOLDER / "diffusion" / "model.safetensors", device=DEVICE)
# model = from_pretrained("owner/name", device=DEVICE)  # from the hub: pip install 'epg_fast[hub]'
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, step {model.metadata['step']}")

engine = SamplingEngine(model, steps=4 if SMALL else 18, guidance=1.6, interval=(0.19, 20.0))
labels = list(range(10)) * 2
images = engine(labels, seed=0)
print(f"{engine.evaluations} network evaluations an image, in {engine.precision}")
show(images, labels)

# %% [markdown]
# Other settings need no other copy of the network. Image i starts from the same noise with any of them.

# %%
unguided = engine.with_settings(guidance=1.0)
show(unguided(labels, seed=0), labels)

# %% [markdown]
# ## How an image comes about
# At every noise level the network estimates the clean image. At the highest it knows the class and little else.

# %%
final, estimates = engine.trajectory([3], seed=0)
print("the same image" if torch.equal(final, engine([3], seed=0)) else "another image")
levels = [f"{sigma:.2g}" for sigma in estimates]
show(torch.cat([*estimates.values(), final]), [*levels, "image"])

# %% [markdown]
# ## Time two ways to compute it
# `ops` says what computes at each site of the network and the sampler. `epg-fast tune` measures them all on a device
# and keeps a plan, which `ops="auto"` reads. Here are two by hand, in turns, on this device.

# %%
on_cpu = "plain,steps=extension" if extension_status()[0] else "plain,attention=math"
other = "triton" if DEVICE == "cuda" else on_cpu
engines = {ops: SamplingEngine(model, steps=4 if SMALL else 18, ops=ops) for ops in ("plain", other)}
drawn = {ops: engine(labels) for ops, engine in engines.items()}  # compiles and allocates
times = {ops: [] for ops in engines}
for _ in range(2 if SMALL else 10):
    for ops in engines:
        begun = time.perf_counter()
        engines[ops](labels)
        times[ops].append(1000 * (time.perf_counter() - begun))
for ops, each in times.items():
    difference = (drawn[ops] - drawn["plain"]).abs().max().item()
    took = f"{statistics.median(each):.1f} ms ({min(each):.1f} to {max(each):.1f})"
    print(f"{ops}: {took} for {len(labels)} images, which differ by {difference:.1e} at most")

# %% [markdown]
# ## Judge
# Without a large network: does a classifier of real digits recognise the samples, and how far are they from held-out
# digits in a space of 20 dimensions? A figure of few images has a spread, and two figures differ only if it is small.

# %%
num = 40 if SMALL else 500
for name, guidance in (("guided", 1.6), ("unguided", 1.0)):
    epg_fast(
        f"sample --checkpoint {FOLDER}/diffusion --num {num} --steps {4 if SMALL else 18} --guidance {guidance} "
        f"--interval [0.19,20.0] --outdir {FOLDER}/{name}"
    )
result = evaluate_images(
    EvaluateConfig(
        samples=f"{FOLDER}/guided/samples.npz",
        compare=f"{FOLDER}/unguided/samples.npz",
        train=f"{FOLDER}/data/train",
        test=f"{FOLDER}/data/test",
    )
)
for name in ("accuracy", "frechet_distance"):
    other = result["compared"][name]
    print(f"{name}: {result[name]:.3f} +- {result['spread'][name]:.3f}, unguided {other['value']:.3f}", end="; ")
    print(f"apart by {other['difference']:+.3f} +- {other['spread']:.3f}", end=", ")
    print("more than chance" if other["differs"] else "no more than chance")
print(result["protocol"]["text"])
