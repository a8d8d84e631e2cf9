"""What a run's settings mean for its sizes: grids, tokens, the views a task reads and what the teacher sees.

The settings are those of a RunConfig as plain data (`model_dump(mode="json")`). `build` says the same of the
RunConfig itself, for a run; here it is said again without torch, and a test compares both for every config.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

Settings = Mapping[str, Any]

# task -> how it chooses its views where the settings name none: as `TaskSpec.reads`
READS = {
    **dict.fromkeys(("contrastive", "clustering", "byol", "simsiam", "moco_v2", "moco_v3", "moby"), "pair"),
    "repre": "first",
    "dino": "all",
}
WITH_REGISTER = ("rotation", "clustering")
# task -> the submodule that the teacher has an average of
TEACHER_HEADS = {
    **dict.fromkeys(("byol", "moco_v2", "moco_v3", "moby"), "projector"),
    "dino": "head",
}
NUM_CELLS = 9  # of the puzzle of a permset jigsaw
_SCALES, _ASPECTS, _CONTEXTS = 12, 16, 4  # places at which the sizes of multiblock masks are looked at


@dataclass(frozen=True)
class Seen:
    """What the encoder gets of one view."""

    size_px: int
    num_patches: int  # of the grid
    num_kept: float  # of these, patches that go through the blocks
    square_kept: float  # mean of their square; the number itself may differ from step to step
    num_prefix: int  # class token and registers

    @property
    def tokens(self) -> float:
        return self.num_prefix + self.num_kept

    @property
    def square_tokens(self) -> float:
        return self.num_prefix**2 + 2 * self.num_prefix * self.num_kept + self.square_kept


def is_swin(model: Settings) -> bool:
    return str(model["name"]).startswith("swin_")


def token_px(model: Settings) -> int:
    return int(model["patch_px"]) * (8 if is_swin(model) else 1)


def grid(model: Settings, size_px: int | None = None) -> tuple[int, int]:
    side = (size_px or model["img_px"]) // token_px(model)
    return side, side


def tasks_of(settings: Settings) -> dict[str, Settings]:
    """The settings of the tasks that are on."""
    return {name: task for name, task in settings["tasks"].items() if task is not None}


def registers(settings: Settings) -> tuple[str, ...]:
    return tuple(name for name in tasks_of(settings) if name in WITH_REGISTER)


def has_class_token(model: Settings) -> bool:
    return bool(model["class_token"]) and not is_swin(model)


def num_prefix(settings: Settings) -> int:
    return int(has_class_token(settings["model"])) + len(registers(settings))


def views_of(settings: Settings, task: str) -> tuple[str, ...]:
    """The views a task reads."""
    views = settings["views"]
    named = settings["tasks"][task]["views"]
    if named is not None:
        return tuple(named)
    reads = READS.get(task, "group")
    if reads == "all":
        return tuple(views)
    if reads == "group":
        first = shape(next(iter(views.values())))
        return tuple(name for name, view in views.items() if shape(view) == first)
    return tuple(views)[: 2 if reads == "pair" else 1]


def shape(view: Settings) -> tuple[Any, ...]:
    """What views must agree on to be encoded in one call: as `ViewConfig.shape`."""
    border = view["shift_border"] if view["shift_px"] else None
    keys = (
        "size_px",
        "corrupt",
        "patch_augment",
        "legacy_jitter_after_norm",
        "shuffle",
        "disjoint",
        "local",
        "mask",
    )
    return (*(view[key] for key in keys), border)


def teacher_views(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The views that the averaged teacher encodes for each task that wants it to."""
    asked = {}
    for name, task in tasks_of(settings).items():
        views = views_of(settings, name)
        if name in ("ijepa", "byol", "moco_v3", "moby"):
            asked[name] = views
        elif name == "moco_v2":
            asked[name] = views if task["symmetric"] else views[1:]
        elif name == "dino":
            asked[name] = tuple(task["teacher_views"] or views[:2])
    return {name: views for name, views in asked.items() if views}


