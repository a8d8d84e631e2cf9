from __future__ import annotations

import os
import signal

import pytest

from pretrain.data import side_by_side
from pretrain.errors import DataError


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_workers", [None, 2])
def test_the_remedy_for_a_killed_worker_needs_no_option_that_a_command_may_lack(
    monkeypatch: pytest.MonkeyPatch, num_workers: int | None
) -> None:
    monkeypatch.setattr(side_by_side, "SMALL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(
        DataError, match=r"was killed .*; run it on fewer CPU cores.* or with more memory"
    ) as told:
        list(side_by_side.side_by_side(die, range(4), 4, 1, num_workers))
    assert "workers" not in str(told.value)
