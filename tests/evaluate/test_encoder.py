"""Every kind of weights opens with its own input, and gives the features its network gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_folder import MEAN, STD, random_state, tiny_config, write_checkpoint
from timm.data import create_transform, resolve_model_data_config

from pretrain.errors import CheckpointError, UserError
from pretrain.evaluate.encoder import CentreCrop, Encoder, open_encoder
from pretrain.export.timm_folder import export_timm

IMAGES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a student and a teacher, and beside it the export of the teacher."""
    folder = tmp_path_factory.mktemp("weights")
    networks = {
        name: random_state(tiny_config(), 2, seed) for seed, name in enumerate(("student", "teacher"))
    }
    write_checkpoint(folder / "run", tiny_config(), ("rotation", "cluster"), networks=networks)
    export_timm(folder / "run", folder / "export")
    return folder / "run"


def test_run_checkpoint_and_export_give_the_same_features(run: Path) -> None:
    opened = [open_encoder(run), open_encoder(run / "checkpoints" / "step-00001000")]
    opened.append(open_encoder(run.parent / "export"))
    for encoder in opened:
        assert (encoder.mean, encoder.std) == (tuple(MEAN), tuple(STD))
        assert (encoder.crop.size_px, encoder.crop.resize_px, encoder.crop.interpolation) == (
            32,
            32,
            "bilinear",
        )
        torch.testing.assert_close(encoder.encode(IMAGES), opened[0].encode(IMAGES), rtol=0, atol=1e-6)
    assert not torch.equal(open_encoder(run, network="student").encode(IMAGES), opened[0].encode(IMAGES))


def test_features_are_those_of_the_named_tokens_of_a_normalised_image(run: Path) -> None:
    model = timm.create_model(f"local-dir:{run.parent / 'export'}", pretrained=True).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        tokens = model.forward_features((IMAGES / 255 - mean) / std)  # class, 2 registers, 16 patches
    expected = {"class": tokens[:, 0], "mean_patch": tokens[:, 3:].mean(dim=1)}
    for feature, value in expected.items():
        found = open_encoder(run, feature).encode(IMAGES)  # type: ignore[arg-type]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)
    assert open_encoder(run).feature == "class"


def test_without_class_token_the_patches_are_averaged(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(class_token=False), ("rotation",))
    export_timm(tmp_path / "run", tmp_path / "export")
    for weights in (tmp_path / "run", tmp_path / "export"):
        encoder = open_encoder(weights)
        assert encoder.feature == "mean_patch"
        pooled = open_encoder(weights, "pooled")
        torch.testing.assert_close(encoder.encode(IMAGES), pooled.encode(IMAGES), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="no class token"):
        open_encoder(tmp_path / "run", "class")


def test_untrained_means_the_same_architecture_and_always_the_same_fresh_weights(run: Path) -> None:
    trained = open_encoder(run.parent / "export")
    before = torch.random.get_rng_state()
    fresh = [open_encoder(f"untrained:{run.parent / 'export'}") for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(fresh[0].encode(IMAGES), fresh[1].encode(IMAGES))
    assert not torch.allclose(fresh[0].encode(IMAGES), trained.encode(IMAGES), atol=0.1)
    assert (fresh[0].num_features, fresh[0].mean) == (trained.num_features, trained.mean)
    others = [open_encoder(f"untrained:{weights}", seed=1) for weights in (run.parent / "export", run)]
    assert torch.equal(others[0].encode(IMAGES), others[1].encode(IMAGES))
    assert not torch.allclose(fresh[0].encode(IMAGES), others[0].encode(IMAGES), atol=0.1)
    for encoder in others:
        assert {"kind": "untrained", "seed": 1}.items() <= encoder.describe().items()


def test_pixels_are_a_flattened_small_image() -> None:
    encoder = open_encoder("pixels")
    image = np.full((40, 60, 3), 255, dtype=np.uint8)
    features = encoder.encode(encoder.crop(image)[None])
    assert features.shape == (1, encoder.num_features) == (1, 768)
    assert torch.equal(features, torch.ones(1, 768))


def test_a_timm_name_opens_only_with_weights_that_are_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match="not on this machine"):
        open_encoder("vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"no such folder.*did you mean"):
        open_encoder("vit_tinny_patch16_224")
    trained = timm.create_model("test_vit.r160_in1k", num_classes=1000)
    torch.save(trained.state_dict(), tmp_path / "cached.pth")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "cached.pth"))
    encoder = open_encoder("test_vit.r160_in1k")
    torch.testing.assert_close(encoder.model.cls_token, trained.cls_token)
    assert encoder.crop.size_px == 160


def test_a_network_that_is_no_vit_gives_its_pooled_features() -> None:
    encoder = open_encoder("untrained:test_resnet")
    side = encoder.crop.size_px
    assert encoder.feature == "pooled"
    assert encoder.encode(torch.zeros(2, 3, side, side, dtype=torch.uint8)).shape == (2, encoder.num_features)
    with pytest.raises(UserError, match="use 'pooled'"):
        open_encoder("untrained:test_resnet", "class")


def test_an_export_whose_weights_were_swapped_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    export_timm(tmp_path / "run", tmp_path / "export")
    content = bytearray((tmp_path / "export" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "export" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not the file that was exported"):
        open_encoder(tmp_path / "export")


def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an exported folder"):
        open_encoder(tmp_path)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    cropped = CentreCrop(224, 256)(image)
    assert torch.equal(cropped.permute(1, 2, 0), torch.from_numpy(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(75, 100), (100, 75), (33, 90), (64, 64)])
def test_the_crop_agrees_with_timms_own_transform(size: tuple[int, int], interpolation: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[0] // 5 + 1, size[1] // 5 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    reference = create_transform(32, interpolation=interpolation, crop_pct=0.875, normalize=False)(smooth)
    ours = CentreCrop(32, 36, interpolation)(np.asarray(smooth).copy())
    assert ours.shape == reference.shape
    assert (ours.float() - reference.float()).abs().mean() < 1.0  # grey levels
    assert (ours.float() - reference.float()).abs().max() <= 6


def test_what_the_folder_says_is_what_the_encoder_does(run: Path) -> None:
    model = timm.create_model(f"local-dir:{run.parent / 'export'}", pretrained=True)
    data = resolve_model_data_config(model)
    encoder: Encoder = open_encoder(run)
    assert encoder.mean == tuple(data["mean"])
    assert encoder.crop.resize_px == int(encoder.crop.size_px / data["crop_pct"])
    assert json.dumps(encoder.describe())
