"""Our step beside what one would use instead, taking turns on the same GPU at equal work.

Equal work: the same images through the same backbone with a gradient, and fused AdamW, in bf16. What peers do
in their own way is written in `benchmarks/steps`, as their examples have it; here their parts are made and
stepped on the GPU. What is not installed is recorded as a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpu.clock import ratio, turns
from gpu.setting import Measured, Setting, Slice, Variant
from gpu.training import CONTRASTIVE_ONLY, KNOBS, TOY_BATCH, Training, compiled, configuration, method
from pretrain import build
from pretrain.config import RunConfig
from pretrain.peers import ALONE

VIT_B, BATCH = "ViT-B/16", 128
METHOD_BATCH = 256
CLIP_NORM = 3.0
OURS = "ours"
Step = Callable[[], object]
# config, sizes of the heads, and the function of the peer's module that makes its step
METHODS = {
    "SimCLR": ("methods/simclr_vits16.yaml", "contrastive", (2048, 128), "simclr"),
    "MoCo v3": ("methods/moco_v3_vits16.yaml", "moco_v3", (4096, 256), "moco_v3"),
}


def _stepper(module: nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> Step:
    """As one writes it: autocast, backward, clip, step."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    is_fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, KNOBS.lr, weight_decay=KNOBS.weight_decay, fused=is_fused)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timm_supervised(config: RunConfig, device: torch.device, is_compiled: bool) -> Step:
    """What timm's training script does in a step, on as many images as our two views have."""
    import timm

    model, side = config.model, config.model.img_px
    sizes: dict[str, Any] = {"img_size": side, "patch_size": model.patch_px, **model.args}
    network = timm.create_model(model.name, num_classes=1000, **sizes).to(device).train()
    called: Any = torch.compile(network) if is_compiled else network
    images = torch.randn(2 * config.batch.global_size, 3, side, side, device=device)
    labels = torch.arange(len(images), device=device) % 1000
    return _stepper(network, lambda: F.cross_entropy(called(images), labels), device)


def bare_loop(config: RunConfig, device: torch.device, is_compiled: bool) -> Step:
    """This package's module in a loop of plain torch; compiled as a whole, not block by block."""
    training = Training(config, device)
    inputs = training.views()
    training.close()
    module = build.module(config, ALONE, device).train()
    called: Any = torch.compile(module) if is_compiled else module
    return _stepper(module, lambda: called(inputs)["total"], device)


PLAIN: dict[str, Callable[[RunConfig, torch.device, bool], Step]] = {
    "timm, supervised": timm_supervised,
    "bare torch loop": bare_loop,
}


def _beside(setting: Setting, config: RunConfig, peer: str, theirs: Step) -> Measured:
    training = Training(config, setting.device)
    runs: dict[str, Step] = {OURS: training.prepared_step, peer: theirs}
    timings = turns(runs, setting.device, setting.steady)
    training.close()
    found = ratio(timings[OURS], timings[peer])
    return {
        "model": config.model.name,
        "batch": config.batch.global_size,
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "ours_over_theirs": found,
        "headline": f"ours takes {found['median']:.3f} times as long",
    }


def plain(setting: Setting, peer: str, is_compiled: bool) -> Measured:
    config = configuration(setting, VIT_B, BATCH, *CONTRASTIVE_ONLY, compiled(setting, is_compiled))
    theirs = PLAIN[peer](config, setting.device, is_compiled and not setting.is_toy)
    return _beside(setting, config, peer, theirs)


def of_method(setting: Setting, name: str, module: str) -> Measured:
    """A method as a peer has it: its backbone and heads are not compiled, as in its examples."""
    from importlib import import_module

    from steps.peers import bench_of  # type: ignore[import-not-found]

    path, task, (hidden, out), make = METHODS[name]
    heads = {"hidden_dim": 32 if setting.is_toy else hidden, "out_dim": 16 if setting.is_toy else out}
    sizes = ", ".join(f"{key}: {value}" for key, value in heads.items())
    batch = TOY_BATCH if setting.is_toy else METHOD_BATCH
    config = method(setting, path, batch, f"tasks.{task}={{{sizes}}}", compiled(setting, True))
    training = Training(config, setting.device)
    inputs = training.views()
    training.close()
    with torch.device(setting.device):  # where their parts are made, and what they draw
        bench = bench_of(config, inputs, {**heads, "num_layers": 3})
        made = getattr(import_module(f"steps.{module}"), make)(bench)

    def theirs() -> None:
        with ExitStack() as within:
            within.enter_context(torch.device(setting.device))
            within.enter_context(torch.autocast(setting.device.type, torch.bfloat16))
            made()

    return _beside(setting, config, f"{name} of {module}", theirs)


def variants(setting: Setting) -> dict[str, Variant]:
    found = {
        f"{peer}, {'compiled' if is_on else 'eager'}": Variant(
            lambda peer=peer, is_on=is_on: plain(setting, peer, is_on), 90.0
        )
        for is_on in (True, False)
        for peer in PLAIN
    }
    for name in METHODS:
        for peer, module in (("lightly", "lightly_steps"), ("solo-learn's way", "solo_steps")):
            found[f"{peer}, {name}"] = Variant(
                lambda name=name, module=module: of_method(setting, name, module), 90.0
            )
    return found


def summary(setting: Setting, good: Mapping[str, Measured]) -> Measured:
    return {f"ours over {name}": found["ours_over_theirs"]["median"] for name, found in good.items()}


PEER_STEPS = Slice("a step beside timm's, a bare torch loop's, lightly's and solo-learn's", variants, summary)
