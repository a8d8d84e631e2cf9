"""The doctor names what was done to a run: the fault injections, each in a real run of seconds."""

from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import Answer
from fault_runs import fault
from outcomes import records
from PIL import Image
from range_server import Fault as SlowAnswer
from range_server import RangeServer
from small_shards import samples, write_shard
from test_faults import CONFIG, Runs, damage, saved_at

from pretrain import cli
from pretrain.data.indexing import index_folder

Ask = Callable[..., Answer]


def test_a_run_that_stays_not_finite(runs: Runs, ask: Ask) -> None:
    spoilt = fault("spoil_loss", steps=range(5, 100))
    runs.start("run", spoilt, settings=["guard.max_nonfinite_steps=2"]).ends(1)
    answer = ask(runs.folder / "run")
    assert answer.code == 2
    assert answer.verdict.startswith("failed: not finite (step ")
    assert answer.causes["not finite"] == "error"
    assert "went back to a checkpoint 2 of 2 times" in answer.of("not finite")
    assert "optim.base_lr=0.002 (now 0.02)" in answer.of("not finite")
    assert "optim.base_lr=0.002 --resume auto" in answer.findings[0]["command"]


def test_one_step_that_was_not_finite_is_a_note(runs: Runs, ask: Ask) -> None:
    runs.start("run", fault("spoil_loss", steps=[5])).ends(0)
    answer = ask(runs.folder / "run")
    assert answer.verdict.startswith("healthy: finished, step 12 of 12")
    assert answer.causes == {"not finite": "note"}
    assert "the last is 6" in answer.of("not finite")


def test_a_loss_spike_that_stopped_the_run(runs: Runs, ask: Ask) -> None:
    spike = "guard.loss_spike={window: 8, min_steps: 4, threshold: 30.0, action: stop}"
    runs.start("run", fault("spoil_loss", data_steps=[7], factor=100.0), settings=[spike]).ends(1)
    answer = ask(runs.folder / "run")
    assert answer.verdict == "failed: loss spike (step 8 of 12)"
    assert "scaled deviations above" in answer.of("loss spike")


@pytest.mark.parametrize("action", ["log", "stop"])
def test_a_collapse(action: str, runs: Runs, ask: Ask) -> None:
    settings = [f"guard.collapse={{min_feature_std: 0.02, patience_steps: 3, action: {action}}}"]
    runs.start("run", fault("constant_features", from_step=4), settings=settings).ends(action == "stop")
    answer = ask(runs.folder / "run")
    assert answer.causes["collapse"] == "error"
    assert "noticed it at step 7" in answer.of("collapse")
    assert answer.verdict.startswith(
        "failed: collapse" if action == "stop" else "finished, not well: collapse"
    )


def test_a_learning_rate_that_is_far_too_high(runs: Runs, ask: Ask) -> None:
    """Without a guard over the gradient, so that nothing holds the weights together."""
    settings = ["optim={name: sgd, base_lr: 3000.0, clip_norm: 0}", "schedule.steps=60", "log.every_steps=2"]
    runs.start("run", settings=[*settings, "checkpoint.every_steps=30"]).wait()
    answer = ask(runs.folder / "run")
    assert answer.causes.keys() & {"diverging", "not finite", "collapse"}, answer.whole
    assert answer.findings[0]["severity"] == "error"
    assert "optim.base_lr=300 (now 3e+03)" in answer.findings[0]["do"]


@pytest.mark.slow
def test_a_task_that_its_images_cannot_teach(tmp_path: Path, ask: Ask) -> None:
    """Plain coloured images look the same however they are turned."""
    folder = tmp_path / "plain"
    folder.mkdir()
    members = []
    for number in range(60):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number * 4, 255 - number * 3, number * 37 % 256)).save(file, "PNG")
        members.append((f"{number:06d}.png", file.getvalue()))
    write_shard(folder / "images.tar", members)
    index_folder(folder)
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("SHARDS", str(folder)))
    settings = ["schedule.steps=400", "log.every_steps=20", "checkpoint.every_steps=200"]
    settings += ["batch.accumulation_steps=1", "optim.base_lr=0.005"]
    runs = Runs(config, tmp_path)
    runs.start("run", settings=settings).ends(0, seconds=250)
    answer = ask(tmp_path / "run")
    assert answer.causes == {"dead task": "warning"}, answer.whole
    assert answer.code == 0
    assert "1 of 2 tasks" in answer.of("dead task")
    assert "rotation: accuracy 0.2" in answer.of("dead task")
    assert "by guessing 0.25" in answer.of("dead task")