def encoded_views(settings: Settings) -> tuple[str, ...]:
    """The views that the student encodes; what only the teacher looks at is not among them."""
    wanted: set[str] = set()
    for name, task in tasks_of(settings).items():
        views = views_of(settings, name)
        wanted |= set(views[:1] if name == "moco_v2" and not task["symmetric"] else views)
    return tuple(view for view in settings["views"] if view in wanted)


def needs_whole(settings: Settings) -> bool:
    """Whether the clean views are normalised too."""
    return bool(teacher_views(settings)) or not {"reconstruction", "mae", "maskfeat"}.isdisjoint(
        tasks_of(settings)
    )


def patch_counts(settings: Settings) -> dict[str, int]:
    """How many patches of a view, or pairs of them, each patch-level task works on."""
    rows, columns = grid(settings["model"])
    count = rows * columns
    counts = {}
    for name, task in tasks_of(settings).items():
        if name in ("colorization", "inpainting"):
            counts[name] = max(1, round(task["ratio"] * count))
        elif name == "relative_position":
            counts[name] = max(1, round(task["pair_ratio"] * count))
        elif name == "jigsaw":
            is_slot = task["mode"] == "slot"
            counts[name] = max(2, round(task["ratio"] * count)) if is_slot else NUM_CELLS
    return counts


def seen_of(settings: Settings, view: str) -> Seen:
    """What of a view goes through the encoder's blocks."""
    model, size_px = settings["model"], settings["views"][view]["size_px"]
    rows, columns = grid(model, size_px)
    count = rows * columns
    mask = settings["views"][view]["mask"]
    if mask is None or mask["how"] == "token":
        kept, square = float(count), float(count**2)
    elif mask["kind"] == "random":
        kept = float(int(count * (1 - mask["ratio"])))
        square = kept**2
    else:
        sizes = block_sizes(mask, (rows, columns))
        kept = math.fsum(size.share * size.context for size in sizes)
        square = math.fsum(size.share * size.context**2 for size in sizes)
    return Seen(size_px, count, kept, square, num_prefix(settings))


@dataclass(frozen=True)
class BlockSize:
    """One size that the blocks of a multiblock mask may have in a step."""

    share: float  # of the steps
    target: int  # patches of a block to predict
    context: int  # patches that the encoder gets


def block_sizes(mask: Settings, grid: tuple[int, int]) -> tuple[BlockSize, ...]:
    """Every size that the blocks of a step may have. Imports torch: a context's size is found by trial.

    The numbers that the images of a step share are put where a real step draws them: on the midpoints of
    equal parts of their range.
    """
    return _block_sizes(json.dumps(mask), grid)


@cache
def _block_sizes(mask_json: str, grid: tuple[int, int]) -> tuple[BlockSize, ...]:
    import torch

    from pretrain.views.masks import MaskConfig, draw_mask

    mask = MaskConfig.model_validate_json(mask_json)
    places = [[(i + 0.5) / parts for i in range(parts)] for parts in (_SCALES, _ASPECTS, _CONTEXTS)]
    found: Counter[tuple[int, int]] = Counter()
    for numbers in itertools.product(*places):
        plan = draw_mask(mask, grid, lambda n: torch.zeros(1, n), lambda n, of=numbers: torch.tensor(of[:n]))  # type: ignore[misc]
        assert plan.kept is not None
        found[plan.targets.shape[2], plan.kept.shape[1]] += 1
    return tuple(BlockSize(n / found.total(), *size) for size, n in sorted(found.items()))


def needs_mask_token(settings: Settings) -> bool:
    masks = [view["mask"] for view in settings["views"].values()]
    inpainting = settings["tasks"]["inpainting"]
    return any(mask is not None and mask["how"] == "token" for mask in masks) or (
        inpainting is not None and inpainting["fill"] == "token"
    )


def needs_no_position(settings: Settings) -> bool:
    relative, model = settings["tasks"]["relative_position"], settings["model"]
    has_positions = model["pos_embed"] != "none" and not is_swin(model)
    return relative is not None and relative["pos_embed"] == "mask" and has_positions
