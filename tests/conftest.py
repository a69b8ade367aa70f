"""Fixtures shared by all tests."""

import gc
import logging
import os
import tempfile

import pytest
import torch

# Without a CUDA device Triton kernels run on CPU tensors, in Triton's interpreter. Triton reads the variable when it is
# imported, which the import of other test modules may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test depends on the plans that the user has made on this machine.
os.environ["EPG_FAST_PLANS"] = os.path.join(tempfile.gettempdir(), f"no_plans_{os.getuid()}")
# Inductor's own folder may hold C++ for another ATEN_CPU_CAPABILITY, which does not compile for this one.
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{_CAPABILITY}")
)


def pytest_collection_finish():
    """What modules and collection have made stays: no collection of garbage looks through it again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger_of_a_library():
    """The package's logger as an import leaves it: a command that ran in this process before has set it up."""
    logger = logging.getLogger("epg_fast")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


class _Log(logging.Handler):
    """What the package logs, from INFO on."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []
        self.ops: list[str] = []
        """Lines that say what computes; apart, since every engine and run has one."""

    def emit(self, record):
        line = record.getMessage()
        (self.ops if line.startswith("ops: ") else self.messages).append(line)


@pytest.fixture
def log(monkeypatch):
    """`log.messages`: the lines of the package's logger in this test, whether or not a command ran before it."""
    logger, handler = logging.getLogger("epg_fast"), _Log()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)


@pytest.fixture
def gemms():
    """Backend "cuda" on a GPU that has it, and without any with formulas in the place of the extension's products.

    The names of the formulas that are called; empty on a GPU.
    """
    pytest.importorskip("triton")
    from tests.ops import kernel_checks

    if torch.cuda.is_available():
        if not kernel_checks.gemms_run():
            pytest.skip(kernel_checks.NO_GEMMS)
        yield []
    else:
        with kernel_checks.gemms_on_cpu() as called:
            yield called


@pytest.fixture(scope="session")
def inductor():
    """Skips a test for which Inductor's C++ has to compile, where it does not: without a C++ compiler."""
    try:
        torch.compile(lambda x: x.softmax(dim=-1))(torch.ones(8, 40))
    except RuntimeError as error:
        pytest.skip(f"Inductor cannot compile a softmax here: {' '.join(str(error).split())[:200]}")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub in memory, without repositories, for huggingface_hub itself."""
    pytest.importorskip("huggingface_hub")
    from tests.fake_hub import running

    with running(tmp_path / "hub", monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with train/ and test/ of the embedded handwritten digits."""
    from epg_fast.data import prepare_digits

    folder = tmp_path_factory.mktemp("digits")
    prepare_digits(folder)
    return folder


class TinyInception(torch.nn.Module):
    """Six features (channel means and deviations, in levels) and four classes, called like NVIDIA's TorchScript.

    Float32 as Inception's, but computed in float64: so much finer that the order of a sum does not show in it.
    """

    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(6, 4)
        torch.nn.init.normal_(self.output.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        torch.nn.init.constant_(self.output.bias, 100.0)
        # Must not matter: it runs in eval mode.
        self.dropout = torch.nn.Dropout(0.5)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = self.dropout(img.to(torch.float64).flatten(2))
        features = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)
        if return_features:
            return features.float()
        if no_output_bias:
            return torch.nn.functional.linear(features, self.output.weight.double()).softmax(dim=1).float()
        return self.output(features.float())


@pytest.fixture(scope="session")
def tiny_inception(tmp_path_factory):
    """Path of a TorchScript file that stands in for Inception."""
    path = tmp_path_factory.mktemp("inception") / "network.bin"
    torch.jit.script(TinyInception()).save(path)
    return path


@pytest.fixture
def tiny_run(digits):
    """Flags of a training run of a few seconds: a very small network on the digits."""
    return [
        *("--config", "digits", "--data.path", f"{digits}/train", "--data.workers", "0", "--device", "cpu"),
        # starting DALI takes longer than the run
        *("--data.backend", "pillow"),
        *("--model.embed_dim", "32", "--model.depth", "1", "--model.num_heads", "2"),
        *("--model.decoder_embed_dim", "48", "--model.decoder_depth", "1", "--model.decoder_num_heads", "2"),
        *("--model.hidden_dim", "32", "--model.output_dim", "16", "--batch_size", "16"),
        *("--optimizer.warmup_steps", "4", "--log_every", "1", "--checkpoint_every", "10", "--tensorboard", "false"),
    ]
