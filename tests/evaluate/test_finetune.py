"""Fine-tuning learns, goes on where it stopped, and does the same in one process and in two."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from run_folder import random_state, seal, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.cli import main
from pretrain.data.indexing import index_folder
from pretrain.errors import CheckpointError, UserError
from pretrain.evaluate import finetune as module
from pretrain.evaluate.classifier import build_classifier
from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.finetune import Finetuned, Place, finetune
from pretrain.evaluate.finetune_report import FinetuneRequest, run_finetune, run_head
from pretrain.evaluate.frozen import run_knn, take_features
from pretrain.evaluate.image_set import open_images
from pretrain.evaluate.recipes import FinetuneRecipe, recipe_with
from pretrain.evaluate.report import EvaluateConfig
from pretrain.evaluate.shards import find_split
from pretrain.evaluate.table import table

QUICK = ("num_epochs=2", "batch_size=8", "base_lr=2e-3")
EVERYTHING = ("drop_path_ratio=0.1", "mixup_alpha=0.8", "cutmix_alpha=1", "erase_ratio=0.25", "repeats=2")


def write_colours(path: Path, count: int, seed: int) -> None:
    """Images of three colours with noise, labelled 2, 5 and 9."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 150
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            label = str((2, 5, 9)[number % 3]).encode()
            for extension, data in (("png", buffer.getvalue()), ("cls", label)):
                entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def write_data(folder: Path, num_train: int = 30, num_test: int = 15) -> Path:
    folder.mkdir(parents=True)
    write_colours(folder / "set-train-0000.tar", num_train, seed=0)
    write_colours(folder / "set-test-0000.tar", num_test, seed=1)
    index_folder(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run", tiny_config(pos_embed="none"))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("pretrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def tune(
    run: Path, data: Path, recipe: FinetuneRecipe, place: Place | None = None, num_workers: int = 0
) -> Finetuned:
    train, test = (open_images(find_split(data, role)) for role in ("train", "test"))  # type: ignore[arg-type]
    classes = train.labels.unique()
    classifier = build_classifier(open_encoder(run), recipe, len(classes), seed=0)
    accelerator = Accelerator(cpu=True)
    return finetune(classifier, train, test, classes, recipe, 0, accelerator, place, num_workers=num_workers)


def weights_of(done: Finetuned) -> dict[str, Tensor]:
    return done.encoder.model.state_dict()


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history]


def test_colours_are_learned_from_a_fresh_head_and_stored_labels(run: Path, data: Path) -> None:
    done = tune(run, data, recipe_with("relvit", ["num_epochs=6", "batch_size=8"]))
    assert done.history[-1]["test_top1_ratio"] > 0.9
    assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]
    assert [epoch["epoch"] for epoch in done.history] == [1, 2, 3, 4, 5, 6]
    assert done.history[-1]["num_correct"] == round(15 * done.history[-1]["test_top1_ratio"])
    assert not any(parameter.requires_grad for parameter in done.encoder.model.parameters())


