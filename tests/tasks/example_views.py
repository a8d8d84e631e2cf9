"""Made-up encoded views, small enough to think about."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pretrain.tasks import TASKS
from pretrain.tasks.contract import EncodedViews, TaskSite
from pretrain.tokens import TokenLayout
from pretrain.views.plan import JitterPlan, PatchSets, TilePlan, ViewPlan

REGISTERS = tuple(name for name, spec in TASKS.items() if spec.needs_register)
LAYOUT = TokenLayout((4, 4), REGISTERS)
SITE = TaskSite(LAYOUT, embed_dim=48, patch_px=4)  # 48 = 3 * 4 * 4, so that a token can hold a patch's pixels

# small heads for tests; every other setting at its default
SETTINGS: dict[str, dict[str, object]] = {
    "contrastive": {"hidden_dim": 8, "out_dim": 4},
    "rotation": {},
    "clustering": {"hidden_dim": 8, "out_dim": 4, "num_prototypes": 5},
    "colorization": {},
    "inpainting": {},
    "relative_position": {"hidden_dim": 8},
    "jigsaw": {},
}


def example_plan(num_rows: int, layout: TokenLayout = LAYOUT, seed: int = 0) -> ViewPlan:
    """Disjoint sets: 2 patches to colour, 2 to inpaint, 2 pairs, 3 shuffled by one step; no view is grey."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_rows, layout.num_patches, generator=generator).argsort(dim=1)
    slots = order[:, 8:11].sort(dim=1).values
    sets = PatchSets(
        colorization=order[:, 0:2],
        inpainting=order[:, 2:4],
        pairs=order[:, 4:8].reshape(num_rows, 2, 2),
        jigsaw=slots,
        jigsaw_source=slots.roll(1, dims=1),
        jigsaw_class=torch.randint(5, (num_rows,), generator=generator),
    )
    no, zero = torch.zeros(num_rows, dtype=torch.bool), torch.zeros(num_rows)
    jitter = JitterPlan(no, torch.zeros(num_rows, 4), torch.arange(4).repeat(num_rows, 1))
    tiles = TilePlan(
        order[:, :0], order[:, :0].unsqueeze(2).expand(-1, -1, 2), jitter, no.unsqueeze(1)[:, :0]
    )
    turns = torch.randint(4, (num_rows,), generator=generator)
    return ViewPlan(no, jitter, no, zero, no, turns, sets, tiles)


def example_views(num_images: int = 4, layout: TokenLayout = LAYOUT, seed: int = 0) -> EncodedViews:
    """Two views of random tokens and pixels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = 2 * num_images
    rows, columns = layout.grid
    tokens = torch.randn(
        num_rows, layout.num_tokens, SITE.embed_dim, generator=generator, dtype=torch.float64
    )
    side_px = SITE.patch_px
    clean = torch.rand(
        num_rows, 3, rows * side_px, columns * side_px, generator=generator, dtype=torch.float64
    )
    return EncodedViews(("first", "second"), layout, tokens, clean, example_plan(num_rows, layout, seed))


def with_patches(views: EncodedViews, patches: Tensor) -> EncodedViews:
    """The same views with these patch tokens (M, P, D) and prefix tokens of zero."""
    prefix = patches.new_zeros(len(patches), views.layout.num_prefix, patches.shape[2])
    return replace(views, tokens=torch.cat([prefix, patches], dim=1))


def with_plan(views: EncodedViews, **changes: object) -> EncodedViews:
    return replace(views, plan=replace(views.plan, **changes))


def rows_of(views: EncodedViews, rows: Tensor) -> EncodedViews:
    """Some of the rows, as another rank would hold them."""
    sets = PatchSets(*(value[rows] for value in vars(views.plan.patches).values()))
    plan = replace(
        views.plan, gray=views.plan.gray[rows], quarter_turns=views.plan.quarter_turns[rows], patches=sets
    )
    return replace(views, tokens=views.tokens[rows], clean=views.clean[rows], plan=plan)
