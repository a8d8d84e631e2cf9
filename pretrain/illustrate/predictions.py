"""What the trained heads give for images they see in part: the very outputs that the losses are made of.

The module of the run is built and loaded as for training and called once; hooks on the heads take what they
give, so nothing of a task is done in another way here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain import build
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.illustrate.images import Picked
from pretrain.illustrate.shown_views import cut_views, inputs_of, plan_of, seen_pixels
from pretrain.peers import ALONE
from pretrain.pretext import OF_TRAINING_IMAGES, plain
from pretrain.report.hog_picture import hog_picture
from pretrain.report.restorations import (
    Restoration,
    TaskRestorations,
    colored_tiles,
    difference_map,
    mean_difference,
    paste,
    patches_to_pixels,
    restore_statistics,
    tiles_of,
    to_pixels,
    true_tiles,
    unnormalize,
)
from pretrain.tasks import color_bins
from pretrain.tasks.colorization import AB_SCALE, ColorizationTask
from pretrain.tasks.multitask import MultiTask
from pretrain.tokens import TokenLayout, take
from pretrain.train import load_weights
from pretrain.views.hog import hog
from pretrain.views.pixels import patchify, to_gray, unpatchify
from pretrain.views.plan import ViewPlan
from pretrain.views.prepare import Inputs, with_labels

# what a hook is put on, by task: the module whose output is the answer
ANSWERS = {
    "inpainting": "head",
    "colorization": "head",
    "reconstruction": "head",
    "mae": "decoder",
    "repre": "decoder",
    "maskfeat": "head",
}
WITHOUT_PIXELS = {
    "ijepa": "I-JEPA predicts features of hidden blocks, which are no pixels to show",
}


@dataclass(frozen=True)
class Answered:
    """What one task gave for the first of its views."""

    given: Tensor  # its answer module's output, of all its views
    clean: Tensor  # (B, 3, H, W) in [0, 1]: what the view showed before anything was hidden
    whole: Tensor  # the same, normalised
    seen: Tensor  # (B, 3, H, W) in [0, 1]: what the encoder got, the rest in grey
    plan: ViewPlan  # of these rows
    changed: Tensor | None  # bool (B, 1, H, W): pixels that a local corruption changed
    layout: TokenLayout

    @property
    def num_images(self) -> int:
        return len(self.clean)


def restored_tasks(config: RunConfig) -> list[str]:
    """The tasks of a run whose answers can be shown as pictures."""
    return [name for name in config.tasks.enabled() if name in ANSWERS]


@torch.no_grad()
def restorations_of(
    config: RunConfig, saved: Checkpoint, picked: Picked, count: int, device: torch.device
) -> list[TaskRestorations]:
    """Every task that gives pixels, on `count` of the images; views are plain and upright."""
    config = _of_pixels(config)
    views = {name: plain(view).model_copy(update={"turn": False}) for name, view in config.views.items()}
    config = config.model_copy(update={"views": views})
    module = build.module(config, ALONE, device)
    wanted = module.state_dict().keys()
    student = {name: value for name, value in saved.student.items() if name in wanted}
    load_weights(module, replace(saved, student=student))
    module.eval()
    cut = cut_views(picked, build.views(config), config.seed)
    num_samples = int(saved.state.get("num_samples", len(picked.pixels)))
    moment = build.timetable(config, num_samples).moment(int(saved.state["step"]))
    inputs = with_labels(inputs_of(config, picked, cut, device), picked.classes.to(device), moment)
    if config.teacher is not None and saved.teacher is not None:
        teacher = module.make_teacher()
        teacher.load_state_dict(saved.teacher)
        inputs = module.consult(teacher, inputs)
    given = _answers(module, inputs)
    made: Mapping[str, Callable[[RunConfig, MultiTask, Answered], TaskRestorations]] = {
        "inpainting": _inpainting,
        "colorization": _colorization,
        "reconstruction": _reconstruction,
        "mae": _mae,
        "repre": _repre,
        "maskfeat": _maskfeat,
    }
    shown = []
    for name, answer in given.items():
        answered = _first_view(config, module, inputs, name, answer)
        task = made[name](config, module, answered)
        shown.append(replace(task, rows=task.rows[:count]))
    return shown


def _of_pixels(config: RunConfig) -> RunConfig:
    """Without tasks that ask about the training images themselves; no token or patch is theirs."""
    none = dict.fromkeys(OF_TRAINING_IMAGES)
    return config.model_copy(update={"tasks": config.tasks.model_copy(update=none)})


def _answers(module: MultiTask, inputs: Inputs) -> dict[str, Tensor]:
    """What the answer modules gave in one pass of the whole module."""
    given: dict[str, Tensor] = {}
    hooks = []
    for name, part in ANSWERS.items():
        if name in module.tasks:

            def keep(_: object, __: object, output: Tensor, name: str = name) -> None:
                given[name] = output.float()

            hooks.append(module.tasks[name].get_submodule(part).register_forward_hook(keep))
    try:
        module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _first_view(config: RunConfig, module: MultiTask, inputs: Inputs, name: str, given: Tensor) -> Answered:
    """The rows of the first view that the task reads; its answer begins with them."""
    view = module.readings[name].views[0]
    group = next(group for group in inputs.groups if view in group.names)
    count = len(group.images) // len(group.names)
    start = group.names.index(view) * count
    rows = slice(start, start + count)
    layout = module.layouts[group.images.shape[-1]]
    whole = group.whole
    if whole is None:
        center, scale = (
            torch.tensor(values, device=group.clean.device).view(3, 1, 1)
            for values in (config.normalization.mean, config.normalization.std)
        )
        whole = (group.clean - center) / scale
    return Answered(
        given,
        group.clean[rows],
        whole[rows],
        seen_pixels(group, config, layout)[rows],
        group.plan.rows(rows),
        None if group.changed is None else group.changed[rows],
        layout,
    )


def _shown(
    name: str,
    captions: tuple[str, str, str, str],
    reading: str,
    answered: Answered,
    target: Tensor,
    restored: Tensor,
    asked: Tensor | None,
) -> TaskRestorations:
    """target, restored: (B, 3, H, W); asked: bool (B, H, W), where the task answers, None for everywhere."""
    rows = []
    for row in range(answered.num_images):
        where = None if asked is None else asked[row]
        rows.append(
            Restoration(
                to_pixels(answered.clean[row]),
                to_pixels(answered.seen[row]),
                to_pixels(restored[row]),
                difference_map(restored[row], target[row], where),
                mean_difference(restored[row], target[row], where),
                plan_of(answered.plan, row, answered.layout),
            )
        )
    return TaskRestorations(name, captions, reading, tuple(rows))


def _asked(index: Tensor, layout: TokenLayout, patch_px: int) -> Tensor:
    """Pixels of the patches of an index, int64 (B, K): bool (B, H, W)"""
    chosen = torch.zeros(len(index), layout.num_patches, dtype=torch.bool, device=index.device)
    chosen = chosen.scatter(1, index, True)
    return torch.stack([patches_to_pixels(row, layout.grid, patch_px) for row in chosen])


def _inpainting(config: RunConfig, module: MultiTask, answered: Answered) -> TaskRestorations:
    patch_px, settings = config.model.token_px, config.tasks.inpainting
    index = answered.plan.patches.inpainting
    told = answered.given[: answered.num_images]  # (B, K, 3 P^2)
    if settings.norm_pix:
        told = restore_statistics(told, take(patchify(answered.clean, patch_px), index))
    restored = paste(answered.clean, tiles_of(told, patch_px).clamp(0, 1), index, patch_px)
    return _shown(
        "inpainting",
        ("original", "what the encoder got", "prediction pasted in", "difference"),
        "Patches hidden for this task are filled with what the head gives; all others are the original's."
        + (
            " Brightness and contrast of each patch are the true ones (norm_pix)."
            if settings.norm_pix
            else ""
        ),
        answered,
        answered.clean,
        restored,
        _asked(index, answered.layout, patch_px),
    )


def _colorization(config: RunConfig, module: MultiTask, answered: Answered) -> TaskRestorations:
    patch_px, settings = config.model.token_px, config.tasks.colorization
    index = answered.plan.patches.colorization
    told = answered.given[: answered.num_images]  # (B, K, out)
    true = true_tiles(answered.clean, index, patch_px)  # (B, K, 3, P, P)
    grey = to_gray(true.flatten(0, 1)).view_as(true)
    target, note = answered.clean, ""
    match settings.target:
        case "pixel":
            tiles = tiles_of(told, patch_px).clamp(0, 1)
            note = "The head gives every pixel's colour."
        case "mean":
            tiles = told.clamp(0, 1)[..., None, None].expand_as(true)
            flat = true.mean(dim=(3, 4), keepdim=True).expand_as(true)
            target = paste(answered.clean, flat, index, patch_px)
            note = (
                "The head gives one mean colour for each patch, and the difference is that to the true mean."
            )
        case "ab":
            tiles = colored_tiles(tiles_of(told, patch_px, channels=2) * AB_SCALE, grey)
            note = "The head gives the colours (Lab a and b) of every pixel; the lightness is the one shown."
        case _:
            tiles = colored_tiles(_ab_of_cells(module, told, patch_px), grey)
            note = "The head gives a distribution over colours for each cell; shown is its annealed mean."
    restored = paste(answered.clean, tiles, index, patch_px)
    return _shown(
        "colorization",
        ("original", "what the encoder got", "colours pasted in", "difference"),
        f"Patches shown in grey get the colours that the head gives. {note}",
        answered,
        target,
        restored,
        _asked(index, answered.layout, patch_px),
    )


def _ab_of_cells(module: MultiTask, told: Tensor, patch_px: int) -> Tensor:
    """Logits of the cells of each patch, (B, K, cells * Q), as a and b of its pixels: (B, K, 2, P, P)"""
    task = module.tasks["colorization"]
    assert isinstance(task, ColorizationTask)
    centers = color_bins.centers().to(told.device)
    side = patch_px // task.config.cell_px
    logits = told.reshape(*told.shape[:2], side, side, len(centers))
    cells = color_bins.annealed_mean(logits, centers).permute(0, 1, 4, 2, 3)  # (B, K, 2, side, side)
    cell_px = task.config.cell_px
    return cells.repeat_interleave(cell_px, 3).repeat_interleave(cell_px, 4)


def _reconstruction(config: RunConfig, module: MultiTask, answered: Answered) -> TaskRestorations:
    told = answered.given[: answered.num_images]  # (B, N, 3 P^2), normalised
    pixels = unpatchify(told, config.model.token_px, answered.layout.grid[1])
    whole = _unnormalized(config, pixels)
    restored, asked = whole, None
    if answered.changed is not None:
        restored = torch.where(answered.changed, whole, answered.clean)
        asked = answered.changed[:, 0]
    return _shown(
        "reconstruction",
        ("original", "what the encoder got", "prediction pasted in", "difference"),
        "Damaged parts of the view are filled with what the head gives there; the rest is the original.",
        answered,
        answered.clean,
        restored,
        asked,
    )


def _mae(config: RunConfig, module: MultiTask, answered: Answered) -> TaskRestorations:
    patch_px = config.model.token_px
    told = answered.given[: answered.num_images]  # (B, N, 3 P^2), normalised
    norm_pix = config.tasks.mae.norm_pix
    if norm_pix:
        told = restore_statistics(told, patchify(answered.whole, patch_px))
    pixels = _unnormalized(config, unpatchify(told, patch_px, answered.layout.grid[1]))
    assert answered.plan.mask is not None
    hidden = answered.plan.mask.hidden
    asked = torch.stack([patches_to_pixels(row, answered.layout.grid, patch_px) for row in hidden])
    restored = torch.where(asked.unsqueeze(1), pixels, answered.clean)
    return _shown(
        "mae",
        ("original", "what the encoder got", "prediction pasted in", "difference"),
        "Hidden patches are filled with what the decoder gives; the others are the original's."
        + (
            " The decoder gives patches without their mean and contrast (norm_pix); the true ones are put "
            "back, so look at structure, not at brightness."
            if norm_pix
            else ""
        ),
        answered,
        answered.clean,
        restored,
        asked,
    )


def _repre(config: RunConfig, module: MultiTask, answered: Answered) -> TaskRestorations:
    restored = answered.given[: answered.num_images].clamp(0, 1)
    return _shown(
        "repre",
        ("original", "what the encoder got", "whole image decoded", "difference"),
        "The decoder gives the whole view from features of several depths; nothing is hidden for it.",
        answered,
        answered.clean,
        restored,
        None,
    )


def _maskfeat(config: RunConfig, module: MultiTask, answered: Answered) -> TaskRestorations:
    told = answered.given[: answered.num_images]  # (B, N, 108)
    true = hog(answered.whole, config.model.token_px)
    assert answered.plan.mask is not None
    hidden = answered.plan.mask.hidden
    pasted = torch.where(hidden.unsqueeze(2), told, true)
    rows = tuple(
        Restoration(
            to_pixels(answered.clean[row]),
            to_pixels(answered.seen[row]),
            hog_picture(pasted[row], answered.layout.grid, hidden[row]),
            hog_picture(true[row], answered.layout.grid, hidden[row]),
        )
        for row in range(answered.num_images)
    )
    return TaskRestorations(
        "maskfeat",
        ("original", "what the encoder got", "gradients, told where hidden", "true gradients"),
        "The task gives histograms of gradient directions, not pixels: strokes lie along edges, bright where "
        "they are strong, and hidden patches have a brown ground. Strokes there should go on with the lines "
        "around them, as in the last panel.",
        rows,
        has_scale=False,
    )


def _unnormalized(config: RunConfig, images: Tensor) -> Tensor:
    return unnormalize(images, config.normalization.mean, config.normalization.std)
