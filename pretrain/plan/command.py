"""`pretrain plan`: what a run would need and take, before anything is rented or started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from pretrain.errors import UserError
from pretrain.plan.hardware import Gpu, gpu_named
from pretrain.plan.measured import Results, read
from pretrain.plan.network import NETWORKS, Network
from pretrain.plan.predict import Prediction, Question, predict
from pretrain.plan.recipe import Settings
from pretrain.plan.schedule import HOST_COPY_BYTES_PER_SECOND
from pretrain.plan.settings import plan_settings
from pretrain.plan.table import told
from pretrain.plan.timing import Machine, usual_utilisation
from pretrain.plan.vits import size_of


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    results = read(arguments.measured) if arguments.measured else None
    gpu = _gpu(arguments.gpu, results)
    settings = plan_settings(arguments.config, arguments.overrides)
    machine = machine_of(
        settings, gpu, NETWORKS[arguments.network], arguments.gpus_per_node, results, arguments.mfu
    )
    copied = results.rate("copy, device to pinned host") if results else None
    found = predict(
        settings,
        Question(
            arguments.nodes,
            machine,
            arguments.images,
            arguments.images_per_core_second,
            arguments.disk_gb_per_second * 1e9,
            arguments.node_mtbf_hours,
            copied or HOST_COPY_BYTES_PER_SECOND,
            results,
        ),
    )
    say(json.dumps(as_json(found), indent=1) if arguments.json else told(found))


def _gpu(name: str | None, results: Results | None) -> Gpu:
    """What is asked for, and that it is what was measured."""
    if results is None or name is None:
        return results.gpu if results else gpu_named(name or "h200")
    gpu = gpu_named(name)
    if gpu != results.gpu:
        raise UserError(
            f"--gpu {name}: --measured holds results of {results.gpu.name}; leave one of both out"
        )
    return gpu


def machine_of(
    settings: Settings,
    gpu: Gpu,
    network: Network,
    gpus_per_node: int,
    results: Results | None = None,
    mfu: float | None = None,
) -> Machine:
    """With what was measured for this model, else with what is usual; mfu: as said by hand."""
    curve: tuple[tuple[int, float], ...] = ()
    if results is not None:
        gpu, network = results.machine_parts(gpu, network)
        if mfu is None:
            curve, _ = results.utilisation_curve(settings)
    return Machine(gpu, network, gpus_per_node, mfu or usual_utilisation(_width(settings)), curve)


def as_json(found: Prediction) -> dict[str, object]:
    """Every number of the prediction, and those that follow from it."""
    return {
        "is_prediction": True,
        **asdict(found),
        "checkpoint_bytes": found.parameters.checkpoint_bytes,
        "step_seconds": found.step.total,
        "images_per_second": found.images_per_second,
    }


def _width(settings: Settings) -> int:
    """Of a ViT; other backbones count as narrow."""
    size = size_of(settings["model"])
    return 0 if size is None else size.dim
