"""Gradients: the loss scale, micro-batches, torch.compile of whole networks and what CUDA graphs ask of an update."""

import contextlib
import math

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig
from epg_fast.distributed import Ranks
from epg_fast.training import loop
from epg_fast.training.gradients import LossScale, check_compilation, compile_stage
from tests.ops.kernel_checks import DEVICE
from tests.training import rank_worker
from tests.training.runs import fails, run_command
from tests.training.stages import ALONE, JOBS, Training

GPU = torch.device("cuda", 0)


def test_the_loss_scale_is_torchs_gradient_scaler():
    ours = LossScale(torch.device(DEVICE), enabled=True)
    growth = {"growth_factor": 2.0**0.001, "backoff_factor": 0.5, "growth_interval": 1}
    theirs = torch.amp.GradScaler(DEVICE, init_scale=2.0**14, **growth)
    weight = torch.zeros(3, device=DEVICE, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.0)
    for step in range(40):
        loss = (weight * (math.inf if step % 7 == 3 else 1.0)).sum()
        torch.testing.assert_close(ours(loss.detach() + 1), theirs.scale(loss.detach() + 1), equal_nan=True)
        theirs.scale(loss).backward()
        found_inf = (~weight.grad.isfinite()).any().float()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(found_inf)
        assert ours.value.item() == pytest.approx(theirs.get_scale(), rel=1e-6)
    assert ours.state_dict() == {"scale": ours.value}


def test_the_loss_scale_stays_finite_and_can_be_off():
    scale = LossScale(torch.device(DEVICE), enabled=True)
    scale.value.fill_(torch.finfo(torch.float32).max / 2)
    scale.update(torch.zeros((), device=DEVICE))
    assert scale.value.isfinite()
    off = LossScale(torch.device(DEVICE), enabled=False)
    loss = torch.ones((), device=DEVICE)
    assert off(loss) is loss and off.value is None and off.state_dict() == {}
    off.update(torch.ones((), device=DEVICE))


@pytest.mark.parametrize("job", JOBS)
def test_the_loss_scale_reaches_every_micro_batch(job, digits, tmp_path):
    rank_worker.save_encoder(tmp_path)
    config = rank_worker.make_config(digits, tmp_path, "unused", job, gradient_accumulation=2, parallelism="ddp")[0]
    plain, scaled = (rank_worker.gradients(config, job, ALONE, scaled=on) for on in (False, True))
    for name, want in plain.items():
        factor = 2.0**14 if name.startswith("grad.") else 1
        if not name.startswith("fp8."):
            torch.testing.assert_close(scaled[name], factor * want, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused(tiny_run, tmp_path, capsys):
    command = run_command(tiny_run, tmp_path / "run", gradient_accumulation=3)
    fails(capsys, command, "batch_size 16 does not divide over 1 rank with 3 micro-batches", "--batch_size 15 or 18")
    assert not (tmp_path / "run").exists()


# ---- torch.compile


class _GraphMemory:
    """A backend of torch.compile whose results are NaN after the next step has begun, as CUDA graphs overwrite them."""

    def __init__(self):
        self.results = []
        self.backend = aot_autograd(fw_compiler=self._compiler, bw_compiler=self._compiler)

    def _compiler(self, module, inputs):
        def call(*arguments):
            results = module(*arguments)
            floats = [r for r in results if isinstance(r, torch.Tensor) and r.is_floating_point()]
            # An alias: autograd adopts a gradient that nobody else holds, as it would a graph's.
            self.results += [r.detach() for r in floats if not self._is_one_of(r, arguments)]
            return results

        return make_boxed_func(call)

    @staticmethod
    def _is_one_of(tensor, arguments):
        storages = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        return tensor.untyped_storage().data_ptr() in storages

    def overwrite(self):
        with torch.no_grad():
            for result in self.results:
                result.fill_(float("nan"))
        self.results.clear()


def updates(job, compile_with=None, begin=lambda: None):
    """(weights and EMA, losses and norms) after three updates."""
    training = Training(job)
    if compile_with:
        compile_stage(training.stage, "network", backend=compile_with)
    for step in range(3):
        begin()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            training.update()
    begin()
    return training.updated(0), training.metrics.write(3)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_compiled_networks_are_whole_graphs_and_leave_nothing_behind_a_step(job):
    """Compiled once, without graph breaks; the numbers of uncompiled updates although results are overwritten."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    memory = _GraphMemory()
    tensors, line = updates(job, memory.backend, memory.overwrite)
    # pre-training: the encoder with and without gradient, its head likewise, the target, and the noised images of one,
    # two and three batches; consistency: the generator and the frozen encoder with and without gradient. torch 2.14
    # makes one more of pre-training's heads.
    assert counters["stats"]["unique_graphs"] in {"pretrain": (8, 9), "finetune-diffusion": (1,)}.get(job, (4,))
    assert not counters["graph_break"]
    torch.compiler.reset()
    want, want_line = updates(job)
    for name in want:
        torch.testing.assert_close(tensors[name], want[name], rtol=1e-3, atol=1e-5, msg=name)
    for name in ("loss", "grad_norm"):
        assert line[name] == pytest.approx(want_line[name], rel=1e-4)


def test_results_that_are_kept_beyond_their_step_would_be_seen():
    memory = _GraphMemory()
    compiled = torch.compile(lambda x: x * 2, backend=memory.backend)
    x = torch.ones(3, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    memory.overwrite()
    assert y.isnan().all() and x.grad.isnan().all()
    torch.compiler.reset()


def test_every_update_begins_a_step_of_the_cuda_graphs(tiny_run, tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: began.append(1))
    monkeypatch.setattr(loop, "check_compilation", lambda config, ranks: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: began.append(options["options"]))
    flags = {"steps": 3, "compile": "network", "cuda_graphs": "true"}
    assert main(run_command(tiny_run, tmp_path / "run", **flags)) == 0
    assert began == [{"triton.cudagraphs": True}, 1, 1, 1]


@pytest.mark.parametrize(
    "ranks, fields, refused",
    [
        (ALONE, {}, "got device cpu, wanted a CUDA device; leave out"),
        (Ranks(0, 2, GPU), {}, "got 2 ranks, wanted 1: .* known to fail under Distributed"),
        (Ranks(0, 1, GPU), {"gradient_accumulation": 2}, "got gradient_accumulation 2, wanted 1"),
        (Ranks(0, 1, GPU), {"compile": "auto"}, "got compile auto, want network: add --compile network"),
        (Ranks(0, 1, GPU), {}, None),
        (Ranks(0, 2, torch.device("cpu")), {"cuda_graphs": False}, None),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(ranks, fields, refused):
    with pytest.raises(ValueError, match=f"cuda_graphs: {refused}") if refused else contextlib.nullcontext():
        check_compilation(DiffusionConfig(**({"compile": "network", "cuda_graphs": True} | fields)), ranks)