def test_a_storage_that_is_too_slow_and_refuses_now_and_then(runs: Runs, ask: Ask) -> None:
    settings = ["schedule.steps=30", "batch.accumulation_steps=1", "checkpoint.every_steps=30"]
    settings += ["log.every_steps=3", "data.resident=false", "data.decode_threads=0"]
    with RangeServer(runs.config.parent) as server:
        server.always = SlowAnswer(bytes_per_second=150_000)
        started = runs.start("run", settings=[*settings, f"data.shards={server.url}"])
        started.wait_for(lambda: len(records(runs.folder / "run")) > 2)
        server.faults.extend([SlowAnswer(status=503)] * 2)
        started.ends(0)
    answer = ask(runs.folder / "run")
    assert answer.verdict == "finished, not well: data-bound, storage retries (step 30 of 30)"
    assert "decodes in the training process: set 2 or more" in answer.of("data-bound")
    assert f"pretrain shards bench {server.url}" in answer.of("data-bound")
    assert "2 reads of shards failed" in answer.of("storage retries")


@pytest.mark.slow
def test_a_slow_first_batch_is_nothing(runs: Runs, ask: Ask) -> None:
    slow = fault("slow_data", on=0, seconds=2.0, steps=[0])
    runs.start("run", slow, settings=["schedule.steps=25", "checkpoint.every_steps=25"]).ends(0)
    assert ask(runs.folder / "run").findings == []


