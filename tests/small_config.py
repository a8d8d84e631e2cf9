"""A small, complete run as YAML, for the tests of what is built around a config."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import RunConfig, load_config

CONFIG = """\
seed: 3
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 2, embed_dim: 24, num_heads: 2}}
data: {shards: shards, lanes: 4}
views:
  one: &view {size_px: 32, turn: true}
  two: *view
tasks:
  contrastive: {hidden_dim: 16, out_dim: 8}
  rotation: {}
  jigsaw: {}
schedule: {steps: 10}
batch: {global_size: 16, accumulation_steps: 2}
engine: {precision: fp32}
"""


def write_config(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def small_config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write_config(folder), overrides)
