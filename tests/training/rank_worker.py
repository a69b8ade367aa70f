"""What test_distributed looks at: gradients, runs and measurements of one rank and of several.

One process imports everything, and each rank is a fork of it.
"""

import contextlib
import datetime
import functools
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import time
import traceback
from pathlib import Path

import sklearn.decomposition  # noqa: F401
import sklearn.linear_model  # noqa: F401
import sklearn.svm  # noqa: F401
import torch
import torch.distributed.fsdp  # noqa: F401

from epg_fast import config as configs
from epg_fast import training
from epg_fast.data import DataError, ImageFolder, PillowLoader
from epg_fast.distributed import joined
from epg_fast.evaluation.judge import Judges
from epg_fast.models import create_encoder, save_weights
from epg_fast.models.fp8 import use_fp8
from epg_fast.training import loop
from epg_fast.training.draws import Draws
from epg_fast.training.gradients import LossScale, add_gradients
from epg_fast.training.parallel import is_sharded, parallelize
from tests.training import stages
from tests.training.runs import few_digits, forget_figures
from tests.training.stages import JOBS, SIZES, make_stage, spoil, stage_class

# Tensors of 1, 11, 24, 32 and more rows: uneven and empty parts, too.
MODEL = stages.SMALLER | {"output_dim": 10}
# Which ranks meet a bad file, where one is allowed.
BAD = [("bad-allowed", [1]), ("bad-too-many", [1, 0])]
DIFFUSION = "finetune-diffusion"
# Evaluations of the weights of one run: ranks, and how they are kept.
SAME_WEIGHTS = {
    "2 ranks": (2, {}),
    "4 ranks, of which one has no batch": (4, {}),
    "EMA in host memory": (2, {"offload_ema": True}),
    "sharded": (2, {"parallelism": "fsdp"}),
}
# Runs of two ranks that are measured, and have a twin that is not.
MEASURED = {
    "pretrain-2": ("pretrain", {"gradient_accumulation": 2}),
    "pretrain-ddp-2": ("pretrain", {"parallelism": "ddp"}),
    "evaluated-fsdp": (DIFFUSION, {}),
    "evaluated-offload": (DIFFUSION, {"parallelism": "ddp", "offload_ema": True}),
}


def main(digits, folder):
    """Runs that are not measured, and gradients."""
    save_encoder(folder)
    run = functools.partial(one, digits, folder)

    def gradients(ranks, parts):
        names = {job: f"gradients-{job}-{ranks}-{parts}" for job in JOBS}
        return [(write_gradients, *make_config(digits, folder, names[j], j, **_one_update(parts))) for j in JOBS]

    ddp, recompute = {"parallelism": "ddp"}, {"activation_checkpointing": True}  # blocks are put together once more
    on_ranks(1, [*(run(f"{j}-1", j, **ddp) for j in JOBS), *gradients(1, 1), *gradients(1, 4)])
    # Workers in the killed run only: they must not matter either.
    workers = configs.DataConfig(str(digits / "train"), normalization="simple", workers=1, backend="pillow")
    on_ranks(1, [run("killed", "pretrain", **ddp, kill_at=3, data=workers)], ends=-signal.SIGKILL)
    first = [run(name, job, **fields) for name, (job, fields) in MEASURED.items()]
    on_ranks(2, [*first, run("diffusion-2", **recompute, stop_at=1), *gradients(2, 1), *gradients(2, 3)])
    copied(folder / "diffusion-2", "stopped")
    flip_a_bit(copied(folder / "pretrain-2", "damaged") / "checkpoints/step_000000004/rank_00001.safetensors")
    copied(folder / "finetune-consistency-1", "consistency-2", 2)
    second = [
        run("damaged", "pretrain", gradient_accumulation=2),
        run("diffusion-2", **recompute),
        run("consistency-2", "finetune-consistency", gradient_accumulation=2),
        *(run(name, data=damaged_data(digits, folder / f"{name}-data", *met_by), log_every=2) for name, met_by in BAD),
        run("full", full_at=3, steps=100),  # the last: this process can write no large file any more
    ]
    on_ranks(2, second)
    for name in ("ddp", "fsdp"):
        copied(folder / "stopped", name, 2)
    (folder / "fsdp/previews/step_000000002.png").unlink()  # as a kill may leave it
    third = [run("killed", "pretrain", **ddp), *(run(name, parallelism=name) for name in ("ddp", "fsdp"))]
    half = {"precision": "fp16", "steps": 2, "spoil": False}
    third += [run(f"half-{name}", "pretrain", parallelism=name, **half) for name in ("ddp", "fsdp")]
    on_ranks(1, third)


