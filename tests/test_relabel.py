"""DeepCluster through the loop: labels come at the start of an epoch, on all ranks, and outlive a resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from method_configs import METHODS, reduced
from ranks import run_on_ranks
from safetensors.torch import load_file
from small_shards import make_shards

from pretrain import build, checkpoint, cluster
from pretrain.cli import main
from pretrain.config import load_config
from pretrain.data.loader import open_splits
from pretrain.relabel import Relabeler
from pretrain.tasks.cluster_labels import ClusterLabelsTask

CONFIG = METHODS / "deepcluster_vits4_cifar10.yaml"
NUM_IMAGES = 34  # four epochs of 4.25 steps: two images are left over by four lanes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, [20, 14], height=40, width=40)
    return folder


def test_images_are_clustered_at_each_epoch_and_a_resume_does_not_change_it(
    shards: Path, tmp_path: Path
) -> None:
    overrides = [*reduced(CONFIG, shards, num_steps=10), "engine.kind=local", "checkpoint.every_steps=5"]
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["train", str(CONFIG), "--output-dir", str(run), *overrides]) == 0
    lines = (run / "train.log").read_text().splitlines()
    told = [line.split(" | ")[-1] for line in lines if "clusters, in" in line]
    assert len(told) == 3
    for epoch, line in enumerate(told):
        found = re.search(rf"epoch {epoch}: (\d+) of 34 images in 4 clusters", line)
        assert found, line
        assert int(found[1]) >= 32  # a round of the lanes, and what the last batch reads beyond it
    weights = load_file(checkpoint.step_folder(run, 10) / checkpoint.STUDENT)
    assert int(weights["tasks.cluster_labels.assigned_epoch"]) == 2
    labels = weights["tasks.cluster_labels.assignments"]
    assert set(labels[labels >= 0].tolist()) == {0, 1, 2, 3}
    # step 5 is the first of epoch 1: it is clustered anew after the resume, to the same labels
    half = checkpoint.step_folder(run, 5)
    assert main(["train", str(CONFIG), "--output-dir", str(again), "--resume", str(half), *overrides]) == 0
    other = load_file(checkpoint.step_folder(again, 10) / checkpoint.STUDENT)
    assert [name for name, value in weights.items() if not torch.equal(value, other[name])] == []
    losses = [
        json.loads(line)["loss/cluster_labels"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(loss > 0 for loss in losses)


def label_on_rank(place: cluster.Cluster, shards: Path, stage: int, folder: Path) -> None:
    config = load_config(
        CONFIG, [*reduced(CONFIG, shards, 10), f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}"]
    )
    peers = cluster.peers(place)
    module = build.module(config, peers, torch.device("cpu"), NUM_IMAGES)
    task = module.tasks["cluster_labels"]
    assert isinstance(task, ClusterLabelsTask)
    splits = open_splits(config.data)
    relabeler = Relabeler(config, task, module.backbone, splits, NUM_IMAGES, peers, torch.device("cpu"))
    engine = build.engine(config, module, peers)
    relabeler.relabel(engine, epoch=1.0)
    weights = engine.weights()
    if place.is_first:
        torch.save({**weights, "fresh": task.fresh_classifier(1)["head.weight"]}, folder / f"stage{stage}.pt")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_cluster_the_same_at_every_stage_and_the_new_classifier_is_taken_over(
    shards: Path, tmp_path: Path
) -> None:
    found = {}
    for stage in (0, 1, 3):
        run_on_ranks(2, label_on_rank, shards, stage, tmp_path)
        found[stage] = torch.load(tmp_path / f"stage{stage}.pt")
        head = found[stage]["tasks.cluster_labels.head.weight"]
        torch.testing.assert_close(head, found[stage]["fresh"], rtol=0, atol=0)
    labels = [record["tasks.cluster_labels.assignments"] for record in found.values()]
    assert all(torch.equal(labels[0], other) for other in labels[1:])
    assert (labels[0] >= 0).sum() >= 32
