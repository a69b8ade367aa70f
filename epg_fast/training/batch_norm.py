"""BatchNorm over the global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from epg_fast.models.blocks import BatchNorm1d


class SyncBatchNorm1d(BatchNorm1d):
    """BatchNorm1d whose training statistics are those of the global batch; works on CPU, unlike torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, C] of this rank (equal B on every rank) -> the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        count = x.shape[0] * dist.get_world_size()
        mean = _AllReduceSum.apply(values.sum(dim=0)) / count
        centred = values - mean
        variance = _AllReduceSum.apply(centred.square().sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def synchronize_batch_norm(module: torch.nn.Module) -> None:
    """Turn every BatchNorm1d of `module` into SyncBatchNorm1d in place; names, parameters and buffers stay."""
    for child in module.modules():
        if type(child) is BatchNorm1d:
            child.__class__ = SyncBatchNorm1d
