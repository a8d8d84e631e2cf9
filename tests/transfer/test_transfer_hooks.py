"""Pretrained weights as feature maps at any input size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from run_folder import tiny_config, write_checkpoint
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from pretrain.errors import UserError
from pretrain.models.backbone import model_args
from pretrain.tokens import TokenLayout
from pretrain.transfer import backbone

VIT: dict[str, Any] = {"img_px": 64, "patch_px": 8, "args": {"depth": 4, "embed_dim": 24, "num_heads": 2}}
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_px": 64,
    "patch_px": 4,
    "args": {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "window_size": 2},
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose ViT has a class token and two registers, every tensor random."""
    run = tmp_path_factory.mktemp("runs") / "vit"
    write_checkpoint(run, tiny_config(**VIT), ("rotation", "clustering"))
    return run


@pytest.fixture(scope="module")
def without_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "bare"
    write_checkpoint(run, tiny_config(**VIT, class_token=False))
    return run


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "swin"
    write_checkpoint(run, tiny_config(**SWIN))
    return run


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def stock(model: Any, **settings: Any) -> Any:
    """timm's own model with the same weights."""
    is_swin, config = model.is_swin, tiny_config(**(SWIN if model.is_swin else VIT))
    args = model_args(config, 0 if is_swin else 2) | settings
    fresh = timm.create_model(config.name, num_classes=0, **args)
    fresh.load_state_dict(model.network.state_dict())
    return fresh.eval()


@torch.no_grad()
def test_a_vit_gives_what_stock_timm_gives_at_its_own_size(vit: Path) -> None:
    model = backbone(vit, out="map").eval()
    assert (model.strides, model.num_channels, model.out_channels) == ((8,), (24,), 24)
    tokens = stock(model).forward_features(images(64, 64))
    assert torch.equal(model(images(64, 64)), tokens[:, 3:].mT.reshape(2, 24, 8, 8))


