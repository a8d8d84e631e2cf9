"""The benchmarks of a GPU run unchanged on a CPU, at toy size, so that they work the first time on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu import command, running, training
from gpu.clock import Timing, ratio, timed, turns
from gpu.command_runs import Length, speed
from gpu.record import SliceFile, open_file
from gpu.setting import TOY, Setting, Slice, Variant
from gpu.slices import SLICES

from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu"
CPU = torch.device("cpu")
QUICK = ("ceilings", "mfu-vitb16", "heads")
# at most these problems: of what need not be installed, and of kernels that only a GPU has
ABSENT = ("No module named 'lightly'", "No module named 'kornia'", "No viable backend")


@pytest.fixture
def toy(tmp_path: Path) -> Setting:
    return Setting(CPU, True, tmp_path / "out")


def measure(out: Path, *arguments: str) -> str:
    """As `make bench-gpu` does, in a process of its own; what it printed."""
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--toy", "--out", str(out), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == EXIT_DONE, ran.stderr[-2000:]
    return ran.stdout


def check(content: dict[str, Any]) -> None:
    """All is measured, but for what is not installed, and kernels that this device does not have."""
    problems = {name: found["problem"] for name, found in content["variants"].items() if "problem" in found}
    assert {name: told for name, told in problems.items() if not any(word in told for word in ABSENT)} == {}
    assert content["is_complete"]
    assert content["is_toy"]
    assert content["place"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "problem" not in content["summary"] or content["slice"] == "memory"
    for name in content["variants"].keys() - problems.keys():
        assert {"commit", "command", "unix_time", "took_seconds", "headline"} <= content["variants"][
            name
        ].keys()


def test_slices_measure_all_that_they_list_and_a_utilisation_is_of_the_measured_rate(tmp_path: Path) -> None:
    measure(tmp_path, *(part for name in QUICK for part in ("--child", name)))
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in QUICK}
    for content in results.values():
        check(content)
    rate = results["ceilings"]["summary"]["flops_per_second"]
    assert rate == max(
        found["flops_per_second"]
        for name, found in results["ceilings"]["variants"].items()
        if "square" in name
    )
    for found in results["mfu-vitb16"]["variants"].values():
        assert found["measured_by"] == "ceilings.json"
        flops = found["gflop_per_image"] * 1e9 * found["images_per_second"]
        assert found["mfu_of_measured_ratio"] == pytest.approx(flops / rate, rel=1e-3)
        seconds = found["seconds"]["step"]["median"]
        assert found["images_per_second"] == pytest.approx(found["batch"] / seconds, rel=1e-3)


@pytest.mark.slow
def test_every_other_slice_does_too_and_the_command_goes_on(tmp_path: Path) -> None:
    others = [name for name in SLICES if name not in QUICK]
    asked = [part for name in others for part in ("--slice", name)]
    assert f"time is up; left: {', '.join(others)}" in measure(tmp_path, *asked, "--max-minutes", "0")
    assert "done; results are in" in measure(tmp_path, *asked, "--max-minutes", "9")
    for name in others:
        check(json.loads((tmp_path / f"{name}.json").read_text()))
    profiled = json.loads((tmp_path / "profile.json").read_text())["variants"].values()
    assert all((tmp_path / found["trace"]).stat().st_size for found in profiled)


# --- how results are kept


def run(
    name: str, asked: Slice, setting: Setting, seconds_left: Callable[[], float] = lambda: 600.0
) -> SliceFile:
    file = open_file(name, asked.what, setting)
    running.run_slice(asked, setting, file, seconds_left=seconds_left, say=lambda told: None)
    return open_file(name, asked.what, setting)


def counting(taken: list[str], fails: str = "") -> Slice:
    def measure(name: str) -> dict[str, Any]:
        taken.append(name)
        if name == fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {"headline": name}

    def variants(setting: Setting) -> dict[str, Variant]:
        return {name: Variant(lambda name=name: measure(name), 100.0) for name in ("a", "b", "c")}

    return Slice("counts", variants, lambda setting, good: {"measured": sorted(good)})


def test_what_is_measured_is_not_measured_again(toy: Setting) -> None:
    taken: list[str] = []
    asked = counting(taken)
    left = iter([99.0, 600.0, 600.0])  # there is too little time for the second at first
    assert not run("count", asked, toy, lambda: next(left)).is_complete
    assert taken == ["a"]
    assert run("count", asked, toy, lambda: 600.0).is_complete
    assert taken == ["a", "b", "c"]
    assert run("count", asked, toy).content["summary"] == {"measured": ["a", "b", "c"]}
    assert taken == ["a", "b", "c"]


def test_a_variant_without_memory_is_recorded_and_the_slice_goes_on(toy: Setting) -> None:
    file = run("count", counting([], fails="b"), toy)
    assert file.is_complete
    assert file.variants["b"]["problem"].startswith("out of memory: CUDA out of memory")
    assert file.content["summary"] == {"measured": ["a", "c"]}


def test_what_a_failed_variant_has_built_is_taken_down(toy: Setting) -> None:
    def fails() -> dict[str, Any]:
        training.Training(training.configuration(toy, "ViT-B/16", 4, "engine.kind=local"), CPU)
        raise RuntimeError("in the middle")

    asked = Slice("fails", lambda setting: {"only": Variant(fails)})
    (found,) = run("fails", asked, toy).variants.values()
    assert found["problem"].startswith("RuntimeError: in the middle (test_gpu_bench.py:")
    assert training._OPEN == []


def test_results_begun_elsewhere_are_not_gone_on_with(toy: Setting) -> None:
    file = run("count", counting([]), toy)
    file.content["place"]["versions"]["torch"] = "1.0"
    file.write()
    with pytest.raises(UserError, match="begun with another torch; give --redo"):
        open_file("count", "counts", toy)


def test_a_process_that_dies_costs_the_variant_that_it_died_over(
    toy: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SLICES, "ceilings", counting([]))
    file = open_file("ceilings", "counts", toy)
    running.begun_path(file).parent.mkdir(parents=True)
    running.begun_path(file).write_text('{"variant": "b", "unix_time": 0}')
    command._note_ending("ceilings", toy, file, -11, 3.0)
    assert (
        open_file("ceilings", "counts", toy).variants["b"]["problem"] == "the process ended with status -11"
    )
    assert not running.begun_path(file).exists()
    assert "ended with status -11" in capsys.readouterr().out


# --- the command line


def test_results_of_a_cpu_are_never_put_among_those_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for out in (command.RESULTS, command.RESULTS / "mine"):
        assert command.main(["--out", str(out), "--slice", "ceilings"]) == EXIT_USER_ERROR
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "is for results of a GPU" in told
    assert command.setting_of(command.parse([])).out == command.ON_CPU


def test_shards_without_an_index_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--shards", str(tmp_path)]) == EXIT_USER_ERROR
    assert "pretrain shards index" in capsys.readouterr().err


def test_slices_are_listed_with_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--out", str(tmp_path), "--list"]
    assert command.main(asked) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SLICES)
    assert next(iter(SLICES)) == "ceilings"  # the others divide by it
    assert all("to do" in line for line in lines)


# --- timing


def test_turns_alternate_and_ratios_are_taken_within_a_window() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = turns(runs, CPU, TOY)
    assert "".join(order[-4:]) == "abab"
    assert found["a"].calls == 1
    assert ratio(Timing((2.0, 9.0), 1), Timing((1.0, 3.0), 1)) == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert timed(lambda: None, CPU, TOY).median >= 0.0


def test_the_speed_of_a_run_is_that_after_its_warm_up() -> None:
    def record(step: int, unix_time: float, wait: float) -> dict[str, Any]:
        times = {"unix_time": unix_time, "step_seconds": 0.5, "data_wait_seconds": wait}
        return {"step": step, "images": 64 * step, "seconds/data": wait, **times}

    # a slow start, then 20 steps in 10 seconds
    records = [record(1, 0.0, 9.0), record(10, 90.0, 9.0), record(20, 95.0, 0.1), record(30, 100.0, 0.2)]
    found = speed(records, Length(steps=30, every=10, warmup=10))
    assert found["wall_seconds_per_step"] == pytest.approx(0.5)
    assert found["images_per_second"] == pytest.approx(128)
    assert found["recorded"]["seconds/data"] == pytest.approx(0.15)
    assert found["data_wait_ratio"] == pytest.approx(0.3)
