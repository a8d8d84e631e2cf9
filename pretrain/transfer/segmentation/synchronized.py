"""Batch norm of maps over the processes that share a global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.models.heads import PeerBatchNorm, synchronize_batch_norm
from pretrain.peers import Peers


class _Sum(torch.autograd.Function):
    """Elementwise sum over processes; its backward sums their gradients."""

    @staticmethod
    def forward(context: object, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class PeerBatchNorm2d(PeerBatchNorm):
    """Batch norm over the places of all maps of all processes; for CPUs, which torch's own refuses."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        if not self.training:
            return nn.functional.batch_norm(
                maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        rows = maps.permute(0, 2, 3, 1)
        return super().forward(rows.reshape(-1, maps.shape[1])).reshape(rows.shape).permute(0, 3, 1, 2)


def synchronized(module: nn.Module, rank: int, world_size: int, device_type: str) -> nn.Module:
    """Make every batch norm of a module see the global batch, in place; a lone process needs no change.

    Parameters and buffers are carried over, and the state dict keeps its names.
    """
    peers = Peers(rank, world_size, sum=_Sum.apply)
    if world_size == 1 or device_type == "cuda":
        return synchronize_batch_norm(module, peers, device_type)
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = PeerBatchNorm2d(child.num_features, peers, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            norm.weight, norm.bias = child.weight, child.bias
            setattr(module, name, norm)
        else:
            synchronized(child, rank, world_size, device_type)
    return module
