"""The command lines of `pretrain evaluate finetune` and `head`, and the normalisation that others take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.evaluate.finetune_report import FinetuneRequest


def add_colour_arguments(parser: argparse.ArgumentParser) -> None:
    """How pixels are normalised: by default as the weights say."""
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels in 0..1")
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels in 0..1")
    parser.add_argument(
        "--normalization-of-data",
        action="store_true",
        help="take both from the train set (default: the weights' own)",
    )


def add_finetune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help="an exported folder, a run, a timm name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe"
    )
    parser.add_argument("--train", required=True, metavar="SHARDS", help="DIR or DIR:split")
    parser.add_argument("--test", required=True, metavar="SHARDS", help="DIR or DIR:split")
    parser.add_argument("--recipe", required=True, choices=("deit", "mae", "relvit"))
    parser.add_argument("--epochs", type=int, metavar="N", help="num_epochs of the recipe")
    parser.add_argument("--batch-size", type=int, metavar="N", help="over all processes")
    parser.add_argument("--lr", type=float, metavar="X", help="base_lr of the recipe")
    parser.add_argument("--pool", choices=("class", "mean_patch"), help="what the head reads")
    parser.add_argument("--pos-embed", choices=("keep", "add"), help="add: a fresh one where there is none")
    parser.add_argument(
        "--img-px", type=int, metavar="N", help="positions are resampled (default: the weights')"
    )
    parser.add_argument(
        "--fraction", type=float, default=1.0, metavar="F", help="of the labels of each class"
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="S")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="S", help="one run each; mean and deviation")
    parser.add_argument("--scratch", action="store_true", help="the control: fresh weights, same recipe")
    parser.add_argument(
        "--then-linear", action="store_true", help="then a linear probe with all labels of the train set"
    )
    parser.add_argument("--network", choices=("teacher", "student"), help="of a run")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of state and results (default: the weights')"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch")
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that augment (default: the cores)"
    )
    add_colour_arguments(parser)


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="RUN", help="a run or checkpoint of a joint training")
    parser.add_argument("--test", required=True, metavar="SHARDS", help="DIR or DIR:split")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the result as JSON")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")


def colours_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of EvaluateConfig."""
    mean, std = (tuple(value) if value else None for value in (arguments.mean, arguments.std))
    return {"mean": mean, "std": std, "normalization_of_data": arguments.normalization_of_data}


def finetune_from(arguments: argparse.Namespace) -> FinetuneRequest:
    from pretrain.evaluate.finetune_report import FinetuneRequest
    from pretrain.evaluate.recipes import recipe_with

    flags = {
        "num_epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "base_lr": arguments.lr,
        "pool": arguments.pool,
        "pos_embed": arguments.pos_embed,
    }
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return FinetuneRequest(
        recipe_name=arguments.recipe,
        recipe=recipe_with(arguments.recipe, [*given, *arguments.overrides]),
        seeds=tuple(arguments.seeds or (arguments.seed,)),
        fraction_ratio=arguments.fraction,
        is_scratch=arguments.scratch,
        then_linear=arguments.then_linear,
        image_px=arguments.img_px,
        resume=arguments.resume,
        num_workers=arguments.workers,
    )
