"""Files for detectron2 have the names and shapes of its classes, and where it is installed its features.

It is in no package index; a checkout and its dependencies on PYTHONPATH let the tests of its own classes run.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from format_models import every_tensor_counts, load, recorded_tensors, shapes

from pretrain.errors import UserError
from pretrain.export import to_detectron2

NOT_READ = ("cls_token", "reg_token", "norm.weight", "norm.bias")
needs_detectron2 = pytest.mark.skipif(find_spec("detectron2") is None, reason="detectron2 is not installed")


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(folder / "model.pth", weights_only=True)
    return tensors


@pytest.mark.parametrize(
    ("kind", "consumer"), [("one block", "detectron2 ViT"), ("swin", "detectron2 SwinTransformer")]
)
def test_names_and_shapes_are_those_of_its_classes(kind: str, consumer: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    to_detectron2.write(tmp_path / "out", source, model)
    assert shapes(read(tmp_path / "out")) == recorded_tensors(consumer)


def test_what_vitdet_does_not_read_is_named_and_stays_behind(tmp_path: Path) -> None:
    source, model = load("registers", tmp_path)
    proof = to_detectron2.write(tmp_path / "out", source, model)
    assert set(proof.left_out) == set(NOT_READ)
    assert set(proof.matched) == set(source.state) - set(NOT_READ)
    written = read(tmp_path / "out")
    positions = source.state["pos_embed"]
    assert torch.equal(written["pos_embed"][:, 1:], positions[:, 3:])  # of patches; two registers stay behind
    assert torch.equal(written["pos_embed"][:, :1], positions[:, :1])


def test_a_model_without_class_token_gets_the_placeholder_that_vitdets_configs_cut_off(
    tmp_path: Path,
) -> None:
    source, model = load("one block of patches", tmp_path)
    to_detectron2.write(tmp_path / "out", source, model)
    positions = read(tmp_path / "out")["pos_embed"]
    assert not positions[:, 0].any()
    assert torch.equal(positions[:, 1:], source.state["pos_embed"])
    description = json.loads((tmp_path / "out" / "model.json").read_text())
    assert description["arguments"]["pretrain_use_cls_token"] is True
    assert description["pixel_mean"] == pytest.approx([255 * value for value in source.mean])


def test_a_proof_without_detectron2_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.export.consumer.find_spec", lambda _library: None)
    source, model = load("class token", tmp_path)
    proof = to_detectron2.write(tmp_path / "out", source, model)
    assert (proof.max_abs_difference, proof.feature_scale, proof.tolerance) == (None, None, None)
    assert proof.note.endswith("detectron2 is not installed here, so its reading is not proved")


def test_windows_of_several_sizes_are_refused(tmp_path: Path) -> None:
    source, model = load("swin with small maps", tmp_path)
    with pytest.raises(
        UserError, match=r"maps of 8, 4 tokens per side are not whole windows of one size \(4, 7\)"
    ):
        to_detectron2.write(tmp_path / "out", source, model)


@needs_detectron2
@pytest.mark.parametrize(
    "kind",
    ["class token", "registers", "patches only", "no positions", "extras", "swin", "swin with odd maps"],
)
def test_its_own_classes_reproduce_the_checkpoint(kind: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    proof = to_detectron2.write(tmp_path / "out", source, model)
    assert proof.max_abs_difference is not None
    assert proof.tolerance is not None
    assert proof.max_abs_difference <= proof.tolerance


@needs_detectron2
@pytest.mark.parametrize(("kind", "left_out"), [("registers", NOT_READ), ("swin", ())])
def test_every_tensor_that_is_read_counts(kind: str, left_out: tuple[str, ...], tmp_path: Path) -> None:
    every_tensor_counts(to_detectron2, kind, tmp_path, left_out)
