"""The heads layer by layer against METHODS.md C8, which blocks they read, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_folder import tiny_config, write_checkpoint
from torch import Tensor, nn

from pretrain.errors import ConfigError, UserError
from pretrain.transfer.segmentation.heads import (
    FcnAuxiliary,
    MlaAuxiliary,
    MlaHead,
    MlaNeck,
    NaiveHead,
    PupAuxiliary,
    PupHead,
    StageNorms,
    UperHead,
)
from pretrain.transfer.segmentation.recipe import HeadRecipe, SegmentationRecipe
from pretrain.transfer.segmentation.run import build_optimizer
from pretrain.transfer.segmentation.scores import IGNORED
from pretrain.transfer.segmentation.segmenter import build_segmenter, default_aux_levels, losses

D, K = 768, 19  # of ViT-B on Cityscapes
SWIN_DIMS = (96, 192, 384, 768)
DEEP = {"img_px": 32, "patch_px": 8, "args": {"depth": 12, "embed_dim": 24, "num_heads": 2}}
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_px": 64,
    "patch_px": 4,
    "args": {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "window_size": 2},
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "vit"
    write_checkpoint(run, tiny_config(**DEEP))
    return run


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "swin"
    write_checkpoint(run, tiny_config(**SWIN))
    return run


def recipe_of(crop_px: int = 32, **head: Any) -> SegmentationRecipe:
    return SegmentationRecipe(crop_px=crop_px, head=HeadRecipe(**head))


def convolutions(head: nn.Module) -> list[tuple[int, int, int, bool]]:
    """(channels in, out, side of the kernel, bias), in the order of definition."""
    return [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.bias is not None)
        for layer in head.modules()
        if isinstance(layer, nn.Conv2d)
    ]


def count(kind: Any, head: nn.Module) -> int:
    return sum(isinstance(layer, kind) for layer in head.modules())


def num_parameters(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def resizings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], str, bool]]:
    """Filled with (size, mode, align_corners) of every resizing from now on."""
    seen: list[tuple[tuple[int, int], str, bool]] = []
    plain = F.interpolate

    def recorded(maps: Tensor, size: Any, mode: str, align_corners: bool) -> Tensor:
        seen.append((tuple(size), mode, align_corners))
        return plain(maps, size, mode=mode, align_corners=align_corners)

    monkeypatch.setattr(F, "interpolate", recorded)
    return seen


def test_naive_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """LN -> 1x1 D to 256, norm, ReLU -> 1x1 to 19 -> 768 in one step."""
    head = NaiveHead(D, 256, K)
    assert convolutions(head) == [(D, 256, 1, True), (256, K, 1, True)]
    assert (count(nn.LayerNorm, head), count(nn.BatchNorm2d, head), count(nn.ReLU, head)) == (1, 1, 1)
    assert num_parameters(head) == 2 * D + (D * 256 + 256) + 2 * 256 + (256 * K + K)
    seen = resizings(monkeypatch)
    assert head(torch.randn(2, D, 6, 6), (96, 96)).shape == (2, K, 96, 96)
    assert seen == [((96, 96), "bilinear", False)]


def test_pup_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """LN -> four times 3x3 to 256, norm, ReLU, doubled after the first three -> 1x1 to 19 -> doubled."""
    head = PupHead(D, 256, K)
    assert convolutions(head) == [(D, 256, 3, True), *[(256, 256, 3, True)] * 3, (256, K, 1, True)]
    assert (count(nn.LayerNorm, head), count(nn.BatchNorm2d, head), count(nn.ReLU, head)) == (1, 4, 4)
    hidden = (9 * D * 256 + 256) + 3 * (9 * 256 * 256 + 256) + 4 * 2 * 256
    assert num_parameters(head) == 2 * D + hidden + (256 * K + K)
    seen = resizings(monkeypatch)
    assert head(torch.randn(1, D, 3, 4), (48, 64)).shape == (1, K, 48, 64)
    assert seen == [(size, "bilinear", False) for size in ((6, 8), (12, 16), (24, 32), (48, 64))]


def test_auxiliary_heads_of_pup_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    head = PupAuxiliary(D, 256, K)
    assert convolutions(head) == [(D, 256, 3, True), (256, K, 1, True)]
    assert (count(nn.LayerNorm, head), count(nn.BatchNorm2d, head)) == (1, 1)
    seen = resizings(monkeypatch)
    assert head(torch.randn(2, D, 3, 3), (48, 48)).shape == (2, K, 48, 48)
    assert seen == [((12, 12), "bilinear", False), ((48, 48), "bilinear", False)]


def test_mla_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """LN and 1x1 to 256 each, 3x3 256; two 3x3 to 128 each, x4 with aligned corners, 3x3 from 512 to 19."""
    neck, head, extra = MlaNeck(D, 256, 4), MlaHead(256, K, 4), MlaAuxiliary(256, K)
    assert convolutions(neck) == [(D, 256, 1, False)] * 4 + [(256, 256, 3, False)] * 4
    assert (count(nn.LayerNorm, neck), count(nn.BatchNorm2d, neck), count(nn.ReLU, neck)) == (4, 8, 8)
    assert convolutions(head) == [(256, 128, 3, False), (128, 128, 3, False)] * 4 + [(512, K, 3, True)]
    assert convolutions(extra) == [(256, K, 1, False)]
    seen = resizings(monkeypatch)
    levels = neck([torch.randn(2, D, 3, 3) for _ in range(4)])
    assert [level.shape for level in levels] == [(2, 256, 3, 3)] * 4
    assert head(levels, (48, 48)).shape == extra(levels[0], (48, 48)).shape == (2, K, 48, 48)
    assert seen == [((12, 12), "bilinear", True)] * 4 + [((48, 48), "bilinear", False)] * 2


@torch.no_grad()
def test_the_neck_of_mla_sums_from_the_deepest_level_up() -> None:
    """With the layers after the sum out of the way, level i is the sum of what i and all deeper ones give."""
    neck = MlaNeck(8, 4, 4).eval()
    inputs = [torch.randn(1, 8, 2, 2) for _ in range(4)]
    alone = [reduce(norm(each)) for each, norm, reduce in zip(inputs, neck.norms, neck.reduce, strict=True)]
    neck.smooth = nn.ModuleList(nn.Identity() for _ in range(4))
    for number, level in enumerate(neck(inputs)):
        torch.testing.assert_close(level, torch.stack(alone[number:]).sum(dim=0))


def test_upernet_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled at 1, 2, 3, 6 and joined; top-down over four stages; all at the finest; FCN head on stage 3."""
    norms, head, extra = StageNorms(SWIN_DIMS), UperHead(SWIN_DIMS, 512, K, 0.1), FcnAuxiliary(384, K, 0.1)
    assert convolutions(head) == [
        *[(768, 512, 1, False)] * 4,
        (768 + 4 * 512, 512, 3, False),
        *[(dim, 512, 1, False) for dim in SWIN_DIMS[:3]],
        *[(512, 512, 3, False)] * 3,
        (4 * 512, 512, 3, False),
        (512, K, 1, True),
    ]
    assert count(nn.BatchNorm2d, head) == 12
    assert convolutions(extra) == [(384, 256, 3, False), (256, K, 1, True)]
    stages = norms([torch.randn(2, dim, 16 >> n, 16 >> n) for n, dim in enumerate(SWIN_DIMS)])
    seen = resizings(monkeypatch)
    assert head(stages, (64, 64)).shape == (2, K, 64, 64)
    sizes = [(2, 2)] * 4 + [(4, 4), (8, 8), (16, 16)] + [(16, 16)] * 4 + [(64, 64)]
    assert seen == [(size, "bilinear", False) for size in sizes]
    assert extra(stages[2], (64, 64)).shape == (2, K, 64, 64)


