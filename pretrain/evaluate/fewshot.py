"""Few labels: fine-tuning on a share of each class, and a linear probe with all labels after it, as in SiT.

Every cell, a share of the labels with one seed, is a file of its own as soon as it is done, so the same
command goes on after any interruption.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pretrain.errors import CheckpointError, UserError
from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.finetune import Place
from pretrain.evaluate.finetune_report import FinetuneData, FinetuneRequest, finetune_once, open_data
from pretrain.evaluate.frozen import FeatureSets, run_linear, take_features
from pretrain.evaluate.image_set import balanced_rows
from pretrain.evaluate.intervals import accuracy_of
from pretrain.evaluate.protocols import protocol_for
from pretrain.evaluate.recipes import FinetuneRecipe, RecipeName
from pretrain.evaluate.report import (
    EvaluateConfig,
    check_colours,
    coloured,
    hardware,
    results_folder,
    save_result,
    sources_of,
    versions,
)
from pretrain.evaluate.table import aligned, percent

FRACTIONS = (0.01, 0.1, 0.25, 0.5, 1.0)
SEEDS = (0, 1, 2)
PRETRAINED = 0.0  # the share of a cell without fine-tuning: a linear probe of the pretrained features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewshotRequest:
    """Which cells, and how each is made."""

    recipe_name: RecipeName
    recipe: FinetuneRecipe
    fractions: tuple[float, ...] = FRACTIONS
    seeds: tuple[int, ...] = SEEDS
    linear_changes: Mapping[str, Any] = field(default_factory=dict)  # of the probes' LinearConfig
    image_px: int | None = None
    num_workers: int | None = None

    def of_cell(self, fraction_ratio: float, seed: int) -> FinetuneRequest:
        return FinetuneRequest(
            self.recipe_name,
            self.recipe,
            (seed,),
            fraction_ratio,
            then_linear=True,
            linear_changes=self.linear_changes,
            image_px=self.image_px,
            num_workers=self.num_workers,
            test_every_epochs=0,  # a test after each of many short epochs would take most of the time
        )


def run_fewshot(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    request: FewshotRequest,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """All cells that are not done yet, and the table of all. config.save is needed for a later continuation.

    A class has at least one image in every share; with one seed a smaller share lies within a larger one.
    """
    config = config or EvaluateConfig()
    _check(request)
    check_colours(config)
    folder = results_folder(weights, config.out, "fewshot") if config.save else None
    data = open_data(train, test)
    for fraction in request.fractions:
        balanced_rows(data.splits["train"].labels(), fraction, 0)  # a wrong share is told before the work
    encoder = coloured(open_encoder(weights, None, config.network), data.splits["train"], config)
    sources = sources_of(encoder, data.splits["train"], data.splits["test"], config)
    # what was measured once is not measured again for every cell
    config = replace(config, mean=encoder.mean, std=encoder.std, normalization_of_data=False)
    accelerator = Accelerator(cpu=config.device == "cpu")
    identity = _identity(request, sources, protocol_for(encoder, config.protocol).name)
    done = _read_done(folder, request, identity)
    accelerator.wait_for_everyone()  # no process writes a cell before all have looked
    sets: FeatureSets | None = None
    cells, num_cells = [], len(request.seeds) * (1 + len(request.fractions))
    for seed in request.seeds:
        for fraction in (PRETRAINED, *request.fractions):
            cell = done.get((fraction, seed))
            if cell is None:
                if fraction == PRETRAINED:
                    quiet = replace(config, save=False)
                    sets = sets or take_features(weights, train, test, quiet)
                    cell = _probe_cell(weights, sets, request, seed, quiet)
                else:
                    cell = _finetune_cell(weights, data, request, fraction, seed, config, accelerator, folder)
                cell = {"fraction_ratio": fraction, "seed": seed, **cell}
                if folder is not None and accelerator.is_main_process:
                    _write_cell(folder, request, cell, identity)
            cells.append(cell)
            if accelerator.is_main_process:
                logger.info("%s (%d of %d)", _told(cell), len(cells), num_cells)
    result = {
        "method": "fewshot",
        "recipe_name": request.recipe_name,
        "recipe": request.recipe.model_dump(mode="json"),
        "seeds": list(request.seeds),
        "fractions": list(request.fractions),
        "rows": rows_of(cells, len(data.tests)),
        "cells": cells,
        "num_test": len(data.tests),
        **sources,
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    if config.save and accelerator.is_main_process:
        save_result(results_folder(weights, config.out), result)
    return result


def _check(request: FewshotRequest) -> None:
    for name, values in (("seeds", request.seeds), ("fractions", request.fractions)):
        if len(set(values)) < len(values):
            raise UserError(f"--{name}: {' '.join(f'{value:g}' for value in values)} names one twice")


def _identity(request: FewshotRequest, sources: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """What all cells of a table have in common."""
    return {
        "recipe": request.recipe.model_dump(mode="json"),
        "protocol": protocol,
        "linear_changes": dict(request.linear_changes),
        "image_px": request.image_px,
        "encoder": sources["encoder"],
        "data": {
            role: sources[role]["manifest_sha256"] + ":" + sources[role]["split"]
            for role in ("train", "test")
        },
    }


def _probe_cell(
    weights: str | Path, sets: FeatureSets, request: FewshotRequest, seed: int, config: EvaluateConfig
) -> dict[str, Any]:
    changes = dict(request.linear_changes)
    result = run_linear(weights, "", "", config, changes=changes, seeds=(seed,), sets=sets)
    return {"num_train": 0, "finetuned_top1_ratio": None, "linear_top1_ratio": result["top1_ratio"]}


def _finetune_cell(
    weights: str | Path,
    data: FinetuneData,
    request: FewshotRequest,
    fraction: float,
    seed: int,
    config: EvaluateConfig,
    accelerator: Accelerator,
    folder: Path | None,
) -> dict[str, Any]:
    place = Place()
    if folder is not None:
        place = Place(_cell_path(folder, request, fraction, seed).with_suffix(""), resume=True)
    of_cell = request.of_cell(fraction, seed)
    _, run = finetune_once(weights, data, of_cell, config, seed, accelerator, place)
    return {
        "num_train": run["num_train"],
        "finetuned_top1_ratio": run["top1_ratio"],
        "linear_top1_ratio": run["linear"]["top1_ratio"],
        "train_loss": run["history"][-1]["train_loss"],
        "seconds": run["seconds"],
    }


def _cell_path(folder: Path, request: FewshotRequest, fraction: float, seed: int) -> Path:
    return folder / request.recipe_name / f"{share_name(fraction)}_seed{seed}.json"


def share_name(fraction: float) -> str:
    """Of a share of the labels, as a key of results: 0.1 -> `10pct`."""
    return f"{100 * fraction:g}pct".replace(".", "_")


def _read_done(
    folder: Path | None, request: FewshotRequest, identity: Mapping[str, Any]
) -> dict[tuple[float, int], dict[str, Any]]:
    done: dict[tuple[float, int], dict[str, Any]] = {}
    wanted = json.loads(json.dumps(identity))
    for seed in request.seeds if folder else ():
        for fraction in (PRETRAINED, *request.fractions):
            path = _cell_path(folder, request, fraction, seed)  # type: ignore[arg-type]
            if not path.is_file():
                continue
            try:
                found = json.loads(path.read_text())
                cell, of_cell = found["cell"], found["identity"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path}: cannot be read ({error}); remove it to have it made again"
                ) from None
            changed = [key for key in wanted if of_cell.get(key) != wanted[key]]
            if changed:
                raise CheckpointError(
                    f"{path}: was made with another {changed[0]}; use another --out, or remove {path.parent}"
                )
            done[fraction, seed] = cell
    return done


def _write_cell(
    folder: Path, request: FewshotRequest, cell: dict[str, Any], identity: Mapping[str, Any]
) -> None:
    """The result, and then what the fine-tuning kept to be continued is no longer needed."""
    path = _cell_path(folder, request, cell["fraction_ratio"], cell["seed"])
    save_result(path.parent, {"cell": cell, "identity": identity}, path.stem)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def rows_of(cells: Sequence[Mapping[str, Any]], num_test: int) -> dict[str, Any]:
    """Mean, deviation and 95 % interval over seeds of both read-outs, by share: 0pct, 1pct, ..."""
    rows: dict[str, Any] = {}
    for fraction in sorted({cell["fraction_ratio"] for cell in cells}):
        of_row = [cell for cell in cells if cell["fraction_ratio"] == fraction]
        row: dict[str, Any] = {"fraction_ratio": fraction, "num_train": of_row[0]["num_train"]}
        for read_out in ("finetuned", "linear"):
            ratios = [cell[f"{read_out}_top1_ratio"] for cell in of_row]
            row[read_out] = None if None in ratios else accuracy_of(ratios, num_test)
        rows[share_name(fraction)] = row
    return rows


def _told(cell: Mapping[str, Any]) -> str:
    linear = f"linear with all labels {percent(cell['linear_top1_ratio'])} %"
    if cell["finetuned_top1_ratio"] is None:
        return f"seed {cell['seed']}, pretrained: {linear}"
    share = f"{100 * cell['fraction_ratio']:g} % of the labels ({cell['num_train']} images)"
    tuned = f"fine-tuned {percent(cell['finetuned_top1_ratio'])} %"
    return f"seed {cell['seed']}, {share}: {tuned}, then {linear}"


def format_fewshot(result: Mapping[str, Any]) -> str:
    """The table as text."""
    lines = [("labels", "images", "fine-tuned %", "then linear with all labels %")]
    for row in result["rows"].values():
        share = f"{100 * row['fraction_ratio']:g} %"
        lines.append((share, str(row["num_train"]), _cell(row["finetuned"]), _cell(row["linear"])))
    encoder, num_seeds = result["encoder"], len(result["seeds"])
    spread = (
        "95 % interval of one test set"
        if num_seeds == 1
        else f"+- deviation of {num_seeds} seeds (95 % interval)"
    )
    head = f"{encoder['weights']}, recipe {result['recipe_name']}; {spread}"
    return f"{head}\n\n{aligned(lines)}"


def _cell(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None:
        return "-"
    low, high = accuracy["top1_ratio_95"]
    std = "" if accuracy["top1_ratio_std"] is None else f" +- {percent(accuracy['top1_ratio_std'])}"
    return f"{percent(accuracy['top1_ratio'])}{std} ({percent(low)} to {percent(high)})"