@pytest.mark.parametrize("allowed", ["0.5", "0.001"])
def test_bad_shards(allowed: str, tmp_path: Path, runs: Runs, ask: Ask) -> None:
    """Images that are no images any more: some, and more than the budget."""
    folder = tmp_path / "hurt"
    folder.mkdir()
    members = samples(0, 60, height=32, width=32)
    bad = {f"{number:06d}.jpg" for number in (3, 30, 31)}
    hurt = [(name, data[: len(data) // 3] if name in bad else data) for name, data in members]
    write_shard(folder / "images-0.tar", hurt[:60])
    write_shard(folder / "images-1.tar", hurt[60:])
    index_folder(folder)
    settings = [f"data={{shards: {folder}, lanes: 12, shuffle_block: 4, decode_threads: 0}}"]
    settings.append(f"data.max_bad_ratio={allowed}")
    started = runs.start("run", settings=settings)
    codes = started.wait()
    answer = ask(runs.folder / "run")
    assert "images-1.tar (2)" in answer.of("bad shards"), started.all_output()
    if allowed == "0.5":
        assert codes == [0]
        assert answer.verdict.startswith("healthy")
        assert answer.causes == {"bad shards": "note"}
        assert "3 of the 30 that data.max_bad_ratio=0.5 allows" in answer.of("bad shards")
    else:
        assert codes == [2]
        assert answer.verdict.startswith("failed: bad shards")
        assert f"pretrain shards verify {folder} --repair {folder}-clean" in answer.of("bad shards")


def test_a_full_disk(runs: Runs, ask: Ask) -> None:
    faults = [fault("full_disk", checkpoints=[10, 12]), fault("quick_retries")]
    runs.start("run", *faults, settings=["checkpoint.max_failures=9"]).ends(1)
    answer = ask(runs.folder / "run")
    assert answer.verdict == "failed: checkpoints not written (step 12 of 12)"
    assert "No space left on device" in answer.of("checkpoints not written")
    assert "--resume auto" in answer.of("checkpoints not written")


def test_a_checkpoint_that_is_damaged(runs: Runs, ask: Ask) -> None:
    run = runs.folder / "run"
    stopped = fault("send_signals", step=7, names=("TERM",))
    runs.start("run", stopped, fault("pace", seconds=0.02)).ends(75)
    damage(saved_at(run, 8))
    answer = ask(run)
    assert answer.code == 2
    assert answer.verdict == "stopped on request, not well: damaged checkpoint (step 8 of 12)"
    assert "weights/student.safetensors is damaged (sha256 differs)" in answer.of("damaged checkpoint")
    assert "step 6 in place of 8" in answer.of("damaged checkpoint")
    damage(saved_at(run, 4))
    assert "step-00000004" not in ask(run).of("damaged checkpoint"), "older ones are not hashed unasked"
    assert "step-00000004" in ask(run, "--verify").of("damaged checkpoint")
    path = saved_at(run, 6) / "engine" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    answer = ask(run)
    assert "optimizer.safetensors is cut short" in answer.of("damaged checkpoint"), (
        "but their lengths are seen"
    )
    assert "step 4 in place of 8" in answer.of("damaged checkpoint")
    shutil.rmtree(run / "checkpoints")
    assert ask(run).causes["checkpoints gone"] == "error"


def test_a_run_that_was_killed_while_it_wrote(runs: Runs, ask: Ask) -> None:
    dies = fault("die_writing", step=6, file="student.safetensors")
    runs.start("run", dies, fault("pace", seconds=0.05)).ends(-signal.SIGKILL)
    answer = ask(runs.folder / "run")
    assert answer.verdict.startswith("failed: killed (step ")
    assert "died while it wrote a checkpoint: .writing-step-00000006-" in answer.of("killed")
    assert "after the checkpoint of step 4 are lost" in answer.of("killed")
    assert "out of memory" in answer.of("killed")


def test_a_run_that_gets_nowhere(runs: Runs, ask: Ask) -> None:
    for _ in range(3):
        runs.go_on("run", fault("send_signals", step=1, names=("KILL",))).ends(-signal.SIGKILL)
    answer = ask(runs.folder / "run")
    assert answer.causes["no progress"] == "error"
    assert "The last 3 starts wrote no checkpoint beyond step 0" in answer.of("no progress")
    assert "guard.max_idle_attempts=4 --resume auto" in answer.of("no progress")


def test_logs_that_could_not_be_written(runs: Runs, ask: Ask) -> None:
    runs.start("run", fault("logs_fail", step=4)).ends(0)
    answer = ask(runs.folder / "run")
    assert answer.causes["damaged records"] == "warning"
    assert "metrics.jsonl: Is a directory" in answer.of("damaged records")


def test_memory_that_ran_out(runs: Runs, ask: Ask) -> None:
    runs.start("run", fault("out_of_memory", on=0, step=3)).ends(1)
    answer = ask(runs.folder / "run")
    assert answer.verdict == "failed: out of memory (step 3 of 12)"
    assert "host memory ran out (OutOfMemoryError, tried to allocate 2.00 GiB)" in answer.of("out of memory")
    assert "engine.recompute=true" in answer.of("out of memory")


def test_settings_that_were_changed_are_a_note(runs: Runs, ask: Ask) -> None:
    runs.start("run", settings=["schedule.steps=4"]).ends(0)
    runs.go_on("run").ends(0)
    answer = ask(runs.folder / "run")
    assert answer.whole["healthy"] is True
    assert "schedule.steps: was 4, now 12" in answer.of("settings changed")


@pytest.mark.distributed
def test_a_rank_that_hangs(runs: Runs, ask: Ask) -> None:
    limits = ", ".join(f"{name}_seconds: 2.0" for name in ("data", "forward", "backward", "step"))
    settings = [f"watchdog={{enabled: true, grace_seconds: 5.0, {limits}}}"]
    hangs = fault("slow_data", on=1, seconds=600.0, steps=[3])
    runs.start("run", hangs, ranks=2, settings=settings).ends(-signal.SIGKILL)
    answer = ask(runs.folder / "run")
    assert answer.verdict.startswith("failed: hang (step ")
    assert "rank 1 (" in answer.of("hang")
    assert "in 'data' of step 3" in answer.of("hang")
    assert "health/attempt-0001/rank-*.stacks.txt" in answer.of("hang")
    assert "killed" not in answer.causes


@pytest.mark.distributed
def test_a_rank_that_is_slow(runs: Runs, ask: Ask) -> None:
    settings = ["guard.straggler={below: 0.6, window: 4}", "checkpoint.every_steps=12"]
    runs.start("run", fault("slow_data", on=1, seconds=0.2), ranks=2, settings=settings).ends(0)
    answer = ask(runs.folder / "run")
    assert answer.causes["straggler"] == "warning"
    assert "All ranks wait for rank 1" in answer.of("straggler")


@pytest.mark.distributed
def test_a_rank_that_dies(runs: Runs, ask: Ask) -> None:
    runs.start("run", fault("end_process", on=1, step=3, code=7), ranks=2).ends(1, 7)
    answer = ask(runs.folder / "run")
    assert answer.verdict.startswith("failed: a rank died (step ")
    assert "dmesg" in answer.of("a rank died")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_device_that_miscalculates(runs: Runs, ask: Ask) -> None:
    drifts = fault("drift", on=1, after_step=4, part="student")
    runs.start("run", drifts, ranks=3, settings=["guard.checksum_every_steps=1"]).ends(1)
    answer = ask(runs.folder / "run")
    assert answer.verdict.startswith("failed: faulty device")
    assert "the weights of rank 1" in answer.of("faulty device")


def test_what_is_printed_fits_a_terminal_and_begins_with_the_verdict(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.start("run", fault("out_of_memory", on=0, step=3)).ends(1)
    capsys.readouterr()
    assert cli.main(["doctor", str(runs.folder / "run")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["failed: out of memory (step 3 of 12)", "", "error: out of memory"]
    assert all(len(line) <= 100 or " " not in line.strip() for line in lines), lines
    assert lines[-1].startswith("looked at: 3 metric lines, ")
