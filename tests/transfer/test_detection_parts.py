"""A detector reads its maps at the right places, at any stride and precision, and all of it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_folder import tiny_config, write_checkpoint
from small_coco import brick, disc
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from pretrain.errors import UserError
from pretrain.transfer.detection.config import DetectionConfig, EvaluateConfig, ModelConfig
from pretrain.transfer.detection.geometry import Placement
from pretrain.transfer.detection.model import build_detector
from pretrain.transfer.detection.parts import Anchors, Batching, BoxReader, masks_in_boxes
from pretrain.transfer.detection.predict import boxes_in_image, paste
from pretrain.transfer.detection.run import losses_of
from pretrain.transfer.detection.samples import Sample

SMALL = ModelConfig(
    channels=16,
    drop_path_ratio=0.0,
    anchor_px=(8, 16, 32, 64, 128),
    proposals_train=(50, 40),
    proposals_test=(60, 50),
    boxes_per_image=16,
    box_layers=1,
    box_dim=32,
    mask_convs=1,
    mask_dim=8,
)
CONFIG = DetectionConfig(model=SMALL)
STRIDES = {"patch 16": (4.0, 8.0, 16.0, 32.0, 64.0), "patch 14": (3.5, 7.0, 14.0, 28.0, 56.0)}


@pytest.fixture
def vit(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "run", tiny_config()))


def ramps(height: int, width: int, strides: tuple[float, ...]) -> dict[str, Tensor]:
    """Maps that hold x and y of the middle of each of their cells, in px."""
    maps = {}
    for level, stride in enumerate(strides):
        y = (torch.arange(-(-height // stride)) + 0.5) * stride
        x = (torch.arange(-(-width // stride)) + 0.5) * stride
        maps[str(level)] = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1])[None]
    return maps


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("seen_first_px", [448, 64])
def test_a_box_is_read_from_where_it_lies(name: str, seen_first_px: int) -> None:
    """Also where the first image is far smaller than the square that it is padded to."""
    strides = STRIDES[name]
    reader = BoxReader(strides, side=7, canonical_px=224)
    boxes = torch.tensor([[100.0, 60, 120, 90], [50, 80, 190, 230], [60, 50, 380, 390], [30.5, 40, 31, 41.5]])
    reader(ramps(448, 448, strides), [boxes], [(seen_first_px, seen_first_px)])
    read = reader(ramps(448, 448, strides), [boxes], [(448, 448)])  # (4, 2, 7, 7)
    centres = torch.stack([boxes[:, [0, 2]].mean(dim=1), boxes[:, [1, 3]].mean(dim=1)], dim=1)
    torch.testing.assert_close(read.mean(dim=(2, 3)), centres, atol=1e-3, rtol=0)
    left = boxes[:, 0] + (boxes[:, 2] - boxes[:, 0]) / 14  # the middle of the first of seven columns
    torch.testing.assert_close(read[:, 0, 3, 0], left, atol=1e-3, rtol=0)


def test_large_boxes_are_read_from_coarse_maps() -> None:
    reader = BoxReader(STRIDES["patch 16"], side=7, canonical_px=224)
    boxes = torch.tensor([[0.0, 0, side, side] for side in (10, 111, 112, 223, 224, 447, 448, 2000)])
    assert reader.levels_of(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    small = BoxReader(STRIDES["patch 16"], side=7, canonical_px=56)
    assert small.levels_of(boxes[:3] / 4).tolist() == [0, 0, 1]


def test_boxes_of_each_image_are_read_from_that_image() -> None:
    maps = {
        key: torch.cat([value, value + 1000]) for key, value in ramps(64, 64, STRIDES["patch 16"]).items()
    }
    boxes = torch.tensor([[10.0, 10, 30, 30]])
    read = BoxReader(STRIDES["patch 16"], 7, 224)(maps, [boxes, boxes.repeat(2, 1)], None)
    assert read.mean(dim=(1, 2, 3)).tolist() == pytest.approx([20, 1020, 1020])


def test_anchors_stand_at_the_strides_and_keep_their_area() -> None:
    anchors = Anchors((14, 28, 56, 112, 224), (0.5, 1.0, 2.0), STRIDES["patch 14"])
    maps = [features[:, :1] for features in ramps(56, 112, STRIDES["patch 14"]).values()]
    (placed,) = anchors(ImageList(torch.zeros(1, 3, 56, 112), [(56, 112)]), maps)
    assert len(placed) == 3 * sum(features[0, 0].numel() for features in maps)
    second = placed[3:6]  # one stride of 3.5 px to the right
    assert second[:, [0, 2]].mean(dim=1).tolist() == pytest.approx([3.5] * 3)
    widths, heights = second[:, 2] - second[:, 0], second[:, 3] - second[:, 1]
    assert (widths * heights).tolist() == pytest.approx([196] * 3)
    assert (heights / widths).tolist() == pytest.approx([0.5, 1, 2])


@pytest.mark.parametrize("box", [(20.0, 15.0, 31.0, 27.0), (20.3, 14.8, 31.4, 27.3)])
def test_a_mask_that_is_learnt_perfectly_comes_back_as_it_was(box: tuple[float, ...]) -> None:
    """Also of few pixels: torchvision's own targets and pasting lose a fifth of the overlap at this size."""
    mask = disc(25.7, 21.2, 5.4)
    target = masks_in_boxes(
        torch.from_numpy(np.stack([brick(1, 1, (9, 9)), mask])),
        torch.tensor([box]),
        torch.tensor([1]),
        side=28,
    )
    pasted = paste(target[0], np.array(box), *mask.shape)
    assert (pasted & mask).sum() / (pasted | mask).sum() > 0.96


