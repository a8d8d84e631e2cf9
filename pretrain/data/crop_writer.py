"""Decode the images of a batch once each, in threads, and write all their crops into shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batch import NO_LABEL, crop_places
from pretrain.data.decode import BadImage, crop_resize, decode, image_size
from pretrain.data.lane import Pick
from pretrain.data.quarantine import Quarantine
from pretrain.data.reader import EncodedSample
from pretrain.errors import DataError
from pretrain.views.plan import ViewConfig, crop_boxes

IMAGES_PER_TASK = 4
Boxes = list[list[int]]  # per image: top, left, height, width


@dataclass(frozen=True)
class Ring:
    """Batches in shared memory, one per slot."""

    crops: tuple[Tensor, ...]  # per crop size: uint8 (slots, V, B, S, S, 3)
    numbers: Tensor  # int64 (slots, 3, B): sample ids, epochs, labels

    @property
    def num_slots(self) -> int:
        return len(self.numbers)


class CropWriter:
    """Fills the slots of a ring."""

    def __init__(
        self, ring: Ring, views: Sequence[ViewConfig], seed: int, num_threads: int, quarantine: Quarantine
    ) -> None:
        self.ring = ring
        self.views = list(zip(views, crop_places(views), strict=True))
        self.seed = seed
        self.quarantine = quarantine
        self.threads = ThreadPoolExecutor(num_threads)

    def begin(self, slot: int, picks: Sequence[Pick]) -> list[Future[None]]:
        """Start filling a slot; it is full when all tasks are done."""
        sizes = [_size_or_any(pick.sample) for pick in picks]
        boxes = self._boxes([pick.sample for pick in picks], [pick.epoch for pick in picks], sizes)
        return [
            self.threads.submit(self._fill, slot, rows, picks, boxes)
            for start in range(0, len(picks), IMAGES_PER_TASK)
            for rows in [range(start, min(start + IMAGES_PER_TASK, len(picks)))]
        ]

    def _boxes(
        self, samples: Sequence[EncodedSample], epochs: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> list[Boxes]:
        """Per view, the crop of each image."""
        sample_ids = torch.tensor([sample.sample_id for sample in samples])
        heights, widths = torch.tensor(sizes).unbind(1)
        return [
            crop_boxes(view, self.seed, torch.tensor(epochs), sample_ids, index, heights, widths).tolist()
            for index, (view, _) in enumerate(self.views)
        ]

    def _fill(self, slot: int, rows: Sequence[int], picks: Sequence[Pick], boxes: Sequence[Boxes]) -> None:
        for row in rows:
            image, used = self._decode_or_replace(picks[row])
            own = [of_view[row] for of_view in boxes]
            if used is not picks[row]:
                height, width = image.shape[:2]
                own = [only for (only,) in self._boxes([used.sample], [used.epoch], [(height, width)])]
            for (view, (group, place)), box in zip(self.views, own, strict=True):
                crop = crop_resize(image, box, view.size_px, view.interpolation)
                self.ring.crops[group][slot, place, row] = crop
            label = NO_LABEL if used.sample.label is None else used.sample.label
            self.ring.numbers[slot, :, row] = torch.tensor([used.sample.sample_id, used.epoch, label])

    def _decode_or_replace(self, pick: Pick) -> tuple[NDArray[np.uint8], Pick]:
        """The picked image, or the next of its block that decodes: the same on every rank and restart."""
        num_samples = len(pick.block.samples)
        for step in range(num_samples):
            candidate = pick if step == 0 else Pick(pick.block, (pick.place + step) % num_samples)
            try:
                return decode(candidate.sample.image), candidate
            except BadImage as bad:
                self.quarantine.add(candidate.sample, bad.reason)
        raise DataError(f"{pick.sample.shard}: none of {num_samples} samples read together decodes; check it")


def _size_or_any(sample: EncodedSample) -> tuple[int, int]:
    """(height, width) in px; of a bad image any, as it will be replaced."""
    try:
        return image_size(sample.image)
    except BadImage:
        return 1, 1
