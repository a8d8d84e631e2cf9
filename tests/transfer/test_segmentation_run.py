"""A segmentation from the command line on: it learns, goes on where it stopped, and tells its result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from ranks import run_on_ranks
from run_folder import tiny_config, write_checkpoint
from safetensors.torch import load_file
from small_scenes import NAMES, write_folder

from pretrain import cluster
from pretrain.config import load_config
from pretrain.errors import CheckpointError, ConfigError, UserError
from pretrain.parser import Parser
from pretrain.settings import read_settings
from pretrain.transfer.segmentation import run as module
from pretrain.transfer.segmentation.arguments import add_arguments, run
from pretrain.transfer.segmentation.folders import find_data
from pretrain.transfer.segmentation.pictures import NO_LABEL, WRONG, errors
from pretrain.transfer.segmentation.recipe import SegmentationRecipe
from pretrain.transfer.segmentation.run import SegmentationRequest, run_segmentation
from pretrain.transfer.segmentation.scenes import open_scenes
from pretrain.transfer.segmentation.scores import scores
from pretrain.transfer.segmentation.testing import chosen, confusion_of

QUICK = (
    "num_steps=30",
    "batch_size=4",
    "crop_px=32",
    "save_every_steps=10",
    "log_every_steps=10",
    "num_workers=0",
    "head.channels=16",
    "optim.name=adamw",
    "optim.lr=0.01",
    "optim.head_lr_scale=1",
    "test.num_pictures=2",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "vit"
    torch.manual_seed(0)  # what it learns from them does not depend on the tests before
    write_checkpoint(run, tiny_config())
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("scenes"), num_train=6, num_val=3)


def segment(*arguments: Any) -> list[str]:
    """What `pretrain transfer segmentation` prints."""
    parser = Parser()
    add_arguments(parser)
    parsed, rest = parser.parse_known_args([str(argument) for argument in (*arguments, "--device", "cpu")])
    parsed.overrides += rest
    said: list[str] = []
    run(parsed, said.append)
    return said


def recipe_of(*overrides: str) -> SegmentationRecipe:
    return read_settings(SegmentationRecipe, None, [*QUICK, *overrides])


@pytest.fixture(scope="module")
def trained(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished training, and what it said."""
    out = tmp_path_factory.mktemp("out") / "whole"
    (said,) = segment(weights, "--data", data, "--out", out, *QUICK)
    return out, said


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def test_it_learns_far_beyond_both_baselines(trained: tuple[Path, str]) -> None:
    out, said = trained
    result = result_of(out)
    baselines = result["baselines"]
    assert result["miou"] > 0.5
    assert baselines["majority"]["class"] in ("sky", "road")
    assert baselines["majority"]["miou"] < 0.25
    assert baselines["initialisation"]["miou"] < 0.4
    assert [row["name"] for row in result["classes"]] == list(NAMES)
    rows = [line.split() for line in said.splitlines()]
    assert ["trained", *(f"{100 * result[key]:.2f}" for key in ("miou", "macc", "pixel_accuracy"))] in rows
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [10, 20, 30]
    assert log[-1]["decoder"] < 0.7 * log[0]["decoder"]
    assert log[0]["loss"] == pytest.approx(sum(log[0][f"auxiliary_{n}"] for n in (1, 2)) + log[0]["decoder"])


def test_pictures_show_every_chosen_image(trained: tuple[Path, str]) -> None:
    out, _ = trained
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["100.png", "102.png"]
    with Image.open(out / "pictures" / "100.png") as page:
        assert page.width >= 4 * 48
        assert page.height > 32
        assert len(page.getcolors(1 << 20) or ()) > 50


def test_errors_are_red_and_what_has_no_label_is_black() -> None:
    labels, predicted = np.array([[0, 1, 255]], np.uint8), np.array([[0, 0, 0]], np.uint8)
    right, wrong, without = errors(np.full((1, 3, 3), 90, np.uint8), labels, predicted)[0]
    assert tuple(wrong) == WRONG
    assert tuple(without) == NO_LABEL
    assert right[0] == right[1] == right[2] > 100


