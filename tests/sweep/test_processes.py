from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain.sweep.processes import CommandError, Processes, StoppedError, only_one

# says when it listens, ends with 75 when told to stop
PATIENT = """
import signal, sys, time
signal.signal(15, lambda *_: sys.exit(75))
print('on', flush=True)
time.sleep(60)
"""
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def when_it_listens(log: Path, act: object) -> threading.Thread:
    def wait() -> None:
        while not (log.exists() and "on\n" in log.read_text()):
            time.sleep(0.02)
        act()  # type: ignore[operator]

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_command_that_fails_gives_its_code_and_only_its_own_last_lines(tmp_path: Path) -> None:
    log, processes = tmp_path / "log", Processes()
    assert 0 < processes.call(python("print('earlier')"), log) < 30
    with pytest.raises(CommandError) as caught:
        processes.call(python("import sys; print('out\\n\\n'); sys.exit('err')"), log)
    assert caught.value.exit_code == 1
    assert caught.value.last_lines == ["out", "err"]
    assert "earlier" in log.read_text()  # the log keeps everything
    with pytest.raises(CommandError) as caught:
        processes.call(python("import os; os.kill(os.getpid(), 9)"), log)
    assert caught.value.exit_code == 128 + 9


def test_a_command_that_was_preempted_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        Processes().call(python("raise SystemExit(75)"), tmp_path / "log")


def test_time_that_is_used_up_ends_the_command_and_lets_none_begin(tmp_path: Path) -> None:
    log, processes = tmp_path / "log", Processes(max_seconds=1.0)
    began = time.monotonic()
    with pytest.raises(StoppedError):
        processes.call(python(PATIENT), log)
    assert 0.9 < time.monotonic() - began < 20
    before = log.read_text()
    with pytest.raises(StoppedError):
        processes.call(python("print('never')"), log)
    assert log.read_text() == before


def test_a_command_that_does_not_listen_is_killed_after_the_grace(tmp_path: Path) -> None:
    log, processes = tmp_path / "log", Processes(grace_seconds=0.3)
    with processes.listening():
        thread = when_it_listens(log, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError):
            processes.call(python(DEAF), log)
        thread.join()


def test_a_signal_to_stop_is_passed_on_and_the_old_handler_comes_back(tmp_path: Path) -> None:
    log, processes = tmp_path / "log", Processes()
    before = signal.getsignal(signal.SIGTERM)
    with processes.listening():
        thread = when_it_listens(log, lambda: os.kill(os.getpid(), signal.SIGTERM))
        began = time.monotonic()
        with pytest.raises(StoppedError):
            processes.call(python(PATIENT), log)
        assert time.monotonic() - began < 30  # not its 60 seconds
        thread.join()
    assert processes.told == signal.SIGTERM
    assert processes.must_stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with only_one(path) as first:
        assert first
        with only_one(path) as second:
            assert not second
    with only_one(path) as again:
        assert again
