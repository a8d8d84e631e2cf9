"""Another image size, no registers, another pooling: stock timm makes of it what our own model does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
import timm
import torch
import torch.nn.functional as F
import yaml
from run_folder import MEAN, STD, random_state, seal, tiny_config, write_checkpoint
from safetensors.torch import load_file
from small_shards import jpeg, samples, write_shard
from torch import Tensor

from pretrain.data.indexing import index_folder
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.export.export_report import ExportReport
from pretrain.export.exporting import Exported, Target, export_run
from pretrain.export.options import ExportOptions
from pretrain.models.backbone import BackboneConfig, accept_any_size, create_backbone, encode
from pretrain.models.t2t import register_t2t
from pretrain.tokens import TokenLayout

SWIN: dict[str, Any] = {"depths": [2, 2, 2, 2], "embed_dim": 12, "num_heads": [1, 2, 4, 8], "window_size": 4}


def swin_config(img_px: int = 64) -> BackboneConfig:
    return BackboneConfig(name="swin_tiny_patch4_window7_224", img_px=img_px, patch_px=2, args=SWIN)


def export(
    folder: Path, config: BackboneConfig, registers: tuple[str, ...] = (), **asked: Any
) -> tuple[dict[str, Tensor], ExportReport]:
    """The weights of a run, and the report of their export to `out`."""
    state = random_state(config, len(registers))
    write_checkpoint(folder / "run", config, registers, networks={"student": state})
    (done,) = export_run(folder / "run", [Target("timm", folder / "out")], ExportOptions(**asked))
    assert isinstance(done, Exported)
    return state, done.report


def stock(folder: Path, **more: Any) -> Any:
    return timm.create_model(f"local-dir:{folder / 'out'}", pretrained=True, **more).eval()


def pictures(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("grid", [(8, 8), (2, 8), (5, 3)], ids=str)
@pytest.mark.parametrize(
    ("changes", "registers"),
    [
        ({}, ("rotation", "cluster")),
        ({}, ()),
        ({"class_token": False}, ()),
        ({"class_token": False}, ("rotation",)),
        ({"pos_embed": "sincos"}, ("rotation",)),
        ({"pos_embed": "none"}, ("rotation",)),
        ({"args": {"depth": 1, "embed_dim": 24, "num_heads": 2, "no_embed_class": True}}, ("rotation",)),
    ],
    ids=str,
)
def test_a_vit_of_another_size_gives_what_the_runs_own_model_gives_there(
    changes: dict[str, Any], registers: tuple[str, ...], grid: tuple[int, int], tmp_path: Path
) -> None:
    """From 4 x 4 tokens; 2 x 8 are as many, and still other positions."""
    config = tiny_config(**changes)
    state, report = export(tmp_path, config, registers, grid=grid)
    own = create_backbone(config, len(registers))
    own.load_state_dict(state)
    accept_any_size(own)
    layout = TokenLayout(grid, registers, config.class_token)
    images = pictures(8 * grid[0], 8 * grid[1])
    with torch.inference_mode():
        expected = encode(own.eval(), images, layout).final
        found = stock(tmp_path).forward_features(images)
    assert found.shape == (2, layout.num_tokens, 24)
    assert (found - expected).abs().max() <= 1e-5
    (change,) = report.changes
    assert (change["to_grid"], change["num_prefix_tokens"]) == (list(grid), layout.num_prefix)
    assert change["resampled"] == ([] if config.pos_embed == "none" else ["pos_embed"])
    assert change["max_abs_difference"] <= 1e-5


def test_only_the_positions_of_patches_are_resampled_by_a_plain_bicubic(tmp_path: Path) -> None:
    state, _ = export(tmp_path, tiny_config(), ("rotation", "cluster"), img_px=48)
    found = load_file(tmp_path / "out" / "model.safetensors")
    before, after = state.pop("pos_embed"), found.pop("pos_embed")
    assert torch.equal(after[:, :3], before[:, :3])  # class token and two registers
    patches = before[:, 3:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after[:, 3:], expected.flatten(2).mT, rtol=0, atol=1e-6)
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(("side_px", "num_clipped"), [(128, 0), (32, 2)])
def test_a_swin_of_another_size_has_the_tables_of_its_clipped_windows_resampled(
    side_px: int, num_clipped: int, tmp_path: Path
) -> None:
    """At 64 px the stages have 32, 16, 8 and 4 tokens a side, all with windows of 4."""
    config = swin_config(img_px=64)
    state, report = export(tmp_path, config, img_px=side_px)
    own = create_backbone(config)
    own.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of timm's interpolation
        own.set_input_size((side_px, side_px), window_size=(4, 4))
    images = pictures(side_px, side_px)
    with torch.inference_mode():
        expected = own.eval().forward_features(images)
        found = stock(tmp_path).forward_features(images)
    assert (found - expected).abs().max() <= 1e-5
    # at 32 px both blocks of the last stage have 2 x 2 tokens
    resampled = report.changes[0]["resampled"]
    assert len(resampled) == num_clipped
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in resampled:
        assert (len(state[name]), len(stored[name])) == (7 * 7, 3 * 3)
        torch.testing.assert_close(stored[name][4], state[name][24])  # a token's bias towards itself


def test_a_swin_is_stored_by_the_names_that_every_timm_reads(tmp_path: Path) -> None:
    """timm up to 1.0.27 and more takes names of its own without a classifier for another arrangement."""
    state, report = export(tmp_path, swin_config())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        stored["layers.0.downsample.reduction.weight"], state["layers.1.downsample.reduction.weight"]
    )
    assert "layers.3.downsample.reduction.weight" not in stored
    assert set(report.matched) == set(state)
    loaded = stock(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_t2t_of_another_size_agrees(tmp_path: Path) -> None:
    config = tiny_config(name="t2t_vit_14", img_px=32, patch_px=16)
    state, _ = export(tmp_path, config, img_px=64)
    register_t2t()
    own = create_backbone(config)
    own.load_state_dict(state)
    accept_any_size(own)
    with torch.inference_mode():
        expected = encode(own.eval(), pictures(64, 64), TokenLayout((4, 4))).final
        assert (stock(tmp_path).forward_features(pictures(64, 64)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "asked", "told"),
    [
        (tiny_config(), {"img_px": 36}, "--img-px 36: .* 8 px patches; use 32 or 40"),
        (tiny_config(), {"img_px": 4}, "use 8"),
        (tiny_config(), {"drop_registers": True}, "--drop-registers: this backbone has none"),
        (tiny_config(class_token=False), {"global_pool": "token"}, "no class token; use avg"),
        (swin_config(), {"global_pool": "token"}, "Swin has no class token; use avg"),
        (
            tiny_config(args={"depth": 1, "embed_dim": 24, "num_heads": 2, "global_pool": "avg"}),
            {"global_pool": "token"},
            "norm behind the pooling",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    config: BackboneConfig, asked: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        export(tmp_path, config, **asked)
    assert not (tmp_path / "out").exists()


# --- pooling


def test_the_mean_is_taken_behind_the_trained_norm_and_timms_own_way_would_be_another_feature(
    tmp_path: Path,
) -> None:
    config, registers = tiny_config(), ("rotation",)
    state, report = export(tmp_path, config, registers, global_pool="avg")
    own = create_backbone(config, 1)
    own.load_state_dict(state)
    images = pictures(32, 32)
    with torch.inference_mode():
        expected = own.eval().forward_features(images)[:, 2:].mean(dim=1)
        ours = stock(tmp_path)(images)
        assert (ours - expected).abs().max() <= 1e-5
        assert report.changes[0]["to"] == "avg"

        export_run(tmp_path / "run", [Target("timm", tmp_path / "plain" / "out")])
        with pytest.raises(RuntimeError, match=r"Missing key.*fc_norm"):
            stock(tmp_path / "plain", global_pool="avg")
        naive = stock(tmp_path / "plain", global_pool="avg", num_classes=7)  # without a word
        assert isinstance(naive.norm, torch.nn.Identity)  # the trained one is gone
        assert torch.equal(naive.fc_norm.weight, torch.ones(24))  # and a fresh one there instead
        wrong = naive.forward_head(naive.forward_features(images), pre_logits=True)
        assert (wrong - expected).norm() > 0.1 * expected.norm()
        told = stock(tmp_path / "plain", global_pool="avg", num_classes=7, fc_norm=False)  # as the card says
        right = told.forward_head(told.forward_features(images), pre_logits=True)
        assert (right - expected).abs().max() <= 1e-5
    card = (tmp_path / "plain" / "out" / "README.md").read_text()
    assert "`fc_norm=False`" in card


def test_an_export_without_class_token_is_pooled_behind_its_trained_norm_by_default(tmp_path: Path) -> None:
    config = tiny_config(class_token=False)
    state, report = export(tmp_path, config, global_pool="avg")
    assert report.changes == []
    own = create_backbone(config)
    own.load_state_dict(state)
    with torch.inference_mode():
        expected = own.eval().forward_features(pictures(32, 32)).mean(dim=1)
        assert (stock(tmp_path)(pictures(32, 32)) - expected).abs().max() <= 1e-5


# --- registers


def run_with_data(folder: Path, shards: Path, manifest_hash: str | None = None) -> Path:
    """A run with one register, whose checkpoint says where its data lie."""
    checkpoint = write_checkpoint(folder / "run", tiny_config(), ("rotation",))
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    config["data"] = {"shards": str(shards)}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    state = json.loads((checkpoint / "state.json").read_text())
    state["identity"] = {"manifest_hash": [manifest_hash or Manifest.load(shards).hash]}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    return folder / "run"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-0.tar", samples(0, 20, height=40, width=32))
    index_folder(folder)
    return folder


def dropped(run: Path, out: Path) -> dict[str, Any]:
    (done,) = export_run(run, [Target("timm", out)], ExportOptions(drop_registers=True))
    assert isinstance(done, Exported)
    (change,) = done.report.changes
    return change


def test_without_registers_the_others_stay_as_they_are_and_the_change_is_measured_on_the_runs_images(
    shards: Path, tmp_path: Path
) -> None:
    run = run_with_data(tmp_path, shards)
    change = dropped(run, tmp_path / "out")
    before = load_file(run / "checkpoints" / "step-00001000" / "weights" / "student.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "reg_token" not in after
    positions = before["backbone.pos_embed"]
    assert torch.equal(after["pos_embed"], torch.cat([positions[:, :1], positions[:, 2:]], dim=1))
    assert len(after) == len([name for name in before if name.startswith("backbone.")]) - 1

    # the same measured by hand: the middle 32 rows of each picture, normalised
    assert change["measured_on"] == f"the first 16 images of {shards} (train)"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = []
    for number in range(16):
        decoded = simplejpeg.decode_jpeg(jpeg(number, height=40, width=32))
        pixels = torch.from_numpy(decoded).permute(2, 0, 1)[:, 4:36]
        images.append((pixels.float() / 255 - mean) / std)
    whole = create_backbone(tiny_config(), 1)
    whole.load_state_dict({n.removeprefix("backbone."): v for n, v in before.items() if "backbone" in n})
    with torch.inference_mode():
        old = whole.eval().forward_features(torch.stack(images))
        new = stock(tmp_path).forward_features(torch.stack(images))
    for name, (a, b) in {
        "class": (old[:, 0], new[:, 0]),
        "mean_patch": (old[:, 2:].mean(1), new[:, 1:].mean(1)),
    }.items():
        relative = ((b - a).norm(dim=1) / a.norm(dim=1)).mean().item()
        assert change["features"][name]["relative"] == pytest.approx(relative, rel=1e-3)
        assert change["features"][name]["cosine"] == pytest.approx(F.cosine_similarity(a, b).mean().item())
    assert change["features"]["class"]["relative"] > 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without the registers rotation: class feature changed by" in card


@pytest.mark.parametrize("data", ["other data", "no data", "remote data"])
def test_where_the_runs_data_are_not_at_hand_noise_is_used_and_told(
    data: str, shards: Path, tmp_path: Path
) -> None:
    if data == "other data":
        run = run_with_data(tmp_path, shards, "0" * 64)
        told = "holds other data than those of the run"
    else:
        place = tmp_path / "gone" if data == "no data" else Path("http://127.0.0.1:1/shards")
        run = run_with_data(tmp_path, shards)
        checkpoint = run / "checkpoints" / "step-00001000"
        config = yaml.safe_load((checkpoint / "config.yaml").read_text())
        config["data"] = {"shards": str(place).replace("http:/1", "http://1")}
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
        seal(checkpoint)
        told = "gone" if data == "no data" else "the run's data are not on this machine"
    change = dropped(run, tmp_path / "out")
    assert change["measured_on"].startswith("16 images of seeded noise (")
    assert told in change["measured_on"]


def test_registers_are_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    state, report = export(tmp_path, tiny_config(), ("rotation", "cluster"))
    assert report.registers == ("rotation", "cluster")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["reg_token"], state["reg_token"])