def test_what_was_interrupted_goes_on_to_the_same_bits(
    weights: Path, data: Path, trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = trained
    plain = module.train

    def stopping(*arguments: Any, **_: Any) -> Any:
        def stop(step: int) -> None:
            if step == 20:
                raise KeyboardInterrupt

        return plain(*arguments[:-1], stop)

    monkeypatch.setattr(module, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        segment(weights, "--data", data, "--out", tmp_path / "cut", *QUICK)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--resume"):
        segment(weights, "--data", data, "--out", tmp_path / "cut", *QUICK)
    with pytest.raises(CheckpointError, match=r"optim\.lr: was 0\.01, now 0\.02"):
        segment(weights, "--data", data, "--out", tmp_path / "cut", *QUICK, "optim.lr=0.02", "--resume")
    segment(weights, "--data", data, "--out", tmp_path / "cut", *QUICK, "--resume")
    one, two = (load_file(folder / "segmenter.safetensors") for folder in (whole, tmp_path / "cut"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert result_of(tmp_path / "cut")["confusion"] == result_of(whole)["confusion"]


def test_a_trained_segmenter_is_tested_again_to_the_same_result(
    weights: Path, data: Path, trained: tuple[Path, str]
) -> None:
    out, _ = trained
    before = result_of(out)
    segment(weights, "--data", data, "--out", out, *QUICK, "--evaluate-only")
    after = result_of(out)
    assert after["confusion"] == before["confusion"]
    assert after["num_steps"] == 30
    assert after["train_seconds"] is None


def test_a_head_of_other_classes_is_refused(
    weights: Path, data: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = trained
    other = write_folder(tmp_path / "other", num_train=1, num_val=1)
    (other / "classes.txt").write_text("sky\nroad\ncar\nboat\n")
    with pytest.raises(UserError, match="its head knows 3 classes, the data has 4"):
        segment(weights, "--data", other, "--out", out, *QUICK, "--evaluate-only")
    (other / "classes.txt").write_text("sky\ncar\nroad\n")
    with pytest.raises(UserError, match="class 1 of its head is 'road', of the data 'car'"):
        segment(weights, "--data", other, "--out", out, *QUICK, "--evaluate-only")
    with pytest.raises(UserError, match="its head is 'pup', the recipe says 'naive'"):
        segment(weights, "--data", data, "--out", out, *QUICK, "head.kind=naive", "--evaluate-only")
    with pytest.raises(CheckpointError, match="tensors do not fit this network"):
        segment(weights, "--data", data, "--out", out, *QUICK, "head.channels=8", "--evaluate-only")
    with pytest.raises(UserError, match="train first"):
        segment(weights, "--data", data, "--out", tmp_path, *QUICK, "--evaluate-only")


def test_a_folder_that_cannot_be_written_is_told_before_training(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out: cannot be written .*choose another"):
        segment(weights, "--data", data, "--out", tmp_path / "file" / "out", *QUICK)


def test_a_perfect_answer_scores_exactly_100(data: Path) -> None:
    """Through the same reading, matrix and scores as a network's answers."""
    labels, splits = find_data(data, SegmentationRecipe().data)
    scenes = open_scenes(splits["test"], labels)
    truths = iter([scenes.classes_of(number) for number in range(len(scenes))])

    def answer(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:  # type: ignore[type-arg]
        truth = torch.from_numpy(next(truths)).long()
        assert truth.shape == size == image.shape[:2]
        return torch.where(truth == 255, 1, truth)

    found = scores(confusion_of(answer, scenes, Accelerator(cpu=True)), labels.classes)
    assert (found["miou"], found["macc"], found["pixel_accuracy"]) == (1.0, 1.0, 1.0)
    assert found["num_pixels"] == int(scenes.pixels.sum())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("head.kind=pop", r"head\.kind: Input should be 'naive', 'pup', 'mla' or 'upernet' \(got 'pop'\)"),
        ("head.kinds=pup", r"head\.kinds: unknown setting; did you mean 'kind'\?"),
        ("optm.lr=1", r"optm: unknown setting; did you mean 'optim'\?"),
        ("crop_px=big", r"crop_px: Input should be a valid integer"),
        ("crop_px", "an override reads key=value"),
        ("test.stride_px=900", r"test\.stride_px: 900 is more than crop_px \(768\)"),
        ("optim.warmup_steps=80000", "leave nothing after"),
        ("data.fit_px=[100,200]", "longer side"),
        ("optim.lr=.nan", "not a finite number"),
        ("seed=1 seed.x=1", "'seed' is a single value"),
    ],
)
def test_wrong_settings_are_told_with_the_nearest_name(settings: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_settings(SegmentationRecipe, None, settings.split())


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("num_steps: 5\nhead: {kind: mla, channels: 8}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nhead: {channels: 16}\noptim: {lr: 2e-3}\n")
    recipe = read_settings(SegmentationRecipe, tmp_path / "own.yaml", ["seed=3"])
    assert (recipe.num_steps, recipe.head.kind, recipe.head.channels) == (5, "mla", 16)
    assert (recipe.optim.lr, recipe.seed) == (0.002, 3)
    (tmp_path / "base.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match="extends this file in turn"):
        read_settings(SegmentationRecipe, tmp_path / "own.yaml")


CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("segmentation_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    if path.stem.endswith("_pretrain"):
        load_config(path)
    else:
        read_settings(SegmentationRecipe, path)


def test_pictures_are_spread_over_the_set() -> None:
    assert chosen(101, 3) == {0, 50, 100}
    assert chosen(2, 8) == {0, 1}
    assert chosen(5, 0) == set()


def _on_rank(place: cluster.Cluster, weights: str, data: str, out: str) -> None:
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE="2", LOCAL_RANK=str(place.rank), ACCELERATE_USE_CPU="1"
    )
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()
    request = SegmentationRequest(weights, Path(data), Path(out), device="cpu")
    run_segmentation(request, recipe_of(*TWO_STEPS))


TWO_STEPS = (
    "num_steps=2", "save_every_steps=2", "optim.name=sgd", "optim.lr=0.1", "test.initialisation=false"
)  # fmt: skip


@pytest.mark.distributed
def test_two_processes_learn_and_count_as_one_does(weights: Path, data: Path, tmp_path: Path) -> None:
    """Three test images leave one process with less to do; batch norms see the whole batch."""
    run_on_ranks(2, _on_rank, str(weights), str(data), str(tmp_path / "two"))
    request = SegmentationRequest(str(weights), data, tmp_path / "one", device="cpu")
    run_segmentation(request, recipe_of(*TWO_STEPS))
    one, two = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # float32, summed in another order through two batch norms and two steps
        scale = float(tensor.abs().max())
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-4, atol=5e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    counts = [np.array(result_of(tmp_path / name)["confusion"]) for name in ("one", "two")]
    assert counts[0].sum() == counts[1].sum()  # every labelled pixel once
    assert np.abs(counts[0] - counts[1]).sum() <= 0.01 * counts[0].sum()  # rounding may turn a close call
