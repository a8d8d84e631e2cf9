"""What is shown as a view is what a training step would be given, and its plan tells all that was changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import MULTITASK

from pretrain import build
from pretrain.config import RunConfig, load_config
from pretrain.data.batch import DataConfig
from pretrain.data.decode import decode
from pretrain.data.loader import open_batches, open_splits
from pretrain.illustrate.images import (
    Picked,
    balanced_rows,
    class_name,
    labels_of,
    pick,
    read_rows,
    split_of,
    split_of_run,
    spread_rows,
)
from pretrain.illustrate.shown_views import (
    changed_patches,
    cut_views,
    inputs_of,
    plan_of,
    samples_of,
    seen_pixels,
)
from pretrain.report.restorations import to_pixels
from pretrain.views.plan import in_places
from pretrain.views.prepare import prepare

CPU = torch.device("cpu")
PLAIN_VIEWS = "views={one: &v {size_px: 32, flip_prob: 0.0, jitter: {prob: 0.0}, gray_prob: 0.0}, two: *v}"


def config_of(folder: Path, shards: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(MULTITASK)
    return load_config(path, [f"data.shards={shards}", *overrides])


def picked_of(shards: Path, ids: torch.Tensor) -> Picked:
    """The images of these sample ids, read and decoded on their own."""
    split = split_of(f"{shards}:train", "train")
    first = int(split.first_sample_ids[0])
    order = ids.argsort()
    samples = list(read_rows(split, (ids[order] - first).tolist()))
    images = [decode(sample.image) for sample in samples]
    assert [sample.sample_id for sample in samples] == ids[order].tolist()
    back = order.argsort().tolist()
    return Picked(tuple(images[i] for i in back), ids, (None,) * len(ids), torch.full_like(ids, -1), "test")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("views.two.size_px=16", "tasks.contrastive.views=[one, two]", "views.one.shift_px=3"),
        ("views.two.like=one", "views.one.interpolation=bilinear"),
    ],
)
def test_views_are_those_of_the_loader_and_of_the_training_step(
    overrides: tuple[str, ...], photographs: Path, tmp_path: Path
) -> None:
    """Pixel for pixel, bit for bit: crops, inputs of the encoder, plans."""
    config = config_of(tmp_path, photographs, *overrides)
    views = build.views(config)
    splits = open_splits(config.data)
    batches = open_batches(
        DataConfig(shards=str(photographs), lanes=4, decode_threads=0),
        splits,
        in_places(views),
        seed=config.seed,
        batch_size=8,
    )
    batch = next(batches)
    ids, crops = batch.sample_ids.clone(), [one.clone() for one in batch.crops]
    batches.close()
    assert batch.epochs.max() == 0
    picked = picked_of(photographs, ids)
    cut = cut_views(picked, views, config.seed)
    for mine, theirs in zip(cut.crops, crops, strict=True):
        assert torch.equal(mine, theirs)
    shown = inputs_of(config, picked, cut, CPU)
    trained = prepare(build.recipe(config), config.seed, crops, torch.zeros_like(ids), ids)
    for mine, theirs in zip(shown.groups, trained.groups, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.plan.quarter_turns, theirs.plan.quarter_turns)


def test_the_crop_box_holds_what_the_view_shows(photographs: Path, tmp_path: Path) -> None:
    """Cut by hand from the original and resized by Pillow: the same picture but for rounding."""
    config = config_of(tmp_path, photographs, PLAIN_VIEWS, "tasks={contrastive: {hidden_dim: 8, out_dim: 8}}")
    picked = pick(split_of(f"{photographs}:test", "test"), 4)
    boxes = set()
    for original, image in zip(picked.pixels, samples_of(config, picked, 4, CPU).images, strict=True):
        for shown in image.views:
            top, left, height, width = shown.box
            part = Image.fromarray(original[top : top + height, left : left + width])
            by_hand = np.asarray(part.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(by_hand - shown.clean).max() <= 2
            boxes.add(shown.box)
    assert len(boxes) == 8


def test_plans_are_disjoint_and_everything_else_is_bit_identical(photographs: Path, tmp_path: Path) -> None:
    """The core of the method, measured on the very images that the report shows."""
    config = config_of(tmp_path, photographs)
    samples = samples_of(config, pick(split_of(f"{photographs}:train", "train"), 6), 6, CPU)
    assert len(samples.images) == 6
    for image in samples.images:
        for view in image.views:
            patches = [patch for one in view.plan.sets for patch in one.patches]
            assert [one.kind for one in view.plan.sets] == [
                "colorization",
                "inpainting",
                "relative_position",
                "jigsaw",
            ]
            assert len(patches) == len(set(patches)) <= 32
            assert view.plan.rest_is_clean
            assert view.seen is not None
            same = (view.seen == view.clean).reshape(8, 4, 8, 4, 3).all(axis=(1, 3, 4)).ravel()
            hidden = view.plan.sets[1].patches
            assert not same[list(hidden)].any(), "inpainting patches are shown in grey"
            pairs = view.plan.sets[2].arrows
            assert all(max(abs(a // 8 - b // 8), abs(a % 8 - b % 8)) == 1 for a, b in pairs)
            slots = view.plan.sets[3]
            assert sorted(slot for _, slot in slots.arrows) == sorted(slots.patches)
            assert sorted(source for source, _ in slots.arrows) == sorted(slots.patches)


def test_moved_content_comes_from_where_the_arrow_begins(photographs: Path, tmp_path: Path) -> None:
    """Every patch has a pattern of its own, told by correlation though it was zoomed and recoloured."""
    coarse = np.random.default_rng(0).integers(0, 255, (16, 16)).astype(np.uint8)
    image = np.array(Image.fromarray(coarse).resize((64, 64), Image.Resampling.NEAREST).convert("RGB"))
    views = PLAIN_VIEWS.replace("size_px: 32", "size_px: 64, scale: [1.0, 1.0], aspect: [1.0, 1.0]")
    config = config_of(
        tmp_path, photographs, views, "tasks={jigsaw: {ratio: 0.5}}", "model.img_px=64", "model.patch_px=16"
    )
    ids = torch.arange(10)
    picked = Picked((image,) * 10, ids, (None,) * 10, ids, "patterns")
    found = []
    for sample in samples_of(config, picked, 10, CPU).images:
        for view in sample.views:
            assert view.seen is not None
            clean, seen = (
                pixels.astype(float).mean(axis=2).reshape(4, 16, 4, 16).transpose(0, 2, 1, 3).reshape(16, 256)
                for pixels in (view.clean, view.seen)
            )
            for source, slot in view.plan.sets[0].arrows:
                likeness = [np.corrcoef(patch, seen[slot])[0, 1] for patch in clean]
                found.append(int(np.argmax(likeness)) == source)
    assert len(found) == 10 * 2 * 8
    assert np.mean(found) > 0.97


def test_a_view_whose_patches_are_all_changed_does_not_claim_to_be_clean(
    photographs: Path, tmp_path: Path
) -> None:
    views = PLAIN_VIEWS.replace("size_px: 32", "size_px: 32, patch_augment: true")
    config = config_of(tmp_path, photographs, views, "tasks={absolute_position: {}}")
    (image, *_) = samples_of(config, pick(split_of(f"{photographs}:train", "train"), 2), 2, CPU).images
    assert not image.views[0].plan.rest_is_clean
    assert "every patch cut and coloured anew" in image.views[0].words


def test_views_that_nothing_is_done_to_are_shown_once(photographs: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, photographs, "tasks={contrastive: {hidden_dim: 8, out_dim: 8}}")
    picked = pick(split_of(f"{photographs}:train", "train"), 4)
    for image in samples_of(config, picked, 4, CPU).images:
        assert [view.seen for view in image.views] == [None, None]
        assert not image.views[0].plan.is_changed


def test_masks_and_blocks_cover_exactly_what_is_hidden(photographs: Path, tmp_path: Path) -> None:
    mask = "{kind: multiblock, min_context: 4}"
    config = config_of(
        tmp_path,
        photographs,
        f"views={{one: {{size_px: 32, mask: {mask}}}}}",
        "tasks={ijepa: {predictor_dim: 24, predictor_depth: 1, num_heads: 2}}",
        "teacher={momentum: 0.9}",
    )
    picked = pick(split_of(f"{photographs}:train", "train"), 6)
    inputs = inputs_of(config, picked, cut_views(picked, build.views(config), config.seed), CPU)
    layout = build.token_layout(config)
    (group,) = inputs.groups
    assert group.plan.mask is not None
    seen = seen_pixels(group, config, layout)
    for row in range(6):
        plan = plan_of(group.plan, row, layout)
        patches = [patch for one in plan.sets for patch in one.patches]
        assert len(patches) == len(set(patches))
        assert set(patches) == set(group.plan.mask.hidden[row].nonzero().flatten().tolist())
        targets = {patch for one in plan.sets if one.kind.startswith("target") for patch in one.patches}
        assert targets == set(group.plan.mask.targets[row].flatten().tolist())
        grey = (to_pixels(seen[row]) == 128).reshape(8, 4, 8, 4, 3).all(axis=(1, 3, 4)).ravel()
        assert grey[patches].all()
        assert plan.num_untouched == len(group.plan.mask.kept[row])
    assert not changed_patches(group, config).any()


def test_images_are_spread_and_a_damaged_one_is_replaced(photographs: Path, tmp_path: Path) -> None:
    assert spread_rows(10, 5) == [1, 3, 5, 7, 9]
    assert spread_rows(3, 8) == [0, 1, 2]
    split = split_of(f"{photographs}:test", "test")
    assert [sample.label for sample in read_rows(split, range(24))] == labels_of(split).tolist()
    picked = pick(split, 4)
    assert picked.labels == tuple(("red", "green", "blue", "yellow")[row % 4] for row in (3, 9, 15, 21))
    # damage one of them in a copy whose index still vouches for the old bytes
    folder = tmp_path / "copy"
    shutil.copytree(photographs, folder)
    shard = next(folder.glob("*test*.tar"))
    data = bytearray(shard.read_bytes())
    first = next(iter(read_rows(split, [3])))
    place = first.offset + 512 + 100
    data[place : place + 8] = bytes(8)
    shard.write_bytes(data)
    again = pick(split_of(f"{folder}:test", "test"), 4)
    assert len(again.pixels) == 4
    assert again.sample_ids[0] == picked.sample_ids[0] + 1
    assert torch.equal(again.sample_ids[1:], picked.sample_ids[1:])


def test_an_evaluation_set_is_drawn_evenly_from_at_most_twenty_classes() -> None:
    labels = torch.arange(1000) % 50
    rows = balanced_rows(labels, 400, seed=1)
    drawn = labels[rows]
    assert rows == sorted(rows) == balanced_rows(labels, 400, seed=1)
    assert drawn.unique(return_counts=True)[1].tolist() == [20] * 20
    assert rows != balanced_rows(labels, 400, seed=2)
    few = balanced_rows(torch.arange(100) % 4, 40, seed=0)
    assert (torch.arange(100) % 4)[few].bincount().tolist() == [10] * 4
    # no labels, or one image for each class: groups would mean nothing
    assert balanced_rows(torch.full((100,), -1), 10, seed=0) == spread_rows(100, 10)
    assert balanced_rows(torch.arange(480), 300, seed=0) == spread_rows(480, 300)


def test_classes_without_a_name_are_numbered() -> None:
    names = ("cat", "dog")
    assert [class_name(label, names) for label in (-1, 0, 1, 2)] == [None, "cat", "dog", "class 2"]


def test_shards_that_are_not_here_are_told_with_the_remedy(photographs: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, photographs)
    split, why = split_of_run(config)
    assert split is not None
    assert why == ""
    split, why = split_of_run(config_of(tmp_path, tmp_path / "gone"))
    assert split is None
    assert "--images SHARDS" in why
