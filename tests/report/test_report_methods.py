"""Every kind of method gives a sensible report, after a few real steps at reduced size."""

from __future__ import annotations

from pathlib import Path

import pytest
from method_configs import METHODS, NAMES, reduced
from pages import Element, read_report, section_ids, section_of

from pretrain.cli import main

ALWAYS = {"tasks", "views", "training", "health", "patches"}
FAST = {
    # sections beside these, what must be said, and what stands for an image where an evaluation set is given
    "mae_vits4_cifar10": ({"attention", "restorations"}, "48 patches: not given to the encoder", "class"),
    "ijepa_vits4_cifar10": ({"attention"}, "what a patch attends to on average", None),
    # a class token that no task reads has learned nothing
    "relvit_vits4_cifar10": ({"attention"}, "what a patch attends to on average", "mean_patch"),
    "relswin_t_cifar10": (set(), "attends within windows", None),
    "relt2t_14_cifar10": ({"attention"}, "the class token as query", None),
    "dino_vits16": ({"attention"}, "The recipe has 10 views of each image; 4 are shown.", None),
}


def made(name: str, shards: Path, folder: Path, with_evaluation: bool) -> Element:
    path = METHODS / f"{name}.yaml"
    overrides = [*reduced(path, shards, 2), "engine.kind=local", "data.decode_threads=0"]
    run = folder / name
    assert main(["train", str(path), "--output-dir", str(run), *overrides]) == 0
    assert main(["report", str(run), *(["--eval", f"{shards}:test"] if with_evaluation else [])]) == 0
    assert (run / "report.html").stat().st_size < 3 * 2**20
    return read_report(run / "report.html")


@pytest.mark.parametrize("name", FAST)
def test_a_method_is_shown_as_far_as_it_can_be(name: str, photographs: Path, tmp_path: Path) -> None:
    more, said, feature = FAST[name]
    page = made(name, photographs, tmp_path, feature is not None)
    assert ALWAYS | more <= set(section_ids(page))
    assert said in page.text
    if "restorations" not in more:
        assert "Reconstructions and colorizations:" in section_of(page, "absent").text
    if "attention" not in more:
        assert "Attention of the last block:" in section_of(page, "absent").text
    if feature is not None:
        assert f"{feature} feature" in section_of(page, "plane").text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAST])
def test_every_method_has_a_report(name: str, photographs: Path, tmp_path: Path) -> None:
    page = made(name, photographs, tmp_path, with_evaluation=True)
    assert ALWAYS | {"plane", "neighbours"} <= set(section_ids(page))
