from __future__ import annotations

from pathlib import Path

import pytest
from small_shards import make_shards

from pretrain.data.bench import BenchRequest, Rate, advice, choose, measure


def test_fewer_threads_win_when_more_bring_little() -> None:
    rates = [Rate(1, 3, 400.0, 1.0), Rate(2, 3, 780.0, 1.0), Rate(4, 3, 800.0, 1.0), Rate(2, 1, 790.0, 1.0)]
    assert choose(rates) == rates[3]
    assert choose(rates[:2]) == rates[1]
    assert advice(rates).startswith("use data.decode_threads=2 data.prefetch_batches=1: 790 images/s")


@pytest.mark.slow
def test_every_setting_is_measured_and_told(tmp_path: Path) -> None:
    make_shards(tmp_path, [20, 20])
    told: list[str] = []
    request = BenchRequest(str(tmp_path), view_px=16, batch_size=8, seconds=0.2, threads=(1,))
    rates = measure(request, told.append)
    assert [(rate.decode_threads, rate.prefetch_batches) for rate in rates] == [(1, 3), (1, 1), (1, 6)]
    assert all(rate.images_per_second > 0 for rate in rates)
    assert told[0].startswith("40 images of 3 KiB; 2 crops of 16 px, batches of 8")
    assert len(told) == 4


@pytest.mark.slow
def test_a_set_smaller_than_the_lanes_can_be_measured(tmp_path: Path) -> None:
    make_shards(tmp_path, [3])
    request = BenchRequest(str(tmp_path), view_px=8, batch_size=10, seconds=0.1, threads=(1,))
    assert len(measure(request, lambda line: None)) == 3
