"""What test_sharding looks at: runs with one rank and with two.

One process imports everything, and each rank is a fork of it.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

from epg_fast import config as configs
from epg_fast import training
from epg_fast.distributed import joined
from epg_fast.models import create_encoder, save_weights
from epg_fast.training import loop, state
from epg_fast.training.checkpoint import CheckpointError
from epg_fast.training.optimizer import make_optimizer
from epg_fast.training.sharding import shard, whole, without_gradient_sync

JOBS = {"pretrain": "Pretrain", "diffusion": "Diffusion", "consistency": "Consistency"}
SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_dim": 24, "output_dim": 10}
# Tensors of 1, 11, 24, 32 and more rows: uneven and empty parts, too.
DECODER = {"decoder_embed_dim": 48, "decoder_depth": 2, "decoder_num_heads": 2}


def main(data, folder):
    save_weights(
        folder / "encoder.safetensors",
        create_encoder("digits_32", **SIZES).state_dict(),
        {"config": {"image_size": 32, "patch_size": 8, **SIZES}},
    )

    def run(name, job, **fields):
        return one_run, *make_config(data, folder, name, job, **fields)

    def copied(source, name):
        """Run folder `name` as `source` was when step 2 had been saved."""
        shutil.copytree(folder / source, folder / name)
        for later in (folder / name / "checkpoints").glob("step_*[!2]"):
            if later.name != "step_000000002.pt":
                shutil.rmtree(later) if later.is_dir() else later.unlink()
        return name

    plain = {"parallelism": "ddp"}
    on_ranks(1, [run(f"{job}-1", job, **plain, spoil=job == "pretrain") for job in JOBS])
    parts = {"gradient_accumulation": 2}
    recompute = {"activation_checkpointing": True}  # the blocks' weights are put together once more
    on_ranks(
        2, [run("pretrain-2", "pretrain", **parts, spoil=True), run("diffusion-2", "diffusion", **recompute, stop_at=1)]
    )
    shutil.copytree(folder / "diffusion-2", folder / "stopped")
    shutil.copytree(folder / "pretrain-2", folder / "damaged")
    flip_a_bit(folder / "damaged/checkpoints/step_000000004/__1_0.distcp")
    second = [
        run("damaged", "pretrain", **parts),
        run("diffusion-2", "diffusion", **recompute),
        run(copied("consistency-1", "consistency-2"), "consistency", **parts),
        (accumulate, *make_config(data, folder, "accumulate", "diffusion")),
        run("full", "diffusion", full_at=3, steps=100),
    ]
    on_ranks(2, second)
    third = [run(copied("stopped", name), "diffusion", parallelism=name) for name in ("ddp", "fsdp")]
    (folder / "fsdp/previews/step_000000002.png").unlink()  # as a kill may leave it
    half = {"precision": "fp16", "steps": 2}
    third += [run(f"half-{name}", "pretrain", parallelism=name, **half) for name in ("ddp", "fsdp")]
    on_ranks(1, third)


def make_config(data, folder, name, job, **fields):
    """(configuration, job, how the run is interfered with)."""
    interference = {key: fields.pop(key, None) for key in ("spoil", "full_at", "stop_at")}
    own = {
        "pretrain": {},
        "diffusion": {"preview": configs.PreviewConfig(every=2, num=2, steps=2)},
        "consistency": {
            "preview": configs.PreviewConfig(every=0),
            "perceptual": str(folder / "encoder.safetensors"),
            "first_stage": 1,
        },
    }
    dropout = {} if job == "pretrain" else {"dropout": 0.0, "p_mean": 1.0}
    backend = "torch" if job == "diffusion" else "auto"
    defaults = {
        "outdir": str(folder / name),
        "model": configs.ModelConfig("digits_32", **SIZES, **DECODER),
        "data": configs.DataConfig(str(data / "train"), normalization="simple", workers=0, backend="pillow"),
        # eps: rounding in gradients near 0 shall not become a step of lr
        "optimizer": configs.OptimizerConfig(
            lr=1e-3, warmup_steps=2, clip_norm=1.0, clip_after=1, eps=1e-3, backend=backend
        ),
        "posthoc_ema": configs.PosthocEmaConfig([0.1], every=3),
        "batch_size": 12,
        "steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 2,
        "tensorboard": False,
        "parallelism": "fsdp",
    }
    return getattr(configs, JOBS[job] + "Config")(**(defaults | dropout | own[job] | fields)), job, interference


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


UPDATE = state.RunState.update


def one_run(rank, config, job, interference):
    def interfered(self, step_module, batch, *arguments):
        if interference["spoil"] and self.iteration == 1:
            batch["x"] = batch["x"].float() / 255
            if rank == self.ranks.world_size - 1:
                batch["x"][-1, 0, 0, 0] = float("nan")
        if interference["full_at"] == self.iteration and rank == 1:
            self.writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if interference["stop_at"] == self.iteration and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return UPDATE(self, step_module, batch, *arguments)

    state.RunState.update = interfered
    try:
        training.train(config, getattr(training, JOBS[job] + "Stage"))
    except CheckpointError as error:
        assert interference["full_at"]
        Path(config.outdir, f"error_{rank}").write_text(str(error))


def accumulate(rank, config, job, interference):
    """Two backward passes give the same gradients, whether the first is averaged over the ranks or only added to."""
    found = []
    with joined("cpu", group_for_one=config.parallelism == "fsdp") as ranks:
        for alone in (False, True):
            torch.manual_seed(0)
            stage = training.DiffusionStage(config, ranks)
            network = stage.network
            stage.sharding = shard(network, stage.average, (), ranks)

            def loss(x, network=network):
                return network.encode(x, x[:, 0, 0, 0]).square().sum()

            step_module, x = loop.make_step_module(stage), torch.full((2, 3, 32, 32), rank + 1.0)
            with without_gradient_sync(step_module) if alone else contextlib.nullcontext():
                step_module(loss, x).backward()
            assert (network.pos_embed.grad is None) == alone
            step_module(loss, 2 * x).backward()
            found.append({n: whole(p.grad) for n, p in network.named_parameters() if p.grad is not None})
        apex = dataclasses.replace(config.optimizer, backend="apex")
        try:
            make_optimizer(network, apex)
            raise AssertionError("apex took sharded parameters")
        except ValueError as error:
            assert "does not take sharded parameters" in str(error)
    together, added = found
    assert together.keys() == added.keys() and "blocks.0.mlp.fc1.weight" in added
    for name, gradient in together.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
