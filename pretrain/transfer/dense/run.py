"""A dense read-out of frozen weights: what a linear head can read from single patch tokens.

The idea is that of DINOv2 (Oquab et al., 2023, arXiv:2304.07193): a batch norm and a linear layer
give logits of each patch, which are upsampled bilinearly to the mask. As done here:

- images are resized to one size of whole patches; the weights are frozen, in eval mode, their positions
  interpolated; tokens are those of the last block after the final norm, encoded once;
- the target of a patch is the share of each class in its pixels, without void; patches of void alone are
  left out;
- the batch norm, without its affine part, takes the statistics of all train patches; the learning rate is
  chosen on a tenth of the train images, then the linear layer is trained again on all of them;
- every labelled pixel of the test split counts once, at the mask's own size, in one confusion matrix.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate.probe import Probe
from pretrain.evaluate.report import hardware, results_folder, save_result, versions
from pretrain.evaluate.table import aligned, percent
from pretrain.export.source import WeightsName
from pretrain.transfer.dense.patches import (
    Size,
    check_size,
    choose_size,
    patch_tokens,
    prepared,
    take_patches,
)
from pretrain.transfer.dense.probe import PROBE, fit_probe
from pretrain.transfer.hooks import TransferBackbone, backbone
from pretrain.transfer.segmentation.folders import Labels, Split, find_data
from pretrain.transfer.segmentation.recipe import DataRecipe
from pretrain.transfer.segmentation.scenes import open_scenes
from pretrain.transfer.segmentation.scores import majority, scores
from pretrain.transfer.segmentation.testing import Image, Predict, confusion_of

MAX_VALUE = 65535  # of masks of 16 bits
PROTOCOL = "linear layer on standardised patch tokens of the last block, logits upsampled bilinearly"


@dataclass(frozen=True)
class DenseRequest:
    """What is asked for."""

    weights: str
    data: Path
    train_split: str = "train"
    test_split: str = "val"
    ignore_label: int = 255  # of mask files
    size_px: Size | None = None  # height and width; None: of the shape of the images, 32 patches long
    num_epochs: int = PROBE.num_epochs
    seed: int = 0
    weights_seed: int = 0  # of the fresh weights that `untrained:` draws
    batch_size: int = 8  # images that are encoded at once
    network: WeightsName | None = None  # of a run
    out: Path | None = None  # None: the folder of the weights
    device: str | None = None  # "cpu", or None for what the machine has

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> DenseRequest:
        """What the command line says."""
        return cls(
            weights=arguments.weights,
            data=arguments.data,
            train_split=arguments.train_split,
            test_split=arguments.test_split,
            ignore_label=arguments.ignore_label,
            size_px=(arguments.size_px[0], arguments.size_px[1]) if arguments.size_px else None,
            num_epochs=arguments.epochs,
            seed=arguments.seed,
            weights_seed=arguments.weights_seed,
            batch_size=arguments.batch_size,
            network=arguments.network,
            out=arguments.out,
            device=arguments.device,
        )

    @property
    def folder(self) -> Path | None:
        """Of results; a timm name has none."""
        if self.out is None and not Path(self.weights).is_dir():
            return None
        return results_folder(self.weights, self.out)


def check_request(request: DenseRequest, stride_px: int) -> tuple[Labels, dict[str, Split]]:
    """What is in the data folder; UserError for what is not, and for a size of other than whole patches.

    stride_px: side of what one patch token stands for.
    """
    if request.train_split == request.test_split:
        raise UserError(
            f"--train-split and --test-split {request.test_split}: the test would be on the images that were "
            "learned from; name two splits"
        )
    if not 0 <= request.ignore_label <= MAX_VALUE:
        raise UserError(f"--ignore-label {request.ignore_label}: values of masks are 0 to {MAX_VALUE}")
    found = find_data(
        request.data,
        DataRecipe(
            train_split=request.train_split, test_split=request.test_split, ignore_label=request.ignore_label
        ),
    )
    if request.size_px is not None:
        check_size(request.size_px, stride_px)
    return found


def run_dense(request: DenseRequest) -> dict[str, Any]:
    """Encode, fit and test; the result also stands in dense.json. Raises UserError for what is wrong."""
    began = time.perf_counter()
    accelerator = Accelerator(cpu=request.device == "cpu")
    if accelerator.num_processes > 1:
        raise UserError("evaluate dense: runs in one process; start it without a launcher")
    network = backbone(request.weights, "map", network=request.network, seed=request.weights_seed)
    network.eval().requires_grad_(False)
    stride_px = int(network.strides[-1])
    labels, splits = check_request(request, stride_px)
    train, test = (open_scenes(splits[role], labels) for role in ("train", "test"))
    folder = request.folder
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # a wrong place is told before the work
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror or error}); choose another --out"
            ) from None
    size_px = request.size_px or choose_size(train, stride_px)

    device = accelerator.device
    network.to(device)
    started = time.perf_counter()
    patches = take_patches(network, train, size_px, request.batch_size, device)
    encode_seconds = time.perf_counter() - started
    started = time.perf_counter()
    config = replace(PROBE, num_epochs=request.num_epochs, seed=request.seed)
    chosen = fit_probe(patches, config, device)
    fit_seconds = time.perf_counter() - started
    started = time.perf_counter()
    matrix = confusion_of(_predictor(network, chosen.probe, size_px, device), test, accelerator)
    constant = majority(train.pixels, test.pixels)
    result = {
        "method": "dense",
        **ratios(scores(matrix, labels.classes)),
        "confusion": matrix.tolist(),
        "baselines": {
            "majority": {
                "class": labels.classes[int(train.pixels.argmax())],
                **ratios(scores(constant, labels.classes)),
            }
        },
        "protocol": PROTOCOL,
        "size_px": list(size_px),
        "stride_px": stride_px,
        "num_train_patches": int(patches.targets.any(dim=1).sum()),  # with a label
        **chosen.describe(),
        "config": asdict(config),
        "seed": request.seed,
        "encoder": _describe(network, size_px),
        "train": train.describe(),
        "test": test.describe(),
        "encode_seconds": encode_seconds,
        "fit_seconds": fit_seconds,
        "test_seconds": time.perf_counter() - started,
        "seconds": time.perf_counter() - began,
        "hardware": hardware(accelerator, "fp32"),
        "versions": versions(),
    }
    if folder is not None:
        save_result(folder, result)
    return result


def _predictor(network: TransferBackbone, probe: Probe, size_px: Size, device: torch.device) -> Predict:
    """What answers an image with the class of each pixel of a size: int64 (H, W)."""
    stride_px = int(network.strides[-1])
    grid = size_px[0] // stride_px, size_px[1] // stride_px

    def answer(image: Image, size: tuple[int, int]) -> Tensor:
        tokens = patch_tokens(network, prepared(image, size_px).to(device)[None])[0]  # (P, D)
        logits = probe.logits(tokens)[:, 0].T.reshape(1, -1, *grid)  # (1, K, h, w)
        return F.interpolate(logits, size, mode="bilinear")[0].argmax(dim=0)

    return answer


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """The scores of a segmentation, under names that carry their unit."""
    rows = [
        {
            "name": row["name"],
            "iou_ratio": row["iou"],
            "accuracy_ratio": row["accuracy"],
            "num_pixels": row["num_pixels"],
        }
        for row in found["classes"]
    ]
    means = {f"{name}_ratio": found[name] for name in ("miou", "macc", "pixel_accuracy")}
    return {**means, "num_pixels": found["num_pixels"], "classes": rows}


def _describe(network: TransferBackbone, size_px: Size) -> dict[str, Any]:
    told = network.encoder.describe()
    del told["resize_px"]
    own = {"image_px": list(size_px), "interpolation": "bilinear", "num_features": network.out_channels}
    return {**told, "feature": "patch_tokens", **own}


def format_dense(result: dict[str, Any]) -> str:
    """One line below its heads; in percent."""
    majority_miou = result["baselines"]["majority"]["miou_ratio"]
    detail = "; ".join(
        (
            f"mAcc {percent(result['macc_ratio'])}",
            f"pixel accuracy {percent(result['pixel_accuracy_ratio'])}",
            f"always '{result['baselines']['majority']['class']}' mIoU {percent(majority_miou)}",
            f"{result['size_px'][0]} x {result['size_px'][1]} px",
            f"lr {result['chosen']['lr']:g} per 256 patches",
        )
    )
    encoder = result["encoder"]
    return aligned(
        [
            ("weights", "feature", "method", "mIoU %", ""),
            (encoder["weights"], encoder["feature"], "dense", percent(result["miou_ratio"]), detail),
        ]
    )
