"""What `pixels.render` and `pixels.normalize` do, arranged for processors.

A graphics card wants one graph over the whole batch, whatever each sample needs. A core wants the opposite:
only the operations that the plan asks for, on one view while it is in its cache. So each view is one call
of code compiled by numba (`view_kernel`), at 224 px 30 to 40 times as fast as the graph on a core. Compiling
takes 8 seconds, once for an installation.

The bits of a view depend on that view alone: no operation is shared between threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pretrain.views.pixels import blur_kernel_px
from pretrain.views.plan import ViewPlan

_GROUP_PX = 1 << 17  # pixels that are worked on together: 1.5 MiB of float32
_REACH = 5  # Gaussian weights further away than this many sigma sum to less than 1e-6

T = TypeVar("T")


def render(crops: Tensor, plan: ViewPlan) -> Tensor:
    """Finish views up to, not including, patch corruption: flip, colour, grey, blur, solarize, turn.

    crops: uint8 (M, S, S, 3). Returns float32 (M, 3, S, S) in [0, 1], `pixels.render`'s within 1e-5. Works in
    as many threads as torch is set to.
    """
    kernel = import_module("pretrain.views.view_kernel")  # numba takes half a second to import
    num_views, size_px = crops.shape[:2]
    finished = _empty(num_views, 3, size_px, size_px)
    source, target = crops.contiguous().numpy(), finished.numpy()
    flip, gray, solarize = plan.flip.tolist(), plan.gray.tolist(), plan.solarize.tolist()
    sigmas_px, turns = plan.blur_sigma_px.tolist(), plan.quarter_turns.tolist()
    jitter = plan.jitter.apply.tolist()
    orders, factors = plan.jitter.order.contiguous().numpy(), plan.jitter.factors.contiguous().numpy()

    def work(views: range) -> None:
        for i in views:
            half = np.array(_blur_weights(sigmas_px[i], size_px), dtype=np.float32)
            order = orders[i] if jitter[i] else orders[i, :0]
            kernel.finish_view(source[i], target[i], flip[i], order, factors[i], gray[i], half, solarize[i])
            if turns[i]:
                finished[i].copy_(torch.rot90(finished[i], -turns[i], dims=(1, 2)))

    step = _group_size(size_px)
    tasks = [range(num_views)[first : first + step] for first in range(0, num_views, step)]
    _in_threads(work, tasks, torch.get_num_threads())
    return finished


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std, each channel with its own."""
    normalized = _empty(*images.shape)
    center, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def work(views: slice) -> None:
        torch.sub(images[views], center, out=normalized[views]).div_(scale)

    step = _group_size(images.shape[-1])
    tasks = [slice(first, first + step) for first in range(0, len(images), step)]
    _in_threads(work, tasks, torch.get_num_threads())
    return normalized


def _empty(*shape: int) -> Tensor:
    """A float32 tensor in numpy's memory, which asks Linux for large pages: touching them costs much less."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


def _group_size(size_px: int) -> int:
    """How many views fit a group; one where a vector of 16 numbers could straddle two of them."""
    return max(1, _GROUP_PX // size_px**2) if size_px % 4 == 0 else 1


def _in_threads(work: Callable[[T], None], tasks: Sequence[T], num_threads: int) -> None:
    """Do all tasks, in `num_threads` threads of our own rather than torch's; each does whole operations.

    The operations are too short to be split between cores, and one that is split may have other bits.
    """
    waiting = deque(tasks)

    def drain() -> None:
        with torch.no_grad():
            while waiting:
                try:
                    task = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                work(task)

    of_torch = torch.get_num_threads()
    if num_threads == of_torch == 1:
        drain()
        return
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = [pool.submit(drain) for _ in range(num_threads)]
    torch.set_num_threads(of_torch)  # each thread has its own number, but new ones start with the last set
    for future in done:
        future.result()


def _blur_weights(sigma_px: float, size_px: int) -> list[float]:
    """One half of a Gaussian filter, from the centre as far as weights count; sigma 0: a single 1."""
    if sigma_px == 0:
        return [1.0]
    radius = blur_kernel_px(size_px) // 2
    if radius >= size_px:
        raise ValueError(f"a blur kernel of {2 * radius + 1} px does not fit an image of {size_px} px")
    half = [math.exp(-0.5 * (step / sigma_px) ** 2) for step in range(radius + 1)]
    total = 2 * sum(half) - half[0]
    return [weight / total for weight in half[: math.ceil(_REACH * sigma_px) + 1]]
