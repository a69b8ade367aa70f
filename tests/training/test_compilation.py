"""torch.compile of whole networks, and what CUDA graphs of them ask of an update."""

import typing

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from epg_fast.__main__ import main
from epg_fast.config import DiffusionConfig
from epg_fast.distributed import Ranks
from epg_fast.training import loop
from epg_fast.training.compilation import begin_step, check_compilation, compile_stage
from epg_fast.training.loop import train_step
from epg_fast.training.metrics import Metrics
from epg_fast.training.state import RunState
from tests.training.stages import JOBS, make_config, make_stage

CPU = torch.device("cpu")


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


class _Images(typing.NamedTuple):
    root: str = "nowhere"

    def fingerprint(self):
        return "none"


def updates(job, compile_with=None, begin=lambda: None, steps=3):
    """(weights and averages, losses and norms) after some updates of a small network with all its parts."""
    torch.manual_seed(0)
    config = make_config(job, {"depth": 1, "decoder_depth": 2}, batch_size=4, precision="fp32")
    config.optimizer.backend, config.optimizer.warmup_steps, config.optimizer.lr = "torch", 0, 1e-3
    state = RunState(config, make_stage(job, config), _Images(), Ranks(0, 1, CPU))
    if compile_with:
        compile_stage(state.stage, "network", backend=compile_with)
    metrics = Metrics(None, False)
    for step in range(steps):
        torch.manual_seed(10 + step)
        batch = {name: torch.randn(4, 3, 32, 32) for name in ("x", "view1", "view2")} | {"label": torch.arange(4)}
        begin()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            train_step(state, batch, metrics)
    begin()
    tensors = {f"{n}.{k}": v for n in ("network", "ema") for k, v in getattr(state.stage, n).state_dict().items()}
    return tensors, metrics.write(steps)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_compiled_networks_are_whole_graphs_and_leave_nothing_behind_a_step(job):
    """Compiled once, without graph breaks; the numbers of uncompiled updates although results are overwritten."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    memory = _GraphMemory()
    tensors, line = updates(job, memory.backend, memory.overwrite)
    # pre-training: the encoder with and without gradient, its head likewise, the target; consistency: the generator
    # and the frozen encoder with and without gradient. torch 2.14 makes one more of pre-training's heads.
    assert counters["stats"]["unique_graphs"] in {"pretrain": (5, 6), "finetune-diffusion": (1,)}.get(job, (4,))
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
    command = ["finetune-diffusion", *tiny_run[:2], "--config", "digits_diffusion", *tiny_run[2:], "--steps", "3"]
    command += ["--preview.every", "0", "--compile", "network", "--cuda_graphs", "true"]
    assert main([*command, "--outdir", str(tmp_path / "run")]) == 0
    assert began == [{"triton.cudagraphs": True}, 1, 1, 1]
    began.clear()
    begin_step(DiffusionConfig(compile="network"))
    assert not began


def test_cuda_graphs_are_refused_where_they_cannot_be():
    config = DiffusionConfig(compile="network", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs: got device cpu, wanted a CUDA device; leave out"):
        check_compilation(config, Ranks(0, 1, CPU))
    with pytest.raises(ValueError, match="cuda_graphs: got 2 ranks, wanted 1: .* known to fail under Distributed"):
        check_compilation(config, Ranks(0, 2, torch.device("cuda", 0)))
    assert check_compilation(config, Ranks(0, 1, torch.device("cuda", 0))) is None
    parts = DiffusionConfig(compile="network", cuda_graphs=True, gradient_accumulation=2)
    with pytest.raises(ValueError, match="cuda_graphs: got gradient_accumulation 2, wanted 1"):
        check_compilation(parts, Ranks(0, 1, torch.device("cuda", 0)))
    assert check_compilation(DiffusionConfig(), Ranks(0, 2, CPU)) is None
    with pytest.raises(ValueError, match="cuda_graphs: got compile auto, want network: add --compile network"):
        DiffusionConfig(cuda_graphs=True)
