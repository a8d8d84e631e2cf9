"""k-NN on the way: it measures what an evaluation would, and changes and ends nothing of the training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from outcomes import assert_same_tensors, records
from prometheus_client import CollectorRegistry
from ranks import run_on_ranks
from small_shards import samples, write_shard

from pretrain import build, checkpoint, cluster
from pretrain.cli import main
from pretrain.config import RunConfig, load_config
from pretrain.data.indexing import index_folder
from pretrain.data.loader import DataConfig
from pretrain.errors import UserError
from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.features import Features
from pretrain.evaluate.knn import knn
from pretrain.metrics import names
from pretrain.metrics.exporter import Exporter
from pretrain.metrics.meter import JsonLines, Meter
from pretrain.online_knn import Chosen, OnlineKnn, OnlineKnnConfig, choose_images
from pretrain.peers import ALONE

CONFIG = """
seed: 3
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 8, args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {shards: SHARDS, lanes: 4, shuffle_block: 4, resident: true}
views: {one: {size_px: 32, turn: true, interpolation: bilinear}}
tasks: {rotation: {}}
optim: {base_lr: 0.02}
schedule: {steps: 6, warmup_steps: 2}
batch: {global_size: 16}
engine: {kind: local, precision: fp32}
checkpoint: {every_steps: 3, keep_last: 3}
log: {every_steps: 1, prometheus: {enabled: false}}
online_knn: {every_steps: 2, num_train: 30, num_test: 20, k: 3, batch_size: 7}
"""


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("pretrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_shard(folder / f"set-train-{number}.tar.gz", samples(number * 30, 30, height=32, width=32))
    write_shard(folder / "set-test-0.tar", samples(60, 40, height=32, width=32))
    index_folder(folder)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder)))
    return path


def train(config: Path, run: Path, *more: str) -> int:
    return main(["train", str(config), "--output-dir", str(run), *more])


def knn_of(run: Path) -> dict[int, float]:
    return {r["step"]: r["knn_top1_ratio"] for r in records(run) if "knn_top1_ratio" in r}


@pytest.mark.parametrize("teacher", ["null", "{momentum: 0.9}"])
def test_it_changes_no_bit_of_a_run_and_a_resumed_run_measures_the_same(
    teacher: str, config: Path, tmp_path: Path
) -> None:
    given = [f"teacher={teacher}", "model.drop_path_ratio=0.1"]
    assert train(config, tmp_path / "with", *given) == 0
    assert train(config, tmp_path / "without", *given, "online_knn=null") == 0
    for step in (3, 6):
        folders = (checkpoint.step_folder(tmp_path / name, step) for name in ("with", "without"))
        assert_same_tensors(*folders, checkpoint.STUDENT, checkpoint.OPTIMIZER)
    assert knn_of(tmp_path / "without") == {}
    measured = knn_of(tmp_path / "with")
    assert list(measured) == [2, 4, 6]
    half = checkpoint.step_folder(tmp_path / "with", 3)
    assert train(config, tmp_path / "resumed", *given, "--resume", str(half)) == 0
    assert knn_of(tmp_path / "resumed") == {step: measured[step] for step in (4, 6)}
    for record in records(tmp_path / "with"):
        assert record["backbone_calls"] == record["step"]  # those of the measurement do not count


def test_it_is_the_accuracy_that_an_evaluation_of_the_same_images_finds(config: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "run") == 0
    settings = load_config(config)
    assert settings.online_knn is not None
    sets = choose_images(settings.online_knn, settings.data)
    encoder = open_encoder(tmp_path / "run")
    bank, queries = (features_of(one, encoder) for one in sets)
    assert (len(bank.labels), len(queries.labels)) == (30, 20)
    assert knn_of(tmp_path / "run")[6] == knn(bank, queries, (3,))["top1_ratio"]


def features_of(chosen: Chosen, encoder) -> Features:  # type: ignore[no-untyped-def]
    from pretrain.evaluate.shards import decode_and_crop

    wanted = set(chosen.rows.tolist())
    samples = [sample for row, (sample, _) in enumerate(chosen.split.samples()) if row in wanted]
    images = torch.stack([decode_and_crop(sample, encoder.crop) for sample in samples])
    return Features(encoder.encode(images).clone(), chosen.labels)


def choose(config: Path, **settings: object) -> tuple[Chosen, Chosen]:
    return choose_images(OnlineKnnConfig(**settings), load_config(config).data)  # type: ignore[arg-type]


def test_as_many_images_of_each_class_and_the_same_every_time(config: Path) -> None:
    bank, queries = choose(config, num_train=30, num_test=20, k=3)
    assert bank.split.name == "train"
    assert queries.split.name == "test"
    assert torch.bincount(bank.labels, minlength=10).tolist() == [3] * 10
    assert torch.bincount(queries.labels, minlength=10).tolist() == [2] * 10
    assert torch.equal(bank.rows, choose(config, num_train=30, num_test=20, k=3)[0].rows)
    assert torch.equal(bank.labels, bank.split.labels()[bank.rows])


def test_of_many_classes_so_few_are_taken_that_each_has_about_k_images(config: Path) -> None:
    bank, queries = choose(config, num_train=30, num_test=20, k=6)
    classes = bank.labels.unique()
    assert torch.bincount(bank.labels)[classes].tolist() == [6] * 5
    assert queries.labels.unique().tolist() == classes.tolist()


def test_one_split_serves_as_both_without_an_image_in_both(config: Path) -> None:
    shards = load_config(config).data.shards
    bank, queries = choose(config, test=f"{shards}:train", num_train=30, num_test=20, k=3)
    assert not set(bank.rows.tolist()) & set(queries.rows.tolist())
    assert (len(bank.rows), len(queries.rows)) == (30, 20)


def test_an_interval_is_in_epochs_or_in_steps() -> None:
    assert OnlineKnnConfig().interval(global_batch=16, num_samples=100) == 6
    assert OnlineKnnConfig(every_epochs=0.5).interval(16, 100) == 3
    assert OnlineKnnConfig(every_steps=50).interval(16, 100) == 50
    assert OnlineKnnConfig(every_epochs=0.01).interval(16, 100) == 1


def test_shards_without_labels_are_refused_before_the_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [member for member in samples(0, 40, height=32, width=32) if member[0].endswith("jpg")]
    (tmp_path / "bare").mkdir()
    write_shard(tmp_path / "bare" / "set-train-0.tar", members)
    index_folder(tmp_path / "bare")
    assert train(config, tmp_path / "run", f"data.shards={tmp_path / 'bare'}") == 2
    error = capsys.readouterr().err
    assert "sample 0 has no label" in error
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=r"online_knn\.train: the run mixes several sources"):
        choose_images(OnlineKnnConfig(), DataConfig(sources=({"shards": "a"},)))  # type: ignore[arg-type]


def test_a_damaged_image_is_done_without(config: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "set-train-0.tar", samples(0, 40, height=32, width=32))
    index_folder(tmp_path)
    settings = load_config(config, [f"data.shards={tmp_path}", "online_knn.num_train=20", "online_knn.k=2"])
    content = bytearray((tmp_path / "set-train-0.tar").read_bytes())
    content[700:760] = bytes(60)
    (tmp_path / "set-train-0.tar").write_bytes(content)
    module = build.module(settings, ALONE, torch.device("cpu"))
    online = OnlineKnn(settings, module.backbone, 6, 40, ALONE)
    assert online.is_whole.tolist().count(False) == 1
    found = online.measure(build.engine(settings, module, ALONE), None)
    assert 0 <= found["knn_top1_ratio"] <= 1


def measured_by(settings: RunConfig) -> dict[str, float]:
    module = build.module(settings, ALONE, torch.device("cpu"))
    online = OnlineKnn(settings, module.backbone, 6, 60, ALONE)
    return online.measure(build.engine(settings, module, ALONE), None)


def test_weights_that_are_not_finite_are_left_to_the_guard(config: Path) -> None:
    settings = load_config(config)
    module = build.module(settings, ALONE, torch.device("cpu"))
    online = OnlineKnn(settings, module.backbone, 6, 60, ALONE)
    with torch.no_grad():
        module.backbone.cls_token.fill_(float("nan"))
    assert online.measure(build.engine(settings, module, ALONE), None) == {}


def test_the_accuracy_is_published(tmp_path: Path) -> None:
    exporter = Exporter(CollectorRegistry())
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    meter = Meter(lines, exporter, {}, every_steps=1, num_steps=2, global_batch=1, images_per_epoch=1)
    meter.publish_evaluation("knn", 20, 0.25)
    value = exporter.registry.get_sample_value(names.EVAL_ACCURACY.name, {"eval": "knn", "k": "20"})
    assert value == 0.25


def measure_on_rank(place: cluster.Cluster, config: Path, out: Path) -> None:
    for stage in (0, 3):
        engine = f"engine={{precision: fp32, deepspeed: {{zero_optimization: {{stage: {stage}}}}}}}"
        settings = load_config(config, [engine])
        peers = cluster.peers(place)
        module = build.module(settings, peers, torch.device("cpu"))
        online = OnlineKnn(settings, module.backbone, 6, 60, peers)
        found = online.measure(build.engine(settings, module, peers), None)
        (out / f"stage{stage}-rank{place.rank}.json").write_text(json.dumps(found))


@pytest.mark.distributed
def test_ranks_share_the_work_and_agree_also_where_the_weights_are_divided(
    config: Path, tmp_path: Path
) -> None:
    """There no rank has the whole network; each reads and encodes every other image."""
    run_on_ranks(2, measure_on_rank, config, tmp_path)
    expected = measured_by(load_config(config))["knn_top1_ratio"]
    found = [json.loads(path.read_text())["knn_top1_ratio"] for path in sorted(tmp_path.glob("stage*.json"))]
    assert found == [expected] * 4
