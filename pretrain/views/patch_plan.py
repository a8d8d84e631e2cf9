"""Choose disjoint sets of patches, batched, from numbers that are uniform in [0, 1).

Everything here is index arithmetic on M views at once. `taken`, bool (M, N), says which of the N patches (row
by row) already belong to a set; the `take_` functions return what they chose and the patches taken after it.
Choices rest on stable sorting and `argmin`, so the same numbers choose the same patches on every device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DERANGEMENT_TRIES = 24  # a random permutation moves every item with probability 1/e: all fail once in 60 000
_NEVER = 1e9  # a priority after all others


def mark(taken: Tensor, index: Tensor) -> Tensor:
    """`taken` with the patches `index`, int64 (M, K), added."""
    return taken.scatter(1, index, True)


def take_first(priority: Tensor, taken: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` free patches of lowest priority, float (M, N): int64 (M, count)."""
    order = priority.masked_fill(taken, _NEVER).argsort(dim=1, stable=True)
    index = order[:, :count]
    return index, mark(taken, index)


def take_block(
    priority: Tensor, tie_break: Tensor, taken: Tensor, count: int, columns: int
) -> tuple[Tensor, Tensor]:
    """The `count` free patches nearest to the free patch of lowest priority: int64 (M, count).

    priority: (M, N). Near means rows or columns apart, whichever is more (Chebyshev); `tie_break`, (M, N) in
    [0, 1), orders patches that are equally near.
    """
    place = torch.arange(priority.shape[1], device=priority.device)
    anchor = priority.masked_fill(taken, _NEVER).argmin(dim=1, keepdim=True)
    rows_apart = (place // columns - anchor // columns).abs()
    columns_apart = (place % columns - anchor % columns).abs()
    return take_first(torch.maximum(rows_apart, columns_apart) + tie_break / 2, taken, count)


def take_cells(priority: Tensor, taken: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One free patch from each cell of a 3 x 3 division of the grid: int64 (M, 9), cell by cell."""
    rows, columns = grid
    if min(grid) < 3:
        raise ValueError(f"a grid of {rows} x {columns} patches has no 3 x 3 cells")
    place = torch.arange(rows * columns, device=priority.device)
    cell = place // columns * 3 // rows * 3 + place % columns * 3 // columns  # (N,)
    outside = cell != torch.arange(9, device=priority.device).unsqueeze(1)  # (9, N)
    blocked = outside | taken.unsqueeze(1)  # (M, 9, N)
    index = priority.unsqueeze(1).masked_fill(blocked, _NEVER).argmin(dim=2)
    return index, mark(taken, index)


def neighbor_edges(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """All pairs of patches that touch by a side or a corner, each once: int64 (2, E)."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=device).view(rows, columns)
    across = torch.stack([place[:, :-1].flatten(), place[:, 1:].flatten()])
    down = torch.stack([place[:-1].flatten(), place[1:].flatten()])
    falling = torch.stack([place[:-1, :-1].flatten(), place[1:, 1:].flatten()])
    rising = torch.stack([place[1:, :-1].flatten(), place[:-1, 1:].flatten()])
    return torch.cat([across, down, falling, rising], dim=1)


def take_neighbors(
    edge_priority: Tensor, taken: Tensor, count: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`count` disjoint pairs of neighbouring free patches, greedily by priority: int64 (M, count, 2).

    edge_priority: (M, E), in the order of `neighbor_edges`. As long as at most half of the patches end up
    taken, the greedy choice cannot run dry: the free ones outnumber any set of patches without neighbours.
    """
    edges = neighbor_edges(grid, edge_priority.device)  # (2, E)
    pairs = torch.empty(len(taken), count, 2, dtype=torch.int64, device=edge_priority.device)
    for i in range(count):
        blocked = taken[:, edges[0]] | taken[:, edges[1]]  # (M, E)
        best = edge_priority.masked_fill(blocked, _NEVER).argmin(dim=1)
        pairs[:, i] = edges.T[best]
        taken = mark(taken, pairs[:, i])
    return pairs, taken


def derangements(draws: Tensor) -> Tensor:
    """Permutations that leave no item in place, all equally likely: (M, tries, K) draws -> int64 (M, K).

    The first try that is a derangement counts; if none is, the items move one place round.
    """
    num_items = draws.shape[2]
    if num_items == 0:
        return draws.new_zeros((len(draws), 0), dtype=torch.int64)
    if num_items == 1:
        raise ValueError("a single item has no derangement")
    item = torch.arange(num_items, device=draws.device)
    tries = draws.argsort(dim=2, stable=True)
    last_resort = item.roll(-1).expand(len(draws), 1, num_items)
    tries = torch.cat([tries, last_resort], dim=1)
    moves_all = (tries != item).all(dim=2)  # (M, tries + 1)
    first = moves_all.to(torch.int8).argmax(dim=1)
    return tries[torch.arange(len(draws), device=draws.device), first]


def _all_permutations(num_items: int) -> Tensor:
    """Every permutation, in lexicographic order: uint8 (num_items!, num_items)."""
    table = torch.zeros(1, 1, dtype=torch.uint8)
    for size in range(2, num_items + 1):
        first = torch.arange(size, dtype=torch.uint8).repeat_interleave(len(table)).unsqueeze(1)
        rest = table.repeat(size, 1)
        table = torch.cat([first, rest + (rest >= first).to(torch.uint8)], dim=1)
    return table


@cache
def permutation_set(num_permutations: int) -> Tensor:
    """Permutations of 9 items that are far from each other: int64 (num_permutations, 9), always the same.

    Greedy, as Noroozi and Favaro (arXiv:1603.09246): the next permutation has the largest mean Hamming
    distance to those chosen; among equals the largest minimum distance, then the first in order.
    """
    candidates = _all_permutations(9).T.contiguous()  # (9, 9!)
    if not 2 <= num_permutations <= candidates.shape[1]:
        raise ValueError(f"num_permutations must be in 2..{candidates.shape[1]}, not {num_permutations}")
    has = torch.stack([candidates == value for value in range(9)]).view(torch.uint8)  # (value, position, 9!)
    total_shared = torch.zeros(
        candidates.shape[1], dtype=torch.int32
    )  # 16 x items in place, over those chosen
    most_shared = torch.zeros(candidates.shape[1], dtype=torch.uint8)
    chosen = [0]
    while len(chosen) < num_permutations:
        shared = torch.zeros_like(most_shared)
        for position, value in enumerate(candidates[:, chosen[-1]].tolist()):
            shared += has[value, position]
        total_shared += shared * 16
        total_shared[chosen[-1]] = 1 << 24  # never again
        torch.maximum(most_shared, shared, out=most_shared)
        chosen.append(int((total_shared + most_shared).argmin()))
    return candidates[:, chosen].T.long()


@cache
def permutation_set_on(device: torch.device, num_permutations: int) -> Tensor:
    """The same where it is needed."""
    return permutation_set(num_permutations).to(device)