def test_a_mask_is_pasted_into_its_box_and_cut_at_the_image() -> None:
    pasted = paste(torch.ones(28, 28), np.array([-6.0, 50.0, 10.0, 70.0]), 64, 80)
    expected = np.zeros((64, 80), np.uint8)
    expected[50:64, :10] = 1
    assert np.array_equal(pasted, expected)


def test_boxes_come_back_to_the_image_and_end_at_its_edges() -> None:
    placement = Placement(0, 0, 200, 100, width=400, height=200)
    boxes = boxes_in_image(torch.tensor([[10.0, 20, 60, 80], [350, 150, 420, 260]]), placement, 100, 200)
    assert boxes.tolist() == [[5, 10, 30, 40], [175, 75, 200, 100]]


def test_batches_are_padded_with_the_mean_colour_to_the_square_of_training() -> None:
    batching = Batching((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), train_side_px=96, test_side_px=None)
    images = [torch.rand(3, 40, 60), torch.rand(3, 64, 32)]
    batch, _ = batching.train()(images, None)
    assert batch.tensors.shape == (2, 3, 96, 96)
    assert batch.image_sizes == [(40, 60), (64, 32)]
    assert batch.tensors[0, :, 40:].abs().max() == 0
    torch.testing.assert_close(batch.tensors[1, 0, :64, :32], (images[1][0] - 0.5) / 0.2)
    assert batching.eval()(images, None)[0].tensors.shape == (2, 3, 64, 64)


def batch_of(has_masks: bool, num_objects: tuple[int, ...] = (2, 1)) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for count in num_objects:
        masks = np.stack([disc(24, 30, 9), brick(50, 20, (20, 14))])[:count]
        boxes = torch.tensor([[15.0, 21, 33, 39], [50, 20, 70, 34]])[:count]
        samples.append(
            Sample(
                torch.randint(0, 255, (3, 64, 80), generator=generator, dtype=torch.uint8),
                boxes,
                torch.tensor([1, 2])[:count],
                torch.from_numpy(masks) if has_masks else None,
            )
        )
    return samples


def swin(tmp_path: Path) -> str:
    args = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
    config = tiny_config(
        name="swin_tiny_patch4_window7_224", img_px=64, patch_px=4, args=args, class_token=False
    )
    return str(write_checkpoint(tmp_path / "swin", config))


@pytest.mark.parametrize("has_masks", [True, False])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_every_weight_learns_also_where_there_is_nothing_to_find(
    kind: str, has_masks: bool, vit: str, tmp_path: Path
) -> None:
    """Parallel training waits for the gradient of every weight, in every step."""
    detector = build_detector(vit if kind == "vit" else swin(tmp_path), 2, has_masks, CONFIG)
    for num_objects in ((2, 1), (0, 0)):
        detector.zero_grad()
        torch.manual_seed(0)
        losses = losses_of(detector, batch_of(has_masks, num_objects))
        assert ("loss_mask" in losses) == has_masks
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()  # type: ignore[union-attr]
        without = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []


def test_coordinates_are_exact_under_autocast(vit: str) -> None:
    """In bfloat16 a coordinate of 300 px would be a multiple of 2."""
    detector = build_detector(vit, 2, True, CONFIG).eval()
    seen = {}
    detector.rpn.register_forward_hook(lambda _, __, output: seen.update(boxes=output[0][0]))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        (result,) = detector([torch.rand(3, 320, 384)])
    assert seen["boxes"].dtype == result["boxes"].dtype == result["masks"].dtype == torch.float32
    far = seen["boxes"][(seen["boxes"] > 256) & (seen["boxes"] < 319)]
    assert len(far) > 10
    assert (far.frac() != 0).float().mean() > 0.5
    detector.train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(detector, batch_of(True))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_number_of_detections_and_their_least_score_are_settings(vit: str) -> None:
    config = DetectionConfig(
        model=SMALL, evaluate=EvaluateConfig(detections_per_image=7, score_threshold=0.01)
    )
    detector = build_detector(vit, 2, True, config).eval()
    with torch.inference_mode():
        (result,) = detector([torch.rand(3, 64, 80)])
    assert len(result["boxes"]) == 7
    assert result["masks"].shape == (7, 28, 28)
    assert set(result["labels"].tolist()) <= {1, 2}
    assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)


def test_the_same_seed_gives_the_same_detector(vit: str) -> None:
    torch.manual_seed(5)
    one = build_detector(vit, 2, True, CONFIG).state_dict()
    torch.manual_seed(6)
    other = build_detector(vit, 2, True, CONFIG).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_vitdets_heads_have_their_convolutions_and_norms(vit: str) -> None:
    model = SMALL.model_copy(
        update={"rpn_convs": 2, "box_convs": 4, "box_layers": 1, "head_norm": "layer", "window_px": 16}
    )
    detector = build_detector(vit, 2, True, DetectionConfig(model=model))
    names = [type(module).__name__ for module in detector.roi_heads.box_head.modules()]
    assert names.count("Conv2d") == names.count("LayerNorm2d") == 4
    assert names.count("Linear") == 1
    assert [type(m).__name__ for m in detector.rpn.head.modules()].count("Conv2d") == 2 + 2
    assert [type(m).__name__ for m in detector.roi_heads.mask_head.modules()].count("LayerNorm2d") == 1
    losses = losses_of(detector, batch_of(True))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_windows_on_a_swin_are_refused(tmp_path: Path) -> None:
    model = SMALL.model_copy(update={"window_px": 16})
    with pytest.raises(UserError, match="window_px 16"):
        build_detector(swin(tmp_path), 2, True, DetectionConfig(model=model))
