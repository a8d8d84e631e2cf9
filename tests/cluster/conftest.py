"""One cluster for all tests of this folder, brought up when the first asks for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, why_absent
from small_shards import make_shards

# 12 lanes and 24 images a step can be shared by 1, 2, 3 and 4 ranks
CONFIG = """
seed: 3
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {shards: SHARDS, lanes: 12, shuffle_block: 4, resident: true}
views:
  one: &view {size_px: 32, turn: true, interpolation: bilinear}
  two: *view
tasks:
  contrastive: {hidden_dim: 32, out_dim: 16}
  rotation: {}
teacher: {momentum: 0.9}
optim: {base_lr: 0.02}
schedule: {steps: 12, warmup_steps: 2}
batch: {global_size: 24, accumulation_steps: 2}
engine: {precision: fp32}
checkpoint: {every_steps: 3, keep_last: 100}
log: {every_steps: 1, prometheus: {enabled: false}}
"""


@pytest.fixture(scope="session")
def a_cluster() -> Iterator[SlurmCluster]:
    problem = why_absent()
    if problem:
        pytest.skip(problem)
    # munge makes a socket in it, whose path must be short
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = SlurmCluster(Path(os.environ["SLURM_TEST_CLUSTER"]).resolve(), folder / "c")
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder)


@pytest.fixture
def cluster(a_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with all nodes idle; what a test leaves behind is cancelled and mended."""
    yield a_cluster
    a_cluster.control("scancel", "--user=root")
    for number in range(1, a_cluster.num_nodes + 1):
        a_cluster.node("join", f"node{number}")
    a_cluster.wait_until_idle()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on 96 images, DeepSpeed ZeRO-1, that takes a second once its ranks have started."""
    folder = tmp_path_factory.mktemp("tiny")
    make_shards(folder / "shards", [24] * 4, height=32, width=32)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder / "shards")))
    return path
