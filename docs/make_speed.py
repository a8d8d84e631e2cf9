"""Writes the table of speed.md that says how a run would scale: what `pretrain plan` predicts.

`python docs/make_speed.py` takes what is measured under benchmarks/results/gpu, if there is anything, and the
stated assumptions for the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.plan.command import machine_of
from pretrain.plan.hardware import gpu_named
from pretrain.plan.measured import Results, read
from pretrain.plan.network import NETWORKS
from pretrain.plan.predict import Prediction, Question, predict
from pretrain.plan.settings import plan_settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BEGIN, END = "<!-- begin: docs/make_speed.py -->\n", "<!-- end: docs/make_speed.py -->\n"
MODELS = {"ViT-S/16": ("vits16", 512), "ViT-B/16": ("vitb16", 256), "ViT-L/16": ("vitl16", 128)}  # images
STRONG_BATCH = 4096
GPUS_OF_A_NODE = 8
IMAGES = 1_281_167
USUAL_GPU = "h200"
BESIDE = ("copy to the host", "memory")  # which are not about the time of a step


def results_at(folder: Path) -> Results | None:
    """None where nothing of a GPU lies."""
    return read(folder) if any(folder.glob("*.json")) else None


def prediction(config: str, global_batch: int, results: Results | None) -> Prediction:
    """Of a node of eight GPUs, with the scaling from one GPU to 1,024."""
    path = ROOT / "configs" / f"imagenet_{config}_multitask.yaml"
    overrides = ["data.lanes=1024", "batch.accumulation_steps=1", f"batch.global_size={global_batch}"]
    settings = plan_settings(path, [*overrides, "engine.recompute=false"])
    gpu = results.gpu if results else gpu_named(USUAL_GPU)
    machine = machine_of(settings, gpu, NETWORKS["infiniband"], GPUS_OF_A_NODE, results)
    return predict(settings, Question(1, machine, IMAGES, 400.0, 1e9, 1000.0, results=results))


def weak_table(found: dict[str, Prediction]) -> list[str]:
    lines = [
        f"| GPUs | {' | '.join(f'{name}: images/s | efficiency' for name in found)} |",
        f"| --- |{' --- | --- |' * len(found)}",
    ]
    for rows in zip(*(of.scaling for of in found.values()), strict=True):
        cells = [f"{row.weak_images_per_second:,.0f} | {100 * row.weak_efficiency:.1f} %" for row in rows]
        lines.append(f"| {rows[0].ranks} | {' | '.join(cells)} |")
    return lines


def strong_table(found: dict[str, Prediction]) -> list[str]:
    lines = [f"| GPUs | images of each | {' | '.join(found)} |", f"| --- | --- |{' --- |' * len(found)}"]
    for rows in zip(*(of.scaling for of in found.values()), strict=True):
        cells = [
            "-" if row.strong_efficiency is None else f"{100 * row.strong_efficiency:.1f} %" for row in rows
        ]
        lines.append(f"| {rows[0].ranks} | {STRONG_BATCH // rows[0].ranks} | {' | '.join(cells)} |")
    return lines


def basis_table(found: dict[str, Prediction]) -> list[str]:
    """What it rests on; lines that differ between the models name theirs."""
    of_models, of_all = {}, {}
    for name, of in found.items():
        for figure in of.basis:
            standing = f"{'measured' if figure.is_measured else '**assumed**'}: {figure.source}"
            if figure.name == "utilisation":
                of_models[name] = f"| {figure.name}, {name} | {figure.value} | {standing} |"
            elif figure.name not in BESIDE:
                of_all[figure.name] = f"| {figure.name} | {figure.value} | {standing} |"
    return ["| what | value | standing |", "| --- | --- | --- |", *of_models.values(), *of_all.values()]


def table(results: Results | None) -> str:
    """All that stands between the marks."""
    weak = {
        name: prediction(config, GPUS_OF_A_NODE * images, results)
        for name, (config, images) in MODELS.items()
    }
    strong = {name: prediction(config, STRONG_BATCH, results) for name, (config, _) in MODELS.items()}
    first = next(iter(weak.values()))
    is_measured = any(figure.is_measured for of in weak.values() for figure in of.basis)
    standing = (
        "Some of what it rests on was measured on one GPU, see below; the scaling itself was not."
        if is_measured
        else "**Nothing in it was measured**: every number that it rests on is assumed, see below."
    )
    images = ", ".join(f"{count} for {name}" for name, (_, count) in MODELS.items())
    return "\n".join(
        [
            f"**Prediction** for {first.gpu}s, {GPUS_OF_A_NODE} in a node, {first.network} between nodes, "
            f"the six tasks of the core method on two views of 224 px. {standing}",
            "",
            f"Weak scaling, each GPU with its own images ({images}):",
            "",
            *weak_table(weak),
            "",
            f"Strong scaling, one batch of {STRONG_BATCH:,} images shared by all GPUs, as a share of what as "
            "many GPUs would do by themselves:",
            "",
            *strong_table(strong),
            "",
            "What both rest on:",
            "",
            *basis_table(weak),
            "",
        ]
    )


def page(text: str, results: Results | None) -> str:
    """The text with its table written anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=RESULTS)
    PAGE.write_text(page(PAGE.read_text(), results_at(parser.parse_args().measured)))
