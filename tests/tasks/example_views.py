"""Made-up encoded views, small enough to think about."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pretrain.models.backbone import Level
from pretrain.tasks import TASKS
from pretrain.tasks.contract import EncodedViews, TaskSite, TeacherViews
from pretrain.tokens import TokenLayout, take
from pretrain.views.masks import MaskPlan
from pretrain.views.plan import JitterPlan, PatchSets, TilePlan, ViewPlan

REGISTERS = tuple(name for name, spec in TASKS.items() if spec.needs_register)
LAYOUT = TokenLayout((4, 4), REGISTERS)
# 48 = 3 * 4 * 4, so that a token can hold a patch's pixels
SITE = TaskSite(LAYOUT, embed_dim=48, patch_px=4, levels=(Level(48, 4), Level(48, 4)), num_samples=20)

TEACHER_DIM = 4  # of all heads that the teacher has
# small heads for tests; every other setting at its default
SETTINGS: dict[str, dict[str, object]] = {
    "contrastive": {"hidden_dim": 8, "out_dim": 4},
    "rotation": {},
    "clustering": {"hidden_dim": 8, "out_dim": 4, "num_prototypes": 5},
    "colorization": {},
    "inpainting": {},
    "relative_position": {"hidden_dim": 8},
    "jigsaw": {},
    "reconstruction": {"where": "changed", "hidden_layers": 1},
    "repre": {"num_levels": 2, "dec_dim": 8},
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "ijepa": {"predictor_dim": 16, "predictor_depth": 1, "num_heads": 2},
    "maskfeat": {},
    "drloc": {"hidden_dim": 8, "ramp_epochs": 0.0, "num_pairs": 256},
    "classification": {"num_classes": 3},
    "cluster_labels": {"num_clusters": 4},
    "byol": {"hidden_dim": 8, "out_dim": TEACHER_DIM},
    "simsiam": {"projector_dim": 8, "predictor_dim": 8, "out_dim": TEACHER_DIM},
    "moco_v2": {"out_dim": TEACHER_DIM, "queue_length": 24},
    "moco_v3": {"hidden_dim": 8, "out_dim": TEACHER_DIM},
    "moby": {"hidden_dim": 8, "out_dim": TEACHER_DIM, "queue_length": 24},
    "dino": {"hidden_dim": 8, "bottleneck_dim": 6, "out_dim": TEACHER_DIM},
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
    return ViewPlan(
        no, jitter, no, zero, no, turns, sets, tiles, mask=example_mask(num_rows, layout, generator)
    )


def example_mask(num_rows: int, layout: TokenLayout, generator: torch.Generator) -> MaskPlan:
    """6 patches of each row are kept; of the others two blocks of 3 are to be predicted."""
    order = torch.rand(num_rows, layout.num_patches, generator=generator).argsort(dim=1)
    kept = order[:, :6].sort(dim=1).values
    hidden = torch.ones(num_rows, layout.num_patches, dtype=torch.bool).scatter(1, kept, False)
    return MaskPlan(hidden, kept, targets=order[:, 6:12].reshape(num_rows, 2, 3))


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
    plan = example_plan(num_rows, layout, seed)
    changed = torch.rand(num_rows, 1, *clean.shape[2:], generator=generator) < 0.3
    teacher_tokens = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    names = ("first", "second")
    # of the frameworks that compare with a head of the teacher
    heads = {
        task: {
            name: torch.randn(num_images, TEACHER_DIM, generator=generator, dtype=torch.float64)
            for name in names
        }
        for task, spec in TASKS.items()
        if spec.teacher_head is not None
    }
    teacher = TeacherViews(names, layout, teacher_tokens, heads)
    whole = (clean - 0.45) / 0.25
    image = torch.arange(num_images)
    return EncodedViews(
        names,
        layout,
        tokens,
        clean,
        plan,
        whole=whole,
        changed=changed,
        teacher=teacher,
        labels=image % 4 - 1,  # the first of four has none
        sample_ids=3 * image + 1,
    )


def ready(name: str, task: nn.Module) -> nn.Module:
    """The task as a training loop would have it: its clusters are assigned, of 10, 5, 4 and 1 images."""
    if name == "cluster_labels":
        task.assign(torch.tensor([0] * 10 + [1] * 5 + [2] * 4 + [3]), epoch=0)
    return task


def suited(name: str, views: EncodedViews) -> EncodedViews:
    """The views as this task would get them: tokens of dropped patches are gone, taps are there."""
    layout, mask = views.layout, views.plan.mask
    assert mask is not None
    patches = layout.patches(views.tokens)
    if name in ("mae", "ijepa"):
        assert mask.kept is not None
        return replace(
            views, tokens=torch.cat([layout.prefix(views.tokens), take(patches, mask.kept)], dim=1)
        )
    if name == "maskfeat":  # of some rows more is hidden than of others
        most = 2 + 2 * views.plan.quarter_turns.unsqueeze(1)
        hidden = mask.hidden & (mask.hidden.cumsum(dim=1) <= most)
        return with_plan(views, mask=replace(mask, hidden=hidden, kept=None))
    if name == "repre":
        taps = {level: patches.mT.unflatten(2, layout.grid) * (level + 1) for level in (0, 1)}
        return replace(views, taps=taps)
    return views


def as_float32(views: EncodedViews) -> EncodedViews:
    assert views.whole is not None
    assert views.teacher is not None
    heads = {
        task: {view: head.float() for view, head in of_views.items()}
        for task, of_views in views.teacher.heads.items()
    }
    return replace(
        views,
        tokens=views.tokens.float(),
        clean=views.clean.float(),
        whole=views.whole.float(),
        teacher=replace(views.teacher, tokens=views.teacher.tokens.float(), heads=heads),
    )


def with_patches(views: EncodedViews, patches: Tensor) -> EncodedViews:
    """The same views with these patch tokens (M, P, D) and prefix tokens of zero."""
    prefix = patches.new_zeros(len(patches), views.layout.num_prefix, patches.shape[2])
    return replace(views, tokens=torch.cat([prefix, patches], dim=1))


def with_plan(views: EncodedViews, **changes: object) -> EncodedViews:
    return replace(views, plan=replace(views.plan, **changes))


def rows_of(views: EncodedViews, rows: Tensor) -> EncodedViews:
    """Some of the rows, as another rank would hold them: the same images of every view."""
    assert views.whole is not None
    assert views.changed is not None
    assert views.teacher is not None
    assert views.labels is not None
    assert views.sample_ids is not None
    images = rows[: len(rows) // len(views.names)]
    heads = {
        task: {view: head[images] for view, head in of_views.items()}
        for task, of_views in views.teacher.heads.items()
    }
    return replace(
        views,
        tokens=views.tokens[rows],
        clean=views.clean[rows],
        plan=views.plan.rows(rows),
        whole=views.whole[rows],
        changed=views.changed[rows],
        teacher=replace(views.teacher, tokens=views.teacher.tokens[rows], heads=heads),
        labels=views.labels[images],
        sample_ids=views.sample_ids[images],
    )
