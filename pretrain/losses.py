"""Losses over the global batch and the soft assignments they need, as plain maths.

Whatever needs the other ranks is handed `Peers`. A loss returned here is this rank's share: its mean over
ranks is the loss of the global batch, and the mean over ranks of its gradients is the gradient of that loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.peers import ALONE, Peers

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _raised(value: Any) -> Any:
    """Half precision to float32; float64 stays."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(value, list | tuple):
        return type(value)(_raised(item) for item in value)
    return value


def _device_type(values: Sequence[Any]) -> str:
    for value in values:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, list | tuple) and value:
            return _device_type(value)
    raise TypeError("an fp32 function needs a tensor among its arguments")


def fp32(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function in float32 under any autocast: its tensors (also in lists and tuples) are raised first.

    float64 stays float64, so that laws can be tested exactly.
    """

    @functools.wraps(function)
    def island(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.autocast(_device_type([*args, *kwargs.values()]), enabled=False):
            return function(*map(_raised, args), **{name: _raised(value) for name, value in kwargs.items()})

    return island


@fp32
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows. logits (M, K); labels int64 (M,) or probabilities (M, K)."""
    return F.cross_entropy(logits, labels)


@fp32
def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise |prediction - target|, in float32; both of one shape, the result too."""
    return (prediction - target).abs()


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """How often the largest logit is the label's. logits (M, K), labels int64 (M,) -> ()"""
    return (logits.detach().argmax(dim=1) == labels).float().mean()


@fp32
def nt_xent(
    views: Sequence[Tensor] | Tensor, temperature: float, peers: Peers = ALONE
) -> tuple[Tensor, Tensor]:
    """Pick each embedding's other view among all embeddings of the global batch: SimCLR's NT-Xent
    (Chen et al., 2020, arXiv:2002.05709, eq. 1), as the mean over anchors.

    views: two views, (B, d) each or view-major (2B, d), of any length; row i of both is the same image.
    Returns the loss and the ratio of anchors whose positive is the nearest. Every rank holds B images.
    """
    first, second = views.chunk(2) if isinstance(views, Tensor) else views
    local = F.normalize(torch.stack([first, second], dim=1), dim=2, eps=1e-12)  # (B, 2, d)
    everywhere = peers.gather(local)  # (B_g, 2, d), rank r's rows from r * B on
    anchors = local.transpose(0, 1).flatten(0, 1)  # (2B, d), view-major
    candidates = everywhere.transpose(0, 1).flatten(0, 1)  # (2 B_g, d), view-major
    own = peers.rank * len(local) + torch.arange(len(local), device=local.device)
    in_first, in_second = own, own + len(everywhere)  # where this rank's images are among the candidates
    itself, positive = torch.cat([in_first, in_second]), torch.cat([in_second, in_first])
    logits = anchors @ candidates.T / temperature  # (2B, 2 B_g)
    logits = logits.scatter(1, itself.unsqueeze(1), -torch.inf)
    return F.cross_entropy(logits, positive), accuracy(logits, positive)


@fp32
def info_nce(queries: Tensor, keys: Tensor, temperature: float, peers: Peers = ALONE) -> Tensor:
    """Pick each query's own key among the keys of every rank (van den Oord et al., 2018,
    arXiv:1807.03748, eq. 4).

    queries, keys: (B, d), unit length; row i of both comes from the same image.
    """
    logits = queries @ peers.gather(keys).T / temperature  # (B, B_g)
    own = peers.rank * len(queries) + torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, own)


@torch.no_grad()
@fp32
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3, peers: Peers = ALONE) -> Tensor:
    """Soft assignments that use all prototypes equally (Caron et al., 2020, arXiv:2006.09882, eq. 3-4).

    scores: (..., M, K) cosines of M embeddings on this rank with K prototypes, so exp(scores / 0.05) stays
    below 5e8. Leading dimensions are separate problems solved with the same messages.
    Returns (..., M, K), no gradient: each row sums to 1, each column to about M / K over all ranks.
    """
    num_rows, num_prototypes = scores.shape[-2] * peers.world_size, scores.shape[-1]
    assignments = (scores / epsilon).exp()
    for _ in range(iterations):
        usage = peers.sum(assignments.sum(dim=-2, keepdim=True))  # (..., 1, K)
        assignments = assignments / usage / num_prototypes
        assignments = assignments / assignments.sum(dim=-1, keepdim=True) / num_rows
    return assignments * num_rows


@fp32
def global_mean(local_sum: Tensor, local_count: Tensor, peers: Peers = ALONE) -> Tensor:
    """This rank's share of a mean over elements whose number differs between ranks; 0 if there are none.

    local_sum: () sum over this rank's elements; local_count: () how many they are.
    """
    global_count = peers.sum(local_count.detach().to(local_sum.dtype))
    return local_sum * peers.world_size / global_count.clamp(min=1)
