"""A transfer to detection as a user starts it: what it leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import assert_same_tensors
from PIL import Image
from run_folder import tiny_config, write_checkpoint
from small_coco import WIDTH, Content, boxes_only, write_split
from test_detection_score import NAMES, by_pycocotools

from pretrain.errors import UserError
from pretrain.settings import read_settings
from pretrain.transfer.detection import arguments as detection_arguments
from pretrain.transfer.detection import run as detection_run
from pretrain.transfer.detection.coco import read_coco
from pretrain.transfer.detection.config import DetectionConfig
from pretrain.transfer.detection.score import score

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
TINY = [
    "data.num_workers=0",
    "augment={kind: crop, size_px: 64, scale: [0.9, 1.1]}",
    "model={channels: 16, drop_path_ratio: 0.1, anchor_px: [8, 16, 24, 48, 96], proposals_train: [60, 40], "
    "proposals_test: [60, 40], boxes_per_image: 16, box_layers: 1, box_dim: 32, mask_convs: 1, mask_dim: 8}",
    "optim={lr: 1e-3, batch_size: 2}",
    "schedule={steps: 4, warmup_steps: 1, save_every_steps: 2, log_every_steps: 1}",
    "evaluate={shortest_px: null, score_threshold: 0.01, initial: false, pictures: 2}",
    "evaluate.picture_threshold=0.1",
]


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", tiny_config()).parents[1]


def write_data(folder: Path, change: Callable[[Content], Any] | None = None) -> Path:
    write_split(folder, "train", 5, seed=1, change=change)
    write_split(folder, "val", 3, seed=2, change=change)
    return folder


def detection(weights: Path | str, data: Path, out: Path | None, *more: str) -> list[str]:
    """What `pretrain transfer detection` prints with the tiny settings."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    detection_arguments.add_arguments(parser)
    line = [str(weights), "--data", str(data), "--device", "cpu", *(["--out", str(out)] if out else [])]
    lines: list[str] = []
    detection_arguments.run(parser.parse_intermixed_args([*line, *TINY, *more]), lines.append)
    return lines


