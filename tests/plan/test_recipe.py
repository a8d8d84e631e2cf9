"""What a plan makes of the settings is what a run makes of the config."""

from __future__ import annotations

from pathlib import Path

import pytest
from method_configs import METHODS, PATHS

from pretrain import build
from pretrain.config import load_config
from pretrain.plan import recipe
from pretrain.plan.heads import _HEADS, _TEACHER_HEADS, HOG_DIM, NUM_COLOR_BINS
from pretrain.tasks import TASKS, color_bins
from pretrain.views.hog import HOG_DIM as REAL_HOG_DIM
from pretrain.views.masks import num_kept

ALL = [*sorted(METHODS.parent.glob("*.yaml")), *PATHS]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_config_means_the_same_to_a_plan_and_to_a_run(path: Path) -> None:
    config = load_config(path)
    settings = config.model_dump(mode="json")
    layout = build.token_layout(config)
    assert list(recipe.tasks_of(settings)) == list(config.tasks.enabled())
    assert recipe.registers(settings) == layout.registers
    assert recipe.grid(settings["model"]) == layout.grid
    assert recipe.num_prefix(settings) == layout.num_prefix
    for task in config.tasks.enabled():
        assert recipe.views_of(settings, task) == build.views_of(config, task)
    assert recipe.teacher_views(settings) == build.teacher_views(config)
    assert recipe.needs_whole(settings) == build.recipe(config).needs_whole
    assert recipe.needs_mask_token(settings) == build.needs_mask_token(config)
    assert recipe.needs_no_position(settings) == build._needs_no_position(config)
    patches, counts = build.patch_config(config), recipe.patch_counts(settings)
    assert counts.get("colorization", 0) == patches.colorization
    assert counts.get("inpainting", 0) == patches.inpainting
    assert counts.get("relative_position", 0) == patches.pairs
    assert counts.get("jigsaw", 0) == patches.jigsaw
    for name, view in config.views.items():
        if view.mask is None or view.mask.how == "token":
            seen = recipe.seen_of(settings, name)
            assert seen.num_kept == seen.num_patches
        elif view.mask.kind == "random":
            kept = num_kept(view.mask, recipe.grid(settings["model"], view.size_px))
            assert recipe.seen_of(settings, name).num_kept == kept


def test_every_task_is_known_with_what_it_reads() -> None:
    assert list(_HEADS) == list(TASKS)
    for name, spec in TASKS.items():
        assert recipe.READS.get(name, "group") == spec.reads, name
        assert (name in recipe.WITH_REGISTER) == spec.needs_register, name
        assert recipe.TEACHER_HEADS.get(name) == spec.teacher_head, name
    assert _TEACHER_HEADS.keys() == recipe.TEACHER_HEADS.keys()


def test_numbers_that_tasks_work_out_are_those_of_the_plan() -> None:
    assert len(color_bins.centers()) == NUM_COLOR_BINS
    assert HOG_DIM == REAL_HOG_DIM