@torch.no_grad()
def test_maps_are_those_after_the_named_blocks(vit: Path) -> None:
    model = backbone(vit, out="maps", levels=[1, 3]).eval()
    expected = stock(model).forward_intermediates(
        images(64, 64), indices=[1, 3], norm=False, intermediates_only=True
    )
    for found, wanted in zip(model(images(64, 64)), expected, strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_a_swin_gives_its_four_stages_as_stock_timm_does(swin: Path) -> None:
    model = backbone(swin, out="maps").eval()
    assert model.strides == (4, 8, 16, 32)
    model(images(96, 160))  # another size in between leaves nothing behind
    expected = stock(model).forward_intermediates(
        images(64, 64), norm=False, intermediates_only=True, output_fmt="NCHW"
    )
    for found, wanted in zip(model(images(64, 64)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_swin_at_another_size_is_the_network_that_timm_builds_for_it(swin: Path) -> None:
    model = backbone(swin, out="map").eval()
    larger = stock(model, img_size=(128, 192))
    expected = larger.forward_features(images(128, 192)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(images(128, 192)), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_swin_below_its_windows_keeps_what_it_learned(swin: Path) -> None:
    model = backbone(swin, out="map").eval()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    assert torch.isfinite(model(images(32, 32))).all()  # a last stage of one place, in windows of 2 x 2
    assert before.keys() == model.network.state_dict().keys()
    for name, value in model.network.state_dict().items():
        assert torch.equal(before[name], value), name


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["vit", "without_prefix", "swin"])
@pytest.mark.parametrize("out", ["map", "maps", "pyramid"])
def test_any_input_size_gives_maps_of_the_told_strides(
    architecture: str, out: Any, request: pytest.FixtureRequest
) -> None:
    model = backbone(request.getfixturevalue(architecture), out=out, channels=32).eval()
    for size in ((64, 64), (97, 161), (33, 300)):
        given = model(images(*size, batch=1))
        maps = [given] if out == "map" else list(given.values()) if out == "pyramid" else given
        assert [tuple(features.shape) for features in maps] == [
            (1, channels, *(int(-(-side // stride)) for side in size))
            for channels, stride in zip(model.num_channels, model.strides, strict=True)
        ]


@torch.no_grad()
def test_what_is_missing_to_whole_patches_is_the_mean_colour(vit: Path) -> None:
    model = backbone(vit, out="map").eval()
    padded = nn.functional.pad(images(80, 90), (0, 6))
    assert torch.equal(model(images(80, 90)), model(padded))


@torch.no_grad()
def test_positions_follow_the_grid_and_not_the_number_of_patches(vit: Path) -> None:
    """4 x 16 patches are as many as 8 x 8, and lie elsewhere."""
    model = backbone(vit, out="map").eval()
    wide = images(32, 128)
    tokens = model.network.forward_features(wide)  # timm's own model takes them for 8 x 8
    mistaken = tokens[:, 3:].mT.reshape(2, 24, 4, 16)
    at_its_size = stock(model)
    at_its_size.set_input_size(img_size=(32, 128))  # timm smooths before it shrinks; we do not
    tokens = at_its_size.forward_features(wide)
    right = tokens[:, 3:].mT.reshape(2, 24, 4, 16)
    found = model(wide)
    assert (found - right).abs().mean() < 0.5 * (found - mistaken).abs().mean()


@torch.no_grad()
def test_one_window_over_all_patches_is_global_attention(vit: Path) -> None:
    whole = backbone(vit, out="map").eval()
    windowed = backbone(vit, out="map", window_px=64, global_blocks=[]).eval()
    torch.testing.assert_close(windowed(images(64, 64)), whole(images(64, 64)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_global_blocks_and_prefix_a_window_sees_nothing_of_the_others(without_prefix: Path) -> None:
    model = backbone(without_prefix, out="map", window_px=32, global_blocks=[]).eval()
    before = images(64, 96, batch=1)
    after = before.clone()
    after[..., :32, 32:64] += 1.0
    changed = (model(before) - model(after)).abs().amax(dim=(0, 1)) > 0  # (8, 12)
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[:4, 4:8] = True
    assert torch.equal(changed, expected)
    model = backbone(without_prefix, out="map", window_px=32, global_blocks=[2]).eval()
    assert ((model(before) - model(after)).abs().amax(dim=(0, 1)) > 0).all()


@torch.no_grad()
def test_a_window_with_its_prefix_is_a_small_image(vit: Path) -> None:
    """Against a slow reference: every window by itself through timm's block, the prefix averaged."""
    model = backbone(vit, out="map", window_px=32, global_blocks=[])
    block, layout = model.eval().network.blocks[0], TokenLayout((8, 8), ("a", "b"))
    tokens = torch.randn(2, 3 + 64, 24, generator=torch.Generator().manual_seed(1))
    places = layout.positions()  # (64, 2)
    expected, prefixes = tokens.clone(), []
    for row in (0, 4):
        for column in (0, 4):
            inside = (places >= torch.tensor([row, column])) & (places < torch.tensor([row + 4, column + 4]))
            index = 3 + inside.all(dim=1).nonzero().flatten()
            done = block(torch.cat([tokens[:, :3], tokens[:, index]], dim=1))
            prefixes.append(done[:, :3])
            expected[:, index] = done[:, 3:]
    expected[:, :3] = torch.stack(prefixes).mean(dim=0)
    (windowed,) = model.windows.of([block], layout)
    torch.testing.assert_close(windowed(tokens), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize("out", ["map", "maps", "pyramid"])
def test_exactly_what_is_used_learns(architecture: str, out: Any, request: pytest.FixtureRequest) -> None:
    """A parameter that waits for a gradient in vain would hold up parallel training."""
    levels = [0, 2] if out == "maps" else None
    model = backbone(
        request.getfixturevalue(architecture), out=out, levels=levels, channels=32, drop_path_ratio=0.1
    )
    assert model.training
    given = model(images(64, 96))
    maps = [given] if out == "map" else given.values() if out == "pyramid" else given
    sum(features.square().mean() for features in maps).backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
    frozen = {name.split(".")[1] for name, value in model.named_parameters() if not value.requires_grad}
    reads_levels = out == "maps" or (architecture, out) == ("swin", "pyramid")
    unused = {"norm"} if reads_levels else set()
    if out == "maps":
        unused.add("layers" if architecture == "swin" else "blocks")
    assert frozen == unused


def test_new_layers_follow_the_seed_and_leave_the_random_state(vit: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (backbone(vit, seed=seed).pyramid.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_torchvision_takes_it_as_it_is(swin: Path) -> None:
    detector = MaskRCNN(backbone(swin, channels=32), num_classes=2, min_size=64, max_size=96)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    losses = detector([torch.rand(3, 64, 64)], [target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert set(detector.eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores", "masks"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weights": "untrained:resnet18"}, "a ResNet; feature maps are taken of a Vision Transformer"),
        ({"weights": "vit_tiny_patch17_224"}, "no such folder, and timm has no model of this name"),
        ({"out": "pyramids"}, "out 'pyramids': did you mean 'pyramid'?"),
        ({"levels": [4]}, "this model has levels 0 to 3"),
        ({"levels": [3, 2]}, "name each once, from shallow to deep"),
        ({"window_px": 20}, "not whole patches of 8 px"),
        ({"global_blocks": [2]}, "goes with window_px"),
        ({"window_px": 64, "global_blocks": [-1]}, "this model has blocks 0 to 3"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(settings: dict[str, Any], told: str, vit: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as raised:
        backbone(**{"weights": vit} | settings)
    assert told in str(raised.value)


def test_a_swin_has_windows_of_its_own(swin: Path) -> None:
    with pytest.raises(UserError, match="a Swin attends in windows of its own; leave it out"):
        backbone(swin, window_px=64)
