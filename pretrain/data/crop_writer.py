"""Decode the images of a batch once each, in threads, and write all their crops into shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batch import NO_LABEL, crop_places
from pretrain.data.decode import MAX_PIXELS, BadImage, crop_resize, decode, image_size, scale_box, shrink_for
from pretrain.data.lane import Pick
from pretrain.data.quarantine import CHECKSUM, Quarantine
from pretrain.data.reader import EncodedSample
from pretrain.errors import DataError
from pretrain.views.plan import ViewConfig, crop_boxes

MAX_IMAGES_PER_TASK = 16  # handing over a task costs as much as a crop of a small image
MIN_TASKS = 16  # of a batch, so that many threads share a small one
Boxes = list[Sequence[int]]  # of one image, per view: top, left, height, width


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
        self,
        ring: Ring,
        views: Sequence[ViewConfig],
        seed: int,
        threads: Executor,
        quarantine: Quarantine,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.crops = [
            crops.numpy() for crops in ring.crops
        ]  # the same memory; numpy writes small parts faster
        self.numbers = ring.numbers.numpy()
        self.views = tuple(views)
        self.places = crop_places(views)
        self.sizes_px = [view.size_px for view in views]
        self.shrinkable_px = 4 * min(self.sizes_px)  # a smaller image holds no crop that may be shrunk
        self.seed = seed
        self.max_pixels = max_pixels
        self.quarantine = quarantine
        self.threads = threads

    def begin(self, slot: int, picks: Sequence[Pick]) -> list[Future[None]]:
        """Start filling a slot; it is full when all tasks are done."""
        samples = [pick.sample for pick in picks]
        images = [sample.image for sample in samples]
        sizes = [self._size_or_any(image) for image in images]
        epochs = [pick.epoch for pick in picks]
        boxes = self._boxes(samples, epochs, sizes)
        self.numbers[slot] = (
            [sample.sample_id for sample in samples],
            epochs,
            [_label(sample) for sample in samples],
        )
        per_task = min(MAX_IMAGES_PER_TASK, -(-len(picks) // MIN_TASKS))
        return [
            self.threads.submit(self._fill, slot, rows, picks, images, sizes, boxes)
            for start in range(0, len(picks), per_task)
            for rows in [range(start, min(start + per_task, len(picks)))]
        ]

    def _boxes(
        self, samples: Sequence[EncodedSample], epochs: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> list[Boxes]:
        """Of each image, the crop of each view."""
        sample_ids = torch.tensor([sample.sample_id for sample in samples])
        heights, widths = torch.tensor(sizes).unbind(1)
        by_view = [
            crop_boxes(view, self.seed, torch.tensor(epochs), sample_ids, index, heights, widths).tolist()
            for index, view in enumerate(self.views)
        ]
        return [list(boxes) for boxes in zip(*by_view, strict=True)]

    def _fill(
        self,
        slot: int,
        rows: Sequence[int],
        picks: Sequence[Pick],
        images: Sequence[bytes],
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Boxes],
    ) -> None:
        for row in rows:
            pick, own = picks[row], boxes[row]
            try:
                shrink = shrink_for(own, self.sizes_px) if min(sizes[row]) >= self.shrinkable_px else 1
                image = self._decode(pick, images[row], shrink)
                if (shrunk_size := image.shape[:2]) != sizes[row]:
                    own = [scale_box(box, sizes[row], shrunk_size) for box in own]
            except BadImage as bad:
                self.quarantine.add(pick.sample, bad.reason)
                image, used = self._replacement(pick)
                (own,) = self._boxes([used.sample], [used.epoch], [image.shape[:2]])
                self.numbers[slot, :, row] = used.sample.sample_id, used.epoch, _label(used.sample)
            for view, (group, place), box in zip(self.views, self.places, own, strict=True):
                crop = crop_resize(image, box, view.size_px, view.interpolation)
                self.crops[group][slot, place, row] = crop

    def _replacement(self, pick: Pick) -> tuple[NDArray[np.uint8], Pick]:
        """The next image of the lane that decodes: the same on every rank and restart."""
        for candidate in pick.successors():
            try:
                return self._decode(candidate, candidate.sample.image), candidate
            except BadImage as bad:
                self.quarantine.add(candidate.sample, bad.reason)
        raise DataError(f"{pick.sample.shard}: nothing that its lane reads in a round decodes; check it")

    def _decode(self, pick: Pick, encoded: bytes, shrink: int = 1) -> NDArray[np.uint8]:
        if not pick.sample.is_intact:
            again = pick.lane.reader.reread(pick.sample)
            if not again.is_intact:
                raise BadImage(CHECKSUM, "these are not the bytes that were indexed")
            encoded = again.image
        return decode(encoded, shrink, self.max_pixels)

    def _size_or_any(self, encoded: bytes) -> tuple[int, int]:
        """(height, width) in px; of a bad image any, as it will be replaced."""
        try:
            return image_size(encoded, self.max_pixels)
        except BadImage:
            return 1, 1


def _label(sample: EncodedSample) -> int:
    return NO_LABEL if sample.label is None else sample.label
