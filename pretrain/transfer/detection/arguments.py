"""The command line of `pretrain transfer detection`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pretrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="an exported folder, a run, a timm name, or untrained:NAME"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the config"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="images and objects in COCO's JSON"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="default: the 1x recipe of Mask R-CNN on Swin-T"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of state, result, pictures (default: transfer/detection of WEIGHTS)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest state in --out")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="score the newest state in --out, train nothing"
    )
    parser.add_argument("--scratch", action="store_true", help="the control: fresh weights, same recipe")
    parser.add_argument("--network", choices=("teacher", "student"), help="of a run")
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    if find_spec("pycocotools") is None:
        raise UserError("detection is scored by pycocotools; install it: pip install 'pretrain[transfer]'")
    from pretrain.settings import read_settings
    from pretrain.transfer.detection.config import DetectionConfig
    from pretrain.transfer.detection.run import DetectionRequest, run_detection

    if arguments.resume and arguments.evaluate_only:
        raise UserError("--resume goes on with a training and --evaluate-only trains nothing; leave one away")
    request = DetectionRequest(
        weights=arguments.weights,
        data=arguments.data,
        config=read_settings(DetectionConfig, arguments.config, arguments.overrides),
        out=arguments.out,
        resume=arguments.resume,
        evaluate_only=arguments.evaluate_only,
        scratch=arguments.scratch,
        network=arguments.network,
        device=arguments.device,
    )
    run_detection(request, say)
