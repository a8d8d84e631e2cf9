"""Every method under configs/methods: it fits together, takes the encoder passes it should, and runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from method_configs import BATCH, NAMES, PATHS, reduced, reduced_config
from PIL import Image
from safetensors.torch import load_file
from small_shards import write_shard

from pretrain import build, checkpoint
from pretrain.check import check
from pretrain.cli import main
from pretrain.config import RunConfig, load_config
from pretrain.data.indexing import index_folder
from pretrain.models.t2t import register_t2t
from pretrain.peers import ALONE
from pretrain.views.plan import encoder_calls
from pretrain.views.prepare import Inputs, Moment, prepare, with_labels

NUM_STEPS = 40
NUM_IMAGES = 64
# one pass for each shape of view: DINO's small crops, and a masked view beside whole ones, need a second
TWO_PASSES = {"dino", "mae_contrastive"}
ONE_TEACHER_PASS = ("moco", "byol", "moby", "dino", "sit_v3", "ijepa")


def picture(number: int) -> bytes:
    """Stripes in a colour, at a width and a slant of its own, darker towards the ground: 72 px.

    Something to learn for every method in a few steps: images differ, and places within them differ.
    """
    rng = np.random.default_rng(number)
    row, column = np.mgrid[:72, :72] / 72
    slant, stripes, phase = rng.uniform(0, np.pi), rng.uniform(2, 9), rng.uniform(0, 1)
    wave = np.sin(2 * np.pi * (stripes * (row * np.sin(slant) + column * np.cos(slant)) + phase))
    colours = rng.uniform(60, 255, (2, 3))
    mixed = colours[0] + (colours[1] - colours[0]) * (wave[..., None] + 1) / 2
    pixels = mixed * (1 - 0.7 * row[..., None]) + rng.normal(0, 4, (72, 72, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    members = []
    for number in range(NUM_IMAGES):
        members += [(f"{number:06d}.jpg", picture(number)), (f"{number:06d}.cls", b"%d" % (number % 10))]
    write_shard(folder / "train-0000.tar", members)
    index_folder(folder)
    return folder


def inputs_of(config: RunConfig) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sizes = list(dict.fromkeys(view.size_px for view in config.views.values()))
    crops = []
    for size in sizes:
        count = sum(view.size_px == size for view in config.views.values())
        shape = (count, BATCH, size, size, 3)
        crops.append(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
    ids = torch.arange(BATCH)
    inputs = prepare(build.recipe(config), config.seed, crops, torch.zeros_like(ids), ids)
    return with_labels(inputs, ids % 10, Moment(0, 10, 0.0))


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_config_of_full_size_fits_together(path: Path) -> None:
    config = load_config(path)
    check(config, world_size=1)
    head = path.read_text().split("\nseed:")[0].split("\nextends:")[0]
    for part in ("pretrain train", "# Hardware:", "# Expected time:", "# Source:", "# Deviations:"):
        assert part in head, part
    assert f"configs/methods/{path.name}" in head
    assert "# Expected result:" in head


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_each_view_is_encoded_once_and_everything_trained_gets_a_gradient(path: Path, shards: Path) -> None:
    """T-RP-6 and its like: one student pass for each shape of view, one of the teacher for all of them."""
    config = reduced_config(path, shards)
    check(config, world_size=1)
    model = build.module(config, ALONE, torch.device("cpu"), NUM_IMAGES).train()
    if "cluster_labels" in model.tasks:
        model.tasks["cluster_labels"].assign(torch.arange(NUM_IMAGES) % 4, epoch=0)
    teacher = model.make_teacher()
    inputs = model.consult(teacher, inputs_of(config))
    named = model(inputs)
    named["total"].backward()
    is_double = any(path.stem.removeprefix("repre_").startswith(name) for name in TWO_PASSES)
    assert model.num_backbone_calls == len(encoder_calls(config.views)) == 1 + is_double
    is_taught = any(name in path.stem for name in ONE_TEACHER_PASS)
    assert teacher.num_calls == int(is_taught)
    assert all(torch.isfinite(value) for value in named.values())
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith(("backbone.patch_embed", "backbone.pos_embed")) for name in frozen)


def pretrain(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_method_learns_resumes_to_the_same_bits_and_its_export_opens_in_timm(
    path: Path, shards: Path, tmp_path: Path
) -> None:
    """Through the real command, at reduced size: 40 steps, then from step 20 once more."""
    overrides = reduced(path, shards, NUM_STEPS)
    run, again, exported = tmp_path / "run", tmp_path / "again", tmp_path / "exported"
    pretrain("train", path, "--output-dir", run, *overrides)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # DINO's loss is the teacher's entropy, which grows as the centre finds its place, plus what is learned
    losses = [record.get("dino/divergence", record["total"]) for record in records]
    assert len(losses) == NUM_STEPS
    quarter = NUM_STEPS // 4
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    assert last < first, (first, last)

    half = checkpoint.step_folder(run, NUM_STEPS // 2)
    pretrain("train", path, "--output-dir", again, "--resume", half, *overrides)
    for name in (checkpoint.STUDENT, checkpoint.OPTIMIZER, checkpoint.TEACHER):
        ends = [checkpoint.step_folder(folder, NUM_STEPS) / name for folder in (run, again)]
        assert ends[0].exists() == ends[1].exists()
        if ends[0].exists():
            one, other = map(load_file, ends)
            assert one.keys() == other.keys()
            assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []

    assert main(["export", str(run), "--out", str(exported)]) == 0
    register_t2t()
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    side = load_config(path, overrides).model.img_px
    assert torch.isfinite(model(torch.randn(1, 3, side, side))).all()
