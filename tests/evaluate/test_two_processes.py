"""Two processes get what one gets: every image once, counts exact, also where the last round is not full.

All that is compared is made by one start of two processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_folder import tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file
from test_features import image, stream, tiny_encoder
from test_finetune import QUICK, tune, weights_of, write_data
from two_processes import in_two_processes

from pretrain.evaluate.features import extract
from pretrain.evaluate.finetune import Place
from pretrain.evaluate.frozen import run_knn, run_linear
from pretrain.evaluate.recipes import recipe_with
from pretrain.evaluate.report import EvaluateConfig

pytestmark = pytest.mark.distributed

COUNTS = (1, 8, 11)
RECIPE = recipe_with("relvit", [*QUICK, "batch_size=4", "clip_norm=0"])
CONFIG = EvaluateConfig(device="cpu", batch_size=2)
PROBE: dict[str, Any] = {"num_epochs": 3, "batch_size": 4, "base_lr": 1.0}


def work(accelerator: Accelerator, run: Path, data: Path, folder: Path) -> None:
    """Everything once, into files of this process."""
    rank = accelerator.process_index
    for count in COUNTS:
        found = extract(tiny_encoder(), stream(count), image, 3, num_images=count, accelerator=accelerator)
        saved = {"features": found.features, "labels": found.labels}
        save_file(saved, folder / f"{count}-rank{rank}.safetensors")
    results = {
        "knn": run_knn(run, data, data, CONFIG),
        "linear": run_linear(run, data, data, CONFIG, changes=PROBE),
        "augmented": run_linear(run, data, data, CONFIG, changes=PROBE, augment=True),
    }
    done = tune(run, data, RECIPE, Place(folder / "finetune"))
    save_file(weights_of(done), folder / f"tuned-rank{rank}.safetensors")
    results["history"] = {"epochs": done.history}
    (folder / f"results-rank{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and 13 images to learn from and 7 to test on."""
    folder = tmp_path_factory.mktemp("material")
    write_checkpoint(folder / "run", tiny_config(pos_embed="none"))
    return folder / "run", write_data(folder / "odd", num_train=13, num_test=7)


@pytest.fixture(scope="module")
def of_two(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(work, *material, folder)
    return folder


def results_of(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"results-rank{rank}.json").read_text())
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_features_are_bit_for_bit_the_same(count: int, of_two: Path) -> None:
    """One image leaves a process without any."""
    expected = extract(tiny_encoder(), stream(count), image, num_images=count)
    for rank in range(2):
        found = load_file(of_two / f"{count}-rank{rank}.safetensors")
        assert torch.equal(found["features"], expected.features)
        assert torch.equal(found["labels"], expected.labels)


def test_knn_and_probes_score_the_same(material: tuple[Path, Path], of_two: Path) -> None:
    run, data = material
    knn = run_knn(run, data, data, CONFIG)
    assert knn["num_queries"] == 7
    for rank in range(2):
        found = results_of(of_two, rank)
        assert found["knn"]["top1_ratio_by_k"] == knn["top1_ratio_by_k"]
        assert found["knn"]["hardware"]["num_processes"] == 2
        for name, augment in (("linear", False), ("augmented", True)):
            expected = run_linear(run, data, data, CONFIG, changes=PROBE, augment=augment)["runs"][0]
            assert found[name]["runs"][0]["chosen"] == expected["chosen"]
            assert found[name]["runs"][0]["heads"] == expected["heads"]


def test_fine_tuning_learns_and_counts_the_same(
    material: tuple[Path, Path], of_two: Path, tmp_path: Path
) -> None:
    expected = tune(*material, RECIPE, Place(tmp_path))
    one, two = (
        load_file(folder / "epoch-00002" / "optimizer.safetensors")
        for folder in (tmp_path, of_two / "finetune")
    )
    for name, moments in one.items():  # these show the scale of the gradients, which AdamW's steps do not
        torch.testing.assert_close(two[name], moments, rtol=0.02, atol=2e-5)
    for rank in range(2):
        found = load_file(of_two / f"tuned-rank{rank}.safetensors")
        for name, value in weights_of(expected).items():
            other = found[name]
            if name.endswith("qkv.bias"):  # attention is blind to a key's bias: its gradient is noise
                other, value = (torch.cat([bias[:24], bias[48:]]) for bias in (other, value))
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)
        history = results_of(of_two, rank)["history"]["epochs"]
        for epoch, other_epoch in zip(expected.history, history, strict=True):
            assert epoch["num_correct"] == other_epoch["num_correct"]
            assert epoch["train_loss"] == pytest.approx(other_epoch["train_loss"], rel=1e-4)
