"""Configs and photographs of the runs that the tests of the report are about."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from small_shards import write_shard

from pretrain.data.indexing import index_folder

MULTITASK = """\
seed: 5
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 2, embed_dim: 24, num_heads: 2}}
data: {shards: shards, lanes: 4, decode_threads: 0}
views:
  one: &view {size_px: 32, turn: true, jitter: {prob: 0.0}, gray_prob: 0.0}
  two: *view
tasks:
  contrastive: {hidden_dim: 16, out_dim: 8}
  rotation: {}
  colorization: {}
  inpainting: {norm_pix: true}
  relative_position: {hidden_dim: 16}
  jigsaw: {}
optim: {base_lr: 2e-3}
schedule: {kind: constant, steps: 4}
batch: {global_size: 8}
engine: {kind: local, precision: fp32}
checkpoint: {every_steps: 2}
log: {every_steps: 1, prometheus: {port: 0}}
export: {at_end: false}
"""
NUM_CLASSES = 4


def photograph(number: int, height: int = 48, width: int = 40) -> bytes:
    """A coloured square of its class on a striped ground, as PNG: pixels are what was drawn."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    ground = 110 + 50 * np.sin(rows / rng.uniform(2, 5) + columns / rng.uniform(3, 9))
    pixels = np.stack([ground * rng.uniform(0.5, 1) for _ in range(3)], axis=2)
    top, left = rng.integers(4, height - 24), rng.integers(2, width - 20)
    colour = np.array([[230, 40, 40], [40, 220, 60], [50, 70, 230], [230, 210, 40]])[number % NUM_CLASSES]
    pixels[top : top + 20, left : left + 18] = colour
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_photographs(folder: Path, classes: tuple[str, ...] = ()) -> Path:
    """40 images for training and 24 for evaluation, labelled."""
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(40)), ("test", range(40, 64))):
        members = []
        for number in numbers:
            members.append((f"{number:06d}.png", photograph(number)))
            members.append((f"{number:06d}.cls", b"%d" % (number % NUM_CLASSES)))
        write_shard(folder / f"set-{split}-0000.tar", members)
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    index_folder(folder)
    return folder