@pytest.mark.parametrize("extra", [(), ('rand_augment="rand-m9-mstd0.5-inc1"', "layer_decay=0.75")])
def test_an_interrupted_and_resumed_run_equals_one_never_stopped(
    extra: tuple[str, ...], run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with("relvit", [*QUICK, "num_epochs=3", *EVERYTHING, *extra])
    expected = tune(run, data, recipe)
    place = Place(tmp_path / "state", every_seconds=0)
    tests_left = [None]

    def stop_in_the_second_epoch(*arguments: Any) -> int:
        if not tests_left:
            raise KeyboardInterrupt
        tests_left.pop()
        return count_correct(*arguments)

    count_correct = module.count_correct
    with monkeypatch.context() as patch:
        patch.setattr(module, "count_correct", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            tune(run, data, recipe, place)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["epoch-00001"]
    torch.manual_seed(123)  # what else goes on in the process is of no account
    resumed = tune(run, data, recipe, Place(tmp_path / "state", resume=True))
    assert without_seconds(resumed.history) == without_seconds(expected.history)
    for name, value in weights_of(expected).items():
        assert torch.equal(weights_of(resumed)[name], value), name
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["epoch-00003"]
    again = tune(run, data, recipe, Place(tmp_path / "state", resume=True))  # nothing is left to do
    assert again.history == resumed.history


def test_worker_processes_change_nothing(run: Path, data: Path) -> None:
    recipe = recipe_with("deit", [*QUICK, "num_epochs=1", "warmup_epochs=0", "drop_path_ratio=0"])
    alone, helped = (tune(run, data, recipe, num_workers=count) for count in (0, 2))
    assert without_seconds(alone.history) == without_seconds(helped.history)


def test_a_state_is_continued_only_if_asked_and_only_if_it_fits(
    run: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    tune(run, data, recipe_with("relvit", [*QUICK, "num_epochs=1"]), Place(folder))
    with pytest.raises(UserError, match="--resume"):
        tune(run, data, recipe_with("relvit", [*QUICK, "num_epochs=1"]), Place(folder))
    other = recipe_with("relvit", [*QUICK, "num_epochs=1", "clip_norm=2"])
    with pytest.raises(CheckpointError, match=r"clip_norm: was 1.0, now 2.0"):
        tune(run, data, other, Place(folder, resume=True))
    weights = folder / "epoch-00001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        tune(run, data, recipe_with("relvit", [*QUICK, "num_epochs=1"]), Place(folder, resume=True))


def test_a_label_that_the_train_set_lacks_counts_as_wrong(run: Path, data: Path) -> None:
    recipe = recipe_with("relvit", ["num_epochs=6", "batch_size=8"])
    train, test = (open_images(find_split(data, role)) for role in ("train", "test"))  # type: ignore[arg-type]
    two = train.labels != 9
    train = module.replace(
        train,
        rows=train.rows[two],
        labels=train.labels[two],
        kept=tuple(s for s, keep in zip(train.kept or (), two, strict=True) if keep),
    )
    classes = train.labels.unique()
    classifier = build_classifier(open_encoder(run), recipe, 2, seed=0)
    done = finetune(classifier, train, test, classes, recipe, 0, Accelerator(cpu=True))
    assert done.history[-1]["num_correct"] == 10


def test_several_seeds_give_mean_and_deviation_and_all_is_saved(run: Path, data: Path) -> None:
    recipe = recipe_with("relvit", [*QUICK])
    request = FinetuneRequest(
        "relvit", recipe, (0, 1), fraction_ratio=0.3, then_linear=True, linear_changes={"num_epochs": 5}
    )
    config = EvaluateConfig(device="cpu", batch_size=16, save=True)
    result = run_finetune(run, data, data, request, config)
    ratios = [one["top1_ratio"] for one in result["runs"]]
    assert result["top1_ratio"] == pytest.approx(sum(ratios) / 2)
    assert result["top1_ratio_std"] == pytest.approx(abs(ratios[0] - ratios[1]) / 2**0.5)
    assert result["interval"] == "Student, over 2 seeds"
    low, high = result["top1_ratio_95"]
    assert low <= result["top1_ratio"] <= high
    for one in result["runs"]:
        assert one["num_train"] == 9
        assert one["best_top1_ratio"] == max(epoch["test_top1_ratio"] for epoch in one["history"])
        assert one["top1_ratio"] == one["history"][-1]["test_top1_ratio"]
        assert one["linear"]["num_train"] == 30  # all labels
    saved = json.loads((run / "eval" / "finetune_relvit_30pct.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert {"device", "num_processes", "precision"} <= saved["hardware"].keys()
    assert saved["recipe"]["base_lr"] == 2e-3
    folders = sorted(path.name for path in (run / "finetune").iterdir())
    assert folders == ["finetune_relvit_30pct_seed0", "finetune_relvit_30pct_seed1"]
    row = table([result]).splitlines()[1]
    assert "finetune relvit" in row
    assert "of 2 seeds" in row
    assert "30 % of the labels" in row


def test_testing_may_wait_for_the_last_epoch(run: Path, data: Path) -> None:
    recipe = recipe_with("relvit", [*QUICK, "num_epochs=3"])
    config = EvaluateConfig(device="cpu")
    always, last = (
        run_finetune(run, data, data, FinetuneRequest("relvit", recipe, test_every_epochs=every), config)
        for every in (1, 0)
    )
    assert [epoch["num_correct"] is None for epoch in last["runs"][0]["history"]] == [True, True, False]
    assert last["top1_ratio"] == always["top1_ratio"]
    assert last["runs"][0]["best_epoch"] == 3


def test_two_heads_learn_from_the_sum_of_their_losses_and_decide_by_their_mean(
    data: Path, tmp_path: Path
) -> None:
    """SiT: a head on the class token and one on the rotation token."""
    registers = ("jigsaw", "rotation")
    write_checkpoint(tmp_path / "run", tiny_config(), registers)
    recipe = recipe_with("relvit", ["pool=class_rotation", "num_epochs=6", "batch_size=8"])
    done = tune(tmp_path / "run", data, recipe)
    assert done.history[-1]["test_top1_ratio"] > 0.9
    assert done.encoder.feature == "class_rotation"
    model: Any = done.encoder.model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = model.forward_features(pixels)
    logits = model(pixels)
    torch.testing.assert_close(logits[:, 0], model.head.of_class(tokens[:, 0]))
    torch.testing.assert_close(logits[:, 1], model.head.of_rotation(tokens[:, 2]))
    targets = torch.eye(3)[torch.tensor([0, 2])]
    summed = sum(torch.nn.functional.cross_entropy(logits[:, k], targets, reduction="none") for k in (0, 1))
    torch.testing.assert_close(module.cross_entropy(logits, targets), summed)
    write_checkpoint(tmp_path / "plain", tiny_config())
    with pytest.raises(UserError, match=r"--pool class_rotation: .*no token of the rotation task"):
        tune(tmp_path / "plain", data, recipe)


def test_the_control_starts_from_fresh_weights_of_the_seed(run: Path, data: Path) -> None:
    recipe = recipe_with("relvit", ["num_epochs=1"])
    request = FinetuneRequest("relvit", recipe, is_scratch=True)
    config = EvaluateConfig(device="cpu")
    scratch = run_finetune(run, data, data, request, config)
    named = run_finetune(f"untrained:{run}", data, data, FinetuneRequest("relvit", recipe), config)
    assert scratch["encoder"]["kind"] == "untrained"
    assert without_seconds(scratch["runs"][0]["history"]) == without_seconds(named["runs"][0]["history"])
    other = run_finetune(
        run, data, data, FinetuneRequest("relvit", recipe, seeds=(1,), is_scratch=True), config
    )
    assert other["runs"][0]["history"][0]["train_loss"] != scratch["runs"][0]["history"][0]["train_loss"]


def test_the_command_line_fine_tunes_resumes_and_tells_mistakes(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        "finetune",
        str(run),
        "--train",
        str(data),
        "--test",
        str(data),
        "--device",
        "cpu",
    ]
    arguments += ["--recipe", "relvit", "--epochs", "1", "--batch-size", "16"]
    assert main([*arguments, "weight_decay=0.1"]) == 0
    assert "finetune relvit" in capsys.readouterr().out
    saved = json.loads((run / "eval" / "finetune_relvit.json").read_text())
    assert (saved["recipe"]["num_epochs"], saved["recipe"]["weight_decay"]) == (1, 0.1)
    assert main([*arguments, "weight_decay=0.1", "--resume"]) == 0
    for extra, told in (
        (["weight_decai=0.1"], "did you mean 'weight_decay'"),
        (["--fraction", "0"], "--fraction 0"),
        (["weight_decay=0.1"], "--resume"),
        (["--mean", "0.5", "0.5", "0.5", "--out", str(run.parent / "o")], "belong together"),
    ):
        capsys.readouterr()
        assert main([*arguments, *extra]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def joint_run(folder: Path, feature: str, weight: Tensor, bias: Tensor) -> Path:
    """A run whose student was trained with a classification head."""
    checkpoint = write_checkpoint(folder, tiny_config(), ("rotation",))
    path = checkpoint / "weights" / "student.safetensors"
    tensors = load_file(path) | {
        "tasks.classification.head.weight": weight,
        "tasks.classification.head.bias": bias,
    }
    save_file(tensors, path)
    config = (checkpoint / "config.yaml").read_text()
    new = f"tasks:\n  classification:\n    feature: {feature}\n    num_classes: {len(weight)}\n"
    (checkpoint / "config.yaml").write_text(config.replace("tasks:\n", new))
    seal(checkpoint)
    return folder


@pytest.mark.parametrize("feature", ["class", "mean_patch"])
def test_the_jointly_trained_head_is_scored_as_it_stands(feature: Any, data: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 24, generator=generator), torch.randn(10, generator=generator)
    run = joint_run(tmp_path / "run", feature, weight, bias)
    sets = take_features(run, data, data, EvaluateConfig(feature, "student", device="cpu"))
    predicted = (sets.test.features @ weight.T + bias).argmax(dim=1)
    hits = int((predicted == sets.test.labels).sum())
    result = run_head(run, data, EvaluateConfig(device="cpu", save=True))
    assert (result["num_correct"], result["num_test"]) == (hits, 15)
    assert result["encoder"]["feature"] == feature
    assert json.loads((run / "eval" / "head.json").read_text())["top1_ratio"] == hits / 15
    swapped = weight[[0, 1, *[2] * 8]]  # a head that always says the label of its largest bias
    sure = torch.full((10,), -1e4).index_fill(0, torch.tensor([5]), 1e4)
    always = run_head(
        joint_run(tmp_path / "sure", feature, swapped, sure), data, EvaluateConfig(device="cpu")
    )
    assert always["top1_ratio"] == pytest.approx(1 / 3)


def test_a_run_without_a_head_is_told(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no classification head.*contrastive, rotation"):
        run_head(run, data, EvaluateConfig(device="cpu"))
    with pytest.raises(UserError, match="neither a run nor a checkpoint"):
        run_head(tmp_path / "absent", data, EvaluateConfig(device="cpu"))


def test_frozen_features_may_take_the_colours_of_the_data(run: Path, data: Path) -> None:
    own = take_features(run, data, data, EvaluateConfig(device="cpu"))
    measured = take_features(run, data, data, EvaluateConfig(device="cpu", normalization_of_data=True))
    mean, std = list(measured.encoder.mean), list(measured.encoder.std)
    assert mean == pytest.approx([80 / 255] * 3, abs=0.02)  # 30 of noise, and 150 in a third of the images
    given = EvaluateConfig(device="cpu", mean=tuple(mean), std=tuple(std))
    assert torch.equal(take_features(run, data, data, given).train.features, measured.train.features)
    assert not torch.equal(own.train.features, measured.train.features)
    assert run_knn(run, data, data, given)["encoder"]["std"] == std
    with pytest.raises(UserError, match="leave one away"):
        take_features(
            run, data, data, EvaluateConfig(device="cpu", mean=(0.5,) * 3, normalization_of_data=True)
        )
    with pytest.raises(UserError, match="above 0"):
        take_features(run, data, data, EvaluateConfig(device="cpu", mean=(0.5,) * 3, std=(0.0,) * 3))


def test_the_tokens_feature_is_the_prefix_tokens_side_by_side(data: Path, tmp_path: Path) -> None:
    networks = {"student": random_state(tiny_config(), 2)}
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation", "contrast"), networks=networks)
    encoder = open_encoder(tmp_path / "run", "tokens")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = encoder.encode(images)
    assert found.shape == (2, 3 * 24)
    assert encoder.num_features == 72
    torch.testing.assert_close(found[:, :24], open_encoder(tmp_path / "run", "class").encode(images))
