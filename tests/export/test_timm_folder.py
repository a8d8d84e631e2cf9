"""An exported folder gives the checkpoint's features in stock timm, or there is no folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from run_folder import MEAN, STD, random_state, seal, tiny_config, write_checkpoint
from safetensors.torch import load_file

from pretrain.errors import CheckpointError, UserError
from pretrain.export import timm_folder
from pretrain.export.parity import ParityError
from pretrain.export.timm_folder import export_timm
from pretrain.models.backbone import BackboneConfig, create_backbone

MODELS: dict[str, tuple[BackboneConfig, tuple[str, ...]]] = {
    "class token and registers": (tiny_config(), ("rotation", "cluster")),
    "class token only": (tiny_config(img_px=48, patch_px=16), ()),
    "no class token": (tiny_config(class_token=False), ()),
    "registers but no class token": (tiny_config(class_token=False), ("rotation",)),
    "no positions": (tiny_config(pos_embed="none", patch_px=4), ("rotation",)),
    "drop path": (tiny_config(drop_path_ratio=0.5), ()),
}


def features_of(state: dict[str, torch.Tensor], config: BackboneConfig, num_registers: int) -> Any:
    """Images, and what the checkpoint's own network makes of them."""
    model = create_backbone(config, num_registers)
    model.load_state_dict(state)
    images = torch.randn(2, 3, config.img_px, config.img_px, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return images, model.eval().forward_features(images)


@pytest.mark.parametrize("name", MODELS)
def test_stock_timm_reproduces_the_checkpoint(name: str, tmp_path: Path) -> None:
    config, registers = MODELS[name]
    state = random_state(config, len(registers))
    write_checkpoint(tmp_path / "run", config, registers, networks={"student": state})
    report = export_timm(tmp_path / "run", tmp_path / "out")
    images, expected = features_of(state, config, len(registers))
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        assert (model.forward_features(images) - expected).abs().max() <= 1e-5
    assert set(report.matched) == set(load_file(tmp_path / "out" / "model.safetensors")) == set(state)
    assert not report.missing
    assert not report.unexpected
    assert report.max_abs_difference <= report.tolerance


def test_a_fresh_interpreter_without_this_project_gives_the_same_features(tmp_path: Path) -> None:
    config, registers = tiny_config(), ("rotation",)
    state = random_state(config, 1)
    write_checkpoint(tmp_path / "run", config, registers, networks={"student": state})
    export_timm(tmp_path / "run", tmp_path / "out")
    images, expected = features_of(state, config, 1)
    torch.save((images, expected), tmp_path / "expected.pt")
    script = f"""
import sys, pathlib
sys.path[:] = [p for p in sys.path if not (pathlib.Path(p) / "pretrain").is_dir()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f)]
import timm, torch
images, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = timm.create_model({"local-dir:" + str(tmp_path / "out")!r}, pretrained=True).eval()
with torch.inference_mode():
    difference = (model.forward_features(images) - expected).abs().max().item()
assert "pretrain" not in sys.modules
try:
    import pretrain
except ModuleNotFoundError:
    print(difference)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 1e-5


def test_the_folder_carries_the_normalisation_and_interpolation_of_the_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation",))
    export_timm(tmp_path / "run", tmp_path / "out", license="cc-by-4.0")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    found = timm.data.resolve_model_data_config(model)
    assert (list(found["mean"]), list(found["std"])) == (MEAN, STD)
    assert found["interpolation"] == "bilinear"  # of the view at the model's size
    assert found["crop_pct"] == 1.0
    assert tuple(found["input_size"]) == (3, 32, 32)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["model_args"]["reg_tokens"] == 1
    assert stored["pretrained_cfg"]["tag"] == "contrastive-rotation_cifar10"
    assert stored["pretrained_cfg"]["license"] == "cc-by-4.0"


def test_timm_adapts_the_folder_to_a_classifier_and_another_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation",))
    export_timm(tmp_path / "run", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7, img_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_the_teacher_is_preferred_and_the_student_can_be_asked_for(tmp_path: Path) -> None:
    config = tiny_config()
    networks = {name: random_state(config, 0, seed) for seed, name in enumerate(("student", "teacher"))}
    write_checkpoint(tmp_path / "run", config, networks=networks)
    for asked, expected in ((None, "teacher"), ("student", "student"), ("teacher", "teacher")):
        report = export_timm(tmp_path / "run", tmp_path / f"out-{asked}", asked)  # type: ignore[arg-type]
        assert report.source_weights == expected
        stored = load_file(tmp_path / f"out-{asked}" / "model.safetensors")
        torch.testing.assert_close(stored["cls_token"], networks[expected]["cls_token"], rtol=0, atol=0)


def test_the_card_says_how_to_load_and_what_the_tokens_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation", "cluster"))
    records = [
        {"step": 900, "loss": 1.5},
        {"step": 1000, "loss": 1.25, "accuracy": {"rotation": 0.5}},
        {"step": 1100, "loss": 0.5},
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 12']))
    export_timm(tmp_path / "run", tmp_path / "out", license="mit")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert 'timm.create_model("local-dir:out", pretrained=True)' in card
    assert card.index("the class token") < card.index("`rotation`") < card.index("`cluster`")
    assert "| accuracy/rotation | 0.5 |" in card
    assert "| loss | 1.25 |" in card  # the record of this step, not of a later one


def test_exporting_leaves_the_random_state_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    before = torch.random.get_rng_state()
    export_timm(tmp_path / "run", tmp_path / "out")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), step=1000)
    newest = write_checkpoint(tmp_path / "run", tiny_config(), step=2000)
    damage(newest / "weights" / "student.safetensors")
    assert export_timm(tmp_path / "run", tmp_path / "out").source_step == 1000
    with pytest.raises(CheckpointError, match=r"sha256 .* damaged"):
        export_timm(newest, tmp_path / "other")
    nothing_left(tmp_path, "other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_even_if_an_older_checkpoint_is_sound(
    value: float, tmp_path: Path
) -> None:
    state = random_state(tiny_config(), 0)
    state["blocks.1.mlp.fc1.weight"][3, 2] = value
    write_checkpoint(tmp_path / "run", tiny_config(), step=1000)
    write_checkpoint(tmp_path / "run", tiny_config(), step=2000, networks={"student": state})
    with pytest.raises(CheckpointError, match=r"NaN or Inf.*blocks\.1\.mlp\.fc1\.weight"):
        export_timm(tmp_path / "run", tmp_path / "out")
    nothing_left(tmp_path, "out")


def with_teacher(checkpoint: Path) -> None:
    """Let its config say that the run has a teacher."""
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    config["teacher"] = {"momentum": 0.9}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    seal(checkpoint)


def test_the_student_is_not_taken_for_a_teacher_that_is_missing(tmp_path: Path) -> None:
    """Row 51: a checkpoint that has lost its teacher, manifest and all."""
    state = random_state(tiny_config(), 0)
    with_teacher(write_checkpoint(tmp_path / "run", tiny_config(), networks={"student": state}))
    for run in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00001000"):
        with pytest.raises(CheckpointError, match=r"its run has a teacher, whose weights are not here"):
            export_timm(run, tmp_path / "out")
        nothing_left(tmp_path, "out")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=r"--weights student"):
            export_timm(run, tmp_path / "empty")
        assert not list((tmp_path / "empty").iterdir())
    report = export_timm(tmp_path / "run", tmp_path / "out", "student")
    assert report.source_weights == "student"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(stored["cls_token"], state["cls_token"], rtol=0, atol=0)


def test_a_checkpoint_before_the_one_that_lost_its_teacher_is_exported(tmp_path: Path) -> None:
    """Row 51."""
    networks = {
        name: random_state(tiny_config(), 0, seed) for seed, name in enumerate(("student", "teacher"))
    }
    with_teacher(write_checkpoint(tmp_path / "run", tiny_config(), step=1000, networks=networks))
    with_teacher(write_checkpoint(tmp_path / "run", tiny_config(), step=2000))
    report = export_timm(tmp_path / "run", tmp_path / "out")
    assert (report.source_step, report.source_weights) == (1000, "teacher")


def test_asking_for_an_absent_teacher_lists_what_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    with pytest.raises(UserError, match=r"no teacher weights.*student"):
        export_timm(tmp_path / "run", tmp_path / "out", "teacher")
    nothing_left(tmp_path, "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "missing: norm.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda state: state.update(cls_token=torch.zeros(1, 1, 12)), "size mismatch for cls_token"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = random_state(tiny_config(), 0)
    change(state)
    write_checkpoint(tmp_path / "run", tiny_config(), networks={"student": state})
    with pytest.raises(CheckpointError, match=message):
        export_timm(tmp_path / "run", tmp_path / "out")
    nothing_left(tmp_path, "out")


def test_a_folder_of_somebody_else_is_never_written_to(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    (tmp_path / "out").mkdir()
    export_timm(tmp_path / "run", tmp_path / "out")  # empty: fine
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["README.md", "config.json", "export_report.json", "model.safetensors"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "export_report.json").write_text('{"title": "mine"}')
    for place in ("file", "thesis"):
        with pytest.raises(UserError, match="exists and is not an export of ours"):
            export_timm(tmp_path / "run", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "thesis" / "export_report.json").read_text() == '{"title": "mine"}'


@pytest.mark.parametrize(
    ("break_config", "message"),
    [
        (lambda config: config["model_args"].update(num_heads=4), "features differ"),
        (lambda config: config["pretrained_cfg"].update(mean=[0.5, 0.5, 0.5]), "mean"),
    ],
)
def test_an_export_that_stock_timm_reads_otherwise_fails_and_leaves_nothing(
    break_config: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    right = timm_folder.timm_config

    def wrong(*arguments: Any) -> dict[str, Any]:
        config = right(*arguments)
        break_config(config)
        return config

    monkeypatch.setattr(timm_folder, "timm_config", wrong)
    with pytest.raises(ParityError, match=message):
        export_timm(tmp_path / "run", tmp_path / "out")
    nothing_left(tmp_path, "out")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder"):
        export_timm(tmp_path, tmp_path / "out")


def test_a_config_that_is_not_a_runs_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", tiny_config())
    (checkpoint / "config.yaml").write_text("model: {name: vit_small_patch16_224, colour: red}\n")
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        export_timm(checkpoint, tmp_path / "out")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def nothing_left(folder: Path, name: str) -> None:
    assert not [path for path in folder.iterdir() if name in path.name]