def refusal(weights: Path | str, data: Path, out: Path | None, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        detection(weights, data, out, *more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_transfer_leaves_scores_predictions_and_pictures(vit: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    lines = detection(vit, data, out, "evaluate.initial=true", "evaluate.detections_per_image=120")
    assert lines[0] == "train: 5 images, 10 objects (masks), 2 categories"
    assert lines[1] == "val: 3 images, 6 objects (masks), 2 categories"
    table = lines[2].splitlines()
    assert table[0].split() == ["%", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    told = [line.rsplit(maxsplit=7)[0].split(maxsplit=1) for line in table[1:11]]
    for kind in ("box", "mask"):
        assert [what for which, what in told if which == kind] == [
            "after 4 steps", "with up to 120 an image", "before training", "one box: full image",
            "one box: mean box",
        ]  # fmt: skip
    assert [line.split()[0] for line in table[-2:]] == ["disc", "brick"]

    result = json.loads((out / "result.json").read_text())
    assert result["detector"] == "Mask R-CNN"
    assert (result["step"], result["is_scratch"], result["num_processes"]) == (4, False, 1)
    assert result["encoder"]["kind"] == "checkpoint"
    assert set(NAMES) < set(result["scores"]["segm"])
    found = read_coco(data, "val")
    for kind in ("bbox", "segm"):
        written = json.loads((out / f"predictions_{kind}.json").read_text())
        assert len(written) == result["num_detections"] > 0
        assert score(found, written, kind, 120) == result["scores"][kind]
        theirs = by_pycocotools(data / "instances_val.json", out / f"predictions_{kind}.json", kind)
        assert len(theirs) == 12  # anyone's tools read the file; annotation 0 makes their figures differ
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "loss_mask", "loss_objectness", "lr", "seconds"} <= rows[0].keys()
    pictures = sorted((out / "pictures").glob("*.jpg"))
    assert [path.name for path in pictures] == ["000.jpg", "002.jpg"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > 2 * 480 > 2 * WIDTH
    assert read_settings(DetectionConfig, out / "config.yaml").schedule.steps == 4


def test_what_was_interrupted_ends_with_the_same_bits(vit: Path, tmp_path: Path) -> None:
    """A state of step 2, as a killed training leaves it, goes on to what an undisturbed one has at step 4."""
    data = write_data(tmp_path / "data")
    detection(vit, data, tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/result.json").read_text())

    class Killed(Exception):
        pass

    def killed(step: int) -> None:
        raise Killed

    train = detection_run.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection_run, "train", lambda *given: train(*given, killed))
        with pytest.raises(Killed):
            detection(vit, data, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").glob("step-*")] == ["step-00002"]
    assert "continue it with --resume" in refusal(vit, data, tmp_path / "cut")
    detection(vit, data, tmp_path / "cut", "--resume")
    names = ("model.safetensors", "optimizer.safetensors")
    assert_same_tensors(tmp_path / "whole/step-00004", tmp_path / "cut/step-00004", *names)
    cut = json.loads((tmp_path / "cut/result.json").read_text())
    assert cut["scores"] == whole["scores"]
    assert (tmp_path / "cut/predictions_segm.json").read_bytes() == (
        tmp_path / "whole/predictions_segm.json"
    ).read_bytes()


def test_boxes_alone_train_a_faster_rcnn_which_can_be_scored_again(vit: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data", boxes_only), tmp_path / "out"
    assert "(boxes only)" in detection(vit, data, out)[0]
    result = json.loads((out / "result.json").read_text())
    assert result["detector"] == "Faster R-CNN"
    assert list(result["scores"]) == ["bbox"]
    assert not (out / "predictions_segm.json").exists()
    detection(vit, data, out, "--evaluate-only", "evaluate.pictures=0")
    again = json.loads((out / "result.json").read_text())
    assert again["scores"] == result["scores"]
    assert again["step"] == 4

    # the classes of the head, its kind and the backbone must be those that were trained
    shapes = ["--evaluate-only"]

    def with_eggs(content: Content) -> None:
        boxes_only(content)
        content["categories"].append({"id": 9, "name": "egg"})

    assert "categories: was" in refusal(vit, write_data(tmp_path / "egg", with_eggs), out, *shapes)
    assert "masks: was False, now True" in refusal(vit, write_data(tmp_path / "masks"), out, *shapes)
    assert "model.channels: was 16, now 8" in refusal(vit, data, out, *shapes, "model.channels=8")
    deeper = write_checkpoint(
        tmp_path / "deeper", tiny_config(args={"depth": 3, "embed_dim": 24, "num_heads": 2})
    )
    assert "architecture: was 'VisionTransformer" in refusal(deeper, data, out, *shapes)
    assert "optim.lr" in refusal(vit, data, out, "--resume", "optim.lr=5e-4")
    assert "holds no trained detector" in refusal(vit, data, tmp_path / "none", *shapes)


def test_wrong_input_is_told_before_anything_is_trained_or_written(vit: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    assert "did you mean 'weight_decay'?" in refusal(vit, data, out, "optim.weight_decai=0.1")
    assert "did you mean 'augment'?" in refusal(vit, data, out, "augmnt.kind=crop")
    assert "'shortest_px' means nothing to kind 'crop'" in refusal(vit, data, out, "augment.shortest_px=[8]")
    assert "epochs and steps both say how long" in refusal(vit, data, out, "schedule.epochs=3")
    assert "has no split 'test'" in refusal(vit, data, out, "data.val=test")
    assert "no such folder" in refusal(tmp_path / "absent", data, out)
    assert "a ResNet" in refusal("untrained:resnet10t", data, out)
    assert "leave one away" in refusal(vit, data, out, "--resume", "--evaluate-only")
    assert "not a folder to save results in" in refusal("untrained:vit_tiny_patch16_224", data, None)
    (data / "images/val/001.jpg").unlink()
    assert "1 images are missing" in refusal(vit, data, out)
    assert not out.exists()


def test_scratch_starts_from_fresh_weights_and_says_so(vit: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", boxes_only)
    detection(vit, data, None, "--scratch", "schedule.steps=1", "evaluate.pictures=0")
    result = json.loads((vit / "transfer/detection_scratch/result.json").read_text())
    assert result["is_scratch"]
    assert result["encoder"]["kind"] == "untrained"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_look_at_every_image_once_and_find_what_one_finds(vit: Path, tmp_path: Path) -> None:
    """Of three images one process gets two; the detector they train together is scored by one process."""
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    folders = [str(folder) for folder in (here, here.parent, here.parent / "export", here.parents[1])]
    script = (
        "import sys\n"
        f"sys.path[:0] = {folders!r}\n"
        "from test_detection_run import detection\n"
        f"print('\\n'.join(detection({str(vit)!r}, {str(data)!r}, {str(out)!r})))\n"
        "import torch.distributed\ntorch.distributed.destroy_process_group()\n"
    )
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for process in processes:
        output, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        said.append(output)
    assert "after 4 steps" in said[0]
    assert said[1].strip() == ""
    two = json.loads((out / "result.json").read_text())
    assert two["num_processes"] == 2
    written = json.loads((out / "predictions_segm.json").read_text())
    detection(vit, data, out, "--evaluate-only")
    assert json.loads((out / "predictions_segm.json").read_text()) == written
    assert json.loads((out / "result.json").read_text())["scores"] == two["scores"]


@pytest.mark.slow
def test_a_detector_learns_what_a_disc_and_a_brick_are(tmp_path: Path) -> None:
    """From fresh weights, in 300 steps: far above one box in every image, and above the start."""
    write_split(tmp_path / "data", "train", 64, seed=1)
    write_split(tmp_path / "data", "val", 12, seed=2)
    vit = write_checkpoint(tmp_path / "run", tiny_config(args={"depth": 2, "embed_dim": 48, "num_heads": 2}))
    more = ["schedule.steps=300", "schedule.save_every_steps=300", "schedule.log_every_steps=50",
            "schedule.warmup_steps=20", "optim.lr=2e-3", "optim.batch_size=4", "model.mask_dim=16",
            "evaluate.initial=true", "evaluate.score_threshold=0.05"]  # fmt: skip
    detection(f"untrained:{vit}", tmp_path / "data", tmp_path / "out", *more)
    result = json.loads((tmp_path / "out/result.json").read_text())
    for kind in ("bbox", "segm"):
        assert result["scores"][kind]["AP50"] > 60
        assert result["scores"][kind]["AP"] > 25
        assert result["initial"][kind]["AP"] < 5
        assert max(one[kind]["AP"] for one in result["baselines"].values()) < 5


NAMED = sorted(path for path in CONFIGS.glob("detection_*.yaml") if "pretrain" not in path.stem)


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.stem)
def test_the_configs_that_come_with_it_are_valid(path: Path) -> None:
    assert read_settings(DetectionConfig, path).num_steps(1000) > 0
