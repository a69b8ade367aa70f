"""What would make the host wait for a GPU, noticed on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NothingIsRead(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read, and tensors copied there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.lift_fresh.default,
        ), f"the host waits: {func}"
        return func(*args, **(kwargs or {}))
