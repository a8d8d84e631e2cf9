"""Mask R-CNN and Faster R-CNN above pretrained weights, of torchvision's parts and those of `parts`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork

from pretrain.export.source import WeightsName
from pretrain.transfer.detection.config import DetectionConfig, ModelConfig
from pretrain.transfer.detection.parts import Anchors, Batching, BoxPredictor, BoxReader, Heads, RpnHead
from pretrain.transfer.hooks import TransferBackbone, backbone

BOX_SIDE, MASK_SIDE = 7, 14  # of the maps that are read for a box


def build_detector(
    weights: str,
    num_categories: int,
    has_masks: bool,
    config: DetectionConfig,
    network: WeightsName | None = None,
) -> GeneralizedRCNN:
    """A detector in train mode whose backbone has the weights that are named.

    It takes a list of images (3, H, W) float32 in 0..1 and in training a list of their boxes (N, 4), labels
    (N,) from 1 on and, with masks, masks (N, H, W); then it gives losses by name. In eval mode it gives
    boxes, labels, scores and, with masks, soft masks (n, 28, 28), in px of the images as they came. Raises
    UserError for weights that cannot be used.
    """
    model = config.model
    body = backbone(
        weights,
        "pyramid",
        network=network,
        channels=model.channels,
        window_px=model.window_px,
        global_blocks=model.global_blocks,
        drop_path_ratio=model.drop_path_ratio,
        seed=config.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        proposer, heads = _proposer(body, model), _heads(body, num_categories + 1, has_masks, config)
    batching = Batching(body.mean, body.std, config.train_side_px, config.test_side_px)
    return GeneralizedRCNN(body, proposer, heads, batching).train()


def _proposer(body: TransferBackbone, model: ModelConfig) -> RegionProposalNetwork:
    before, after = zip(model.proposals_train, model.proposals_test, strict=True)
    return RegionProposalNetwork(
        Anchors(model.anchor_px, model.anchor_ratios, body.strides),
        RpnHead(body.out_channels, len(model.anchor_ratios), model.rpn_convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=model.anchors_per_image,
        positive_fraction=0.5,
        pre_nms_top_n={"training": before[0], "testing": before[1]},
        post_nms_top_n={"training": after[0], "testing": after[1]},
        nms_thresh=0.7,
    )


def _heads(body: TransferBackbone, num_classes: int, has_masks: bool, config: DetectionConfig) -> Heads:
    model, test, channels = config.model, config.evaluate, body.out_channels
    return Heads(
        box_roi_pool=BoxReader(body.strides, BOX_SIDE, model.canonical_px),
        box_head=FastRCNNConvFCHead(
            (channels, BOX_SIDE, BOX_SIDE),
            [channels] * model.box_convs,
            [model.box_dim] * model.box_layers,
            _norm(model),
        ),
        box_predictor=BoxPredictor(model.box_dim, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=model.boxes_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=test.score_threshold,
        nms_thresh=test.nms_threshold,
        detections_per_img=test.detections_per_image,
        **(_mask_parts(body, num_classes, model) if has_masks else {}),
    )


def _mask_parts(body: TransferBackbone, num_classes: int, model: ModelConfig) -> dict[str, nn.Module]:
    return {
        "mask_roi_pool": BoxReader(body.strides, MASK_SIDE, model.canonical_px),
        "mask_head": MaskRCNNHeads(body.out_channels, [model.mask_dim] * model.mask_convs, 1, _norm(model)),
        "mask_predictor": MaskRCNNPredictor(model.mask_dim, model.mask_dim, num_classes),
    }


def _norm(model: ModelConfig) -> Any:
    return partial(LayerNorm2d, eps=1e-6) if model.head_norm == "layer" else None
