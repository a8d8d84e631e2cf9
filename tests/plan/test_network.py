"""How long ranks talk: worked by hand, and as collectives are known to scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pretrain.plan.hardware import gpu_named
from pretrain.plan.network import (
    GATHER_SECONDS,
    LATENCY_SECONDS,
    NETWORKS,
    Communication,
    bus_rate,
    communication_of,
)
from pretrain.plan.parameters import Parameters

H100, L40S = gpu_named("h100"), gpu_named("l40s")
INFINIBAND, ETHERNET = NETWORKS["infiniband"], NETWORKS["ethernet"]
MILLION = Parameters(100_000_000, {}, 0, 0, 0, 0, 2)


def settings_of(accumulation: int = 1, precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    engine = {
        "kind": "deepspeed",
        "precision": precision,
        "gradient_reduction": precision,
        "deepspeed": {"zero_optimization": zero},
    }
    return {"engine": engine, "batch": {"accumulation_steps": accumulation}}


def talk(
    stage: int, nodes: int = 1, gpus: int = 8, settings: dict[str, Any] | None = None, gpu: Any = H100
) -> Communication:
    return communication_of(
        settings or settings_of(), MILLION, gpu, INFINIBAND, stage=stage, nodes=nodes, gpus_per_node=gpus
    )


def test_a_sum_over_the_ranks_of_a_node_worked_by_hand() -> None:
    found = talk(stage=0)
    # 400 MB in a ring of eight at 450 GB/s, in eight buckets of 12.5 M elements
    assert found.reduce_seconds == pytest.approx(2 * 7 / 8 * 400e6 / 450e9 + 8 * LATENCY_SECONDS)
    assert found.gather_seconds == 0.0
    assert found.small_seconds == pytest.approx(GATHER_SECONDS + LATENCY_SECONDS)


def test_what_each_stage_moves() -> None:
    assert talk(0).gathered_bytes == 0.0
    assert talk(1).gathered_bytes == talk(2).gathered_bytes == talk(3).gathered_bytes == 400e6
    assert talk(1).reduce_seconds == talk(0).reduce_seconds  # whole sums, as DeepSpeed does by default
    own = settings_of(use_multi_rank_bucket_allreduce=False)
    assert talk(1, settings=own).reduce_seconds < 0.7 * talk(1).reduce_seconds
    released = settings_of(stage3_max_live_parameters=1000)
    assert talk(3, settings=released).gathered_bytes == 800e6
    twice = settings_of(accumulation=2)
    assert talk(2, settings=twice).reduced_bytes == 2 * talk(1, settings=twice).reduced_bytes
    assert talk(1, settings=settings_of(precision="bf16")).reduced_bytes == 200e6


def test_one_rank_has_nobody_to_talk_to() -> None:
    alone = talk(1, gpus=1)
    assert (alone.seconds, alone.exposed_seconds(1.0)) == (0.0, 0.0)


def test_the_slowest_link_is_the_rate() -> None:
    assert bus_rate(H100, INFINIBAND, 1, 8) == 450e9
    assert bus_rate(H100, INFINIBAND, 2, 8) == pytest.approx(360e9)
    assert bus_rate(H100, INFINIBAND, 2, 4) == pytest.approx(180e9)
    assert bus_rate(H100, ETHERNET, 2, 8) == pytest.approx(11.25e9)
    assert bus_rate(L40S, INFINIBAND, 1, 8) == 20e9
    assert bus_rate(gpu_named("a100"), INFINIBAND, 1, 8) == pytest.approx(240e9)
    assert talk(1, nodes=8).seconds > talk(1).seconds


def test_sums_hide_under_the_backward_pass_only_where_they_are_let() -> None:
    plain = talk(1)
    assert plain.exposed_seconds(1.0) == plain.seconds
    hidden = replace(plain, overlaps=True)
    assert talk(1, settings=settings_of(overlap_comm=True)) == hidden
    assert hidden.exposed_seconds(1.0) == pytest.approx(
        0.1 * plain.reduce_seconds + plain.gather_seconds + plain.small_seconds
    )
    assert hidden.exposed_seconds(0.0) == pytest.approx(plain.seconds)
