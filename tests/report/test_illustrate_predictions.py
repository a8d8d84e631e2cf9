"""Reconstructions: a head that gives the right answer must give the picture back, through every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_runs import MULTITASK
from torch import Tensor, nn

from pretrain import build
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig, load_config
from pretrain.illustrate import predictions
from pretrain.illustrate.images import pick, split_of
from pretrain.illustrate.predictions import ANSWERS, restorations_of, restored_tasks
from pretrain.illustrate.shown_views import cut_views, inputs_of
from pretrain.peers import ALONE
from pretrain.pretext import plain
from pretrain.report.hog_picture import hog_picture
from pretrain.report.restorations import TaskRestorations
from pretrain.tasks.colorization import color_target
from pretrain.tasks.hidden_patches import normalize_patches
from pretrain.tasks.multitask import MultiTask
from pretrain.tokens import take
from pretrain.views.hog import hog
from pretrain.views.pixels import normalize, patchify, split_patches
from pretrain.views.prepare import ViewGroup

CPU = torch.device("cpu")
COUNT = 6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LOCAL = "{one: &v {size_px: 32, turn: true, local: {kind: blocks}}, two: *v}"
DROPPED = "{one: {size_px: 32, mask: {kind: random, how: drop, ratio: 0.5}}}"
BLOCKED = "{one: {size_px: 32, mask: {kind: block, ratio: 0.4}}}"


def whole(group: ViewGroup) -> Tensor:
    return normalize(group.clean, MEAN, STD)


def of_all_patches(group: ViewGroup) -> Tensor:
    return patchify(whole(group), 4)


def of_color(target: Any) -> Callable[[ViewGroup], Tensor]:
    def answer(group: ViewGroup) -> Tensor:
        index = group.plan.patches.colorization
        tiles = take(split_patches(group.clean, 4), index)
        return color_target(tiles.flatten(0, 1), target).view(*index.shape, -1)

    return answer


def of_inpainting(norm_pix: bool) -> Callable[[ViewGroup], Tensor]:
    def answer(group: ViewGroup) -> Tensor:
        patches = take(patchify(group.clean, 4), group.plan.patches.inpainting)
        return normalize_patches(patches) if norm_pix else patches

    return answer


MAE = "mae: {decoder_dim: 24, decoder_depth: 1, decoder_heads: 2"
REPRE = "{repre: {num_levels: 2}, contrastive: {hidden_dim: 8, out_dim: 8}}"
Case = tuple[str, str, str, Callable[[ViewGroup], Tensor]]
CASES: dict[str, Case] = {
    "inpainting": ("inpainting", "", "{inpainting: {}, jigsaw: {}, rotation: {}}", of_inpainting(False)),
    "inpainting norm_pix": (
        "inpainting",
        "",
        "{inpainting: {norm_pix: true, fill: zero}, colorization: {}}",
        of_inpainting(True),
    ),
    "colorization pixel": ("colorization", "", "{colorization: {}, inpainting: {}}", of_color("pixel")),
    "colorization mean": ("colorization", "", "{colorization: {target: mean}}", of_color("mean")),
    "reconstruction": ("reconstruction", LOCAL, "{reconstruction: {}, rotation: {}}", of_all_patches),
    "mae": ("mae", DROPPED, f"{{{MAE}, norm_pix: false}}}}", of_all_patches),
    "mae norm_pix": ("mae", DROPPED, f"{{{MAE}}}}}", lambda group: normalize_patches(of_all_patches(group))),
    "repre": ("repre", "", REPRE, lambda group: group.clean[: len(group.clean) // 2]),
    "maskfeat": ("maskfeat", BLOCKED, "{maskfeat: {}}", lambda group: hog(whole(group), 4)),
}


def config_of(folder: Path, shards: Path, views: str, tasks: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(MULTITASK)
    overrides = [f"data.shards={shards}", f"tasks={tasks}", *([f"views={views}"] if views else [])]
    return load_config(path, overrides)


def checkpoint_of(config: RunConfig) -> Checkpoint:
    """As a run would have written it before its first step."""
    module = build.module(config, ALONE, CPU, 40)
    return Checkpoint(Path("step-00000001"), {"step": 1, "num_samples": 40}, module.state_dict(), None, {})


class Oracle(nn.Module):
    """In the place of a head: gives what it was told, plus a constant."""

    def __init__(self, answer: Tensor, error: float) -> None:
        super().__init__()
        self.answer, self.error = answer, error

    def forward(self, *_: Tensor) -> Tensor:
        return self.answer + self.error


def restored(
    case: str, shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: float = 0.0
) -> tuple[TaskRestorations, float]:
    """The task's pictures with an oracle for a head, and the error that the task itself finds."""
    name, views, tasks, answer = CASES[case]
    config = config_of(folder, shards, views, tasks)
    picked = pick(split_of(f"{shards}:test", "test"), COUNT)
    upright = {key: plain(view).model_copy(update={"turn": False}) for key, view in config.views.items()}
    shown = config.model_copy(update={"views": upright})
    inputs = inputs_of(shown, picked, cut_views(picked, build.views(shown), config.seed), CPU)
    (group,) = inputs.groups
    real_load = predictions.load_weights
    own: list[float] = []

    def load(module: MultiTask, saved: Checkpoint) -> None:
        real_load(module, saved)
        setattr(module.tasks[name], ANSWERS[name], Oracle(answer(group), error))
        own.append(float(module.eval()(inputs)[f"{name}/error"]))

    monkeypatch.setattr(predictions, "load_weights", load)
    found = restorations_of(config, checkpoint_of(config), picked, COUNT, CPU)
    (task,) = [one for one in found if one.task == name]
    assert len(found) == len(restored_tasks(config))
    return task, own[0]


