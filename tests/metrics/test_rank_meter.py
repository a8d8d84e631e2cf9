from __future__ import annotations

import os

import pytest
import torch
from prometheus_client import CollectorRegistry

from pretrain.metrics import rank_meter as rank_meter_module
from pretrain.metrics.exporter import Exporter
from pretrain.metrics.rank_meter import RankMeter, resident_bytes
from pretrain.metrics.server import Health
from pretrain.read_counts import ReadCounts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(rank_meter_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def exporter() -> Exporter:
    return Exporter(CollectorRegistry(), is_first=False)


def meter_of(exporter: Exporter) -> RankMeter:
    return RankMeter(exporter, Health(60.0), torch.device("cpu"))


def step(meter: RankMeter, number: int, read: ReadCounts, calls: float = 1.0) -> None:
    sections = {"data": 0.1, "forward": 0.2}
    meter.record(number, 0.5, 0.1, sections, read, [os.getpid()], {"backbone": calls})


def test_what_was_read_is_counted_though_it_is_published_now_and_then(
    exporter: Exporter, clock: list[float]
) -> None:
    meter, sample = meter_of(exporter), exporter.registry.get_sample_value
    for number in range(1, 31):
        clock[0] += 0.1
        step(meter, number, ReadCounts({"damaged": number // 10}, 2, number, 3, 4), calls=number)
    clock[0] += 1.0
    step(meter, 31, ReadCounts({"damaged": 3, "checksum": 1}, 2, 31, 3, 4), calls=31)
    assert sample("pretrain_skipped_samples_total", {"reason": "damaged"}) == 3
    assert sample("pretrain_skipped_samples_total", {"reason": "checksum"}) == 1
    assert sample("pretrain_shards_opened_total") == 31
    assert sample("pretrain_storage_retries_total") == 2
    assert sample("pretrain_cache_reads_total", {"result": "hit"}) == 3
    assert sample("pretrain_backbone_calls_total") == 31
    assert sample("pretrain_data_wait_seconds_total") == pytest.approx(3.1)
    assert sample("pretrain_step_seconds_count") == 31
    assert sample("pretrain_section_seconds_sum", {"section": "forward"}) == pytest.approx(6.2)


def test_data_that_are_opened_anew_count_from_0_and_the_metric_goes_on(
    exporter: Exporter, clock: list[float]
) -> None:
    meter = meter_of(exporter)
    for number, opened in ((1, 10), (2, 12), (3, 5)):  # the run went back before the third
        clock[0] += 2.0
        step(meter, number, ReadCounts(num_shards_opened=opened))
    assert exporter.registry.get_sample_value("pretrain_shards_opened_total") == 17


def test_memory_is_that_of_the_process_and_of_its_loader(exporter: Exporter) -> None:
    meter = meter_of(exporter)
    step(meter, 1, ReadCounts())
    sample = exporter.registry.get_sample_value
    trainer = sample("pretrain_resident_memory_bytes", {"process": "trainer"})
    assert trainer is not None
    assert trainer > 50 * 2**20  # torch alone
    assert sample("pretrain_resident_memory_bytes", {"process": "loader"}) == pytest.approx(trainer, rel=0.1)
    assert resident_bytes(2**30) == 0  # a process that is gone


def test_a_checkpoint_is_a_section_and_progress(exporter: Exporter) -> None:
    meter = meter_of(exporter)
    meter.section("checkpoint", 1.5, step=7)
    assert meter.health.step == 7
    sample = exporter.registry.get_sample_value
    assert sample("pretrain_section_seconds_sum", {"section": "checkpoint"}) == 1.5
