"""Another version of timm opens what this one has exported, and exports the same itself.

pip install --target DIR --no-deps timm==1.0.16
OTHER_TIMM=DIR pytest -m slow tests/export/test_other_timm.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from run_folder import tiny_config, write_checkpoint
from safetensors.torch import load_file

from pretrain.export.exporting import Target, export_run
from pretrain.export.options import ExportOptions
from pretrain.models.backbone import BackboneConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("OTHER_TIMM" not in os.environ, reason="OTHER_TIMM names no folder with another timm"),
]

SWIN_T = BackboneConfig(name="swin_tiny_patch4_window7_224", img_px=224, patch_px=4)
RUNS: dict[str, tuple[BackboneConfig, tuple[str, ...]]] = {
    "registers": (tiny_config(), ("rotation", "cluster")),
    "no-class-token": (tiny_config(class_token=False), ()),
    "registers-only": (tiny_config(class_token=False), ("rotation",)),
    "sincos": (tiny_config(pos_embed="sincos"), ("rotation",)),
    "swin-t": (SWIN_T, ()),
}
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "larger": {"img_px": 64},
    "pooled": {"global_pool": "avg"},
}

READ = """
import sys
import timm, torch
print(timm.__version__)
for folder, (images, tokens, pooled) in torch.load(sys.argv[1]).items():
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        found = model.forward_features(images), model(images)
    assert found[0].shape == tokens.shape, folder
    assert torch.equal(found[0], tokens) or (found[0] - tokens).abs().max() < 1e-5, folder
    assert (found[1] - pooled).abs().max() < 1e-5, folder
"""


def other(*arguments: str | Path, pretrain: bool = False) -> subprocess.CompletedProcess[str]:
    paths = [os.environ["OTHER_TIMM"], *([str(Path(__file__).parents[2])] if pretrain else [])]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, (config, registers) in RUNS.items():
        write_checkpoint(folder / name, config, registers)
    return folder


def test_it_gives_the_same_features_from_our_folders(folder: Path) -> None:
    expected = {}
    for name in RUNS:
        for kind, asked in ASKED.items():
            out = folder / f"{name}-{kind}"
            export_run(folder / name, [Target("timm", out)], ExportOptions(**asked))
            model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            images = torch.randn(1, 3, *model.patch_embed.img_size)
            with torch.inference_mode():
                expected[str(out)] = images, model.forward_features(images), model(images)
    torch.save(expected, folder / "expected.pt")
    (folder / "read.py").write_text(READ)
    done = other(folder / "read.py", folder / "expected.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != timm.__version__


@pytest.mark.parametrize("name", RUNS)
def test_it_writes_the_same_weights_and_proves_them(name: str, folder: Path) -> None:
    for kind, asked in ASKED.items():
        flags = [part for key, value in asked.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        out = folder / f"{name}-{kind}-by-other"
        done = other("-m", "pretrain", "export", folder / name, "--out", out, *flags, pretrain=True)
        assert done.returncode == 0, done.stderr
        export_run(folder / name, [Target("timm", folder / f"{name}-{kind}")], ExportOptions(**asked))
        ours, theirs = (load_file(folder / part / "model.safetensors") for part in (f"{name}-{kind}", out))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-6)


def test_where_it_would_drop_tokens_it_is_told_or_right(folder: Path) -> None:
    write_checkpoint(folder / "no-positions", tiny_config(pos_embed="none"), ("rotation",))
    done = other(
        "-m", "pretrain", "export", folder / "no-positions", "--out", folder / "np-by-other", pretrain=True
    )
    if done.returncode:
        assert done.returncode == 2
        assert "silently drops class token and registers" in done.stderr
        assert "install timm>=1.0.26" in done.stderr
    else:
        assert "33 of 33 tensors" in done.stdout or "30 of 30 tensors" in done.stdout
