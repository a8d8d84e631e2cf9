"""Files for mmpretrain, mmsegmentation and mmdetection: names, shapes and order of their classes.

Where the libraries are installed (PYTHONPATH is enough), also their features, and a config that loads them.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from format_models import every_tensor_counts, load, recorded_tensors, shapes
from open_mmlab import fill_gaps, require
from timm.models.swin_transformer import SwinTransformer

from pretrain.errors import UserError
from pretrain.export import to_openmmlab
from pretrain.export.consumer import AbsentError, import_consumer
from pretrain.export.quiet import quiet
from pretrain.export.to_openmmlab import Library

HELD: dict[Library, list[str]] = {
    "mmpretrain": [
        "class token",
        "class token, pooled by mean",
        "patches only",
        "one register, no class token",
        "no positions",
        "extras",
        "swin",
    ],
    "mmseg": ["class token", "patches only", "extras", "swin", "swin with odd maps"],
    "mmdet": ["swin", "swin with odd maps"],
}


@pytest.fixture(scope="module", autouse=True)
def _gaps() -> None:
    fill_gaps()


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(folder / "backbone.pth", weights_only=True)["state_dict"]
    return tensors


@pytest.mark.parametrize(
    ("library", "kind", "consumer", "prefix"),
    [
        ("mmpretrain", "one block", "mmpretrain VisionTransformer", "backbone."),
        ("mmpretrain", "swin", "mmdet SwinTransformer", "backbone."),
        ("mmseg", "one block", "mmseg VisionTransformer", ""),  # its loader strips no prefix
        ("mmseg", "swin", "mmdet SwinTransformer", "backbone."),
        ("mmdet", "swin", "mmdet SwinTransformer", "backbone."),
    ],
)
def test_names_and_shapes_are_those_of_their_classes(
    library: Library, kind: str, consumer: str, prefix: str, tmp_path: Path
) -> None:
    source, model = load(kind, tmp_path)
    proof = to_openmmlab.write(tmp_path / "out", source, model, library)
    written = shapes(read(tmp_path / "out"))
    assert written == {prefix + name: shape for name, shape in recorded_tensors(consumer).items()}
    assert set(proof.matched) == set(source.state)
    init = runpy.run_path(str(tmp_path / "out" / "backbone.py"))["backbone"]["init_cfg"]
    assert init.get("prefix", "") == prefix


def test_merging_by_unfold_gives_what_merging_by_concatenation_gave(tmp_path: Path) -> None:
    """OpenMMLab gathers four neighbours with torch's Unfold, in which the channels come first."""
    source, model = load("swin", tmp_path)
    assert isinstance(model, SwinTransformer)
    to_openmmlab.write(tmp_path / "out", source, model, "mmdet")
    written = read(tmp_path / "out")
    merging = "backbone.stages.0.downsample"
    maps = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2))  # (B, H, W, C)
    gathered = F.unfold(maps.permute(0, 3, 1, 2), kernel_size=2, stride=2).mT  # (B, H / 2 * W / 2, 4 C)
    norm = [written[f"{merging}.norm.{part}"] for part in ("weight", "bias")]
    merged = F.layer_norm(gathered, [32], *norm) @ written[f"{merging}.reduction.weight"].T
    with torch.inference_mode():
        expected = model.layers[1].downsample(maps).flatten(1, 2)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_a_vit_without_class_token_hands_out_its_map(tmp_path: Path) -> None:
    source, model = load("patches only", tmp_path)
    to_openmmlab.write(tmp_path / "out", source, model, "mmpretrain")
    variables = runpy.run_path(str(tmp_path / "out" / "backbone.py"))
    assert variables["backbone"]["out_type"] == "featmap"
    assert not variables["backbone"]["with_cls_token"]
    assert variables["pixels"]["mean"] == pytest.approx([255 * value for value in source.mean], abs=1e-3)
    assert "backbone.cls_token" not in read(tmp_path / "out")


