"""The command line of `pretrain evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

# as in feature.py, protocols.py and recipes.py, which import too much for a parser
FEATURES = (
    "class",
    "mean_patch",
    "tokens",
    "class_last4",
    "mean_patch_last4",
    "class_mean_patch",
    "class_rotation",
    "pooled",
)
PROTOCOLS = ("generic", "dino_small", "dino", "moco_v3", "moby", "mae", "ijepa", "sit", "relvit")
RECIPES = ("deit", "sit", "mae", "relvit")
POOLS = ("class", "mean_patch", "class_rotation")

WEIGHTS = "an exported folder, a run, a timm name; untrained:NAME draws fresh ones"
SHARDS = "DIR or DIR:split"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def add(kind: str, text: str) -> argparse.ArgumentParser:
        return kinds.add_parser(kind, help=text, epilog=parser.epilog)

    _add_knn(add("knn", "weighted k-nearest neighbours"))
    _add_linear(add("linear", "linear probe with swept learning rates, as the method's authors do it"))
    _add_probes(add("probes", "k-NN and linear probes with shares of the labels, on one encoding: a table"))
    _add_finetune(add("finetune", "train backbone and head with a recipe"))
    _add_fewshot(add("fewshot", "fine-tune on shares of the labels, then a linear probe with all: a table"))
    _add_summary(
        add("summary", "pretext tasks, k-NN and linear of a run beside untrained weights and raw pixels")
    )
    _add_head(add("head", "the classification head of a joint training"))
    _add_dense(add("dense", "linear segmentation: what a linear head reads from single patch tokens"))
    _add_pretext(add("pretext", "how well a run solves its pretext tasks on other images"))


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    from pretrain.evaluate import commands

    commands.run(arguments, say)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def share(text: str) -> float:
    ratio = float(text)
    if not 0 < ratio <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share is above 0 and at most 1")
    return ratio


def _add_sets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help=WEIGHTS)
    parser.add_argument("--train", required=True, metavar="SHARDS", help=SHARDS)
    parser.add_argument("--test", required=True, metavar="SHARDS", help=SHARDS)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of results (default: the weights' folder, if they have one)"
    )
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")


def _add_reading(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Of frozen features."""
    parser.add_argument(
        "--features" if several else "--feature",
        choices=FEATURES,
        nargs="+" if several else None,
        help="what an image becomes; default: what the protocol says. tokens: class and task tokens",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        metavar="METHOD",
        help=f"default: that of the run's tasks; {', '.join(PROTOCOLS)}",
    )
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="to encode")
    _add_weights_seed(parser)


def _add_weights_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights-seed",
        type=int,
        default=0,
        metavar="S",
        help="of the fresh weights that untrained:NAME draws (default: 0)",
    )


def _add_colours(parser: argparse.ArgumentParser) -> None:
    """How pixels are normalised: by default as the weights say."""
    parser.add_argument(
        "--network", choices=("teacher", "student"), help="of a run (default: teacher if any)"
    )
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels in 0..1")
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels in 0..1")
    parser.add_argument(
        "--normalization-of-data",
        action="store_true",
        help="take both from the train set (default: the weights' own), as domain transfer does",
    )


