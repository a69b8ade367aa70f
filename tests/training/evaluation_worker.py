"""What test_evaluation looks at of several ranks: evaluations of the same weights, and runs with and without them.

One process imports everything, and each rank is a fork of it.
"""

import datetime
import os
import shutil
import signal
import time

import sklearn.decomposition  # noqa: F401
import sklearn.svm  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

from epg_fast import config as configs
from epg_fast import training
from epg_fast.distributed import joined
from epg_fast.evaluation.judge import Judges
from tests.training import stages
from tests.training.rank_worker import MODEL, on_ranks
from tests.training.stages import stage_class

SAME_WEIGHTS = {
    "2 ranks": (2, {}),
    "4 ranks, of which one has no batch": (4, {}),
    "EMA in host memory": (2, {"offload_ema": True}),
    "sharded": (2, {"parallelism": "fsdp"}),
}
RUNS = {name: {"parallelism": name} for name in ("ddp", "fsdp")} | {"offload": {"offload_ema": True}}
STOPPED = ("ddp", "fsdp")


def main(digits, folder):
    def run(name, steps=2, evaluates=True, interrupt=None, **fields):
        return one_run, make_config(digits, folder / name, steps, evaluates, **fields), interrupt

    on_ranks(1, [run("trained", evaluates=False)])
    for name in ("1 rank", *SAME_WEIGHTS):
        shutil.copytree(folder / "trained", folder / name)
    on_ranks(1, [run("1 rank")])
    for name, (ranks, fields) in SAME_WEIGHTS.items():
        on_ranks(ranks, [run(name, **fields)])
    interrupt = (1, 2)  # rank 1 is asked to end in the evaluation of step 2
    tasks = [run(f"{name}, {on}", 4, on, **fields) for name, fields in RUNS.items() for on in (True, False)]
    tasks += [run(f"stopped {name}", 4, True, stop, **RUNS[name]) for name in STOPPED for stop in (interrupt, None)]
    on_ranks(2, [*tasks, (long_decision,)])


def make_config(digits, outdir, steps, evaluates, **fields):
    judged = {"train": str(digits / "train"), "test": str(digits / "test"), "num": 20, "batch_size": 8}
    defaults = {
        "outdir": str(outdir),
        "steps": steps,
        "data": configs.DataConfig(str(digits / "train"), normalization="simple", workers=0, backend="pillow"),
        "optimizer": configs.OptimizerConfig(lr=1e-3, warmup_steps=1, backend="torch"),
        "posthoc_ema": configs.PosthocEmaConfig([0.1], every=3),
        "preview": configs.PreviewConfig(every=0, steps=2),
        "evaluate": configs.RunEvaluationConfig(every=2 if evaluates else 0, sigma_rel=[0.1], **judged),
        "batch_size": 8,
        "device": "cpu",
        "log_every": 3,
        "checkpoint_every": 4,
        "tensorboard": False,
        "dropout": 0.5,
    }
    return stages.make_config("finetune-diffusion", MODEL, **defaults | fields)


def one_run(rank, config, interrupt):
    judge, judged = Judges.rows, []

    def interrupted(self, images, labels):
        judged.append(len(images))
        if interrupt and (rank, len(judged)) == interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(self, images, labels)

    Judges.rows = interrupted
    try:
        training.train(config, stage_class("finetune-diffusion"))
    finally:
        Judges.rows = judge


def long_decision(rank):
    """A decision takes longer than ranks wait for each other in a collective."""
    with joined("cpu", timeout=datetime.timedelta(seconds=1)) as ranks:
        for answer in (1, 2):
            assert ranks.decide(lambda answer=answer: time.sleep(1.5) or answer) == answer
