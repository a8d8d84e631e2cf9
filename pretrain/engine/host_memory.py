"""Memory on the host that copies of a model are written into again and again."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class HostMemory:
    """Copies named tensors to the CPU, into memory of earlier copies that nobody holds any more.

    New memory costs more than the copy (the system clears every page), and pinning it beside a GPU more
    still. A copy is handed out as a tensor object; once that object is gone its memory is taken again, so
    whoever keeps only a slice of it must clone the slice. As many copies of a name as are held at one time,
    so many are kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[Tensor, weakref.ref[Tensor]]]] = {}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """A copy on the CPU, complete on return."""
        own = self._take(name, value)
        return own.copy_(value.detach())

    def _take(self, name: str, like: Tensor) -> Tensor:
        """An object of its own over free memory, or over new memory."""
        kept = self._kept.setdefault(name, [])
        kept[:] = [pair for pair in kept if (pair[0].shape, pair[0].dtype) == (like.shape, like.dtype)]
        for place, (memory, holder) in enumerate(kept):
            if holder() is None:
                given = memory.view_as(memory)
                kept[place] = (memory, weakref.ref(given))
                return given
        memory = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        given = memory.view_as(memory)
        kept.append((memory, weakref.ref(given)))
        return given

    @property
    def num_bytes(self) -> int:
        """Of all that is kept, held by someone or not."""
        return sum(memory.nbytes for kept in self._kept.values() for memory, _ in kept)
