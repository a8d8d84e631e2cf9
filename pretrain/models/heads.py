"""Heads that read tokens, and a batch norm over the ranks that share a global batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pretrain.peers import Peers


def mlp(
    dims: Sequence[int], norm: bool = False, activation: Callable[[], nn.Module] = nn.GELU
) -> nn.Sequential:
    """Linear layers through the widths `dims`; between them batch norm (if `norm`) and the activation.

    A layer followed by batch norm has no bias: the norm would cancel it.
    """
    layers: list[nn.Module] = []
    for wide_in, wide_out in itertools.pairwise(dims[:-1]):
        layers.append(nn.Linear(wide_in, wide_out, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(wide_out))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


def projection_head(
    embed_dim: int, hidden_dim: int = 2048, out_dim: int = 128, num_layers: int = 3
) -> nn.Sequential:
    """Into the space where embeddings are compared; batch norm and ReLU after every layer but the last.

    (M, D) -> (M, out)
    """
    return mlp([embed_dim, *[hidden_dim] * (num_layers - 1), out_dim], norm=True, activation=nn.ReLU)


class PeerBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all ranks (Ioffe and Szegedy, 2015, arXiv:1502.03167).

    Equals nn.BatchNorm1d on the joined batch, for any device; torch's SyncBatchNorm refuses CPU tensors.
    Statistics are float32 whatever the input. Every rank holds the same number of rows.
    """

    def __init__(
        self, num_features: int, peers: Peers, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.peers = peers

    def forward(self, rows: Tensor) -> Tensor:
        """(M, D) -> (M, D)"""
        if not self.training:
            return super().forward(rows)
        count = len(rows) * self.peers.world_size
        if rows.dim() != 2 or count < 2:
            raise ValueError(f"batch norm needs two or more rows of shape (M, D), got {tuple(rows.shape)}")
        with torch.autocast(rows.device.type, enabled=False):
            values = rows.to(torch.promote_types(rows.dtype, torch.float32))
            mean = self.peers.sum(values.sum(dim=0)) / count  # (D,)
            centered = values - mean
            variance = self.peers.sum(centered.square().sum(dim=0)) / count  # (D,), biased
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
            scale = self.weight.to(values.dtype) * torch.rsqrt(variance + self.eps)
            return (centered * scale + self.bias.to(values.dtype)).to(rows.dtype)

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), share)


def synchronize_batch_norm(module: nn.Module, peers: Peers, device_type: str) -> nn.Module:
    """Make every nn.BatchNorm1d in a module see the global batch, in place; a lone rank needs no change.

    Parameters and buffers are carried over, and the state dict keeps its names. Returns the module, a new one
    only if it was itself a batch norm. Call it before optimizers and engines see the parameters.
    """
    if peers.world_size == 1:
        return module
    if device_type == "cuda":
        synchronized: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return synchronized
    if type(module) is nn.BatchNorm1d:
        return _over_peers(module, peers)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, peers, device_type))
    return module


def _over_peers(plain: nn.BatchNorm1d, peers: Peers) -> PeerBatchNorm:
    if not (plain.affine and plain.track_running_stats):
        raise ValueError(
            "a batch norm without affine parameters or running statistics cannot be synchronized"
        )
    synchronized = PeerBatchNorm(plain.num_features, peers, plain.eps, plain.momentum).train(plain.training)
    synchronized.weight, synchronized.bias = plain.weight, plain.bias
    synchronized.running_mean, synchronized.running_var = plain.running_mean, plain.running_var
    synchronized.num_batches_tracked = plain.num_batches_tracked
    return synchronized
