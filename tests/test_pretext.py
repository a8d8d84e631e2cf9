"""Pretext tasks of a finished run, on images it has not seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from method_configs import METHODS, reduced
from small_shards import samples, write_shard

from pretrain.cli import main
from pretrain.data.indexing import index_folder
from pretrain.errors import UserError
from pretrain.pretext import plain, run_pretext
from pretrain.views.plan import ViewConfig

RELVIT = METHODS / "relvit_vits4_cifar10.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-0000.tar", samples(0, 32, height=32, width=32))
    write_shard(folder / "test-0000.tar", samples(32, 21, height=32, width=32))
    index_folder(folder)
    return folder


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With positions the relations of patches can be read off, so a few steps suffice to learn some."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = [*reduced(RELVIT, shards, 60), "engine.kind=local", "model.pos_embed=learn"]
    assert main(["train", str(RELVIT), "--output-dir", str(folder), *overrides]) == 0
    return folder


def test_it_measures_whole_batches_of_the_named_split_and_tells_what_was_learned(
    run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "pretext", str(run), "--test", str(shards), "--batch-size", "10"]) == 0
    said = capsys.readouterr().out
    assert "step 60: 20 images of" in said
    result = json.loads((run / "eval" / "pretext.json").read_text())
    accuracy = result["values"]["spatial_relation/accuracy"]
    assert f"{accuracy:.4f}" in said
    assert accuracy > result["values"]["spatial_relation/chance"] + 0.05
    again = run_pretext(run, f"{shards}:test", batch_size=10, device="cpu")
    assert again.values == result["values"]  # nothing is random, and the run was not changed
    trained_on = run_pretext(run, f"{shards}:train", batch_size=10, device="cpu")
    assert trained_on.num_images == 30
    assert trained_on.values != again.values


def test_too_few_images_and_missing_runs_end_in_one_line(run: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 21 images, fewer than a batch of 50"):
        run_pretext(run, str(shards), batch_size=50)
    with pytest.raises(UserError, match="no whole checkpoint"):
        run_pretext(tmp_path, str(shards))


def test_a_plain_view_keeps_what_tasks_ask_about() -> None:
    view = ViewConfig(size_px=32, turn=True, shift_px=4, patch_augment=True, shuffle=True)
    shown = plain(view)
    assert (shown.turn, shown.shuffle, shown.size_px) == (True, True, 32)
    assert (shown.shift_px, shown.patch_augment, shown.flip_prob, shown.jitter.prob) == (0, False, 0.0, 0.0)
