"""The command line of `pretrain transfer segmentation`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help="an exported folder, a run, a timm name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="Cityscapes' folder, or one of images/SPLIT, masks/SPLIT and classes.txt",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a recipe (default: SETR-PUP, 80,000 steps, Cityscapes)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of state, results, pictures (default: transfer/segmentation of WEIGHTS)",
    )
    parser.add_argument("--scratch", action="store_true", help="the control: fresh weights, same recipe")
    parser.add_argument("--network", choices=("teacher", "student"), help="of a run")
    parser.add_argument("--resume", action="store_true", help="go on after the last saved step")
    parser.add_argument("--evaluate-only", action="store_true", help="test what a training has left in --out")
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    from pretrain.errors import UserError
    from pretrain.settings import read_settings
    from pretrain.transfer.segmentation.recipe import SegmentationRecipe

    if arguments.evaluate_only and arguments.resume:
        raise UserError("--evaluate-only trains nothing that --resume could continue; leave one away")
    recipe = read_settings(SegmentationRecipe, arguments.config, arguments.overrides)

    from accelerate import PartialState

    from pretrain.transfer.segmentation.report import format_result
    from pretrain.transfer.segmentation.run import SegmentationRequest, run_segmentation

    request = SegmentationRequest(
        weights=arguments.weights,
        data=arguments.data,
        out=arguments.out,
        network=arguments.network,
        is_scratch=arguments.scratch,
        resume=arguments.resume,
        evaluate_only=arguments.evaluate_only,
        device=arguments.device,
    )
    result = run_segmentation(request, recipe)
    if PartialState().is_main_process:
        say(format_result(result, request.folder))
