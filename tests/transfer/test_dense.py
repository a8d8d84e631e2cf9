"""The dense read-out: targets of patches worked by hand, and what a linear layer reads from their tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from run_folder import tiny_config, write_checkpoint
from small_scenes import IGNORED, save_mask, write_folder
from torch import Tensor

from pretrain.cli import main
from pretrain.tokens import TokenLayout
from pretrain.transfer import backbone
from pretrain.transfer.dense.patches import (
    Patches,
    choose_size,
    class_areas,
    patch_tokens,
    shares,
    take_patches,
)
from pretrain.transfer.dense.probe import PROBE, fit_probe, held_out_images
from pretrain.transfer.segmentation.folders import find_data
from pretrain.transfer.segmentation.recipe import DataRecipe
from pretrain.transfer.segmentation.scenes import SceneSet, open_scenes

CPU = torch.device("cpu")
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_px": 64,
    "patch_px": 4,
    "args": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with patches of 8 px, learned at 32 px."""
    run = tmp_path_factory.mktemp("runs") / "vit"
    torch.manual_seed(0)
    write_checkpoint(run, tiny_config(), ("rotation",))
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("scenes"), num_train=8, num_val=3)


def evaluate(*arguments: object) -> int:
    # accelerate keeps the device of its first use in a process
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return main(["evaluate", "dense", *map(str, arguments), "--device", "cpu"])


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "eval" / "dense.json").read_text())
    return found


def scenes_of(data: Path) -> SceneSet:
    labels, splits = find_data(data, DataRecipe(test_split="train"))
    return open_scenes(splits["train"], labels)


def test_a_patch_learns_the_shares_of_its_labelled_pixels() -> None:
    void = IGNORED
    classes = np.array(
        [[0, 0, 1, void], [0, 2, void, void], [void, void, 2, 2], [void, void, 2, 2]], dtype=np.uint8
    )
    areas = class_areas(classes, (2, 2), num_classes=3)
    assert (areas / 4).tolist() == [[3, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 4]]
    assert shares(areas).tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_a_pixel_between_patches_counts_in_each_with_its_part() -> None:
    classes = np.array([[0, 1, 0]], dtype=np.uint8)  # 3 pixels for 2 patches: each has one and a half
    assert shares(class_areas(classes, (1, 2), 2)).tolist() == [
        pytest.approx([2 / 3, 1 / 3]),
        pytest.approx([2 / 3, 1 / 3]),
    ]
    few = np.array([[0], [1]], dtype=np.uint8)  # 2 pixels for 4 patches: each has half of one
    assert shares(class_areas(few, (4, 1), 2)).argmax(dim=1).tolist() == [0, 0, 1, 1]


def test_the_areas_of_any_size_add_up_to_its_pixels() -> None:
    classes = np.random.default_rng(0).integers(0, 5, (37, 53)).astype(np.uint8)
    areas = class_areas(classes, (6, 7), num_classes=5)
    assert (areas.sum(dim=0) / 42).tolist() == np.bincount(classes.ravel()).tolist()
    assert torch.equal(areas.sum(dim=1), torch.full((42,), 37.0 * 53, dtype=torch.float64))


def test_patches_of_void_alone_and_held_out_images_are_not_learned_from() -> None:
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(40, 6, generator=generator), torch.eye(3)[torch.arange(40) % 3]
    void = torch.arange(0, 40, 5)
    targets[void] = 0
    patches = Patches(features, targets, num_images=10)
    assert patches.rows_of(torch.tensor([0, 2])).tolist() == [1, 2, 3, 8, 9, 11]
    config = replace(PROBE, num_epochs=2)
    spoiled = Patches(features.index_fill(0, void, 1e6), targets, num_images=10)
    one, other = (fit_probe(each, config, CPU) for each in (patches, spoiled))
    assert torch.equal(one.probe.weight, other.probe.weight)
    assert one.heads == other.heads


