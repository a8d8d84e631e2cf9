from __future__ import annotations

import time

import pytest
import torch

from pretrain.section_time import SectionTime, stopwatch


def test_sections_share_the_time_between_the_first_border_and_the_end() -> None:
    clock = SectionTime(torch.device("cpu"))
    started = time.perf_counter()
    for section, seconds in (("data", 0.02), ("forward", 0.03), ("data", 0.01), ("step", 0.01)):
        clock.enter(section)
        time.sleep(seconds)
    found = clock.finish()
    elapsed = time.perf_counter() - started
    assert list(found) == ["data", "forward", "step"]
    assert found["data"] >= 0.03
    assert found["forward"] >= 0.03
    assert sum(found.values()) == pytest.approx(elapsed, abs=2e-3)


def test_each_step_begins_anew() -> None:
    clock = SectionTime(torch.device("cpu"))
    assert clock.finish() == {}
    clock.enter("data")
    assert set(clock.finish()) == {"data"}
    clock.enter("step")
    assert set(clock.finish()) == {"step"}


@pytest.mark.gpu
def test_on_a_gpu_sections_are_of_an_earlier_step_and_nothing_waits() -> None:
    device = torch.device("cuda")
    clock = SectionTime(device)
    weights = torch.randn(4096, 4096, device=device)
    found = []
    for _ in range(4):
        clock.enter("forward")
        for _ in range(20):
            weights = torch.nn.functional.normalize(weights @ weights)
        clock.enter("step")
        found.append(clock.finish())
        torch.cuda.synchronize()
    assert found[0] == {}  # the device has only just begun it
    assert all(set(later) == {"forward", "step"} for later in found[1:])
    assert all(later["forward"] > 10 * later["step"] for later in found[1:])


def test_a_stopwatch_tells_how_long_a_block_took() -> None:
    with stopwatch() as seconds:
        time.sleep(0.02)
    assert 0.02 <= seconds[0] < 1.0
