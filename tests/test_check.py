"""Mixes that cannot work are refused with the reason, before anything is built; those that can are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_config import small_config

from pretrain import build
from pretrain.check import check, check_lengths
from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.views.plan import encoder_calls

TWO = "views={one: {size_px: 32}, two: {size_px: 32}}"
MASKED = "views={one: {size_px: 32}, two: {size_px: 32}, hidden: {size_px: 32, mask: {kind: random}}}"
TOKEN = "views={one: {size_px: 32, mask: {kind: block}}}"
SWIN = "model={name: swin_tiny_patch4_window7_224, img_px: 64, patch_px: 4, args: {depths: [1, 1, 1, 1]}}"
BIG = "views={one: {size_px: 64}, two: {size_px: 64}}"

REFUSED = {
    "a jigsaw beside relations": ([TWO, "tasks={jigsaw: {}, spatial_relation: {}}"], "'jigsaw' moves some"),
    "patches of a view that drops some": (
        [MASKED, "tasks={colorization: {views: [hidden]}}"],
        "colorization: reads all patches, but view 'hidden' drops some",
    ),
    "taps of a view that drops patches": (
        [MASKED, "tasks={repre: {num_levels: 2, views: [hidden]}}"],
        "repre: reads all patches, but view 'hidden' drops some",
    ),
    "views of two encoder passes": (
        [MASKED, "tasks={contrastive: {views: [one, hidden]}}"],
        "differ in size, or in what is hidden",
    ),
    "patch tasks under a mask token": (
        [TOKEN, "tasks={maskfeat: {}, relative_position: {}}"],
        "relative_position: works on patches of its own, but view 'one' hides",
    ),
    "patch tasks under local damage": (
        ["views={one: {size_px: 32, local: {}}}", "tasks={reconstruction: {}, jigsaw: {}}"],
        "jigsaw: works on patches of its own",
    ),
    "targets of shuffled patches": (
        ["views={one: {size_px: 32, local: {}, shuffle: true}}", "tasks={reconstruction: {}}"],
        "reconstruction: its answers stand at the places",
    ),
    "mask tokens without positions": (
        [TOKEN, "tasks={maskfeat: {}}", "model.pos_embed=none"],
        "maskfeat: without positions all hidden patches",
    ),
    "inpainting without positions": (
        [TWO, "tasks={inpainting: {}}", "model.pos_embed=none"],
        "inpainting: without positions",
    ),
    "a teacher's task without a teacher": ([TWO, "tasks={byol: {}}"], "byol: needs an averaged teacher"),
    "a queue that the batch does not divide": (
        [TWO, "tasks={moby: {queue_length: 12}}", "teacher={}"],
        "moby: queue_length 12 is not a multiple of the 8 keys",
    ),
    "LARS on flat partitions": ([TWO, "tasks={contrastive: {}}", "optim.name=lars"], "'lars' scales each"),
    "a mask on a Swin": (
        [SWIN, "views={one: {size_px: 64, mask: {}}}", "tasks={mae: {}}"],
        "views.one.mask: a Swin",
    ),
    "a token of its own on a Swin": ([SWIN, BIG, "tasks={clustering: {}}"], "no place for the register"),
    "small crops on a Swin": (
        [SWIN, "views={one: {size_px: 64}, two: {size_px: 32}}", "tasks={simsiam: {}}"],
        "views.two.size_px: 32, but swin",
    ),
    "likeness in a circle": (
        ["views={one: {size_px: 32, like: two}, two: {size_px: 32, like: one}}", "tasks={simsiam: {}}"],
        "one and two are like each other",
    ),
    "likeness to nobody": (
        ["views={one: {size_px: 32, like: twoo}, two: {size_px: 32}}", "tasks={simsiam: {}}"],
        "no view is named 'twoo'; did you mean 'two'",
    ),
    "a block mask on a small view": (
        [
            "views={one: {size_px: 32}, two: {size_px: 8, mask: {kind: block}}}",
            "tasks={simsiam: {views: [one, one]}}",
        ],
        "a grid of 2 x 2 patches is too small",
    ),
    "more levels than blocks": (
        [TWO, "tasks={repre: {num_levels: 3}}"],
        "repre.num_levels: 3 is more than the 2",
    ),
    "one image to compare": (
        [TWO, "tasks={simsiam: {}}", "batch={global_size: 1}", "data.lanes=1"],
        "simsiam compares images, and a micro step has one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mix_that_cannot_work_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    overrides, reason = REFUSED[case]
    config = small_config(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=reason) as caught:
        check(config, world_size=1)
    assert "\n" not in str(caught.value)


ACCEPTED = {
    "masked autoencoding beside contrast": ([MASKED, "tasks={contrastive: {}, mae: {views: [hidden]}}"], 2),
    "contrast on masked views": (
        [
            "views={one: {size_px: 32, mask: {}}, two: {size_px: 32, mask: {}}}",
            "tasks={contrastive: {}, mae: {}}",
        ],
        1,
    ),
    "relations beside contrast and colorization": (
        [TWO, "tasks={contrastive: {}, colorization: {}, spatial_relation: {}}"],
        1,
    ),
    "a jigsaw and relations, each with a view": (
        [TWO, "tasks={jigsaw: {views: [one]}, spatial_relation: {views: [two]}}"],
        2,
    ),
    "RePre's decoder under the core tasks": (
        [TWO, "tasks={contrastive: {}, jigsaw: {}, repre: {num_levels: 2}}"],
        1,
    ),
    "RePre on a Swin": ([SWIN, BIG, "tasks={simsiam: {}, repre: {}}"], 1),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_parts_of_several_methods_go_together(case: str, tmp_path: Path) -> None:
    overrides, num_passes = ACCEPTED[case]
    config = small_config(tmp_path, *overrides)
    check(config, world_size=1)
    assert len(encoder_calls(build.views(config))) == num_passes


def test_only_the_views_that_patch_tasks_read_are_worked_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, TWO, "tasks={jigsaw: {views: [one]}, spatial_relation: {views: [two]}}")
    assert {name: view.corrupt for name, view in build.views(config).items()} == {"one": True, "two": False}


def test_a_warm_up_longer_than_the_run_is_refused_once_the_data_are_known(tmp_path: Path) -> None:
    config = small_config(tmp_path, "schedule={steps: 10, warmup_epochs: 5}")
    check(config, world_size=1)
    check_lengths(config, num_samples=16)
    with pytest.raises(ConfigError, match="a warm-up of 31 steps leaves nothing of a run of 10"):
        check_lengths(config, num_samples=100)


def test_a_config_extends_another_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "data: {shards: a, lanes: 4}\nviews: {one: {size_px: 32}, two: {size_px: 32}}\n"
        "tasks: {simsiam: {out_dim: 8}, jigsaw: {}}\nschedule: {steps: 9}\nbatch: {global_size: 8}\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\ntasks: {jigsaw: null, rotation: {}}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: middle.yaml\nviews: {one: {turn: true}}\ntasks: {simsiam: {predictor_dim: 4}}\n")
    config = load_config(top, ["schedule.steps=5"])
    assert set(config.tasks.enabled()) == {"rotation", "simsiam"}
    assert (config.tasks.simsiam.out_dim, config.tasks.simsiam.predictor_dim) == (8, 4)
    assert (config.views["one"].turn, config.views["two"].turn, config.schedule.steps) == (True, False, 5)


def test_what_extends_itself_or_nothing_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("extends: two.yaml\n")
    two.write_text("extends: one.yaml\n")
    with pytest.raises(ConfigError, match="extends this file in turn"):
        load_config(one)
    one.write_text("extends: absent.yaml\n")
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_config(one)
    one.write_text("extends: [a]\n")
    with pytest.raises(ConfigError, match="is not the path of another config"):
        load_config(one)
