"""Heads that read tokens, and a batch norm over the ranks that share a global batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses import fp32, unit_length
from pretrain.peers import Peers


def mlp(
    dims: Sequence[int],
    norm: bool = False,
    activation: Callable[[], nn.Module] = nn.GELU,
    *,
    bias: bool = True,
    last_norm: bool = False,
) -> nn.Sequential:
    """Linear layers through the widths `dims`; between them batch norm (if `norm`) and the activation.

    `last_norm` adds a batch norm without scale and shift after the last layer. `bias` is for layers that no
    batch norm follows: the norm would cancel it.
    """
    layers: list[nn.Module] = []
    num_layers = len(dims) - 1
    for number, (wide_in, wide_out) in enumerate(itertools.pairwise(dims), start=1):
        is_last = number == num_layers
        has_norm = last_norm if is_last else norm
        layers.append(nn.Linear(wide_in, wide_out, bias=bias and not has_norm))
        if has_norm:
            layers.append(nn.BatchNorm1d(wide_out, affine=not is_last))
        if not is_last:
            layers.append(activation())
    return nn.Sequential(*layers)


def projection_head(
    embed_dim: int,
    hidden_dim: int = 2048,
    out_dim: int = 128,
    num_layers: int = 3,
    *,
    bias: bool = True,
    last_norm: bool = False,
) -> nn.Sequential:
    """Into the space where embeddings are compared; batch norm and ReLU after every layer but the last.

    (M, D) -> (M, out); `bias` and `last_norm` as in `mlp`.
    """
    dims = [embed_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    return mlp(dims, norm=True, activation=nn.ReLU, bias=bias, last_norm=last_norm)


def per_view(head: nn.Module, rows: Tensor, num_views: int) -> Tensor:
    """A head on each view by itself, so that its batch norms see one view at a time.

    rows: (M, D), view-major, M = V * B. Returns (M, d).
    """
    return torch.cat([head(of_view) for of_view in rows.chunk(num_views)])


@fp32
def _weight_normalized(rows: Tensor, direction: Tensor, gain: Tensor | None) -> Tensor:
    weight = unit_length(direction)
    return F.linear(rows, weight if gain is None else gain * weight)


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have a direction and, apart from it, a length (Salimans and
    Kingma, 2016, arXiv:1602.07868); of length 1 unless `learn_gain`.

    Plain parameters, normalised when used and in float32: torch's own weight norm replaces the parameter,
    which neither a copy for a teacher nor a partitioned optimizer survives.
    """

    def __init__(self, in_dim: int, out_dim: int, learn_gain: bool = False) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-(in_dim**-0.5), in_dim**-0.5))
        self.gain = nn.Parameter(torch.ones(out_dim, 1)) if learn_gain else None

    def forward(self, rows: Tensor) -> Tensor:
        """(M, in) -> (M, out)"""
        return _weight_normalized(rows, self.direction, self.gain)


class PrototypeHead(nn.Module):
    """DINO's head (Caron et al., 2021, arXiv:2104.14294, appendix C): an MLP with GELU into a bottleneck,
    unit length, and a weight-normalised layer onto K prototypes.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 65536,
        num_layers: int = 3,
        learn_gain: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = mlp([embed_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = WeightNormLinear(bottleneck_dim, out_dim, learn_gain)

    def forward(self, rows: Tensor) -> Tensor:
        """(M, D) -> (M, K) float32"""
        logits: Tensor = self.last(unit_length(self.mlp(rows)))
        return logits


class PeerBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all ranks (Ioffe and Szegedy, 2015, arXiv:1502.03167).

    Equals nn.BatchNorm1d on the joined batch, for any device; torch's SyncBatchNorm refuses CPU tensors.
    Statistics are float32 whatever the input. Every rank holds the same number of rows.
    """

    def __init__(
        self,
        num_features: int,
        peers: Peers,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
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
            normalized = centered * torch.rsqrt(variance + self.eps)
            if self.affine:
                normalized = normalized * self.weight.to(values.dtype) + self.bias.to(values.dtype)
            return normalized.to(rows.dtype)

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
    if not plain.track_running_stats:
        raise ValueError("a batch norm without running statistics cannot be synchronized")
    synchronized = PeerBatchNorm(plain.num_features, peers, plain.eps, plain.momentum, plain.affine)
    synchronized.train(plain.training)
    synchronized.weight, synchronized.bias = plain.weight, plain.bias
    synchronized.running_mean, synchronized.running_var = plain.running_mean, plain.running_var
    synchronized.num_batches_tracked = plain.num_batches_tracked
    return synchronized
