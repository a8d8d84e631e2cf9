from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain import checkpoint
from pretrain.attempts import FencedError, begin, this_process
from pretrain.checkpoint import (
    CONFIG,
    FOLDER,
    MANIFEST,
    OPTIMIZER,
    STATE,
    STUDENT,
    TEACHER,
    attempt_of,
    list_checkpoints,
    newest_attempt,
    newest_valid,
    origin,
    prune,
    read_checkpoint,
    set_aside,
    step_folder,
    step_of,
    sweep,
    verify,
    write_checkpoint,
)

FILES = (STUDENT, TEACHER, OPTIMIZER, STATE, CONFIG)


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"backbone.w": torch.randn(6, 4, generator=generator), "head.b": torch.arange(3.0) + step}
    return {
        STUDENT: {**weights, "backbone.w.T": weights["backbone.w"].T},  # not contiguous, and shares memory
        TEACHER: {"backbone.w": weights["backbone.w"] / 2},
        OPTIMIZER: {"exp_avg.head.b": torch.ones(3) * step},
    }


def write(run: Path, step: int, with_teacher: bool = True, attempt: int = 1) -> Path:
    parts = tensors(step)
    if not with_teacher:
        del parts[TEACHER]
    return write_checkpoint(run, step, parts, {"step": step, "note": "é"}, f"seed: {step}\n", attempt)


def begin_here(run: Path, began_from: tuple[int | None, int] | None = None) -> int:
    """A new attempt in the place of one that is dead."""
    attempt = begin(run, replace(this_process(), start_ticks=1), 3600)
    if began_from:
        attempt.began_from(*began_from)
    return attempt.number


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_verifies_and_reads_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert names_below(folder) == sorted([*FILES, MANIFEST])
    assert verify(folder) == []
    saved = read_checkpoint(folder)
    assert saved.state == {"step": 7, "note": "é"}
    assert saved.teacher is not None
    for found, name in ((saved.student, STUDENT), (saved.teacher, TEACHER), (saved.optimizer, OPTIMIZER)):
        assert found.keys() == tensors(7)[name].keys()
        assert all(torch.equal(found[key], value) for key, value in tensors(7)[name].items())
    assert (folder / CONFIG).read_text() == "seed: 7\n"
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["step-00000007"]


def test_a_run_without_a_teacher_has_none_in_its_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, with_teacher=False)
    assert verify(folder) == []
    assert read_checkpoint(folder).teacher is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_a_folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [flip_a_bit, cut, empty, Path.unlink, put_a_folder_in_its_place]


@pytest.mark.parametrize(
    ("name", "damage"),
    # a bit flipped in the manifest is the subject of the next test
    [(name, d) for name in (*FILES, MANIFEST) for d in DAMAGES if (name, d) != (MANIFEST, flip_a_bit)],
)
def test_damage_to_any_file_is_found_before_it_is_parsed_and_the_one_before_is_taken(
    name: str, damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 3: whatever is damaged, no parser of tensors meets it.

    Row 5, too: no file says which checkpoint is the latest, so none can be empty or point to nothing. What
    can is MANIFEST.json, and then the newest whole checkpoint is found without it.
    """
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    damage(newer / name)
    monkeypatch.setattr(checkpoint, "load_file", lambda path: pytest.fail("parsed before it was verified"))
    found, rejected = newest_valid(tmp_path)
    assert found == older
    assert len(rejected) == 1
    assert str(newer) in rejected[0]
    assert name in rejected[0]
    assert "\n" not in rejected[0]


def test_no_single_flipped_bit_of_the_manifest_makes_a_checkpoint_pass_as_another(tmp_path: Path) -> None:
    """Every byte of MANIFEST.json in turn: a problem is told, or the same files are still vouched for."""
    folder = write(tmp_path, 1)
    path = folder / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        if verify(folder) == []:
            assert json.loads(damaged)["files"] == json.loads(whole)["files"]


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", '{"files": []}', '{"files": 3}', '{"files": {"state.json": 5}}', "\ufffd", "{"],
)
def test_a_manifest_of_another_form_is_a_problem_not_a_crash(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    assert verify(folder) != []
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert verify(folder) != []


def test_a_manifest_that_does_not_vouch_for_a_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    for name in FILES:
        whole = json.loads((folder / MANIFEST).read_text())
        files = {key: value for key, value in whole["files"].items() if key != name}
        (folder / MANIFEST).write_text(json.dumps({"step": 1, "files": files}))
        assert verify(folder) == [f"{name} is not listed"]
        (folder / MANIFEST).write_text(json.dumps(whole))


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    moved = folder.rename(step_folder(tmp_path, 5))
    assert verify(moved) == ["holds step 1"]


def test_when_all_are_damaged_none_is_taken_and_every_reason_is_told(tmp_path: Path) -> None:
    """Row 4; that a run asked to resume then refuses to start is a test of whole runs."""
    for step, damage in ((1, cut), (2, flip_a_bit), (3, Path.unlink)):
        damage(write(tmp_path, step) / STUDENT)
    found, rejected = newest_valid(tmp_path)
    assert found is None
    assert [
        str(step_folder(tmp_path, step)) in line for step, line in zip((3, 2, 1), rejected, strict=True)
    ] == [True] * 3
    assert newest_valid(tmp_path / "elsewhere") == (None, [])


def test_a_writer_killed_at_any_moment_costs_the_attempt_after_it_nothing(tmp_path: Path) -> None:
    """Row 1, in a folder with attempts: what the dead one left is swept, and its number not used again."""
    run = tmp_path / "run"
    script = """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {tests!r})
        from pretrain import attempts
        from test_checkpoint import write
        run = Path(sys.argv[1])
        attempt = attempts.begin(run, attempts.this_process(), 3600)
        attempt.began_from(None, 0)
        write(run, 1, attempt=attempt.number)
        real = os.fsync
        def fsync(handle):
            real(handle)
            if (run / "checkpoints" / f".writing-step-00000002-{{os.getpid()}}" / "state.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = fsync
        write(run, 2, attempt=attempt.number)
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(script.format(tests=str(Path(__file__).parent))),
        str(run),
    ]
    assert subprocess.run(command, timeout=120).returncode == -9
    assert len(list((run / FOLDER).glob(".writing-*"))) == 1
    attempt = begin(run, this_process(), 3600)
    assert attempt.number == 2
    assert len(sweep(run)) == 1
    assert newest_valid(run) == (step_folder(run, 1), [])
    attempt.began_from(1, 1)
    assert write(run, 2, attempt=2) == run / FOLDER / "step-00000002.2"
    assert newest_valid(run) == (step_folder(run, 2, 2), [])