def measure(digits, folder):
    """Runs that are measured, beside those of `main`."""
    few_digits(digits, folder / "few")
    run = functools.partial(one, digits, folder, measured=True)

    def measured(twin, name=None, **fields):
        job, own = MEASURED[twin]
        return run(name or f"{twin}-measured", job, **own, **fields)

    for name in ("1 rank", *SAME_WEIGHTS):
        copied(folder / f"{DIFFUSION}-1", name)
    ddp = {"parallelism": "ddp"}
    on_ranks(1, [run("1 rank", **ddp), run("pretrain-1-measured", "pretrain", **ddp)])
    for name, (ranks, fields) in SAME_WEIGHTS.items():
        on_ranks(ranks, [run(name, **ddp | fields)])
    stopped = functools.partial(measured, "evaluated-fsdp", "stopped-fsdp", checkpoint_every=4)
    split = stays_split, *make_config(digits, folder, "none", "pretrain")
    on_ranks(2, [*map(measured, MEASURED), stopped(stop_in=2), split, (long_decision,)])
    killed = ("pretrain-2", "pretrain-ddp-2")
    for name in killed:  # between the checkpoint and the figures of step 2
        forget_figures(copied(folder / f"{name}-measured", f"{name}-killed", 2), 2)
    on_ranks(2, [stopped(), *(measured(name, f"{name}-killed") for name in killed)])


def one(digits, folder, name, job=DIFFUSION, steps=4, **fields):
    """A run, of which in pre-training a batch is spoilt."""
    return one_run, *make_config(digits, folder, name, job, **{"steps": steps, "spoil": job == "pretrain"} | fields)


def copied(run, name, *steps):
    """The run folder `name` beside `run`, as that was when one of these steps, or the last, had been saved."""
    copy = Path(shutil.copytree(run, run.with_name(name)))
    for path in (copy / "checkpoints").glob("step_*"):
        if steps and int(path.name[5:]) not in steps:
            shutil.rmtree(path)
    return copy


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
    interference = {key: fields.pop(key, None) for key in ("spoil", "full_at", "stop_at", "stop_in", "kill_at")}
    few, measured = {part: str(folder / "few" / part) for part in ("train", "test")}, fields.pop("measured", False)
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
    if measured and job == "pretrain":  # an uneven share each, and noise that decides about many images
        probe = configs.ProbeConfig(2, test=str(digits / "test"), num=(201, 151), sigmas=[0.3, 0.5])
        own |= {"probe": probe, "collapse": configs.CollapseConfig(1)}
    elif measured:
        own["evaluate"] = configs.RunEvaluationConfig(every=2, num=20, batch_size=8, sigma_rel=[0.1], **few)
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


def on_ranks(count, tasks, ends=0):
    """Have all `tasks` done by `count` new processes that are ranks."""
    context = multiprocessing.get_context("fork")
    ports = [free_port() for _ in tasks]
    ranks = [context.Process(target=one_rank, args=(rank, count, ports, tasks)) for rank in range(count)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(200)
            assert process.exitcode == ends, f"a rank of {count} ended with {process.exitcode}"
    finally:
        for process in ranks:  # which would wait for one that has failed
            process.kill()


_PORTS = itertools.count()


def free_port():
    """A port that nobody listens to, and that stays so until a rank does.

    The system gives none from this range to connections, and test processes each take their own part of it.
    """
    while True:
        port = 10000 + (32 * os.getpid() + next(_PORTS) % 32) % 20000
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


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


STEP, JUDGE = loop.train_step, Judges.rows


def one_run(rank, config, job, interference):
    judged = []

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
        if interference["kill_at"] == state.iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        STEP(state, batch, metrics)

    def judge(self, images, labels):
        judged.append(len(images))
        if rank == 1 and len(judged) == interference["stop_in"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return JUDGE(self, images, labels)

    loop.train_step, Judges.rows = interfered, judge
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


def stays_split(rank, config, job, interference):
    """What a measurement puts together of weights is let go, before a checkpoint asks for the parts."""
    with joined("cpu") as ranks:
        stage = make_stage(job, config, ranks=ranks)
        parallel = parallelize(stage)
        feature = parallel.observe(stage.network.encode, torch.randn(2, 3, 32, 32), torch.zeros(2))
        assert len(feature) == 2 and all(map(is_sharded, stage.network.parameters()))


def long_decision(rank):
    """A decision takes longer than ranks wait for each other in a collective."""
    with joined("cpu", timeout=datetime.timedelta(seconds=1)) as ranks:
        for answer in (1, 2):
            assert ranks.decide(lambda answer=answer: time.sleep(1.5) or answer) == answer
