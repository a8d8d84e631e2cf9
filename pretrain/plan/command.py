"""`pretrain plan`: what a run would need and take, before anything is rented or started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from pretrain.plan.hardware import gpu_named
from pretrain.plan.network import NETWORKS
from pretrain.plan.predict import Prediction, Question, predict
from pretrain.plan.recipe import Settings
from pretrain.plan.settings import plan_settings
from pretrain.plan.table import told
from pretrain.plan.timing import Machine, usual_utilisation
from pretrain.plan.vits import size_of


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    gpu = gpu_named(arguments.gpu)
    settings = plan_settings(arguments.config, arguments.overrides)
    utilisation = arguments.mfu or usual_utilisation(_width(settings))
    machine = Machine(gpu, NETWORKS[arguments.network], arguments.gpus_per_node, utilisation)
    found = predict(
        settings,
        Question(
            arguments.nodes,
            machine,
            arguments.images,
            arguments.images_per_core_second,
            arguments.disk_gb_per_second * 1e9,
            arguments.node_mtbf_hours,
        ),
    )
    say(json.dumps(as_json(found), indent=1) if arguments.json else told(found))


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
