"""What test_distributed looks at: gradients, and runs, of one rank and of two.

One process imports everything, and each rank is a fork of it.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import socket
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp  # noqa: F401

from epg_fast import config as configs
from epg_fast import training
from epg_fast.data import DataError, ImageFolder, PillowLoader
from epg_fast.distributed import joined
from epg_fast.models import create_encoder, save_weights
from epg_fast.models.fp8 import use_fp8
from epg_fast.training import loop
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import LossScale, add_gradients
from epg_fast.training.parallel import parallelize
from tests.training import stages
from tests.training.stages import JOBS, SIZES, make_stage, spoil, stage_class

# Tensors of 1, 11, 24, 32 and more rows: uneven and empty parts, too.
MODEL = stages.SMALLER | {"output_dim": 10}


# Which ranks meet a bad file, where one is allowed.
BAD = [("bad-allowed", [1]), ("bad-too-many", [1, 0])]


def main(data, folder):
    save_encoder(folder)

    def run(name, job="finetune-diffusion", steps=4, **fields):
        return one_run, *make_config(data, folder, name, job, steps=steps, **fields)

    def gradients(ranks, parts):
        return [
            (write_gradients, *make_config(data, folder, f"gradients-{job}-{ranks}-{parts}", job, **_one_update(parts)))
            for job in JOBS
        ]

    def copied(source, name):
        """Run folder `name` as `source` was when step 2 had been saved."""
        shutil.copytree(folder / source, folder / name)
        for later in (folder / name / "checkpoints").glob("step_*[!2]"):
            shutil.rmtree(later)
        return name

    ddp, micro_batches = {"parallelism": "ddp"}, {"gradient_accumulation": 2}
    recompute = {"activation_checkpointing": True}  # the blocks' weights are put together once more
    on_ranks(1, [*(run(f"{j}-1", j, **ddp, spoil=j == "pretrain") for j in JOBS), *gradients(1, 1), *gradients(1, 4)])
    first = [
        run("pretrain-2", "pretrain", **micro_batches, spoil=True),
        run("pretrain-ddp-2", "pretrain", **ddp, spoil=True),
        run("diffusion-2", **recompute, stop_at=1),
    ]
    on_ranks(2, [*first, *gradients(2, 1), *gradients(2, 3)])
    shutil.copytree(folder / "diffusion-2", folder / "stopped")
    shutil.copytree(folder / "pretrain-2", folder / "damaged")
    flip_a_bit(folder / "damaged/checkpoints/step_000000004/rank_00001.safetensors")
    second = [
        run("damaged", "pretrain", **micro_batches),
        run("diffusion-2", **recompute),
        run(copied("finetune-consistency-1", "consistency-2"), "finetune-consistency", **micro_batches),
        (accumulate, *make_config(data, folder, "accumulate", "finetune-diffusion")),
        *(run(name, data=damaged_data(data, folder / f"{name}-data", *met_by), log_every=2) for name, met_by in BAD),
        run("full", full_at=3, steps=100),  # the last: this process can write no large file any more
    ]
    on_ranks(2, second)
    third = [run(copied("stopped", name), parallelism=name) for name in ("ddp", "fsdp")]
    (folder / "fsdp/previews/step_000000002.png").unlink()  # as a kill may leave it
    third += [run(f"half-{name}", "pretrain", parallelism=name, precision="fp16", steps=2) for name in ("ddp", "fsdp")]
    on_ranks(1, third)


def save_encoder(folder):
    sizes = SIZES | {name: value for name, value in MODEL.items() if name in SIZES}
    weights = create_encoder("digits_32", **sizes).state_dict()
    save_weights(folder / "encoder.safetensors", weights, {"config": {"image_size": 32, "patch_size": 8, **sizes}})


def damaged_data(digits, folder, *ranks):
    """A copy of the images in which the fourth that each of these ranks meets is empty."""
    images = ImageFolder(shutil.copytree(digits / "train", folder))
    options = {"image_size": 32, "batch_size": 12, "seed": 0, "workers": 0, "world_size": 2}
    for place in [next(PillowLoader(images, rank=rank, **options))["index"][3] for rank in ranks]:
        (folder / images.paths[place]).write_bytes(b"")
    return configs.DataConfig(str(folder), workers=0, backend="pillow", max_bad_fraction=1 / len(images))


def make_config(digits, folder, name, job, **fields):
    """(configuration, job, how the run is interfered with)."""
    interference = {key: fields.pop(key, None) for key in ("spoil", "full_at", "stop_at")}
    own = {
        "pretrain": {},
        "finetune-diffusion": {"preview": configs.PreviewConfig(every=2, num=2, steps=2)},
        "finetune-consistency": {
            "preview": configs.PreviewConfig(every=0),
            "perceptual": str(folder / "encoder.safetensors"),
            "first_stage": 1,
        },
    }[job]
    own |= {} if job == "pretrain" else {"dropout": 0.0, "p_mean": 1.0}
    backend = "torch" if job == "finetune-diffusion" else "auto"
    defaults = {
        "outdir": str(folder / name),
        "data": configs.DataConfig(str(digits / "train"), normalization="simple", workers=0, backend="pillow"),
        # eps: rounding in gradients near 0 shall not become a step of lr
        "optimizer": configs.OptimizerConfig(
            lr=1e-3, warmup_steps=2, clip_norm=1.0, clip_after=1, eps=1e-3, backend=backend
        ),
        "posthoc_ema": configs.PosthocEmaConfig([0.1], every=3),
        "batch_size": 12,
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 2,
        "tensorboard": False,
        "parallelism": "fsdp",
    }
    return stages.make_config(job, MODEL, **(defaults | own | fields)), job, interference


def _one_update(parts):
    return {"gradient_accumulation": parts, "parallelism": "ddp", "ops": "plain"}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def on_ranks(count, tasks):
    """Have all `tasks` done by `count` new processes that are ranks."""
    context = multiprocessing.get_context("fork")
    ports = [free_port() for _ in tasks]
    ranks = [context.Process(target=one_rank, args=(rank, count, ports, tasks)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
        assert process.exitcode == 0, f"a rank of {count} ended with {process.exitcode}"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(rank, count, ports, tasks):
    torch.set_num_threads(1)
    try:
        for port, (act, *job) in zip(ports, tasks, strict=True):
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            act(rank, *job)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


STEP = loop.train_step


def one_run(rank, config, job, interference):
    def interfered(state, batch, metrics):
        if interference["spoil"] and state.iteration == 1:
            batch["x"] = batch["x"].float() / 255
            if rank == state.ranks.world_size - 1:
                spoil(batch)
        if interference["full_at"] == state.iteration and rank == 1:
            state.writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if interference["stop_at"] == state.iteration and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        STEP(state, batch, metrics)

    loop.train_step = interfered
    try:
        training.train(config, stage_class(job))
    except (OSError, DataError) as error:
        Path(config.outdir, f"error_{rank}").write_text(str(error))


def write_gradients(rank, config, job, interference):
    """What `gradients` finds of the global batch, as rank 0 has it, into a file."""
    with joined("cpu") as ranks:
        found = gradients(config, job, ranks)
        if ranks.main:
            torch.save(found, f"{config.outdir}.pt")


def gradients(config, job, ranks, scaled=False):
    """{"loss": ..., "grad.<name>": ..., "buffer.<name>": ...} of the whole global batch, as rank 0 has them; of
    diffusion, the gradients with its linears in FP8 as well, "fp8.<name>"."""
    torch.manual_seed(0)
    stage = make_stage(job, config, perceptual=False, ranks=ranks)
    stages.spread(stage.network)
    count = config.batch_size // ranks.world_size
    own = slice(ranks.rank * count, (ranks.rank + 1) * count)
    batch = {name: images[own] for name, images in stages.batch_of(stage, config.batch_size).items()}
    parallel, scale = parallelize(stage), LossScale(ranks.device, enabled=scaled)
    draws = Draws(0, 0, ranks.rank * count, count, ranks.device)
    loss = add_gradients(stage, parallel, batch, draws, 7, scale)
    assert len(loss.per_sample) == count and all(len(term) == count for term in loss.terms.values())
    values = torch.stack([loss.loss.detach(), loss.level.double().mean()]) / ranks.world_size
    if ranks.world_size > 1:
        torch.distributed.all_reduce(values)
    trained = {name: p for name, p in stage.network.named_parameters() if p.grad is not None}
    found = {f"grad.{n}": p.grad for n, p in trained.items()} | {
        f"buffer.{n}": b for n, b in stage.network.named_buffers()
    }
    if ranks.world_size > 1:  # the gradients lie in the buckets that were summed, each like its parameter
        assert all(p.grad._base is not None and p.grad.stride() == p.stride() for p in trained.values())
    if job == "finetune-diffusion":
        found = {name: value.clone() for name, value in found.items()}
        use_fp8(stage.network, "plain")
        stage.network.zero_grad()
        add_gradients(stage, parallel, batch, draws, 7, scale)
        found |= {f"fp8.{n}": p.grad for n, p in trained.items()}
    return {"loss": values[0], "level": values[1]} | found


def accumulate(rank, config, job, interference):
    """Two backward passes give the same gradients, whether the first is averaged over the ranks or only added to."""
    found = []
    with joined("cpu", group_for_one=config.parallelism == "fsdp") as ranks:
        for now in (True, False):
            torch.manual_seed(0)
            stage = make_stage(job, config, ranks=ranks)
            network, parallel = stage.network, parallelize(stage)

            def loss(x, network=network):
                return network.encode(x, x[:, 0, 0, 0]).square().sum()

            x = torch.full((2, 3, 32, 32), rank + 1.0)
            with parallel.averaged(now):
                parallel(loss, x).backward()
            assert (network.pos_embed.grad is None) != now
            parallel(loss, 2 * x).backward()
            found.append({n: p.grad.full_tensor() for n, p in network.named_parameters() if p.grad is not None})
    averaged, added = found
    assert averaged.keys() == added.keys() and "blocks.0.mlp.fc1.weight" in added
    for name, gradient in averaged.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-5, atol=1e-6)