KILLER = """
    import os, shutil, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from pretrain import checkpoint
    from test_checkpoint import write

    def die_at(moment):
        def counted(function):
            def wrapper(*arguments, **settings):
                nonlocal moment
                moment -= 1
                if moment == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **settings)
            return wrapper
        # everything that touches the disk, just before it does
        checkpoint.save_file = counted(checkpoint.save_file)
        Path.write_text = counted(Path.write_text)
        Path.rename = counted(Path.rename)
        os.fsync = counted(os.fsync)
        os.unlink = counted(os.unlink)  # of shutil.rmtree
        os.rmdir = counted(os.rmdir)

    rewrite, moment, code = sys.argv[2] == "rewrite", 0, None
    while code != 0:
        moment += 1
        run = Path(sys.argv[1], str(moment))
        run.mkdir()
        write(run, 1)
        if rewrite:
            write(run, 2)
        child = os.fork()  # starting Python for each moment would take minutes
        if child == 0:
            die_at(moment)
            write(run, 2)
            os._exit(0)
        code = os.waitpid(child, 0)[1]
        assert code in (0, signal.SIGKILL), code
"""


@pytest.mark.parametrize("how", ["first", "rewrite"])
def test_a_writer_killed_at_any_moment_leaves_whole_checkpoints_and_litter_that_sweep_removes(
    how: str, tmp_path: Path
) -> None:
    """Row 1: just before the k-th thing that touches the disk, for every k."""
    script = textwrap.dedent(KILLER.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), how], check=True, env=environment, timeout=120
    )
    moments = sorted(int(path.name) for path in tmp_path.iterdir())
    assert len(moments) > 15
    num_with_litter = 0
    for moment in moments:
        run = tmp_path / str(moment)
        complete = list_checkpoints(run)
        assert step_folder(run, 1) in complete
        assert all(verify(folder) == [] for folder in complete)
        assert (len(complete) == 2) >= (moment == moments[-1])  # the last one was not killed
        assert newest_valid(run) == (complete[0], [])
        litter = sweep(run)
        num_with_litter += bool(litter)
        assert {path.name for path in (run / FOLDER).iterdir()} == {path.name for path in complete}
        write(run, 2)  # a later attempt succeeds
        assert newest_valid(run) == (step_folder(run, 2), [])
    assert num_with_litter > 10
    assert sweep(tmp_path / "elsewhere") == []


