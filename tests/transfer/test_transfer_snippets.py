"""The snippets of docs/transfer.md, pasted into a folder that holds an export."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from run_folder import tiny_config, write_checkpoint

from pretrain.export.timm_folder import export_timm

GUIDE = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
SNIPPETS = dict(re.findall(r"^```python (\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snippets")
    config = tiny_config(img_px=32, patch_px=16, args={"depth": 4, "embed_dim": 24, "num_heads": 2})
    write_checkpoint(folder / "run", config, ("rotation",))
    export_timm(folder / "run", folder / "exported")
    return folder


def test_the_guide_has_a_snippet_for_each_library() -> None:
    assert set(SNIPPETS) == {"torchvision", "segmentation_models_pytorch", "detectron2", "mmdet", "mmseg"}


@pytest.mark.parametrize("library", sorted(SNIPPETS))
def test_a_snippet_works_when_pasted(library: str, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # mmcv without its compiled operators can be installed, and then imports neither of these two
    for name in (library, *(["mmcv", "mmcv._ext"] if library.startswith("mm") else [])):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(exported)
    exec(compile(SNIPPETS[library], f"docs/transfer.md: {library}", "exec"), {"__name__": "__main__"})
