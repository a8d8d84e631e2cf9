"""Views of some images exactly as a training step makes them, and what the plan did to each patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pretrain import build
from pretrain.config import RunConfig
from pretrain.data.batch import crop_places, crop_sizes
from pretrain.data.decode import crop_resize
from pretrain.illustrate.images import Picked
from pretrain.report.patch_drawing import PatchSet, Plan, Rectangle
from pretrain.report.restorations import hide, to_pixels, unnormalize
from pretrain.report.samples import SampleImage, Samples, SampleView
from pretrain.tokens import TokenLayout
from pretrain.views import pixels, pixels_cpu
from pretrain.views.pixels import split_patches
from pretrain.views.plan import ViewConfig, ViewPlan, crop_boxes, in_places
from pretrain.views.prepare import Inputs, ViewGroup, prepare

MAX_VIEWS = 4  # of an image that are shown
ORIGINAL_PX = 320  # the longer side of an original as it is shown
QUARTERS = {1: "turned by 90°", 2: "turned by 180°", 3: "turned by 270°"}


@dataclass(frozen=True)
class Cut:
    """Crops of some images, in the shape in which a loader gives them."""

    crops: list[Tensor]  # per size: uint8 (V, B, S, S, 3)
    boxes: list[Tensor]  # per view: int64 (B, 4), top, left, height, width


def cut_views(picked: Picked, views: Mapping[str, ViewConfig], seed: int, epoch: int = 0) -> Cut:
    """One crop of every view of every image, where this seed and epoch put it."""
    placed = in_places(views)
    sizes = torch.tensor([image.shape[:2] for image in picked.pixels])
    epochs = torch.full_like(picked.sample_ids, epoch)
    count = len(picked.pixels)
    crops = [
        torch.zeros(
            sum(view.size_px == size_px for view in placed), count, size_px, size_px, 3, dtype=torch.uint8
        )
        for size_px in crop_sizes(placed)
    ]
    boxes = []
    for index, (view, (group, place)) in enumerate(zip(placed, crop_places(placed), strict=True)):
        box = crop_boxes(view, seed, epochs, picked.sample_ids, index, sizes[:, 0], sizes[:, 1])
        for row, image in enumerate(picked.pixels):
            cropped = crop_resize(image, box[row].tolist(), view.size_px, view.interpolation)
            crops[group][place, row] = torch.from_numpy(np.ascontiguousarray(cropped))
        boxes.append(box)
    return Cut(crops, boxes)


def inputs_of(config: RunConfig, picked: Picked, cut: Cut, device: torch.device) -> Inputs:
    """What the encoder is to see of them, in epoch 0."""
    ids = picked.sample_ids.to(device)
    crops = [of_size.to(device) for of_size in cut.crops]
    return prepare(build.recipe(config), config.seed, crops, torch.zeros_like(ids), ids)


def seen_pixels(group: ViewGroup, config: RunConfig, layout: TokenLayout) -> Tensor:
    """What the encoder gets of a group of views, other patches in grey: (M, 3, H, W) in [0, 1]"""
    images = unnormalize(group.images, config.normalization.mean, config.normalization.std)
    hidden = hidden_patches(group.plan, config, layout)
    return hide(images, hidden, config.model.token_px) if hidden is not None else images


def hidden_patches(plan: ViewPlan, config: RunConfig, layout: TokenLayout) -> Tensor | None:
    """Patches whose content a token stands in for, or that are dropped: bool (M, N)"""
    hidden = torch.zeros(len(plan.flip), layout.num_patches, dtype=torch.bool, device=plan.flip.device)
    inpainting = config.tasks.inpainting
    if inpainting is not None and inpainting.fill == "token":
        hidden = hidden.scatter(1, plan.patches.inpainting, True)
    if plan.mask is not None:
        hidden = hidden | plan.mask.hidden
    return hidden if bool(hidden.any()) else None


def plan_of(plan: ViewPlan, row: int, layout: TokenLayout) -> Plan:
    """The numbers of one view as what is drawn."""
    sets = []
    patches = plan.patches
    for kind, index in (("colorization", patches.colorization), ("inpainting", patches.inpainting)):
        if index.shape[1]:
            sets.append(PatchSet(kind, tuple(index[row].tolist())))
    if patches.pairs.shape[1]:
        pairs = patches.pairs[row].tolist()
        sets.append(
            PatchSet(
                "relative_position",
                tuple(patch for pair in pairs for patch in pair),
                tuple((first, second) for first, second in pairs),
            )
        )
    if patches.jigsaw.shape[1]:
        slots, sources = patches.jigsaw[row].tolist(), patches.jigsaw_source[row].tolist()
        moved = tuple((source, slot) for source, slot in zip(sources, slots, strict=True) if source != slot)
        sets.append(PatchSet("jigsaw", tuple(slots), moved))
    if plan.mask is not None:
        sets += _mask_sets(plan, row)
    return Plan(layout.grid, tuple(sets), _rectangles(plan, row))


def _mask_sets(plan: ViewPlan, row: int) -> list[PatchSet]:
    """Hidden patches; of I-JEPA also the blocks to predict, each patch in the first block that holds it."""
    assert plan.mask is not None
    hidden = plan.mask.hidden[row].nonzero().flatten().tolist()
    blocks = plan.mask.targets[row].tolist()
    sets: list[PatchSet] = []
    taken: set[int] = set()
    for number, block in enumerate(blocks):
        own = tuple(patch for patch in block if patch not in taken)
        taken.update(own)
        if own:
            sets.append(PatchSet(f"target {number % 4 + 1}", own))
    rest = tuple(patch for patch in hidden if patch not in taken)
    return [*sets, *([PatchSet("hidden", rest)] if rest else [])]


def _rectangles(plan: ViewPlan, row: int) -> tuple[Rectangle, ...]:
    if plan.local is None:
        return ()
    found = []
    for kind in ("color", "gray", "blur", "drop", "replace"):
        for top, left, height, width in getattr(plan.local, kind)[row].tolist():
            if height and width:
                found.append(Rectangle(kind, top, left, height, width))
    return tuple(found)


@dataclass(frozen=True)
class _Drawn:
    """The views of one encoder call as pixels."""

    group: ViewGroup
    layout: TokenLayout
    clean: list[NDArray[np.uint8]]
    seen: list[NDArray[np.uint8]]
    changed: Tensor  # bool (M, N): patches that were given to the encoder otherwise than in the clean view


def samples_of(config: RunConfig, picked: Picked, count: int, device: torch.device) -> Samples:
    """The first `count` images with their views; corruptions may borrow from the others."""
    views = build.views(config)
    cut = cut_views(picked, views, config.seed)
    drawn = [_drawn(group, config) for group in inputs_of(config, picked, cut, device).groups]
    places = {name: place for place, name in enumerate(views)}
    images = []
    for row, original in enumerate(picked.pixels[:count]):
        shown = []
        for name in _representative(views):
            top, left, height, width = cut.boxes[places[name]][row].tolist()
            of_call = next(one for one in drawn if name in one.group.names)
            place = of_call.group.names.index(name) * len(picked.pixels) + row
            shown.append(_sample_view(name, of_call, place, (top, left, height, width)))
        size = original.shape[:2]
        images.append(SampleImage(shrunk(original), (size[0], size[1]), tuple(shown), picked.labels[row]))
    return Samples(tuple(images), len(views), picked.source)


def _drawn(group: ViewGroup, config: RunConfig) -> _Drawn:
    own = build.token_layout(config)
    side = group.images.shape[-1] // config.model.token_px
    layout = TokenLayout((side, side), own.registers, own.has_class_token)
    seen = to_list(seen_pixels(group, config, layout))
    return _Drawn(group, layout, to_list(group.clean), seen, changed_patches(group, config))


def changed_patches(group: ViewGroup, config: RunConfig) -> Tensor:
    """Where what the encoder is given differs in any bit from the clean view, normalised: bool (M, N)"""
    whole = group.whole
    if whole is None:
        normalize = pixels_cpu.normalize if group.clean.device.type == "cpu" else pixels.normalize
        whole = normalize(group.clean, config.normalization.mean, config.normalization.std)
    differs = split_patches((group.images != whole).any(dim=1, keepdim=True), config.model.token_px)
    return differs.flatten(2).any(dim=2)


def _sample_view(name: str, drawn: _Drawn, row: int, box: tuple[int, int, int, int]) -> SampleView:
    plan = plan_of(drawn.group.plan, row, drawn.layout)
    changed = set(drawn.changed[row].nonzero().flatten().tolist())
    planned = {patch for one in plan.sets for patch in one.patches}
    return SampleView(
        name,
        box,
        drawn.clean[row],
        drawn.seen[row] if changed | planned else None,
        replace(plan, rest_is_clean=changed <= planned),
        words_of(drawn.group.plan, row, drawn.layout.num_patches),
    )


def to_list(images: Tensor) -> list[NDArray[np.uint8]]:
    return [to_pixels(image) for image in images]


def shrunk(pixels: NDArray[np.uint8], most_px: int = ORIGINAL_PX) -> NDArray[np.uint8]:
    """At most so many px a side; smaller ones stay as they are."""
    if max(pixels.shape[:2]) <= most_px:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((most_px, most_px), Image.Resampling.LANCZOS)
    return np.asarray(image).copy()


def words_of(plan: ViewPlan, row: int, num_patches: int) -> tuple[str, ...]:
    """What was done to a whole view."""
    words = []
    if plan.shift_px is not None and bool(plan.shift_px[row].any()):
        down, right = plan.shift_px[row].tolist()
        words.append(f"moved by {right}, {down} px")
    if plan.flip[row]:
        words.append("flipped")
    if plan.jitter.apply[row]:
        words.append("colours jittered")
    if plan.gray[row]:
        words.append("grey")
    if plan.blur_sigma_px[row] > 0:
        words.append("blurred")
    if plan.solarize[row]:
        words.append("solarized")
    if int(plan.quarter_turns[row]):
        words.append(QUARTERS[int(plan.quarter_turns[row])])
    if plan.patches.shuffled is not None:
        words.append("patches shuffled")
    if 0 < num_patches == plan.tiles.index.shape[1]:
        words.append("every patch cut and coloured anew")
    return tuple(words)


def _representative(views: Mapping[str, ViewConfig]) -> Sequence[str]:
    """At most four views, of each shape the first ones, in recipe order."""
    seen: dict[tuple[object, ...], int] = {}
    ranked = []
    for place, (name, view) in enumerate(views.items()):
        number = seen.get(view.shape, 0)
        seen[view.shape] = number + 1
        ranked.append((number, place, name))
    chosen = sorted(ranked)[:MAX_VIEWS]
    return [name for _, _, name in sorted(chosen, key=lambda one: one[1])]