@pytest.mark.parametrize(
    ("kind", "depth", "expected"),
    [
        ("naive", 12, (2, 5, 8)),
        ("pup", 12, (4, 7, 9, 11)),
        ("naive", 24, (9, 14, 19)),
        ("pup", 24, (9, 14, 19, 23)),
        ("naive", 4, (0, 1, 2)),
    ],
)
def test_auxiliary_heads_sit_where_they_were_published(kind: Any, depth: int, expected: Any) -> None:
    assert default_aux_levels(kind, depth) == expected


@pytest.mark.parametrize(
    ("kind", "levels", "decoder", "auxiliary"),
    [
        ("naive", (2, 5, 8, 11), (3,), (0, 1, 2)),
        ("pup", (4, 7, 9, 11), (3,), (0, 1, 2, 3)),
        ("mla", (2, 5, 8, 11), (0, 1, 2, 3), (0, 1, 2, 3)),
    ],
)
def test_heads_of_a_vit_read_its_blocks(
    kind: Any, levels: Any, decoder: Any, auxiliary: Any, vit: Path
) -> None:
    """Each logit map depends on the blocks that its head reads and on no later one."""
    segmenter = build_segmenter(vit, recipe_of(kind=kind, channels=8), 5)
    assert segmenter.reads.levels == levels
    assert (segmenter.reads.decoder, segmenter.reads.auxiliary) == (decoder, auxiliary)
    pixels = torch.randn(2, 3, 32, 32)
    found = segmenter(pixels)
    assert [each.shape for each in found] == [(2, 5, 32, 32)] * (1 + len(auxiliary))
    blocks = [next(block.parameters()) for block in segmenter.backbone.network.blocks]
    for logits, places in zip(found, [decoder, *((place,) for place in auxiliary)], strict=True):
        gradients = torch.autograd.grad(logits.square().mean(), blocks, retain_graph=True, allow_unused=True)
        deepest = levels[-1] if kind == "mla" else levels[places[-1]]
        reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert reached == [number <= deepest for number in range(12)]
    assert len(segmenter.eval()(pixels)) == 1


