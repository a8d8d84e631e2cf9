"""What a detector finds in every image of a split, each looked at once, as COCO's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from pretrain.transfer.detection.coco import CocoSet
from pretrain.transfer.detection.config import EvaluateConfig
from pretrain.transfer.detection.geometry import Placement
from pretrain.transfer.detection.masks import encode
from pretrain.transfer.detection.samples import image_for_testing

MASK_THRESHOLD = 0.5
BOX_DIGITS, SCORE_DIGITS = 2, 6  # that results are written and scored with


@torch.inference_mode()
def predict(
    detector: GeneralizedRCNN, found: CocoSet, config: EvaluateConfig, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """All detections of a split, image by image in its order; the same list in all processes.

    A detection has image_id, category_id, bbox (x, y, width, height in px), score and, of Mask R-CNN,
    segmentation. Images are taken one by one, so the result depends neither on batches nor on processes.
    """
    detector.to(accelerator.device).eval()
    own = []
    for place in range(accelerator.process_index, len(found), accelerator.num_processes):
        own.append((place, detect(detector, found, place, config, accelerator.device)))
    # one process's list comes back as it is, those of several one after another
    gathered: list[tuple[int, list[dict[str, Any]]]] = gather_object(own)
    gathered.sort(key=lambda pair: pair[0])
    assert [place for place, _ in gathered] == list(range(len(found))), "every image once"
    return [detection for _, detections in gathered for detection in detections]


def detect(
    detector: GeneralizedRCNN, found: CocoSet, place: int, config: EvaluateConfig, device: torch.device
) -> list[dict[str, Any]]:
    """The detections in one image, best first."""
    image, placement = image_for_testing(found, place, config)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        (result,) = detector([image.to(device).float() / 255])
    height, width = found.sizes[place].tolist()
    boxes = boxes_in_image(result["boxes"], placement, height, width)
    masks = result["masks"].cpu() if "masks" in result else None
    detections = []
    for number, (label, score) in enumerate(
        zip(result["labels"].tolist(), result["scores"].tolist(), strict=True)
    ):
        left, top, right, bottom = boxes[number].tolist()
        detection = {
            "image_id": int(found.image_ids[place]),
            "category_id": found.categories[label - 1].id,
            "bbox": [round(value, BOX_DIGITS) for value in (left, top, right - left, bottom - top)],
            "score": round(score, SCORE_DIGITS),
        }
        if masks is not None:
            detection["segmentation"] = encode(paste(masks[number], boxes[number], height, width))
        detections.append(detection)
    return detections


def boxes_in_image(boxes: Tensor, placement: Placement, height: int, width: int) -> NDArray[np.float64]:
    """(n, 4) as the detector saw them -> (n, 4) in px of the image as it is stored"""
    moved = placement.boxes_back(boxes.double().cpu().numpy())
    return moved.clip(0, np.array([width, height] * 2))


def paste(mask: Tensor, box: NDArray[np.float64], height: int, width: int) -> NDArray[np.uint8]:
    """A soft mask (S, S) that fills a box: uint8 (height, width), 1 where it is at least one half"""
    left, top, right, bottom = box.tolist()
    first_x, first_y = max(0, int(left) - 1), max(0, int(top) - 1)
    last_x, last_y = min(width, int(right) + 2), min(height, int(bottom) + 2)
    x = (torch.arange(first_x, last_x) + 0.5 - left) / max(right - left, 1e-3) * 2 - 1  # -1..1 over the box
    y = (torch.arange(first_y, last_y) + 0.5 - top) / max(bottom - top, 1e-3) * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (h, w, 2), x first
    soft = F.grid_sample(mask[None, None], grid[None].to(mask.dtype), align_corners=False)[0, 0]
    pasted = np.zeros((height, width), dtype=np.uint8)
    pasted[first_y:last_y, first_x:last_x] = (soft >= MASK_THRESHOLD).numpy()
    return pasted
