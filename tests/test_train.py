"""Whole runs: they learn, they stop and continue exactly, and they do not let damage pass."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from outcomes import assert_same_tensors, records
from small_shards import samples, write_shard

from pretrain import checkpoint, cluster
from pretrain.cli import main
from pretrain.data.indexing import index_folder

NUM_IMAGES = 60

CONFIG = """
seed: 3
model: {name: vit_tiny_patch16_224, img_px: 32, patch_px: 4, args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {shards: SHARDS, lanes: 4, shuffle_block: 4, resident: true}
views:
  one: &view {size_px: 32, turn: true, interpolation: bilinear}
  two: *view
tasks:
  contrastive: {hidden_dim: 32, out_dim: 16}
  rotation: {}
  colorization: {}
  inpainting: {}
  relative_position: {hidden_dim: 32}
  jigsaw: {}
teacher: {momentum: 0.9}
optim: {base_lr: 0.02}
schedule: {steps: 10, warmup_steps: 2}
batch: {global_size: 16, accumulation_steps: 2}
engine: {precision: fp32}
checkpoint: {every_steps: 2, keep_last: 3}
log: {every_steps: 1, prometheus: {enabled: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_shard(folder / f"images-{number}.tar", samples(number * 20, 20, height=32, width=32))
    index_folder(folder)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder)))
    return path


def arguments(config: Path, run: Path, *more: str) -> list[str]:
    return ["train", str(config), "--output-dir", str(run), *more]


def train_here(config: Path, run: Path, *more: str) -> int:
    """In this process, with the plain torch engine."""
    return main(arguments(config, run, "engine.kind=local", *more))


def start(config: Path, run: Path, *more: str) -> subprocess.Popen[bytes]:
    """As a user would, in a process group of its own."""
    command = [sys.executable, "-m", "pretrain", *arguments(config, run, *more)]
    with (run.parent / f"{run.name}.out").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def train(config: Path, run: Path, *more: str) -> None:
    process = start(config, run, *more)
    assert process.wait(240) == 0, (run.parent / f"{run.name}.out").read_text()[-3000:]


def samples_seen(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["samples"]) for record in records(run)]


def last_checkpoint(run: Path) -> Path:
    return checkpoint.list_checkpoints(run)[0]


