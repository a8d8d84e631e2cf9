"""Parts of a detector that torchvision's do not serve for, as they stand.

Strides come from the backbone: torchvision infers them from the first batch and rounds them to powers of two,
which is wrong for patches of 14 px, and for images much smaller than the square they are padded to. Boxes are
read, and masks compared, with the middle of pixel (0, 0) at (0.5, 0.5); torchvision takes it to be at (0, 0),
which costs a mask of 10 px a fifth of its overlap. Anchors and box offsets are float32 also under autocast:
in bfloat16 a coordinate of 1000 px is off by up to 4. Images arrive at their final size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_area, roi_align

CANONICAL_STRIDE_PX = 16  # of the map that a box of canonical size is read from
POINTS_PER_BIN = 2  # a side
SIZE_UNIT_PX = 32  # batches are padded to a multiple
BOX_STD, SCORE_STD = 0.001, 0.01  # of the last layers' first weights


class BoxReader(nn.Module):
    """RoIAlign of every box from one of the maps, a coarse one for a large box (arXiv:1612.03144, eq. 1)."""

    def __init__(self, strides: Sequence[float], side: int, canonical_px: float) -> None:
        super().__init__()
        self.strides, self.side, self.canonical_px = tuple(strides[:-1]), side, canonical_px  # not "pool"

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _: Any) -> Tensor:
        """Maps (B, C, h, w), boxes of each image (n, 4) -> (all n, C, side, side)"""
        image = torch.cat([torch.full_like(own[:, :1], number) for number, own in enumerate(boxes)])
        every = torch.cat([image, torch.cat(boxes)], dim=1)  # (all n, 5)
        levels = self.levels_of(every[:, 1:])
        first = next(iter(maps.values()))
        read = first.new_zeros(len(every), first.shape[1], self.side, self.side)
        for level, (stride, features) in enumerate(zip(self.strides, maps.values(), strict=False)):
            (rows,) = torch.where(levels == level)
            part = roi_align(features, every[rows], self.side, 1 / stride, POINTS_PER_BIN, aligned=True)
            read[rows] = part.to(read.dtype)
        return read

    def levels_of(self, boxes: Tensor) -> Tensor:
        """(n, 4) -> int64 (n,): 0 is the finest map"""
        finest = math.floor(math.log2(CANONICAL_STRIDE_PX / self.strides[0]) + 0.5)
        levels = torch.floor(finest + torch.log2(box_area(boxes).sqrt() / self.canonical_px) + 1e-6)
        return levels.clamp(0, len(self.strides) - 1).long()


class Heads(RoIHeads):  # type: ignore[misc]
    """torchvision's box and mask heads with aligned masks; without a mask head they find boxes only."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image, none in training; and losses by name, none when testing."""
        if self.training:
            proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        scores, found_offsets = self.box_predictor(
            self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        )
        if self.training:
            assert targets is not None
            of_class, of_box = fastrcnn_loss(scores, found_offsets, labels, offsets)
            losses = {"loss_classifier": of_class, "loss_box_reg": of_box}
            if self.has_mask():
                are_objects = [own > 0 for own in labels]
                boxes = [own[keep] for own, keep in zip(proposals, are_objects, strict=True)]
                wanted = torch.cat(
                    [
                        masks_in_boxes(target["masks"], own, rows[keep], self._mask_side)
                        for target, own, rows, keep in zip(targets, boxes, matched, are_objects, strict=True)
                    ]
                )
                logits = self._mask_logits(features, boxes, image_shapes)
                losses["loss_mask"] = mask_loss(logits, torch.cat(labels)[torch.cat(are_objects)], wanted)
            return [], losses
        found = self.postprocess_detections(scores, found_offsets, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": chances, "labels": labels}
            for boxes, chances, labels in zip(*found, strict=True)
        ]
        if self.has_mask():
            logits = self._mask_logits(features, found[0], image_shapes).float()
            classes = torch.cat(found[2])
            soft = logits[torch.arange(len(classes), device=classes.device), classes].sigmoid()
            for result in results:
                count = len(result["boxes"])
                result["masks"], soft = soft[:count], soft[count:]
        return results, {}

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """(n, K, 28, 28)"""
        logits: Tensor = self.mask_predictor(
            self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
        )
        return logits

    @property
    def _mask_side(self) -> int:
        return 2 * int(self.mask_roi_pool.side)  # the predictor doubles it


def masks_in_boxes(masks: Tensor, boxes: Tensor, rows: Tensor, side: int) -> Tensor:
    """Masks (N, H, W) of 0 and 1, mask rows[i] as box i of (n, 4) shows it -> float32 (n, side, side)"""
    used, places = torch.unique(rows, return_inverse=True)  # not all of an image are learnt at once
    rois = torch.cat([places[:, None].to(boxes), boxes], dim=1).float()
    read: Tensor = roi_align(masks[used][:, None].float(), rois, side, 1.0, POINTS_PER_BIN, aligned=True)
    return read[:, 0]


def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of each object's own class. logits (n, K, S, S), labels (n,), wanted (n, S, S) in 0..1"""
    own = logits[torch.arange(len(labels), device=labels.device), labels].float()
    if not len(labels):
        return own.sum()  # 0, yet part of the graph: parallel training waits for every gradient
    return F.binary_cross_entropy_with_logits(own, wanted)


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Boxes of one size and several shapes around every place of each map, float32, not rounded."""

    def __init__(self, sizes_px: Sequence[float], ratios: Sequence[float], strides: Sequence[float]) -> None:
        super().__init__(tuple((size,) for size in sizes_px), (tuple(ratios),) * len(sizes_px))
        self.strides = tuple(strides)
        shapes = torch.tensor(ratios).sqrt()  # height / width is the ratio at the same area
        halves = torch.stack([-1 / shapes, -shapes, 1 / shapes, shapes], dim=1) / 2  # (A, 4)
        self.register_buffer("cells", torch.tensor(sizes_px)[:, None, None] * halves, persistent=False)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """One (places * A, 4) for each image: row by row, level by level."""
        levels = []
        for cells, stride, features in zip(self.cells, self.strides, feature_maps, strict=True):
            rows, columns = (torch.arange(side, device=cells.device) * stride for side in features.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((centres + cells).reshape(-1, 4))
        return [torch.cat(levels)] * len(image_list.image_sizes)


class RpnHead(RPNHead):  # type: ignore[misc]
    """torchvision's, with float32 results."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, offsets = super().forward(maps)
        return [one.float() for one in scores], [one.float() for one in offsets]


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's, with float32 results and the small first weights of the reference implementations."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        for layer, std in ((self.cls_score, SCORE_STD), (self.bbox_pred, BOX_STD)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        scores, offsets = super().forward(features)
        return scores.float(), offsets.float()


class Batching(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalise images and pad them to one size, with the mean colour; nothing is resized or turned back.

    train_side_px, test_side_px: of the square that is padded to, if an image is not larger.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], train_side_px: int | None, test_side_px: int | None
    ) -> None:
        super().__init__(0, 0, list(mean), list(std), size_divisible=SIZE_UNIT_PX)
        self.train_side_px, self.test_side_px = train_side_px, test_side_px

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = SIZE_UNIT_PX) -> Tensor:
        """-> (B, 3, H, W)"""
        least = (self.train_side_px if self.training else self.test_side_px) or 1
        sides = [max(least, *(image.shape[axis] for image in images)) for axis in (1, 2)]
        height, width = (-(-side // size_divisible) * size_divisible for side in sides)
        batch = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result
