"""What `pretrain evaluate KIND` does: arguments in, lines of text out."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.fewshot import FRACTIONS, SEEDS, FewshotRequest, format_fewshot, run_fewshot
from pretrain.evaluate.finetune_report import FinetuneRequest, run_finetune, run_head
from pretrain.evaluate.frozen import run_knn, run_linear
from pretrain.evaluate.knn import KS
from pretrain.evaluate.probes import ProbesRequest, run_probes
from pretrain.evaluate.probes_table import format_probes
from pretrain.evaluate.protocols import protocol_for
from pretrain.evaluate.recipes import FinetuneRecipe, RecipeName, recipe_with
from pretrain.evaluate.report import EvaluateConfig
from pretrain.evaluate.summary import format_summary, run_summary
from pretrain.evaluate.table import table

Say = Callable[[str], None]


def run(arguments: argparse.Namespace, say: Say) -> None:
    """Every process of a launcher calls this; the first one speaks."""
    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger("pretrain").setLevel(logging.WARNING)
        say = _say_nothing
    _COMMANDS[arguments.kind](arguments, say)


def _say_nothing(line: str) -> None:
    pass


def config_from(arguments: argparse.Namespace) -> EvaluateConfig:
    """What a kind of evaluation has no flag for keeps its default."""
    given = vars(arguments)
    names = {"feature", "protocol", "network", "weights_seed", "device", "out", "normalization_of_data"}
    fields = names & given.keys()
    settings = {name: given[name] for name in fields}
    for name in ("mean", "std"):
        settings[name] = tuple(given[name]) if given.get(name) else None
    if arguments.kind in (
        "knn",
        "linear",
        "probes",
        "summary",
        "head",
    ):  # of a fine-tuning it is the recipe's
        settings["batch_size"] = arguments.batch_size
    # a timm name has no folder to keep results in
    has_place = Path(arguments.weights).is_dir() or arguments.out is not None
    return EvaluateConfig(save=has_place, **settings)


def _knn(arguments: argparse.Namespace, say: Say) -> None:
    ks = sorted(set(arguments.k)) if arguments.k else KS
    result = run_knn(
        arguments.weights,
        arguments.train,
        arguments.test,
        config_from(arguments),
        ks=ks,
        temperature=arguments.temperature,
    )
    say(table([result]))


def _linear(arguments: argparse.Namespace, say: Say) -> None:
    result = run_linear(
        arguments.weights,
        arguments.train,
        arguments.test,
        config_from(arguments),
        changes=_head_changes(arguments),
        seeds=arguments.seeds,
        augment=arguments.augment,
        num_workers=arguments.workers,
    )
    say(table([result]))


def _head_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of linear probes replace of the protocol's LinearConfig."""
    flags = {
        "num_epochs": arguments.epochs,
        "base_lr": arguments.base_lr,
        "inputs": tuple(arguments.inputs) if arguments.inputs else None,
    }
    return {name: value for name, value in flags.items() if value is not None}


def _probes(arguments: argparse.Namespace, say: Say) -> None:
    request = ProbesRequest(
        features=tuple(arguments.features or ()),
        fractions=tuple(arguments.fractions),
        seeds=tuple(arguments.seeds),
        linear_changes=_head_changes(arguments),
        ks=tuple(sorted(set(arguments.k))) if arguments.k else KS,
        temperature=arguments.temperature,
        also_test=tuple(arguments.also_test),
        num_train=arguments.num_train,
        num_test=arguments.num_test,
    )
    result = run_probes(arguments.weights, arguments.train, arguments.test, request, config_from(arguments))
    say(format_probes(result))


def _summary(arguments: argparse.Namespace, say: Say) -> None:
    folder = Path(arguments.weights)
    say(format_summary(run_summary(folder, arguments.train, arguments.test, config_from(arguments))))
    say(_next_steps(folder, arguments.out or folder))


def _finetune(arguments: argparse.Namespace, say: Say) -> None:
    name, recipe = _recipe_from(arguments)
    request = FinetuneRequest(
        recipe_name=name,
        recipe=recipe,
        seeds=tuple(arguments.seeds or (arguments.seed,)),
        fraction_ratio=arguments.fraction,
        is_scratch=arguments.scratch,
        then_linear=arguments.then_linear,
        linear_changes=_linear_changes(arguments),
        image_px=arguments.img_px,
        resume=arguments.resume,
        num_workers=arguments.workers,
        test_every_epochs=arguments.test_every,
    )
    result = run_finetune(arguments.weights, arguments.train, arguments.test, request, config_from(arguments))
    say(table([result]))


def _fewshot(arguments: argparse.Namespace, say: Say) -> None:
    name, recipe = _recipe_from(arguments)
    request = FewshotRequest(
        recipe_name=name,
        recipe=recipe,
        fractions=tuple(arguments.fractions or FRACTIONS),
        seeds=tuple(arguments.seeds or SEEDS),
        linear_changes=_linear_changes(arguments),
        image_px=arguments.img_px,
        num_workers=arguments.workers,
    )
    result = run_fewshot(arguments.weights, arguments.train, arguments.test, request, config_from(arguments))
    say(format_fewshot(result))


def _linear_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    return {} if arguments.linear_epochs is None else {"num_epochs": arguments.linear_epochs}


def _recipe_from(arguments: argparse.Namespace) -> tuple[RecipeName, FinetuneRecipe]:
    """The recipe that was asked for, else that of the method which made the weights."""
    name: RecipeName = arguments.recipe or protocol_for(open_encoder(arguments.weights)).recipe
    flags = {
        "num_epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "base_lr": arguments.lr,
        "pool": arguments.pool,
        "pos_embed": arguments.pos_embed,
    }
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return name, recipe_with(name, [*given, *arguments.overrides])


def _head(arguments: argparse.Namespace, say: Say) -> None:
    say(table([run_head(arguments.weights, arguments.test, config_from(arguments))]))


def _next_steps(run: Path, results: Path) -> str:
    exported = run / "exported"
    lines = [
        f"results     {results / 'eval' / 'summary.json'}",
        f"run         {run} (metrics.jsonl, checkpoints/)",
    ]
    if exported.is_dir():
        lines += [
            f"weights     {exported}",
            f"load them   timm.create_model('local-dir:{exported}', pretrained=True)",
        ]
    else:
        lines.append(f"export      pretrain export {run} --out {exported}")
    return "\n" + "\n".join(lines)


_COMMANDS: dict[str, Callable[[argparse.Namespace, Say], None]] = {
    "knn": _knn,
    "linear": _linear,
    "probes": _probes,
    "summary": _summary,
    "finetune": _finetune,
    "fewshot": _fewshot,
    "head": _head,
}
