"""`from_pretrained` of an exported folder gives the checkpoint's features and its preprocessing."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_models import every_tensor_counts, load
from PIL import Image
from safetensors.torch import load_file

from pretrain.errors import UserError
from pretrain.export import to_transformers
from pretrain.export.parity import ParityError
from pretrain.export.quiet import quiet

with quiet():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLASSES = {
    "class token": "ViTModel",
    "one register, no class token": "ViTModel",
    "no positions": "ViTModel",
    "extras": "ViTModel",
    "class token, pooled by mean": "ViTModel",
    "registers": "Dinov2WithRegistersModel",
    "registers without positions of their own": "Dinov2WithRegistersModel",
    "patches only": "IJepaModel",
    "patches with fixed positions": "IJepaModel",
    "swin": "SwinModel",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_transformers_reproduces_the_checkpoint(kind: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    proof = to_transformers.write(tmp_path / "out", source, model)
    assert proof.consumer == f"transformers {transformers.__version__} {CLASSES[kind]}"
    assert set(proof.matched) == set(source.state)
    assert proof.max_abs_difference is not None
    assert proof.tolerance is not None
    assert proof.max_abs_difference <= proof.tolerance
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(proof.files)


@pytest.mark.parametrize("kind", ["class token", "registers", "patches only", "swin"])
def test_every_tensor_counts(kind: str, tmp_path: Path) -> None:
    every_tensor_counts(to_transformers, kind, tmp_path)


def test_a_user_gets_the_class_token_and_the_runs_preprocessing(tmp_path: Path) -> None:
    source, model = load("class token", tmp_path)
    to_transformers.write(tmp_path / "out", source, model)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with quiet():
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    # 32 px images are taken whole, so the processor has only to normalise
    images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0) / 255
    images = (images - torch.tensor(source.mean).view(3, 1, 1)) / torch.tensor(source.std).view(3, 1, 1)
    torch.testing.assert_close(values, images, rtol=0, atol=1e-5)
    with torch.inference_mode():
        pooled = theirs(values).pooler_output
        torch.testing.assert_close(pooled, model.forward_features(images)[:, 0], rtol=0, atol=1e-4)


def test_the_names_are_those_of_the_hub(tmp_path: Path) -> None:
    """Of transformers 4, which 5 reads too; its own names inside are others."""
    source, model = load("registers", tmp_path)
    to_transformers.write(tmp_path / "out", source, model)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {
        "embeddings.register_tokens",
        "encoder.layer.1.attention.attention.query.weight",
        "encoder.layer.1.attention.output.dense.bias",
        "encoder.layer.1.layer_scale2.lambda1",
    } <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_register_tokens"], config["layer_norm_eps"], config["image_size"]) == (2, 1e-6, 32)


@pytest.mark.parametrize("lost", ["encoder.layer.1.intermediate.dense.bias", "layernorm.weight"])
def test_a_tensor_lost_on_the_way_fails_the_export(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = load("class token", tmp_path)
    rename = to_transformers.rename

    def forget(*arguments: Any) -> Any:
        tensors = rename(*arguments)
        del tensors[lost]
        return tensors

    monkeypatch.setattr(to_transformers, "rename", forget)
    with pytest.raises(ParityError, match=r"1 tensors are missing"):
        to_transformers.write(tmp_path / "out", source, model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("swin with odd maps", "not whole windows"), ("other activation", "its activation is QuickGELU")],
)
def test_what_transformers_computes_otherwise_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        to_transformers.write(tmp_path / "out", source, model)


def test_without_transformers_the_folder_is_written_and_the_note_says_what_is_not_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = load("class token", tmp_path)
    to_transformers.write(tmp_path / "out", source, model)
    monkeypatch.setattr(to_transformers, "find_spec", lambda _library: None)
    proof = to_transformers.write(tmp_path / "unproved", source, model)
    assert (proof.consumer, proof.max_abs_difference, proof.tolerance) == (
        "transformers ViTModel (not asked)",
        None,
        None,
    )
    assert "transformers is not installed here, so its reading is not proved" in proof.note
    for name in proof.files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unproved" / name).read_bytes()


def test_a_transformers_too_old_for_the_class_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = load("class token", tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _library: "4.48.3")
    with pytest.raises(UserError, match=r"transformers 4\.48\.3 .* pip install 'transformers>=4\.50'"):
        to_transformers.write(tmp_path / "out", source, model)


def test_exporting_is_silent_and_leaves_switches_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, model = load("registers", tmp_path)
    before = torch.random.get_rng_state()
    to_transformers.write(tmp_path / "out", source, model)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(before, torch.random.get_rng_state())
    assert transformers.utils.logging.is_progress_bar_enabled()