def test_every_parameter_that_learns_gets_a_gradient(vit: Path, swin: Path) -> None:
    """Else parallel training waits for it."""
    for run, head in (
        (vit, {"kind": "mla"}),
        (vit, {"kind": "pup", "aux_weight": 0.0}),
        (swin, {"kind": "upernet"}),
    ):
        segmenter = build_segmenter(run, recipe_of(channels=8, **head), 4)
        found = losses(segmenter(torch.randn(2, 3, 32, 32)), torch.randint(0, 4, (2, 32, 32)), 0.4)
        torch.stack(list(found.values())).sum().backward()
        missing = [
            name for name, value in segmenter.named_parameters() if value.requires_grad and value.grad is None
        ]
        assert missing == []


@pytest.mark.parametrize(
    ("head", "crop_px", "told"),
    [
        ({"kind": "upernet"}, 32, "is a Vision Transformer; set head.kind=pup"),
        ({"kind": "pup"}, 36, "use 32 or 40"),
        ({"kind": "pup"}, 4, "use 8"),
        ({"kind": "pup", "aux_levels": [4, 12]}, 32, "no block 12; it has 0 to 11"),
        ({"kind": "pup", "aux_levels": [7, 4]}, 32, "from shallow to deep"),
        ({"kind": "naive", "levels": [3, 5]}, 32, "reads one block"),
        ({"kind": "naive", "levels": [40]}, 32, "no block 40"),
        ({"kind": "mla", "aux_levels": [3]}, 32, "leave it out"),
        ({"kind": "mla", "levels": [3, 5, 8, 13]}, 32, "no block 13"),
    ],
)
def test_heads_that_do_not_fit_a_vit_are_refused(head: Any, crop_px: int, told: str, vit: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        build_segmenter(vit, recipe_of(crop_px, **head), 5)


@pytest.mark.parametrize("kind", ["naive", "pup", "mla"])
def test_heads_for_a_vit_are_refused_on_a_swin(kind: Any, swin: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a Swin; set head\.kind=upernet"):
        build_segmenter(swin, recipe_of(kind=kind), 5)


def test_levels_are_refused_on_a_swin(swin: Path) -> None:
    with pytest.raises(UserError, match=r"head\.levels: upernet reads all stages"):
        build_segmenter(swin, recipe_of(kind="upernet", levels=[1]), 5)


def test_the_loss_is_the_mean_over_all_pixels_with_ignored_ones_as_zero() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[0, 0], labels[1, :, 1] = IGNORED, IGNORED
    found = losses([logits, logits.detach()], labels, 0.4)
    chances = logits.detach().log_softmax(dim=1)
    by_hand = sum(
        -float(chances[image, labels[image, row, column], row, column])
        for image in range(2)
        for row in range(4)
        for column in range(4)
        if labels[image, row, column] != IGNORED
    )
    assert found["decoder"].item() == pytest.approx(by_hand / 32, rel=1e-5)
    assert found["auxiliary_1"].item() == pytest.approx(0.4 * by_hand / 32, rel=1e-5)
    found["decoder"].backward()
    assert logits.grad is not None
    assert not logits.grad[0, :, 0].any()


def test_a_crop_without_any_label_has_loss_zero() -> None:
    found = losses([torch.randn(1, 3, 4, 4)], torch.full((1, 4, 4), IGNORED), 0.4)
    assert float(found["decoder"]) == 0.0


def test_what_is_new_learns_ten_times_as_fast_but_for_the_neck(vit: Path) -> None:
    recipe = recipe_of(kind="mla", channels=8)
    segmenter = build_segmenter(vit, recipe, 5)
    scales = {
        id(parameter): group["lr_scale"]
        for group in build_optimizer(segmenter, recipe).param_groups
        for parameter in group["params"]
    }
    learning = {name: value for name, value in segmenter.named_parameters() if value.requires_grad}
    assert len(scales) == len(learning)
    for name, parameter in learning.items():
        assert scales[id(parameter)] == (10.0 if name.startswith(("decoder", "auxiliary")) else 1.0), name


def test_the_rate_falls_as_published() -> None:
    """(0.01 - 1e-4) (1 - t / T) ** 0.9 + 1e-4"""
    lr = SegmentationRecipe().optim.schedule(80_000)
    assert lr(0) == pytest.approx(0.01)
    assert lr(40_000) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    assert lr(80_000) == pytest.approx(1e-4)
