"""The order of commands, with a stand-in for `pretrain`; test_real_sweep.py has the real one."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_scenes import write_folder
from small_study import STUDY, write_study

from pretrain.cli import main
from pretrain.sweep import execute
from pretrain.sweep.execute import hardware, last_values, steady_seconds, train_seconds
from pretrain.sweep.processes import Processes, only_one
from pretrain.sweep.runs import Run, Sweep


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("pretrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def commands(calls: Path) -> list[str]:
    """`train both/seed-0` and so on, in the order they were run; the list is emptied."""
    if not calls.exists():
        return []
    found = []
    for line in calls.read_text().splitlines():
        command, *rest = line.split()
        if command == "train":
            folder = rest[rest.index("--output-dir") + 1]
        else:
            folder = rest[0 if command == "export" else 1].removesuffix("/exported")
        found.append(f"{command} {folder.removeprefix('out/')}")
    calls.unlink()
    return found


def sweep(*arguments: object) -> int:
    return main(["sweep", "study.yaml", "--output-dir", "out", *map(str, arguments)])


def done(variant: str, seed: int) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(f"out/{variant}/seed-{seed}/done.json").read_text())
    return found


def of_run(name: str) -> list[str]:
    return [f"{command} {name}" for command in ("train", "export", "evaluate")]


ONE_SEED = STUDY.replace("[0, 1]", "[0]")
ALL = [*of_run("both/seed-0"), *of_run("rotation/seed-0")]


def test_every_run_is_trained_exported_and_read_out_once_and_then_never_again(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    assert sweep() == 0
    arguments = calls.read_text().splitlines()
    assert arguments[0] == (
        "train run.yaml log.every_steps=1 tasks.jigsaw=null seed=0 --resume auto --output-dir out/both/seed-0"
    )
    assert arguments[1] == "export out/both/seed-0 --out out/both/seed-0/exported"
    assert arguments[2] == (
        "evaluate knn out/both/seed-0/exported --train shards --test others "
        "--out out/both/seed-0/read_outs/knn --feature class --batch-size 20"
    )
    assert commands(calls) == [*ALL, *of_run("both/seed-1"), *of_run("rotation/seed-1")]
    found = done("both", 1)
    assert (found["variant"], found["seed"], found["steps"], found["images"]) == ("both", 1, 3, 48)
    assert (found["commit"], found["hardware"]) == ("c0ffee", "2 x H1")
    assert found["train_seconds"] == pytest.approx(3 * 0.4)
    assert sweep() == 0
    assert commands(calls) == []
    # 50 and 52 %, so 51 and the root of 2; the metric's last value is that of step 2, for step 3 has none
    assert (
        "| both     | 2 of 2 | 3     | 1.2     | 51.00 ± 1.41 | 0.2 ± 0           |"
        in capsys.readouterr().out
    )


def test_the_result_of_a_fine_tuning_is_found_under_the_name_of_its_recipe(
    calls: Path, tmp_path: Path
) -> None:
    read_out = "{name: tuned, kind: finetune, args: [--recipe, relvit, --batch-size, 21]}"
    write_study(tmp_path, ONE_SEED.replace(ONE_SEED.split("  - ")[1].split("\n")[0], read_out))
    assert sweep() == 0
    assert done("both", 0)["read_outs"]["tuned"]["result"] == {"top1_ratio": 0.52}  # type: ignore[index]


def test_a_dense_read_out_is_given_its_folder_and_becomes_a_column_in_percent(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "scenes")
    args = "[--size-px, 32, 48, --seed, '{seed}', --batch-size, 21]"
    read_out = f"{{name: dense, kind: dense, data: scenes, value: miou_ratio, args: {args}}}"
    fresh = read_out.replace("name: dense", "name: fresh, weights: untrained, variants: [both]")
    line = ONE_SEED.split("  - ")[1].split("\n")[0]
    write_study(tmp_path, ONE_SEED.replace(line, f"{read_out}\n  - {fresh}"))
    assert sweep() == 0
    evaluations = [told for told in calls.read_text().splitlines() if told.startswith("evaluate")]
    assert evaluations[:2] == [
        f"evaluate dense {prefix}out/both/seed-0/exported --data scenes "
        f"--out out/both/seed-0/read_outs/{name} --size-px 32 48 --seed 0 --batch-size 21"
        for name, prefix in (("dense", ""), ("fresh", "untrained:"))
    ]
    commands(calls)
    assert done("both", 0)["read_outs"]["dense"]["result"] == {"miou_ratio": 0.52}  # type: ignore[index]
    assert "| dense % | fresh % |" in capsys.readouterr().out
    assert sweep() == 0
    assert commands(calls) == []


def test_a_sweep_that_is_out_of_time_ends_with_75_and_goes_on_where_it_stopped(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    (tmp_path / "slow").touch()
    assert sweep("--max-minutes", 2.5 / 60) == 75
    told = capsys.readouterr().out
    assert "not finished: 2 runs, both/seed-0 first; the same command goes on" in told
    assert commands(calls) == ["train both/seed-0"]
    assert not Path("out/both/seed-0/done.json").exists()
    (tmp_path / "slow").unlink()
    assert len(Path("out/both/seed-0/metrics.jsonl").read_text().splitlines()) == 1
    assert sweep() == 0
    assert commands(calls) == ALL
    steps = [
        json.loads(line)["step"] for line in Path("out/both/seed-0/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3]
    assert "| both     | 1 of 1 |" in capsys.readouterr().out


def test_what_a_killed_sweep_had_finished_is_not_done_again(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep() == 0
    commands(calls)
    run = tmp_path / "out" / "both" / "seed-0"
    (run / "done.json").unlink()  # killed between the last read-out and this file
    assert sweep() == 0
    assert commands(calls) == []
    assert (run / "done.json").exists()
    (run / "done.json").unlink()
    (run / "exported").rmdir()
    (run / ".exported.12.tmp").mkdir()  # killed while it exported
    assert sweep() == 0
    assert commands(calls) == ["export both/seed-0"]
    assert not (run / ".exported.12.tmp").exists()


def test_a_run_that_fails_is_recorded_and_named_and_the_others_go_on(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED.replace("both: [", "both: [optim.base_lr=9, "))
    assert sweep() == 1
    assert commands(calls) == ["train both/seed-0", *of_run("rotation/seed-0")]
    told = capsys.readouterr().out
    assert "[1/2] both/seed-0: failed with exit code 3" in told
    assert "the loss exploded" in told
    assert "failed: both/seed-0;" in told
    assert "| both     | 0 of 1 (failed) |" in told
    assert "| rotation | 1 of 1          |" in told
    failure = json.loads(Path("out/both/seed-0/failed.json").read_text())
    assert (failure["stage"], failure["exit_code"]) == ("train", 3)
    assert failure["last_lines"][-1] == "the loss exploded"
    # the cause is mended without a change of the study: it is tried again, and no longer counts as failed
    program = tmp_path / "program.py"
    program.write_text(program.read_text().replace('== "9"', '== "never"'))
    assert sweep() == 0
    assert commands(calls) == of_run("both/seed-0")
    assert not Path("out/both/seed-0/failed.json").exists()


def test_a_changed_study_is_refused_and_runs_nothing(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    assert sweep("--index", 0) == 0
    commands(calls)
    capsys.readouterr()
    for arguments in ([], ["--table-only"], ["--dry-run"]):
        assert sweep("optim.base_lr=0.7", *arguments) == 2
        told = capsys.readouterr().err
        assert "out/both/seed-0: was begun with other settings (optim.base_lr: was 0.0005, now 0.7)" in told
        assert "choose another --output-dir" in told
    assert commands(calls) == []
    # more seeds and variants are no change of what was run
    write_study(tmp_path, ONE_SEED.replace("metrics:", "  \nmetrics:"))
    assert sweep() == 0
    assert commands(calls) == of_run("rotation/seed-0")


def test_a_read_out_that_is_added_or_changed_is_the_only_thing_that_runs(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep() == 0
    commands(calls)
    line = "  - {name: probe, kind: linear, test: others, args: [--batch-size, 21], variants: [both]}\n"
    write_study(tmp_path, ONE_SEED.replace("metrics:", f"{line}metrics:"))
    assert sweep() == 0
    assert commands(calls) == ["evaluate both/seed-0"]
    table = json.loads(Path("out/table.json").read_text())
    assert table["rows"][0]["columns"]["probe"]["mean"] == pytest.approx(52.0)
    assert table["rows"][1]["columns"]["probe"]["mean"] is None
    write_study(tmp_path, ONE_SEED.replace("--feature, class", "--feature, mean_patch"))
    assert sweep() == 0
    assert commands(calls) == ["evaluate both/seed-0", "evaluate rotation/seed-0"]


def test_the_table_is_made_again_from_the_finished_runs_alone(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep() == 0
    commands(calls)
    written = Path("out/table.md").read_text()
    for path in Path("out").rglob("*"):
        if path.is_file() and path.name != "done.json":
            path.unlink()
    assert sweep("--table-only") == 0
    assert commands(calls) == []
    assert Path("out/table.md").read_text() == written


def test_an_index_runs_one_run_and_an_array_of_them_all(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep("--nproc", 2, "--array") == 2  # what cannot run is told before any job is queued
    assert "variant 'both': engine.kind" in capsys.readouterr().err
    assert main(["sweep", "study.yaml", "optim.weight_decay=0.1", "--array"]) == 0
    assert capsys.readouterr().out == (
        "2 runs\nsbatch --array=0-1%4 --wrap "
        '"pretrain sweep study.yaml optim.weight_decay=0.1 --output-dir runs/study '
        '--index \\$SLURM_ARRAY_TASK_ID"\n'
    )
    assert commands(calls) == []
    for index in (1, 0):
        assert sweep("--index", index) == 0
    assert commands(calls) == [*of_run("rotation/seed-0"), *of_run("both/seed-0")]
    assert sweep("--index", 2) == 2
    assert "--index 2: the study has runs 0 to 1" in capsys.readouterr().err


def test_a_dry_run_lists_the_runs_and_their_state(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    assert sweep("--dry-run") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "   0  both/seed-0      3 steps, to run"
    assert "4 runs into out" in told
    assert not Path("out").exists()
    assert sweep("--index", 0) == 0
    capsys.readouterr()
    assert sweep("--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("3 steps, done")


def test_a_run_that_another_sweep_is_at_is_left_to_it(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    with only_one(tmp_path / "out" / "both" / "seed-0" / ".sweep.lock"):
        assert sweep() == 75
    assert commands(calls) == of_run("rotation/seed-0")
    told = capsys.readouterr().out
    assert "both/seed-0: another sweep is at it" in told
    assert "not finished: both/seed-0; the same command goes on" in told


def test_what_another_sweep_has_finished_meanwhile_is_not_called_unfinished(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    alone = execute._run_alone

    def done_by_another(study: Sweep, run: Run, processes: Processes, title: str) -> bool:
        is_ours = alone(study, run, processes, title)
        return is_ours and run.variant != "both"  # as if it had been at it until now

    monkeypatch.setattr(execute, "_run_alone", done_by_another)
    assert sweep() == 0
    assert "not finished" not in capsys.readouterr().out


def test_a_compute_budget_measures_each_variant_once_and_all_runs_share_it(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in takes 0.4 s per step for two tasks and 0.1 s for one: 3 steps against 12."""
    write_study(tmp_path, f"{ONE_SEED}budget: compute\nmeasure_steps: 12\n")
    assert sweep("--index", 0) == 2
    assert "measure it first, with --measure-only" in capsys.readouterr().err
    assert main(["sweep", "study.yaml", "--output-dir", "out", "--array"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("job=$(sbatch --parsable")
    assert told[2].startswith("sbatch --dependency=afterok:$job --array=0-1%4")
    assert sweep("--measure-only") == 0
    assert commands(calls) == ["train .cost/both", "train .cost/rotation"]
    assert sweep("--measure-only") == 0
    assert commands(calls) == []
    assert sweep() == 0
    assert commands(calls) == ALL
    assert (done("both", 0)["steps"], done("rotation", 0)["steps"]) == (3, 12)
    assert done("both", 0)["train_seconds"] == pytest.approx(done("rotation", 0)["train_seconds"])
    assert sweep("optim.base_lr=0.7") == 2
    assert "the cost of 'both' was measured with other settings" in capsys.readouterr().err


def test_a_signal_ends_the_sweep_with_75(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path)
    (tmp_path / "slow").touch()

    def stop() -> None:
        lines = tmp_path / "out" / "both" / "seed-0" / "metrics.jsonl"
        while not lines.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sweep() == 75
    thread.join()
    assert commands(calls) == ["train both/seed-0"]


def test_seconds_count_every_step_once_and_the_steady_ones_leave_the_start_out() -> None:
    records = [
        {"step": step, "step_seconds": seconds} for step, seconds in ((1, 9.0), (4, 0.5), (6, 0.25), (9, 1.0))
    ]
    assert train_seconds(records) == 9.0 + 3 * 0.5 + 2 * 0.25 + 3 * 1.0
    assert steady_seconds(records) == 0.5  # the median of 0.5, 0.25 and 1.0: step 1 is in the first third
    assert train_seconds([]) == 0.0


def test_the_last_value_is_the_last_that_was_known() -> None:
    assert last_values([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}]) == {"a": 3.0, "b": 2.0}


def test_hardware_counts_equal_gpus_and_says_cores_where_there_are_none() -> None:
    assert hardware({"gpus": ["A", "B", "A"]}) == "2 x A, 1 x B"
    assert "CPU cores" in hardware({"gpus": []})
