"""What `pretrain list` says is what there is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm

from pretrain.cli import main
from pretrain.listing import list_backbones, list_choices, list_methods, list_tasks
from pretrain.models.backbone import FAMILIES
from pretrain.tasks import TASKS


def test_every_task_has_a_row_with_its_headline_and_a_sentence() -> None:
    rows = list_tasks("*").splitlines()
    assert [row.split()[0] for row in rows[1:]] == list(TASKS)
    for row, spec in zip(rows[1:], TASKS.values(), strict=True):
        assert f"{spec.headline} ({'up' if spec.higher_is_better else 'down'})" in row
        own, of_file = spec.task.__doc__ or "", sys.modules[spec.task.__module__].__doc__ or ""
        sentence = row.split(")", 1)[1].strip()
        assert len(sentence) > 20
        assert any(" ".join(told.split()).startswith(sentence) for told in (own, of_file))
        assert "Metrics:" not in row
    assert len(list_tasks("rot*").splitlines()) == 2
    assert list_tasks("zzz") == "no task 'zzz'"


def test_every_method_is_listed_with_the_first_line_of_its_header(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("# What b is.\n#\n#  command\nseed: 0\n")
    (tmp_path / "a_long_one.yaml").write_text("seed: 0\n")
    assert list_methods("*", tmp_path).splitlines() == ["a_long_one", "b           What b is."]
    assert list_methods("b*", tmp_path) == "b  What b is."
    assert list_methods("zzz", tmp_path) == "no method 'zzz'"
    assert "is not there" in list_methods("*", tmp_path / "absent")


def test_every_backbone_family_is_counted_and_a_pattern_lists_its_members() -> None:
    rows = list_backbones("*").splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(FAMILIES)
    counts = {row.split()[0]: int(row.split()[1]) for row in rows}
    assert counts["vit_*"] == len(timm.list_models("vit_*")) > 50
    found = list_backbones("vit_tiny*").splitlines()
    assert found == timm.list_models("vit_tiny*")
    assert "no backbone 'resnet50'" in list_backbones("resnet50")


def test_the_command_prints_one_list_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "backbones", "vit_tiny_patch16_224"]) == 0
    assert capsys.readouterr().out == "vit_tiny_patch16_224\n"
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line and line[0] != " "] == [
        "methods",
        "tasks",
        "backbones",
    ]
    assert told == f"{list_choices(None)}\n"
