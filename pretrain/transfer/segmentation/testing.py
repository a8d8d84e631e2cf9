"""The test of a segmenter: every image of a split once, every labelled pixel counted once, on any number of
processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pretrain.transfer.segmentation.augment import fitted_size, resize_image
from pretrain.transfer.segmentation.recipe import SegmentationRecipe
from pretrain.transfer.segmentation.samples import normalised
from pretrain.transfer.segmentation.scenes import SceneSet
from pretrain.transfer.segmentation.scores import confusion
from pretrain.transfer.segmentation.segmenter import Segmenter
from pretrain.transfer.segmentation.sliding import predict

Image = NDArray[np.uint8]  # (H, W, 3)
Classes = NDArray[np.uint8]  # (H, W)
See = Callable[[int, Image, Classes, Classes], None]  # number, image, labels, prediction
Predict = Callable[[Image, tuple[int, int]], Tensor]  # image, (H, W) of the answer -> int64 (H, W)
AHEAD = 4  # images that are read while others are looked at


def predictor(segmenter: Segmenter, recipe: SegmentationRecipe, device: torch.device) -> Predict:
    """How the network in eval mode answers for an image of any size."""
    mean, std = segmenter.backbone.mean, segmenter.backbone.std
    window = recipe.crop_px if recipe.test.mode == "slide" else None

    def network(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits: Tensor = segmenter(pixels)[0]
        return logits

    def answer(image: Image, size: tuple[int, int]) -> Tensor:
        fitted = fitted_size((image.shape[0], image.shape[1]), recipe.data.fit_px)
        if fitted != image.shape[:2]:
            image = resize_image(image, fitted)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None]
        whole = torch.tensor([fitted], device=device)
        ready = normalised(pixels, whole, mean, std)[0]
        return predict(network, ready, size, window, recipe.stride_px, recipe.test.flip)

    return answer


@torch.inference_mode()
def confusion_of(
    answer: Predict, scenes: SceneSet, accelerator: Accelerator, see: See | None = None
) -> Tensor:
    """The confusion matrix of a whole split, the same on all processes: int64 (K, K).

    Each process answers for other images, so none is counted twice, and the counts are summed as integers.
    see: is shown every image that this process answers for.
    """
    num_classes = len(scenes.labels.classes)
    device = accelerator.device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    own = range(accelerator.process_index, len(scenes), accelerator.num_processes)
    for index, image, labels in _read_ahead(scenes, own):
        predicted = answer(image, (labels.shape[0], labels.shape[1]))
        # a copy: the labels may lie in memory that is lent for reading only
        matrix += confusion(predicted, torch.from_numpy(labels.copy()).to(device), num_classes)
        if see is not None:
            see(index, image, labels, predicted.to("cpu", torch.uint8).numpy())
    total: Tensor = accelerator.reduce(matrix, "sum").cpu()
    expected = int(scenes.pixels.sum())
    assert int(total.sum()) == expected, (int(total.sum()), expected)
    return total


def segmenter_confusion(
    segmenter: Segmenter,
    scenes: SceneSet,
    recipe: SegmentationRecipe,
    accelerator: Accelerator,
    see: See | None = None,
) -> Tensor:
    """The confusion matrix of a network, which is left in the mode that it was in."""
    was_training = segmenter.training
    segmenter.eval()
    try:
        return confusion_of(predictor(segmenter, recipe, accelerator.device), scenes, accelerator, see)
    finally:
        segmenter.train(was_training)


def chosen(num_scenes: int, num_pictures: int) -> set[int]:
    """Images to draw, spread over the split."""
    count = min(num_pictures, num_scenes)
    return {round(place) for place in np.linspace(0, num_scenes - 1, count).tolist()}


def _read_ahead(scenes: SceneSet, indices: Sequence[int]) -> Iterator[tuple[int, Image, Classes]]:
    """Index, image and labels in order; the next ones are read meanwhile."""

    def read(index: int) -> tuple[int, Image, Classes]:
        return index, scenes.image(index), scenes.classes_of(index)

    with ThreadPoolExecutor(2) as pool:
        waiting: deque[Future[tuple[int, Image, Classes]]] = deque()
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