def _add_knn(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_reading(parser)
    _add_colours(parser)
    _add_votes(parser)


def _add_votes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--k", type=positive, nargs="+", metavar="K", help="neighbours (default: 10 20 100 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.07, metavar="T", help="of the votes")


def _add_linear(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_reading(parser)
    _add_colours(parser)
    _add_heads(parser)
    parser.add_argument(
        "--augment", action="store_true", help="encode other crops in every epoch (default: features once)"
    )
    _add_workers(parser)


def _add_heads(parser: argparse.ArgumentParser) -> None:
    """How linear probes are trained."""
    parser.add_argument("--epochs", type=positive, metavar="N", help="default: the protocol's")
    parser.add_argument(
        "--base-lr",
        type=float,
        metavar="X",
        help="of the sweep, per 256 images of a batch (default: its own)",
    )
    parser.add_argument(
        "--inputs",
        choices=("raw", "standardised"),
        nargs="+",
        help="without and with a BatchNorm before the head (default: the protocol's)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="S", help="one probe each; mean and interval"
    )


def _add_probes(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_reading(parser, several=True)
    _add_colours(parser)
    _add_votes(parser)
    _add_heads(parser)
    parser.add_argument(
        "--fractions",
        type=share,
        nargs="+",
        default=[0.01, 0.1, 1.0],
        metavar="F",
        help="of the labels of each class, for linear probes (default: 0.01 0.1 1)",
    )
    parser.add_argument(
        "--also-test",
        action="append",
        default=[],
        metavar="SHARDS",
        help="another test set, DIR, DIR:split or NAME=DIR, read out by the same bank and heads; repeatable",
    )
    for role in ("train", "test"):
        parser.add_argument(
            f"--num-{role}",
            type=positive,
            metavar="N",
            help=f"{role} images at most, as many of each class, always the same ones (default: all)",
        )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that augment (default: the cores)"
    )


def _add_summary(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_reading(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe"
    )
    parser.add_argument("--recipe", choices=RECIPES, help="default: that of the run's tasks")
    parser.add_argument("--epochs", type=int, metavar="N", help="num_epochs of the recipe")
    parser.add_argument("--batch-size", type=int, metavar="N", help="over all processes")
    parser.add_argument("--lr", type=float, metavar="X", help="base_lr of the recipe")
    parser.add_argument("--pool", choices=POOLS, help="what the head reads")
    parser.add_argument("--pos-embed", choices=("keep", "add"), help="add: a fresh one where there is none")
    parser.add_argument(
        "--img-px", type=int, metavar="N", help="positions are resampled (default: the weights')"
    )
    parser.add_argument(
        "--linear-epochs", type=positive, metavar="N", help="of the probe with all labels (default: its own)"
    )
    _add_workers(parser)
    _add_colours(parser)


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_recipe(parser)
    parser.add_argument(
        "--fraction", type=float, default=1.0, metavar="F", help="of the labels of each class"
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="S")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="S", help="one run each; mean and interval")
    parser.add_argument("--scratch", action="store_true", help="the control: fresh weights, same recipe")
    parser.add_argument(
        "--then-linear", action="store_true", help="then a linear probe with all labels of the train set"
    )
    parser.add_argument(
        "--test-every", type=int, default=1, metavar="N", help="epochs (0: only after the last)"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last state that was kept")


def _add_fewshot(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_recipe(parser)
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        metavar="F",
        help="of the labels of each class (default: 0.01 0.1 0.25 0.5 1)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="of each (default: 0 1 2)")


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="RUN", help="a run or checkpoint of a joint training")
    parser.add_argument("--test", required=True, metavar="SHARDS", help=SHARDS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the result as JSON")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")


def _add_dense(parser: argparse.ArgumentParser) -> None:
    """Run by the command line itself: it reads folders of masks, as a transfer to segmentation does."""
    parser.add_argument("weights", metavar="WEIGHTS", help=WEIGHTS)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="images/SPLIT, masks/SPLIT and classes.txt, or Cityscapes' folder",
    )
    parser.add_argument("--train-split", default="train", metavar="NAME", help="to learn from")
    parser.add_argument("--test-split", default="val", metavar="NAME", help="to test on")
    parser.add_argument(
        "--ignore-label",
        type=int,
        default=255,
        metavar="N",
        help="mask value that is void (default: 255)",
    )
    parser.add_argument(
        "--size-px",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="of images, in whole patches (default: their shape, at most 32 patches long)",
    )
    parser.add_argument("--epochs", type=positive, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the head and what is held out")
    _add_weights_seed(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images, to encode")
    parser.add_argument(
        "--network", choices=("teacher", "student"), help="of a run (default: teacher if any)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of results (default: the weights' folder, if they have one)"
    )
    parser.add_argument("--device", choices=("cpu",), help="default: what the machine has")


def _add_pretext(parser: argparse.ArgumentParser) -> None:
    """Run by the command line itself: it needs the heads of a run and the views of its config."""
    parser.add_argument("weights", metavar="RUN", type=Path, help="a run folder or one checkpoint")
    parser.add_argument("--test", required=True, metavar="SHARDS", help=SHARDS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write all values as JSON")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what there is")