@pytest.mark.parametrize(
    ("library", "kind", "message"),
    [
        (
            "mmpretrain",
            "registers",
            r"--format mmpretrain: .*register tokens \(rotation, cluster\); add --drop-reg",
        ),
        ("mmpretrain", "swin with odd maps", "not whole windows"),
        (
            "mmseg",
            "wide blocks",
            "a whole multiple of the 24 channels wide, this one is 60; use --format mmpretrain",
        ),
        (
            "mmdet",
            "class token",
            "mmdetection 3 has no Vision Transformer of its own; use --format mmpretrain",
        ),
    ],
)
def test_what_a_library_cannot_hold_is_refused(
    library: Library, kind: str, message: str, tmp_path: Path
) -> None:
    source, model = load(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        to_openmmlab.write(tmp_path / "out", source, model, library)
    assert not (tmp_path / "out").exists()


def test_a_proof_without_the_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.export.consumer.find_spec", lambda _library: None)
    source, model = load("class token", tmp_path)
    proof = to_openmmlab.write(tmp_path / "out", source, model, "mmseg")
    assert proof.max_abs_difference is None
    assert "mmseg is not installed here, so its reading is not proved" in proof.note


def test_a_library_that_cannot_be_imported_is_as_good_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old libraries beside a new torch fail in many ways, and aloud."""
    (tmp_path / "outdated").mkdir()
    (tmp_path / "outdated" / "__init__.py").write_text("raise AssertionError('other==9 is incompatible')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AbsentError, match=r"cannot be imported here \(other==9 is incompatible\)"):
        import_consumer("outdated.models")


@pytest.mark.parametrize(
    ("library", "kind"), [(name, kind) for name, kinds in HELD.items() for kind in kinds]
)
def test_their_own_classes_reproduce_the_checkpoint(library: Library, kind: str, tmp_path: Path) -> None:
    require(library)
    source, model = load(kind, tmp_path)
    proof = to_openmmlab.write(tmp_path / "out", source, model, library)
    assert proof.max_abs_difference is not None
    assert proof.tolerance is not None
    assert proof.max_abs_difference <= proof.tolerance


@pytest.mark.parametrize(("library", "kind"), [("mmpretrain", "class token"), ("mmseg", "swin")])
def test_every_tensor_counts(library: Library, kind: str, tmp_path: Path) -> None:
    require(library)
    every_tensor_counts(to_openmmlab, kind, tmp_path, library=library)


@pytest.mark.parametrize("library", get_args(Library))
def test_a_config_takes_the_backbone_over_as_the_first_lines_say(library: Library, tmp_path: Path) -> None:
    require(library)
    from mmengine import Config

    source, model = load("swin", tmp_path)
    to_openmmlab.write(tmp_path / "out", source, model, library)
    base = {
        "backbone": {"type": "ResNet", "depth": 50, "init_cfg": {"type": "Pretrained", "checkpoint": "other"}}
    }
    (tmp_path / "CONFIG.py").write_text(f"model = {base!r}\ndata_preprocessor = dict(num_classes=3)\n")
    text = (tmp_path / "out" / "backbone.py").read_text()
    lines = [line.removeprefix("#     ") for line in text.splitlines() if line.startswith("#     ")]
    (tmp_path / "mine.py").write_text("\n".join(lines).replace("FOLDER", "out"))
    with quiet():
        config: Any = Config.fromfile(str(tmp_path / "mine.py"))
    assert config.model.backbone.type == f"{library}.SwinTransformer"
    assert "depth" not in config.model.backbone
    assert Path(config.model.backbone.init_cfg.checkpoint) == tmp_path / "out" / "backbone.pth"
    pixels = config.data_preprocessor if library == "mmpretrain" else config.model.data_preprocessor
    assert pixels.mean == pytest.approx([255 * value for value in source.mean], abs=1e-3)