def test_held_out_images_are_drawn_from_the_seed() -> None:
    images = torch.arange(5, 45)
    kept, held_out = held_out_images(images, 0.1, seed=0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == images.tolist()
    assert len(held_out) == 4
    assert torch.equal(held_out, held_out_images(images, 0.1, seed=0)[1])
    assert not torch.equal(held_out, held_out_images(images, 0.1, seed=1)[1])


def test_the_rate_is_chosen_by_the_loss_of_a_separable_problem() -> None:
    """The class is the largest of three numbers by a margin; two epochs are few for the smallest rate."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4000,), generator=generator)
    features = torch.randn(4000, 6, generator=generator) + 6 * torch.eye(3, 6)[labels]
    chosen = fit_probe(Patches(features, F.one_hot(labels, 3).float(), 40), replace(PROBE, num_epochs=2), CPU)
    losses = [head["held_out_loss"] for head in chosen.heads]
    assert chosen.lr_factor == chosen.config.lr_factors[losses.index(min(losses))]
    assert min(losses) < 0.02 < losses[0]
    right = chosen.probe.logits(features)[:, 0].argmax(dim=1) == labels
    assert right.float().mean() > 0.99


def test_tokens_are_those_of_timm_after_the_final_norm(weights: Path) -> None:
    network = backbone(weights, "map").eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    whole: Tensor = network.network.forward_features((images / 255 - mean) / std)  # type: ignore[operator]
    expected = TokenLayout((4, 4), ("rotation",)).patches(whole)
    torch.testing.assert_close(patch_tokens(network, images), expected)


def test_a_patch_has_the_token_and_the_target_of_its_place(weights: Path, data: Path) -> None:
    """Whatever the batch size; images are read ahead in threads."""
    scenes, network = scenes_of(data), backbone(weights, "map").eval()
    found = take_patches(network, scenes, (32, 48), 3, CPU)
    assert found.features.shape == (8 * 24, 24)
    pixels = torch.from_numpy(scenes.image(5)).permute(2, 0, 1)[None]
    torch.testing.assert_close(
        found.features.view(8, 24, 24)[5], patch_tokens(network, pixels)[0], rtol=1e-4, atol=1e-5
    )
    classes = torch.from_numpy(scenes.classes_of(5)[16:24, 8:16].copy())  # third row, second column
    expected = torch.bincount(classes.flatten(), minlength=3) / 64
    assert torch.equal(found.targets.view(8, 4, 6, 3)[5, 2, 1], expected)


def test_untrained_tokens_tell_colours_and_the_same_seed_gives_the_same_bits(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--data", data, "--size-px", 96, 144, "--epochs", 20]
    for name in ("one", "two"):
        assert evaluate(f"untrained:{weights}", *settings, "--out", tmp_path / name) == 0
    one, two = (result_of(tmp_path / name) for name in ("one", "two"))
    majority = one["baselines"]["majority"]
    assert majority["miou_ratio"] < 0.25
    assert one["miou_ratio"] > majority["miou_ratio"] + 0.3
    assert one["pixel_accuracy_ratio"] > majority["pixel_accuracy_ratio"] + 0.2
    assert {name: value for name, value in one.items() if not name.endswith("seconds")} == {
        name: value for name, value in two.items() if not name.endswith("seconds")
    }
    # every labelled pixel of the test split counts once, at the masks' own size: the first row is void
    assert one["num_pixels"] == np.sum(one["confusion"]) == 3 * 31 * 48
    assert {"kind": "untrained", "seed": 0}.items() <= one["encoder"].items()
    fresh = ["--weights-seed", 1, "--out", tmp_path / "three"]
    assert evaluate(f"untrained:{weights}", *settings, *fresh) == 0
    assert result_of(tmp_path / "three")["confusion"] != one["confusion"]
    assert (one["size_px"], one["num_train_patches"], one["num_held_out"]) == ([96, 144], 8 * 12 * 18, 1)
    told = capsys.readouterr().out
    assert f"{100 * one['miou_ratio']:.2f}   mAcc" in told
    assert f"always '{majority['class']}' mIoU {100 * majority['miou_ratio']:.2f}" in told

    assert evaluate(f"untrained:{weights}", *settings, "--out", tmp_path / "other", "--seed", 1) == 0
    assert result_of(tmp_path / "other")["heads"] != one["heads"]


def test_results_stand_beside_the_weights_and_the_size_is_that_of_the_images(
    weights: Path, data: Path
) -> None:
    assert evaluate(weights, "--data", data, "--epochs", 1) == 0
    found = result_of(weights)
    assert (found["size_px"], found["stride_px"]) == ([32, 48], 8)
    assert found["encoder"]["kind"] == "checkpoint"
    assert found["versions"].keys() >= {"pretrain", "torch", "timm"}
    assert (found["train"]["num_images"], found["test"]["split"]) == (8, "val")


@pytest.mark.parametrize(
    ("size", "stride_px", "expected"),
    [
        ((360, 480), 4, (96, 128)),  # 32 patches long
        ((480, 360), 4, (128, 96)),
        ((360, 480), 16, (352, 480)),  # the image is shorter than 32 patches
        ((1024, 2048), 16, (256, 512)),
        ((10, 100), 16, (16, 96)),
        ((7, 9), 16, (16, 16)),
    ],
)
def test_the_size_keeps_the_shape_of_most_images(
    size: tuple[int, int], stride_px: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    for number, (height, width) in enumerate(((20, 20), size, size)):
        for folder in ("images", "masks"):
            (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
        image = np.zeros((height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / "train" / f"{number}.png")
        save_mask(tmp_path / "masks" / "train" / f"{number}.png", image[..., 0])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert choose_size(scenes_of(tmp_path), stride_px) == expected


def test_a_swin_is_read_at_its_last_stage(data: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "swin", tiny_config(**SWIN))
    assert evaluate(tmp_path / "swin", "--data", data, "--size-px", 64, 96, "--epochs", 1) == 0
    found = result_of(tmp_path / "swin")
    assert (found["stride_px"], found["num_train_patches"]) == (32, 8 * 2 * 3)
    assert found["encoder"]["num_features"] == 8 * 12


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "absent"], "--data absent: no such folder"),
        (["--train-split", "trian"], "no split 'trian'; did you mean 'train'?"),
        (["--test-split", "train"], "--test-split train: the test would be on the images that were learned"),
        (["--size-px", "33", "48"], "--size-px 33 48: not whole patches of 8 px; use 32 48"),
        (["--size-px", "3", "44"], "use 8 48"),
        (["--ignore-label", "-1"], "--ignore-label -1: values of masks are 0 to 65535"),
        (["--epochs", "0"], "0 is below 1"),
    ],
)
def test_wrong_input_is_told_in_one_line(
    arguments: list[str],
    told: str,
    weights: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code: Any = evaluate(weights, "--data", data, "--out", tmp_path / "out", *arguments)
    except SystemExit as exit_:  # of the parser
        code = exit_.code
    said = capsys.readouterr()
    assert code == 2
    assert told in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there_and_a_single_image_are_told(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_folder(tmp_path / "alone", num_train=1, num_val=1)
    assert evaluate(tmp_path / "absent", "--data", alone) == 2
    assert "no such folder" in capsys.readouterr().err
    assert evaluate("untrained:resnet18", "--data", alone) == 2
    assert "a ResNet; feature maps are taken of a Vision Transformer or a Swin" in capsys.readouterr().err
    assert evaluate(weights, "--data", alone, "--out", tmp_path / "out") == 2
    assert "1 train images with labels, of which one is held out" in capsys.readouterr().err
