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


@fp32
def unit_length(rows: Tensor) -> Tensor:
    """(..., d) -> (..., d) of length 1"""
    return F.normalize(rows, dim=-1, eps=1e-12)


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
    local = unit_length(torch.stack([first, second], dim=1))  # (B, 2, d)
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
def info_nce(
    queries: Tensor, keys: Tensor, temperature: float, peers: Peers = ALONE
) -> tuple[Tensor, Tensor]:
    """Pick each query's own key among the keys of every rank (van den Oord et al., 2018,
    arXiv:1807.03748, eq. 4).

    queries, keys: (B, d), of any length; row i of both comes from the same image. Returns the mean over
    queries and the ratio of queries whose own key is the nearest.
    """
    logits = unit_length(queries) @ peers.gather(unit_length(keys)).T / temperature  # (B, B_g)
    own = peers.rank * len(queries) + torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, own), accuracy(logits, own)


@fp32
def queue_cross_entropy(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Pick each query's own key among itself and a queue of earlier keys: MoCo (He et al., 2020,
    arXiv:1911.05722, eq. 1).

    queries, keys: (B, d), of any length; row i of both comes from the same image. queue: (K, d), unit length.
    Returns the mean over queries and the ratio of queries that are nearer to their key than to all others, by
    more than rounding: keys that are all the same are not told apart.
    """
    queries = unit_length(queries)
    positive = (queries * unit_length(keys)).sum(dim=1, keepdim=True)  # (B, 1)
    negatives = queries @ queue.T  # (B, K)
    nearest = (positive.squeeze(1) > negatives.amax(dim=1) + 1e-5).float().mean()
    logits = torch.cat([positive, negatives], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64)), nearest


@fp32
def mean_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows of the cosine between row i of both. (M, d), (M, d) -> ()"""
    return (unit_length(first) * unit_length(second)).sum(dim=1).mean()


@torch.no_grad()
@fp32
def mean_cosine_of_strangers(first: Tensor, second: Tensor, peers: Peers = ALONE) -> Tensor:
    """Mean cosine between row i of one and row j of the other for all i != j of the global batch.

    (V, B, d), (V, B, d) -> (), the mean over V. What `mean_cosine` has to be compared with: both are 1 when
    all embeddings are the same.
    """
    first, second = unit_length(first), unit_length(second)
    width = first.shape[2]
    matched = (first * second).sum(dim=(1, 2)).unsqueeze(1)  # (V, 1)
    sums = peers.sum(torch.cat([first.sum(dim=1), second.sum(dim=1), matched], dim=1))
    of_all = (sums[:, :width] * sums[:, width : 2 * width]).sum(dim=1)  # (V,)
    num_rows = first.shape[1] * peers.world_size
    return (of_all - sums[:, -1]).mean() / max(1, num_rows * (num_rows - 1))


@torch.no_grad()
@fp32
def embedding_std(rows: Tensor, peers: Peers = ALONE) -> Tensor:
    """How far embeddings are spread: standard deviation over the global batch of each of the d coordinates of
    the unit vectors, averaged. (M, d) -> ()

    About 1 / sqrt(d) when they fill the sphere, 0 when they have collapsed into a point.
    """
    unit = unit_length(rows)
    sums = peers.sum(torch.stack([unit.sum(dim=0), unit.square().sum(dim=0)]))  # (2, d)
    means = sums / (len(rows) * peers.world_size)
    return (means[1] - means[0].square()).clamp(min=0).sqrt().mean()


@torch.no_grad()
@fp32
def sharpened(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """A teacher's probabilities, centred and sharpened (Caron et al., 2021, arXiv:2104.14294, eq. 1 and 4).

    logits (..., K), center (K,) -> (..., K), no gradient
    """
    return torch.softmax((logits - center) / temperature, dim=-1)


@fp32
def cross_view_cross_entropy(
    logits: Tensor, targets: Tensor, places: Sequence[int], temperature: float
) -> Tensor:
    """Every view predicts what the teacher makes of every other view: DINO (Caron et al., 2021,
    arXiv:2104.14294, eq. 3), as the mean over pairs of views and images.

    logits: (S, B, K) of the student; targets: (T, B, K) probabilities, the t-th of the student's view
    `places[t]`, which does not predict it. There are T * (S - 1) pairs.
    """
    terms = []
    for view, of_view in enumerate(logits):  # one at a time: a softmax over all views at once is large
        others = [target for target, place in zip(targets, places, strict=True) if place != view]
        if others:
            terms.append(F.cross_entropy(of_view / temperature, torch.stack(others).sum(dim=0)))
    return torch.stack(terms).sum() / (len(targets) * (len(logits) - 1))


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

    With accumulation it is the mean of one micro step; those of a step are averaged, each with equal weight.

    local_sum: () sum over this rank's elements; local_count: () how many they are.
    """
    global_count = peers.sum(local_count.detach().to(local_sum.dtype))
    return local_sum * peers.world_size / global_count.clamp(min=1)