def test_writing_a_step_again_replaces_it_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write_checkpoint(tmp_path, 3, {**tensors(5), TEACHER: {}}, {"step": 3, "again": True}, "seed: 5\n")
    saved = read_checkpoint(step_folder(tmp_path, 3))
    assert verify(saved.folder) == []
    assert saved.state["again"] is True
    assert torch.equal(saved.student["head.b"], tensors(5)[STUDENT]["head.b"])
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_nothing_behind_and_the_checkpoints_before_untouched(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    calls, real = 0, checkpoint.save_file

    def save_file(values: dict[str, Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(values, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    for step in (2, 4):  # anew, and in the place of another
        calls = 0
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, step)
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-00000002"]
    assert newest_valid(tmp_path) == (step_folder(tmp_path, 2), [])


def test_what_the_library_makes_of_a_full_disk_is_told_as_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training loop mends OSErrors only, and safetensors raises an exception that is none."""

    def save_file(values: dict[str, Tensor], path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 1)
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_file_that_the_disk_does_not_give_back_is_a_problem_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    real = checkpoint._sha256

    def sha256(path: Path) -> str:
        if path == newer / STUDENT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(checkpoint, "_sha256", sha256)
    found, rejected = newest_valid(tmp_path)
    assert found == older
    assert f"{STUDENT} cannot be read (Input/output error)" in rejected[0]


def test_checkpoints_are_listed_newest_first_and_by_number(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10, 2):
        step_folder(tmp_path, step).mkdir(parents=True)
    for folder in (tmp_path / FOLDER).iterdir():  # row 40: whatever the clocks said when they were written
        os.utime(folder, (0, 1e9 / step_of(folder)))
    for name in ("step-", "step-x", ".writing-step-00000011-1", ".removing-step-00000012-1", "other"):
        (tmp_path / FOLDER / name).mkdir()
    (tmp_path / FOLDER / "step-00000013").write_text("a file")
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [100_000_000, 10, 9, 2]
    assert list_checkpoints(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    ("keep_last", "milestones", "left"),
    [
        (1, None, [10]),
        (3, None, [8, 9, 10]),
        (20, None, list(range(1, 11))),
        (2, 4, [4, 8, 9, 10]),
        (1, 3, [3, 6, 9, 10]),
        (0, None, [10]),  # the newest always stays
    ],
)
def test_pruning_keeps_the_newest_and_the_milestones(
    keep_last: int, milestones: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in range(1, 11):
        (step_folder(tmp_path, step) / "weights").mkdir(parents=True)
    prune(tmp_path, keep_last, milestones)
    assert sorted(step_of(path) for path in (tmp_path / FOLDER).iterdir()) == left
    prune(tmp_path, keep_last, milestones)
    assert sorted(step_of(path) for path in (tmp_path / FOLDER).iterdir()) == left


def test_the_name_of_a_checkpoint_tells_its_step_and_attempt(tmp_path: Path) -> None:
    for step, attempt in ((0, 1), (7, 2), (123_456_789, 12), (5, 1), (5, 10), (5, 9)):
        folder = step_folder(tmp_path, step, attempt)
        folder.mkdir(parents=True)
        assert (step_of(folder), attempt_of(folder)) == (step, attempt)
    assert step_folder(tmp_path, 7, 2).name == "step-00000007.2"
    # of the same step, the later attempt comes first, by number and not by letter
    assert [folder.name[5:].lstrip("0") for folder in list_checkpoints(tmp_path)] == [
        "123456789.12",
        "7.2",
        "5.10",
        "5.9",
        "5",
        "",
    ]
    for name in (
        "step-00000005.1",
        "step-00000005.0",
        "step-00000005.02",
        "step-00000005.",
        "step-5.2.3",
        "step-٣",
    ):
        (tmp_path / FOLDER / name).mkdir()
        with pytest.raises(ValueError, match="is not the name of a checkpoint"):
            step_of(Path(name))
    assert len(list_checkpoints(tmp_path)) == 6
    assert newest_attempt(tmp_path) == 12
    (tmp_path / FOLDER / ".writing-step-00000009.13-4711").mkdir()
    (tmp_path / FOLDER / "aside-step-00000009.11").mkdir()
    assert newest_attempt(tmp_path) == 13
    assert newest_attempt(tmp_path / "elsewhere") == 0


def test_a_checkpoint_under_the_name_of_another_attempt_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert origin(folder) == (1, 1)
    moved = folder.rename(step_folder(tmp_path, 1, 3))
    assert verify(moved) == ["was written by attempt 1"]
    of_second = write(tmp_path, 1, attempt=2)
    aside = of_second.rename(of_second.with_name("aside-step-00000001.2"))
    assert origin(aside) == (2, 1)
    assert verify(aside) == []
    assert verify(aside.rename(step_folder(tmp_path, 5, 4))) == ["holds step 1", "was written by attempt 2"]


def test_a_checkpoint_from_before_there_were_attempts_is_of_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["attempt"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify(folder) == []
    assert origin(folder) == (1, 1)


def test_what_a_stale_attempt_wrote_is_neither_listed_nor_resumed_from_nor_pruned(tmp_path: Path) -> None:
    begin_here(tmp_path, (None, 0))
    first, beyond = write(tmp_path, 10), write(tmp_path, 20)
    begin_here(tmp_path, (1, 10))
    assert list_checkpoints(tmp_path) == [first]
    newer = write(tmp_path, 15, attempt=2)
    assert list_checkpoints(tmp_path) == [newer, first]
    assert list_checkpoints(tmp_path, all_attempts=True) == [beyond, newer, first]
    assert newest_valid(tmp_path) == (newer, [])
    cut(newer / STUDENT)
    assert newest_valid(tmp_path)[0] == first
    prune(tmp_path, 1, None)
    assert set(list_checkpoints(tmp_path, all_attempts=True)) == {beyond, newer, first}
    assert set_aside(tmp_path, 15) == [beyond.with_name("aside-step-00000020")]
    assert set_aside(tmp_path, 15) == []


def test_what_was_put_aside_stays_until_the_run_has_come_further(tmp_path: Path) -> None:
    begin_here(tmp_path, (None, 0))
    write(tmp_path, 10)
    beyond = write(tmp_path, 20)
    [aside] = set_aside(tmp_path, 10)
    begin_here(tmp_path, (1, 10))
    reached = write(tmp_path, 20, attempt=2)
    assert prune(tmp_path, 3, None) == []
    damaged = write(tmp_path, 30, attempt=2)
    cut(damaged / STUDENT)
    assert prune(tmp_path, 3, None) == []  # what is damaged is nothing to rely on
    whole = write(tmp_path, 40, attempt=2)
    assert prune(tmp_path, 4, None) == [aside]
    assert not aside.exists()
    assert not beyond.exists()
    assert list_checkpoints(tmp_path) == [whole, damaged, reached, step_folder(tmp_path, 10)]


def test_a_stale_attempt_can_write_neither_over_nor_beside_a_newer_one(tmp_path: Path) -> None:
    begin_here(tmp_path, (None, 0))
    write(tmp_path, 10)
    begin_here(tmp_path, (1, 10))
    write(tmp_path, 20, attempt=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(FencedError, match="attempt 2 has taken over from attempt 1"):
        write(tmp_path, 20)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_attempt_that_is_overtaken_while_it_writes_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_here(tmp_path, (None, 0))
    older, real = write(tmp_path, 10), checkpoint.save_file

    def save_file(values: dict[str, Tensor], path: Path) -> None:
        real(values, path)
        if path.name == Path(OPTIMIZER).name:
            begin_here(tmp_path, (1, 10))

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(FencedError):
        write(tmp_path, 20)
    assert list((tmp_path / FOLDER).iterdir()) == [older]


@pytest.mark.parametrize("kind", ["writing", "removing"])
def test_sweeping_leaves_the_newest_attempt_what_it_works_on_while_it_lives(
    kind: str, tmp_path: Path
) -> None:
    names = [f".{kind}-step-00000020{number}-4711" for number in ("", ".2", ".3")]
    for name in names:
        (tmp_path / FOLDER / name / "weights").mkdir(parents=True)

    def left() -> list[str]:
        return sorted(path.name for path in (tmp_path / FOLDER).iterdir())

    begin_here(tmp_path, (None, 0))
    begin_here(tmp_path, (None, 0))
    third = begin(tmp_path, this_process(), 3600)
    assert {path.name for path in sweep(tmp_path)} == set(names[:2])
    assert left() == names[2:]
    assert sweep(tmp_path) == []
    third.finish("failed", 20)
    assert [path.name for path in sweep(tmp_path)] == names[2:]
    (tmp_path / FOLDER / ".writing-step-00000020.4-4711").mkdir()
    begin_here(tmp_path, (None, 0))
    assert len(sweep(tmp_path)) == 1  # its process is dead, as can be seen on its own machine
    (tmp_path / FOLDER / ".writing-step-00000020.5-4711").mkdir()
    begin(tmp_path, replace(this_process(), host="node9"), 3600)
    assert sweep(tmp_path) == []  # on another machine it may live


def test_pruning_keeps_the_newest_that_verifies_and_what_it_is_told_to_keep(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in range(1, 7)]
    for folder in folders[4:]:
        flip_a_bit(folder / STUDENT)
    assert prune(tmp_path, 2, None, keep=[tmp_path / FOLDER / ".." / FOLDER / folders[1].name]) == [
        folders[2],
        folders[0],
    ]
    assert list_checkpoints(tmp_path) == [folders[5], folders[4], folders[3], folders[1]]
    assert newest_valid(tmp_path)[0] == folders[3]
    write(tmp_path, 7)
    prune(tmp_path, 1, None)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [7]


def test_a_checkpoint_that_a_newer_attempt_sweeps_while_it_is_removed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = write(tmp_path, 1), checkpoint.shutil.rmtree

    def rmtree(path: Path, **settings: Any) -> None:
        real(path)
        real(path, **settings)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    checkpoint.remove_checkpoint(folder)
    assert list((tmp_path / FOLDER).iterdir()) == []
