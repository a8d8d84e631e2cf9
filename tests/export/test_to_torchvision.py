"""torchvision's own models, built from an exported folder, give the checkpoint's features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from format_models import every_tensor_counts, load

from pretrain.errors import UserError
from pretrain.export import to_torchvision
from pretrain.export.parity import ParityError

HELD = [
    "class token",
    "class token, pooled by mean",
    "one register, no class token",
    "no positions",
    "extras",
    "swin",
]


@pytest.mark.parametrize("kind", HELD)
def test_torchvision_reproduces_the_checkpoint(kind: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    proof = to_torchvision.write(tmp_path / "out", source, model)
    assert set(proof.matched) == set(source.state)
    assert not proof.left_out
    assert proof.max_abs_difference is not None
    assert proof.tolerance is not None
    assert proof.max_abs_difference <= proof.tolerance
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(proof.files)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("class token", "the feature of an image is the class token"),
        (
            "class token, pooled by mean",
            "the mean of the patch tokens, not the first token (here the class token)",
        ),
        (
            "one register, no class token",
            "the mean of the patch tokens, not the first token (here the first reg",
        ),
    ],
)
def test_the_note_says_where_the_feature_of_an_image_is(kind: str, told: str, tmp_path: Path) -> None:
    """torchvision hands out the first token, whatever the run pooled."""
    assert told in to_torchvision.write(tmp_path / "out", *load(kind, tmp_path)).note


def test_a_user_needs_the_two_files_only(tmp_path: Path) -> None:
    source, model = load("class token", tmp_path)
    to_torchvision.write(tmp_path / "out", source, model)
    description = json.loads((tmp_path / "out" / "model.json").read_text())
    theirs = torchvision.models.VisionTransformer(**description["arguments"], num_classes=5)
    loading = theirs.load_state_dict(
        torch.load(tmp_path / "out" / "model.pth", weights_only=True), strict=False
    )
    assert loading.missing_keys == ["heads.head.weight", "heads.head.bias"]
    assert not loading.unexpected_keys
    assert (description["mean"], description["interpolation"]) == (list(source.mean), "bilinear")
    features: list[Any] = []
    theirs.heads.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        theirs.eval()(images)
        torch.testing.assert_close(features[0], model.forward_features(images)[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["class token", "swin"])
def test_every_tensor_counts(kind: str, tmp_path: Path) -> None:
    every_tensor_counts(to_torchvision, kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("registers", r"register tokens \(rotation, cluster\); add --drop-registers"),
        ("patches only", "always has a class token, this one has none; use --format timm"),
        ("swin with odd maps", r"maps of 8, 4 tokens per side are not whole windows of one size \(3\)"),
        ("other activation", "its activation is QuickGELU; use --format timm or onnx"),
        ("norm before blocks", "it has a norm before the first block"),
        ("wide images", "it is for images of 32 x 48 px, not square ones"),
    ],
)
def test_what_torchvision_cannot_hold_is_refused_before_anything_is_written(
    kind: str, message: str, tmp_path: Path
) -> None:
    source, model = load(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        to_torchvision.write(tmp_path / "out", source, model)
    assert not (tmp_path / "out").exists()


def test_a_tensor_lost_on_the_way_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = load("class token", tmp_path)
    rename = to_torchvision.rename

    def forget(*arguments: Any) -> Any:
        tensors = rename(*arguments)
        tensors["stranger"] = tensors.pop("encoder.ln.weight")
        return tensors

    monkeypatch.setattr(to_torchvision, "rename", forget)
    with pytest.raises(
        ParityError, match=r"1 tensors are missing \(encoder.ln.weight\), 1 unexpected \(stranger\)"
    ):
        to_torchvision.write(tmp_path / "out", source, model)