@pytest.mark.parametrize("case", CASES)
def test_the_right_answer_gives_the_picture_back(
    case: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, own_error = restored(case, photographs, tmp_path, monkeypatch)
    assert own_error == pytest.approx(0, abs=1e-6), "the task agrees that this is its target"
    assert len(task.rows) == COUNT
    for row in task.rows:
        if case == "maskfeat":
            np.testing.assert_array_equal(row.restored, row.difference)  # told and true gradients
            continue
        assert row.error == pytest.approx(0, abs=1e-4)
        far = np.abs(row.restored.astype(int) - row.original)
        if case == "colorization mean":  # flat patches, of the right mean
            blocks = (row.restored.astype(float) - row.original).reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
            assert np.abs(blocks).max() < 1
        else:
            assert far.max() <= 1
        assert (row.seen != row.original).any() or case == "repre"


@pytest.mark.parametrize("case", ["inpainting", "colorization pixel", "repre"])
def test_a_wrong_answer_shows_in_the_difference_by_as_much(
    case: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.05 too bright, and no pixel of these images is near white; what is not asked does not change."""
    task, own_error = restored(case, photographs, tmp_path, monkeypatch, error=0.05)
    assert own_error == pytest.approx(0.05, rel=1e-3)
    for row in task.rows:
        assert row.error == pytest.approx(0.05, rel=0.02)
        changed = (row.restored != row.original).any(axis=2).reshape(8, 4, 8, 4).any(axis=(1, 3))
        asked = (row.difference != 128).any(axis=2).reshape(8, 4, 8, 4).any(axis=(1, 3))
        assert (changed == asked).all()
        assert 0 < asked.sum() <= 64


def test_normalised_answers_are_wrong_by_the_contrast_of_each_patch(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With norm_pix an answer that is 0.1 off is off by a tenth of the patch's standard deviation."""
    task, _ = restored("inpainting norm_pix", photographs, tmp_path, monkeypatch, error=0.1)
    for row in task.rows:
        asked = (row.difference != 128).any(axis=2).reshape(8, 4, 8, 4).any(axis=(1, 3)).ravel()
        patches = row.original.astype(float).reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
        deviations = patches.std(axis=1, ddof=1)[asked] / 255
        assert row.error == pytest.approx(0.1 * deviations.mean(), rel=0.15)


def test_told_gradients_are_pasted_where_patches_are_hidden(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = restored("maskfeat", photographs, tmp_path, monkeypatch, error=0.7)
    for row in task.rows:
        hidden = (row.seen == 128).all(axis=2).reshape(8, 4, 8, 4).all(axis=(1, 3))
        side = row.restored.shape[0] // 8
        differs = (row.restored != row.difference).any(axis=2).reshape(8, side, 8, side).any(axis=(1, 3))
        assert (differs <= hidden).all()
        assert differs.sum() > 0.8 * hidden.sum() > 0
    assert hog_picture(torch.zeros(64, 108), (8, 8)).shape == (192, 192, 3)


@pytest.mark.parametrize("target", ["ab", "ab_cls"])
def test_colours_of_lab_come_near_the_true_ones(
    target: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lightness is that of the grey that was shown; classes are 10 units of a and b wide."""
    from pretrain.tasks import color_bins
    from pretrain.tasks.colorization import cell_colors

    def classes(group: ViewGroup) -> Tensor:
        index = group.plan.patches.colorization
        colors = cell_colors(take(split_patches(group.clean, 4), index).flatten(0, 1), 4)  # (T, 1, 2)
        nearest, _ = color_bins.soft_encode(colors, color_bins.centers())
        logits = torch.full((*colors.shape[:2], len(color_bins.centers())), -99.0)
        return logits.scatter(2, nearest[..., :1], 99.0).view(*index.shape, -1)

    answer = of_color("ab") if target == "ab" else classes
    monkeypatch.setitem(CASES, "lab", ("colorization", "", f"{{colorization: {{target: {target}}}}}", answer))
    right, _ = restored("lab", photographs, tmp_path, monkeypatch)
    monkeypatch.setitem(CASES, "lab", (*CASES["lab"][:3], lambda group: torch.zeros_like(answer(group))))
    if target == "ab":
        grey, _ = restored("lab", photographs, tmp_path, monkeypatch)
        pairs = zip(right.rows, grey.rows, strict=True)
        assert sum((a.error or 0) < 0.5 * (b.error or 0) for a, b in pairs) >= COUNT - 1
    errors = [row.error for row in right.rows]
    assert max(error or 0 for error in errors) < 0.12


def test_tasks_about_the_training_images_stand_in_no_way(photographs: Path, tmp_path: Path) -> None:
    """Their heads know the images of the training set by number; others are shown here."""
    config = config_of(tmp_path, photographs, "", "{exemplar: {}, inpainting: {}, rotation: {}}")
    picked = pick(split_of(f"{photographs}:test", "test"), 4)
    (task,) = restorations_of(config, checkpoint_of(config), picked, 3, CPU)
    assert (task.task, len(task.rows)) == ("inpainting", 3)
