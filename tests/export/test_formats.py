"""The table of formats, and what is the same for all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import random_state, tiny_config, write_checkpoint

from pretrain.cli import main
from pretrain.errors import UserError
from pretrain.export.exporting import Exported, Impossible, Target, export_run
from pretrain.export.formats import FORMATS, chosen, writer
from pretrain.export.options import ExportOptions
from pretrain.models.backbone import create_backbone


def test_every_format_of_the_table_has_a_writer() -> None:
    assert all(callable(writer(name)) for name in FORMATS)


def test_the_guide_has_a_row_for_every_format() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert [name for name in FORMATS if f"\n| `{name}` | " not in guide] == []


def test_formats_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert chosen(["all"]) == chosen(["onnx", "all"]) == list(FORMATS)
    assert chosen(["dino", "timm", "dino"]) == ["timm", "dino"]
    with pytest.raises(UserError, match="--format torchvisio: did you mean 'torchvision'"):
        chosen(["timm", "torchvisio"])


def test_a_format_without_a_place_for_registers_is_refused_or_told_of(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation",))
    targets = [Target("torchvision", tmp_path / "a"), Target("timm", tmp_path / "b")]
    with pytest.raises(UserError, match=r"no place for the register tokens .*--drop-registers"):
        export_run(tmp_path / "run", targets)
    assert not (tmp_path / "a").exists()
    refused, done = export_run(tmp_path / "run", targets, skip_impossible=True)
    assert isinstance(refused, Impossible)
    assert "no place for the register tokens" in refused.why
    assert isinstance(done, Exported)
    assert not (tmp_path / "a").exists()
    (kept,) = export_run(tmp_path / "run", targets[:1], ExportOptions(drop_registers=True))
    assert isinstance(kept, Exported)


@pytest.mark.parametrize(
    "format", ["transformers", "torchvision", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_the_card_of_a_format_loads_it_and_its_report_lists_its_files(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another size than the run's: what was changed is what every format holds."""
    state = random_state(tiny_config(), 0)
    write_checkpoint(tmp_path / "run", tiny_config(), networks={"student": state})
    out = tmp_path / "out"
    (done,) = export_run(tmp_path / "run", [Target(format, out)], ExportOptions(img_px=48))
    assert isinstance(done, Exported)
    report = json.loads((out / "export_report.json").read_text())
    assert set(report["files"]) == {path.name for path in out.iterdir()} - {"export_report.json"}
    assert len(report["matched"]) == len(state)
    card = (out / "README.md").read_text()
    assert "timm.create_model" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    named: dict[str, Any] = {"images": images}
    with torch.inference_mode():
        exec(code, named)

        own = create_backbone(tiny_config(img_px=48))
        positions = torch.nn.functional.interpolate(
            state["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2), (6, 6), mode="bicubic"
        )
        resampled = torch.cat([state["pos_embed"][:, :1], positions.flatten(2).mT], dim=1)
        own.load_state_dict({**state, "pos_embed": resampled})
        expected = own.eval().forward_features(images)
    if "tokens" in named:
        assert (torch.as_tensor(named["tokens"]) - expected).abs().max() <= 1e-4
    else:
        assert (named["features"] - expected[:, 0]).abs().max() <= 1e-4


def test_each_format_is_up_to_date_or_replaced_by_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    target = Target("torchvision", tmp_path / "out")
    states = []
    for options in (None, None, ExportOptions(img_px=48)):
        (done,) = export_run(tmp_path / "run", [target], options)
        assert isinstance(done, Exported)
        states.append(done.state)
    assert states == ["written", "up to date", "replaced"]
    (done,) = export_run(tmp_path / "run", [Target("timm", tmp_path / "out")], options)
    assert isinstance(done, Exported)
    assert (done.state, (tmp_path / "out" / "model.pth").exists()) == ("replaced", False)


@pytest.mark.slow
def test_all_formats_at_once_tell_what_each_can_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("rotation",))
    assert main(["export", str(tmp_path / "run"), "--format", "all", "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()[-len(FORMATS) - 1 :]
    told = {line.split()[0]: line for line in table}
    assert list(told)[1:] == list(FORMATS)
    assert all("impossible" in told[name] for name in ("torchvision", "mmdet", "mmseg", "mmpretrain"))
    assert all("31 of 31" in told[name] for name in ("timm", "hf-hub", "transformers", "dino", "onnx"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"timm", "hf-hub", "transformers", "detectron2", "dino", "onnx"}