def kill_after(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """SIGKILL every rank once a step was logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        seen = records(run)
        if seen and seen[-1]["step"] >= step:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def test_a_run_learns_and_its_weights_open_in_timm(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_here(config, run, "schedule.steps=60", "checkpoint.every_steps=60") == 0
    seen = records(run)
    assert [record["step"] for record in seen] == list(range(1, 61))
    for name in ("loss/colorization", "loss/inpainting", "total"):
        first, last = (sum(record[name] for record in part) / 5 for part in (seen[:5], seen[-5:]))
        assert last < 0.9 * first, name
    assert seen[-1]["backbone_calls"] == 2 * 60  # once per micro step, whatever the number of tasks
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_continues_to_the_same_bits_and_on_fewer_ranks_with_the_same_samples(
    config: Path, tmp_path: Path
) -> None:
    whole, broken, narrow = tmp_path / "whole", tmp_path / "broken", tmp_path / "narrow"
    streamed = "data.resident=false"
    train(config, whole, "--nproc", "2", streamed)
    process = start(config, broken, "--nproc", "2", streamed)
    kill_after(process, broken, 5)
    assert len(records(broken)) < 10, "it was meant to be killed before its end"
    kept = last_checkpoint(broken)
    train(config, narrow, "--nproc", "1", "--resume", str(kept), streamed)
    train(config, broken, "--nproc", "2", "--resume", "auto", streamed)
    assert samples_seen(broken) == samples_seen(whole)
    assert_same_tensors(last_checkpoint(broken), last_checkpoint(whole))
    expected = records(whole)[checkpoint.step_of(kept) :]
    assert samples_seen(narrow) == [(record["step"], record["samples"]) for record in expected]
    # the first loss is of the same weights; Adam then magnifies the rounding of gradients near zero
    for number, (found, wanted) in enumerate(zip(records(narrow), expected, strict=True)):
        assert found["total"] == pytest.approx(wanted["total"], rel=1e-2 if number else 1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_five_kills_at_random_moments_change_nothing(config: Path, tmp_path: Path) -> None:
    settings = ("--nproc", "2", "schedule.steps=40", "log.every_steps=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole, *settings)
    generator = torch.Generator().manual_seed(int(time.time()))
    for attempt in range(5):
        process = start(config, broken, *settings, "--resume", "auto" if attempt else "none")
        done = records(broken)[-1]["step"] if records(broken) else 0
        kill_after(process, broken, min(39, done + int(torch.randint(1, 9, (), generator=generator))))
    train(config, broken, *settings, "--resume", "auto")
    assert samples_seen(broken) == samples_seen(whole)
    assert_same_tensors(last_checkpoint(broken), last_checkpoint(whole))


@pytest.mark.slow
def test_every_zero_stage_continues_from_a_checkpoint_of_another_engine(config: Path, tmp_path: Path) -> None:
    """The local engine writes at step 8; stages 1 and 3 take the last two steps as it does."""
    whole = tmp_path / "whole"
    assert train_here(config, whole) == 0
    half = checkpoint.step_folder(whole, 8)
    expected = {record["step"]: record for record in records(whole)}
    for stage in (1, 3):
        run = tmp_path / f"stage{stage}"
        zero = f"engine.deepspeed.zero_optimization.stage={stage}"
        train(config, run, "--nproc", "1", "--resume", str(half), zero)
        assert [record["step"] for record in records(run)] == [9, 10]
        for record in records(run):
            assert record["samples"] == expected[record["step"]]["samples"]
            assert record["total"] == pytest.approx(expected[record["step"]]["total"], rel=1e-4)


def flip_a_bit(folder: Path) -> None:
    path = folder / checkpoint.STUDENT
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))


def seal(folder: Path) -> None:
    """Let the manifest of a checkpoint vouch for the files that are there, whoever made them."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    there = {name for name in manifest["files"] if (folder / name).exists()}
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in there}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def leave_out_the_teacher(folder: Path) -> None:
    (folder / checkpoint.TEACHER).unlink()
    seal(folder)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip_a_bit, "weights/student.safetensors is damaged"),
        (leave_out_the_teacher, "weights/teacher.safetensors is missing, and its run has a teacher"),
    ],
    ids=["a flipped bit", "no teacher"],
)
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_taken(
    damage: Callable[[Path], None],
    told: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Row 3, and row 51 of a checkpoint to go on from: half of it is not taken for a whole."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_here(config, whole) == 0
    assert train_here(config, run) == 0
    damage(last_checkpoint(run))
    assert train_here(config, run, "--resume", "auto") == 0
    printed = capsys.readouterr()
    assert f"step-00000010: {told}" in printed.err
    aside = run / "checkpoints" / "aside-step-00000010"
    assert checkpoint.verify(aside) == [told + " (sha256 differs)" * ("damaged" in told)]
    assert f"was renamed to {aside}" in printed.out
    assert "2 steps beyond the checkpoint are taken again" in printed.out
    assert samples_seen(run) == samples_seen(whole)
    assert_same_tensors(last_checkpoint(run), last_checkpoint(whole))


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def safetensors_header(length: int, header: object) -> bytes:
    return length.to_bytes(8, "little") + json.dumps(header).encode()


BEYOND = {"backbone.norm.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
HARM: dict[str, Callable[[Path, Canary], object]] = {
    "a pickle of torch": lambda path, canary: torch.save(canary, path),
    "a pickle": lambda path, canary: path.write_bytes(pickle.dumps(canary)),
    "a header of exbibytes": lambda path, canary: path.write_bytes(safetensors_header(1 << 60, {})),
    "tensors beyond the file": lambda path, canary: path.write_bytes(
        safetensors_header(len(json.dumps(BEYOND)), BEYOND) + bytes(64)
    ),
}


@pytest.fixture(scope="module")
def saved_once(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "saved"
    assert train_here(config, run, "schedule.steps=4", "checkpoint.every_steps=4") == 0
    return run


@pytest.mark.parametrize("harm", HARM)
def test_weights_that_were_made_to_do_harm_are_refused_in_one_line_and_nothing_of_them_runs(
    harm: str, saved_once: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 37: their manifest vouches for them, so that only their form can tell."""
    run, canary, out = tmp_path / "run", Canary(tmp_path / "it ran"), tmp_path / "exported"
    shutil.copytree(saved_once, run)
    for name in (checkpoint.STUDENT, checkpoint.TEACHER, checkpoint.OPTIMIZER):
        HARM[harm](last_checkpoint(run) / name, canary)
    seal(last_checkpoint(run))
    assert checkpoint.verify(last_checkpoint(run)) == []
    resume = arguments(config, run, "engine.kind=local", "--resume", "auto")
    for command in (
        resume,
        [*resume, "--allow-change", "tasks", "tasks.rotation=null"],
        ["export", str(run), "--out", str(out)],
        ["export", str(run), "--out", str(out), "--weights", "student"],
        ["evaluate", "pretext", str(run), "--test", str(config.parent)],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        lines = capsys.readouterr().err.splitlines()
        told = [line for line in lines if "is not in the format safetensors" in line]
        assert len(told) == 1, lines
        assert told[0].startswith("pretrain: ")
        assert not [line for line in lines if line not in told and "passing over" not in line], lines
        assert not canary.path.exists(), command
        assert not out.exists()
    if "pickle" in harm:  # it does run where a file's name says nothing and all is let through
        unsafe = shutil.copy(last_checkpoint(run) / checkpoint.STUDENT, tmp_path / "weights.pt")
        with suppress(RuntimeError):  # once it has run, there are no tensors
            torch.load(unsafe, weights_only=False)
        assert canary.path.exists()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_here(config, run) == 0
    for folder in checkpoint.list_checkpoints(run):
        (folder / checkpoint.MANIFEST).unlink()
    assert train_here(config, run, "--resume", "auto") == 2
    assert "cannot resume, all 3 checkpoints are damaged" in capsys.readouterr().err


def test_a_run_stops_after_so_many_steps_that_are_not_finite(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = train_here(config, run, "optim.base_lr=1e30", "optim.clip_norm=0", "guard.max_nonfinite_steps=3")
    assert code == 1
    seen = records(run)
    assert [record["skipped_steps"] for record in seen[-3:]] == [1, 1, 1]
    assert len(seen) < 10


def test_a_bad_image_is_replaced_recorded_and_counted(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    members = samples(0, 60, height=32, width=32)
    members[10] = (members[10][0], b"not an image")
    write_shard(folder / "images.tar", members)
    index_folder(folder)
    run = tmp_path / "run"
    assert train_here(config, run, f"data.shards={folder}") == 0
    record = json.loads((run / "quarantine.jsonl").read_text().splitlines()[0])
    assert record["sample_id"] == 5
    assert records(run)[-1]["bad_samples"] == 1


def test_a_used_folder_is_not_taken_for_a_run_resumed_from_elsewhere(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert train_here(config, one) == 0
    assert train_here(config, other) == 0
    before = samples_seen(other)
    assert train_here(config, other, "--resume", str(checkpoint.step_folder(one, 8))) == 2
    assert f"{other}: is not empty and not the run to resume" in capsys.readouterr().err
    assert samples_seen(other) == before


def test_going_back_within_a_run_puts_the_later_checkpoints_aside(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_here(config, run) == 0
    assert train_here(config, run, "--resume", str(checkpoint.step_folder(run, 6)), "schedule.steps=8") == 0
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)] == [8, 6]
    assert samples_seen(run)[-1][0] == 8


@pytest.mark.distributed
def test_a_problem_that_only_rank_0_sees_ends_the_other_ranks_too(config: Path, tmp_path: Path) -> None:
    """As under srun, where nobody stops the others: each rank is started by hand."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "something").touch()
    port = str(cluster.free_port())
    processes = []
    for rank in range(2):
        layout = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables = {**os.environ, **layout, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "pretrain", *arguments(config, run)]
        processes.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 2
        assert f"{run}: is not empty" in told


def test_a_finished_run_has_nothing_left_to_do(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_here(config, run) == 0
    before = samples_seen(run)
    assert train_here(config, run, "--resume", "auto") == 0
    assert samples_seen(run) == before


def test_a_run_goes_on_with_new_data_only_when_told_and_from_their_beginning(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    write_shard(folder / "images.tar", samples(500, 33, height=32, width=32))
    index_folder(folder)
    run, broken = tmp_path / "run", tmp_path / "broken"
    assert train_here(config, run, "schedule.steps=4") == 0
    shutil.copytree(run, broken)
    new_data = ("--resume", "auto", f"data.shards={folder}")
    assert train_here(config, run, *new_data) == 2
    assert "manifest_hash: was" in (told := capsys.readouterr().err)
    assert "--allow-new-data goes on with the new data" in told
    assert train_here(config, run, *new_data, "seed=9", "--allow-new-data") == 2
    assert "seed: was" in capsys.readouterr().err

    assert train_here(config, run, *new_data, "--allow-new-data") == 0
    state = json.loads((last_checkpoint(run) / checkpoint.STATE).read_text())
    assert (state["step"], state["data_start_step"]) == (10, 4)
    # stopped on the new data, it goes on where it was without being told again
    assert train_here(config, broken, *new_data, "--allow-new-data", "schedule.steps=8") == 0
    assert train_here(config, broken, *new_data, "schedule.steps=10") == 0
    assert samples_seen(broken) == samples_seen(run)
