"""Mask R-CNN and Faster R-CNN above pretrained weights, of torchvision's parts.

Three things differ from what torchvision does by itself. Strides come from the backbone: torchvision infers
them from the first batch and rounds them to powers of two, which is wrong for patches of 14 px, and for
images that are much smaller than the square they are padded to. Anchors and box offsets are float32 also
under autocast: in bfloat16 a coordinate of 1000 px is off by up to 4. Images arrive at their final size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from pretrain.export.source import WeightsName
from pretrain.transfer.detection.config import NUM_LEVELS, DetectionConfig, ModelConfig
from pretrain.transfer.hooks import TransferBackbone, backbone

FEATURE_LEVELS = [str(level) for level in range(NUM_LEVELS - 1)]  # of the pyramid, that boxes are read from
CANONICAL_LEVEL = 4  # that a box of canonical size is read from: stride 2^4
BOX_SIDE, MASK_SIDE = 7, 14  # of the maps that are read for a box
POINTS_PER_BIN = 2  # a side
SIZE_UNIT_PX = 32  # batches are padded to a multiple
BOX_STD, SCORE_STD = 0.001, 0.01  # of the last layers' first weights


def build_detector(
    weights: str,
    num_categories: int,
    has_masks: bool,
    config: DetectionConfig,
    network: WeightsName | None = None,
) -> FasterRCNN:
    """A detector in train mode whose backbone has the weights that are named.

    It takes a list of images (3, H, W) float32 in 0..1 and in training a list of their boxes (N, 4), labels
    (N,) from 1 on and, for Mask R-CNN, masks (N, H, W); then it gives losses by name. In eval mode it gives
    boxes, labels, scores and soft masks (n, 1, 28, 28), in px of the images as they came. Raises UserError for
    weights that cannot be used.
    """
    settings = config.model
    body = backbone(
        weights,
        "pyramid",
        network=network,
        channels=settings.channels,
        window_px=settings.window_px,
        global_blocks=settings.global_blocks,
        drop_path_ratio=settings.drop_path_ratio,
        seed=config.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        parts = _box_parts(body, num_categories + 1, config)
        if has_masks:
            detector = MaskRCNN(body, **parts, **_mask_parts(body, num_categories + 1, settings))
        else:
            detector = FasterRCNN(body, **parts)
    detector.transform = Batching(body.mean, body.std, config.train_side_px, config.test_side_px)
    return detector.train()


def _box_parts(body: TransferBackbone, num_classes: int, config: DetectionConfig) -> dict[str, Any]:
    model, test = config.model, config.evaluate
    anchors = Anchors(model.anchor_px, model.anchor_ratios, body.strides)
    channels = body.out_channels
    return {
        "rpn_anchor_generator": anchors,
        "rpn_head": RpnHead(channels, len(model.anchor_ratios), model.rpn_convs),
        "rpn_pre_nms_top_n_train": model.proposals_train[0],
        "rpn_post_nms_top_n_train": model.proposals_train[1],
        "rpn_pre_nms_top_n_test": model.proposals_test[0],
        "rpn_post_nms_top_n_test": model.proposals_test[1],
        "rpn_batch_size_per_image": model.anchors_per_image,
        "box_roi_pool": box_reader(body.strides, BOX_SIDE, model.canonical_px),
        "box_head": FastRCNNConvFCHead(
            (channels, BOX_SIDE, BOX_SIDE),
            [channels] * model.box_convs,
            [model.box_dim] * model.box_layers,
            _norm(model),
        ),
        "box_predictor": BoxPredictor(model.box_dim, num_classes),
        "box_batch_size_per_image": model.boxes_per_image,
        "box_score_thresh": test.score_threshold,
        "box_nms_thresh": test.nms_threshold,
        "box_detections_per_img": test.detections_per_image,
    }


def _mask_parts(body: TransferBackbone, num_classes: int, model: ModelConfig) -> dict[str, Any]:
    return {
        "mask_roi_pool": box_reader(body.strides, MASK_SIDE, model.canonical_px),
        "mask_head": MaskRCNNHeads(body.out_channels, [model.mask_dim] * model.mask_convs, 1, _norm(model)),
        "mask_predictor": MaskRCNNPredictor(model.mask_dim, model.mask_dim, num_classes),
    }


def _norm(model: ModelConfig) -> Any:
    return partial(LayerNorm2d, eps=1e-6) if model.head_norm == "layer" else None


def box_reader(strides: Sequence[float], side: int, canonical_px: float) -> MultiScaleRoIAlign:
    """RoIAlign over the levels at the strides that they really have."""
    reader = MultiScaleRoIAlign(FEATURE_LEVELS, side, POINTS_PER_BIN)
    reader.scales = [1.0 / stride for stride in strides[: len(FEATURE_LEVELS)]]
    finest = round(torch.tensor(strides[0]).log2().item())
    reader.map_levels = LevelMapper(
        finest, finest + len(FEATURE_LEVELS) - 1, canonical_px, CANONICAL_LEVEL
    )  # fmt: skip
    return reader


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
