"""What the tasks of the core method cost, in one pass and in separate ones, and what DeepSpeed costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pretrain import build, cluster
from pretrain.config import RunConfig
from pretrain.peers import ALONE, Peers
from pretrain.tasks.contract import TaskOutput
from pretrain.tasks.multitask import MultiTask, views_for
from pretrain.views.prepare import Inputs
from steps.ours import (
    CONTRASTIVE_ONLY,
    KNOBS,
    LOCAL,
    PLAIN,
    Setting,
    configuration,
    inputs_for,
    training_step,
)
from steps.turns import CPU, Step, row, table, take_turns

CORE = "imagenet_vits16_multitask.yaml"
SMALL = "cifar10_vits4_multitask.yaml"
ZERO_1 = "engine.deepspeed={zero_optimization: {stage: 1}}"


def bare_step(config: RunConfig, inputs: Inputs, peers: Peers = ALONE, wrap: Any = None) -> Step:
    """What one would write around the same module without an engine."""
    module: Any = build.module(config, peers, torch.device("cpu")).train()
    if wrap is not None:
        module = wrap(module)
    optimizer = torch.optim.AdamW(module.parameters(), KNOBS.lr, weight_decay=KNOBS.weight_decay, fused=True)

    def step() -> None:
        total = module(inputs)["total"]
        total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def core(setting: Setting) -> dict[str, Any]:
    """The size that counts: ViT-S/16 at 224 px, 8 images of two views."""
    common = [*PLAIN, setting.model(224, 16), *views(setting, 224), setting.batch(8), ZERO_1]
    only = configuration(CORE, *common, *CONTRASTIVE_ONLY)
    every = configuration(CORE, *common)
    one, all_six = inputs_for(only, setting.shards), inputs_for(every, setting.shards)
    bare, zero, six = (
        "contrastive, bare torch loop",
        "contrastive, DeepSpeed ZeRO-1",
        "six tasks, DeepSpeed ZeRO-1",
    )
    with cluster.connected(cluster.Cluster()):
        steps = {
            bare: bare_step(only, one),
            zero: training_step(only, one),
            six: training_step(every, all_six),
        }
        seconds = take_turns(steps, setting.rounds_or(9))
    rows = [
        row("all six core tasks / contrastive alone, ViT-S/16, 224 px", seconds, six, zero, 1.10),
        row("DeepSpeed ZeRO-1 / bare torch loop, ViT-S/16, 224 px", seconds, zero, bare, 1.05),
    ]
    return table("ViT-S/16 at 224 px, 8 images of two views, fp32", CPU, seconds, rows)


def small(setting: Setting) -> dict[str, Any]:
    """A network so small that everything around the matrix products shows."""
    model = setting.model(32, 4, "vit_tiny_patch16_224", "depth: 8")
    common = [*PLAIN, model, *views(setting, 32), setting.batch(16)]
    only = configuration(SMALL, *common, "engine.kind=local", *CONTRASTIVE_ONLY)
    every = configuration(SMALL, *common, "engine.kind=local")
    deep = configuration(SMALL, *common, ZERO_1, *CONTRASTIVE_ONLY)
    one, all_six = inputs_for(only, setting.shards), inputs_for(every, setting.shards)
    names = (
        "contrastive, bare torch loop",
        "contrastive, plain engine",
        "contrastive, DeepSpeed ZeRO-1",
        "six tasks",
    )
    bare, plain, zero, six = names
    with cluster.connected(cluster.Cluster()):
        steps = {
            bare: bare_step(only, one),
            plain: training_step(only, one),
            zero: training_step(deep, one),
            six: training_step(every, all_six),
        }
        seconds = take_turns(steps, setting.rounds_or(11))
    rows = [
        row("all six core tasks / contrastive alone, ViT-Ti/4, 32 px", seconds, six, plain),
        row("plain engine / bare torch loop, ViT-Ti/4, 32 px", seconds, plain, bare),
        row("DeepSpeed ZeRO-1 / bare torch loop, ViT-Ti/4, 32 px", seconds, zero, bare),
    ]
    return table("ViT-Ti/4 with 8 blocks at 32 px, 16 images of two views, fp32", CPU, seconds, rows)


def separate_outputs(module: MultiTask, inputs: Inputs) -> tuple[list[Any], dict[str, TaskOutput]]:
    """As the module's own, but every task has the views encoded for itself."""
    outputs = {}
    for name, task in module.tasks.items():
        encoded = [module._encode(group, inputs) for group in inputs.groups]
        outputs[name] = task.forward(views_for(encoded, module.readings[name].views), module.peers)
    return encoded, outputs


def passes(setting: Setting) -> dict[str, Any]:
    """Six tasks in one encoder pass, against a pass for each."""
    model = setting.model(224, 16, "vit_tiny_patch16_224")
    config = configuration(CORE, *LOCAL, model, *views(setting, 224), setting.batch(2))
    inputs = inputs_for(config, setting.shards)
    steps, calls = {}, {}
    shared, separate = "one pass", "a pass for each task"
    for name in (shared, separate):
        module = build.module(config, ALONE, torch.device("cpu"))
        if name == separate:
            module._outputs = partial(separate_outputs, module)  # type: ignore[method-assign]
        steps[name] = training_step(config, inputs, module=module)
        steps[name]()
        calls[name] = module.num_backbone_calls
    seconds = take_turns(steps, setting.rounds_or(9))
    found = table("ViT-Ti/16 at 224 px, six tasks, 2 images of two views, fp32", CPU, seconds, [
        row("a pass for each of six tasks / one pass for all, ViT-Ti/16, 224 px", seconds, separate, shared)
    ])  # fmt: skip
    return found | {"encoder_calls_per_step": calls}


def views(setting: Setting, size_px: int) -> list[str]:
    return [f"views.{view}.size_px={setting.view_px(size_px)}" for view in ("one", "two")]
