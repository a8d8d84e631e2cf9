"""Our training steps beside those of other libraries, on the same network, images and optimizer.

The peers' steps are written as their examples and training code have them, around the same stock timm model
with fresh weights and with heads of the same sizes. All get the same finished batch and fused AdamW, whatever
their examples name; nobody clips gradients. What the peers do not have stays in ours: the check that every
number is finite, the metrics of each task, and the health of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.views.prepare import Inputs
from steps.ours import KNOBS, LOCAL, Setting, configuration, inputs_for, training_step
from steps.turns import CPU, Step, absent, row, table, take_turns

SAME = [*LOCAL, "optim.clip_norm=0"]
TITLES = {
    "simclr": "SimCLR",
    "moco_v2": "MoCo v2",
    "moco_v3": "MoCo v3",
    "dino": "DINO",
    "mae": "MAE",
    "supervised": "supervised",
}
NUM_LOCAL = 2  # small crops of DINO; its paper has eight


@dataclass(frozen=True)
class Bench:
    """What a peer's step is made of."""

    create: Callable[..., nn.Module]  # the timm model; without a classifier unless asked for one
    views: list[Tensor]  # (B, 3, H, W) float32, normalised; large ones first
    labels: Tensor  # int64 (B,)
    width: int
    heads: dict[str, int]  # sizes, by the names of our settings

    def optimizer(self, *modules: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, KNOBS.lr, weight_decay=KNOBS.weight_decay, fused=True)


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # that its parts are from
    module: str  # of this folder, with a function for each method


LIGHTLY = Peer("lightly", "lightly", "lightly_steps")
SOLO = Peer("solo-learn's way", "lightly", "solo_steps")
TIMM = Peer("timm", "timm", "timm_steps")


def bench_of(config: RunConfig, inputs: Inputs, heads: dict[str, int]) -> Bench:
    model = config.model
    dynamic = len(inputs.groups) > 1

    def create(num_classes: int = 0) -> nn.Module:
        args = {"img_size": model.img_px, "patch_size": model.patch_px, "dynamic_img_size": dynamic}
        network: nn.Module = timm.create_model(model.name, num_classes=num_classes, **args, **model.args)
        return network.train()

    views = [view.contiguous() for group in inputs.groups for view in group.images.chunk(len(group.names))]
    assert inputs.labels is not None
    return Bench(create, views, inputs.labels, int(create().num_features), heads)


def compared(
    setting: Setting, method: str, config: RunConfig, heads: dict[str, int], *peers: Peer
) -> dict[str, Any]:
    """A table of ours against each peer; those that are not installed are named.

    method: the function of the peers' modules that makes their step.
    """
    what = TITLES[method]
    inputs = inputs_for(config, setting.shards)
    bench = bench_of(config, inputs, heads)
    steps, rows = {"ours": training_step(config, inputs)}, []
    for peer in peers:
        if find_spec(peer.package):
            make: Callable[[Bench], Step] = getattr(import_module(f"steps.{peer.module}"), method)
            steps[peer.name] = make(bench)
    seconds = take_turns(steps, setting.rounds_or(9))
    for peer in peers:
        label = f"{what}: ours / {peer.name}"
        if peer.name in steps:
            rows.append(row(label, seconds, "ours", peer.name, 1.0))
        else:
            rows.append(absent(label, f"{peer.package} is not installed (make bench installs it)"))
    return table(
        f"{what}, {config.model.name}, {config.model.img_px} px, {len(inputs.sample_ids)} images, fp32",
        CPU,
        seconds,
        rows,
    )


def two_views(setting: Setting) -> list[str]:
    size = setting.view_px(224)
    return [
        setting.model(224, 16),
        f"views.one.size_px={size}",
        f"views.two.size_px={size}",
        setting.batch(2),
    ]


def size(setting: Setting, number: int) -> int:
    return 64 if setting.toy else number


def simclr(setting: Setting) -> dict[str, Any]:
    heads = {"hidden_dim": size(setting, 2048), "out_dim": size(setting, 128), "num_layers": 3}
    task = f"tasks.contrastive={{temperature: 0.1, last_norm: true, {_yaml(heads)}}}"
    config = configuration("methods/simclr_vits16.yaml", *SAME, *two_views(setting), task)
    return compared(setting, "simclr", config, heads, LIGHTLY, SOLO)


def moco_v2(setting: Setting) -> dict[str, Any]:
    heads = {"out_dim": size(setting, 128), "queue_length": size(setting, 65536)}
    task = f"tasks.moco_v2={{temperature: 0.2, {_yaml(heads)}}}"
    config = configuration("methods/moco_v2_vits16.yaml", *SAME, *two_views(setting), task)
    return compared(setting, "moco_v2", config, heads, LIGHTLY)


def moco_v3(setting: Setting) -> dict[str, Any]:
    heads = {"hidden_dim": size(setting, 4096), "out_dim": size(setting, 256), "num_layers": 3}
    task = f"tasks.moco_v3={{{_yaml(heads)}}}"
    config = configuration("methods/moco_v3_vits16.yaml", *SAME, *two_views(setting), task)
    return compared(setting, "moco_v3", config, heads, LIGHTLY, SOLO)


def dino(setting: Setting) -> dict[str, Any]:
    names = ("hidden_dim", "bottleneck_dim", "out_dim")
    heads = dict(zip(names, (size(setting, n) for n in (2048, 256, 4096)), strict=True))
    large, few = setting.view_px(224), setting.view_px(96) // (2 if setting.toy else 1)
    crops = {"global_one": large, "global_two": large}
    crops |= {f"local_{number}": few for number in range(1, NUM_LOCAL + 1)}
    views = ", ".join(f"{name}: {{size_px: {size_px}}}" for name, size_px in crops.items())
    task = f"tasks.dino={{{_yaml(heads)}, freeze_last_layer_epochs: 0}}"
    config = configuration(
        "methods/dino_vits16.yaml",
        *SAME,
        setting.model(224, 16),
        f"views={{{views}}}",
        setting.batch(2),
        task,
    )
    return compared(setting, "dino", config, heads, LIGHTLY, SOLO)


def mae(setting: Setting) -> dict[str, Any]:
    numbers = (64, 1, 2) if setting.toy else (512, 8, 16)
    heads = dict(zip(("decoder_dim", "decoder_depth", "decoder_heads"), numbers, strict=True))
    view = f"views.one.size_px={setting.view_px(224)}"
    task = f"tasks.mae={{norm_pix: true, {_yaml(heads)}}}"
    model = setting.model(224, 16)
    positions = ["model.pos_embed=sincos", "model.init=mae"]
    config = configuration("methods/mae_vitb16.yaml", *SAME, model, *positions, view, setting.batch(4), task)
    return compared(setting, "mae", config, heads, LIGHTLY)


def supervised(setting: Setting) -> dict[str, Any]:
    view = f"views={{one: {{size_px: {setting.view_px(224)}}}}}"
    config = configuration(
        "methods/simclr_vits16.yaml", *SAME, setting.model(224, 16), view, setting.batch(4),
        "tasks={classification: {num_classes: 1000}}",
    )  # fmt: skip
    return compared(setting, "supervised", config, {}, TIMM)


def _yaml(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in sizes.items())
