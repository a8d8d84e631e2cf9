"""The recipes hold the published numbers, and wrong settings are told with the nearest right ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.settings import read_settings
from pretrain.transfer.detection.config import DetectionConfig, step_down

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
COCO_IMAGES = 117_266  # of train2017, that have an object


def config_of(name: str, *overrides: str) -> DetectionConfig:
    return read_settings(DetectionConfig, CONFIGS / f"detection_{name}.yaml", overrides)


def test_swins_1x_drops_after_8_and_11_of_12_epochs() -> None:
    config = config_of("coco_swin_t_1x")
    lr, epoch = config.lr_schedule(COCO_IMAGES), COCO_IMAGES / 16
    assert config.num_steps(COCO_IMAGES) == 87_950
    assert lr(0) == pytest.approx(1e-7)
    assert lr(250) == pytest.approx(0.5 * (1e-4 + 1e-7))
    assert lr(500) == lr(int(8 * epoch) - 1) == 1e-4
    assert lr(int(8 * epoch) + 1) == lr(int(11 * epoch) - 1) == pytest.approx(1e-5)
    assert lr(int(11 * epoch) + 1) == lr(87_949) == pytest.approx(1e-6)
    assert (config.optim.weight_decay, config.model.drop_path_ratio) == (0.05, 0.2)
    assert (min(config.augment.shortest_px), max(config.augment.shortest_px)) == (480, 800)
    assert config.augment.longest_px == config.evaluate.longest_px == 1333
    assert config.train_side_px is config.test_side_px is None


def test_without_a_config_it_is_swins_1x() -> None:
    named, default = config_of("coco_swin_t_1x"), DetectionConfig()
    for part in ("model", "augment", "optim"):
        assert getattr(named, part) == getattr(default, part)
    assert default.num_steps(COCO_IMAGES) == named.num_steps(COCO_IMAGES)
    assert [default.lr_schedule(999)(step) for step in range(750)] == [
        named.lr_schedule(999)(step) for step in range(750)
    ]


def test_vitdet_is_trained_in_squares_with_layer_decay() -> None:
    config = config_of("coco_vit_100ep")
    assert (config.augment.kind, config.augment.scale, config.train_side_px) == ("jitter", (0.1, 2.0), 1024)
    assert config.test_side_px == 1024
    assert (config.optim.layer_decay, config.optim.weight_decay, config.optim.batch_size) == (0.7, 0.1, 64)
    model = config.model
    assert (model.window_px, model.rpn_convs, model.box_convs, model.box_layers) == (14 * 16, 2, 4, 1)
    assert model.head_norm == "layer"
    assert config.num_steps(COCO_IMAGES) == pytest.approx(184_375, rel=0.01)  # detectron2's, of 118,000
    drops = [step for step in range(150_000, 184_000, 10) if config.lr_schedule(COCO_IMAGES)(step) < 5e-5]
    assert drops[0] == pytest.approx(163_889, rel=0.01)


def test_one_x_of_a_vit_differs_from_100_epochs_in_length_and_batch_only() -> None:
    long, short = config_of("coco_vit_100ep"), config_of("coco_vit_1x")
    assert (short.schedule.epochs, short.schedule.drops, short.optim.batch_size) == (12, (8, 11), 16)
    assert (short.model, short.augment, short.evaluate) == (long.model, long.augment, long.evaluate)


def test_a_schedule_in_steps_drops_in_steps_and_a_cosine_ends_at_nothing() -> None:
    stepped = DetectionConfig.model_validate(
        {"schedule": {"steps": 120, "drops": (60, 90), "warmup_steps": 10, "drop_factor": 0.5}}
    )
    lr = stepped.lr_schedule(7)
    assert [lr(step) for step in (10, 59, 60, 90)] == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5])
    cosine = DetectionConfig.model_validate(
        {"schedule": {"steps": 110, "kind": "cosine", "warmup_steps": 10}, "optim": {"lr_batch": 8}}
    )
    lr = cosine.lr_schedule(7)
    assert lr(10) == pytest.approx(2e-4)  # twice the batch that the rate is for
    assert lr(60) == pytest.approx(1e-4)
    assert lr(110) == 0
    assert step_down(1.0, [3], 0.1, 0)(0) == 1.0


WRONG = {
    "model.chanels=8": "model.chanels: unknown setting; did you mean 'channels'?",
    "optim.lr=0": "optim.lr: Input should be greater than 0",
    "augment.kind=lsj": "augment.kind: Input should be 'multi_scale', 'jitter' or 'crop' (got 'lsj')",
    "augment.size_px=512": "augment: 'size_px' means nothing to kind 'multi_scale'; remove it",
    "augment={kind: crop, scale: [2.0, 0.5]}": "augment: scale goes from 2.0 down to 0.5",
    "model.anchor_px=[8, 16]": "model.anchor_px",
    "schedule={epochs: 2, steps: 5}": "schedule: epochs and steps both say how long; remove one",
    "schedule={epochs: 12, drops: [8, 12]}": "drops [8.0, 12.0] must rise and end before the length",
    "schedule={kind: cosine, drops: [8]}": "schedule: drops means nothing to kind 'cosine'",
    "evaluate={square: true, longest_px: null}": "evaluate: square pads to longest_px; give longest_px",
    "data.val=5": "data.val: Input should be a valid string (got 5)",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_setting_is_told_with_its_place_and_remedy(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(DetectionConfig, None, [override])
    assert WRONG[override] in str(caught.value)
    assert "\n" not in str(caught.value)
